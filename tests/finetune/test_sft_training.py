"""Training on conversations: packed equals unpacked, equal losses in every layout, and the recipe."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import train_rows
from sft_helpers import PAD, make_data, stored_conversations, stored_sequences, write_chat_tokenizer, write_jsonl
from test_sft_data import random_chats

from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout
from open_lm.config.recipe_files import recipe_names
from open_lm.data.batch import Batch, TargetMask
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.token_flags import flag_document
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError
from open_lm.main import main
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.training.step import StepOptions, train_step

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN, VOCAB = 299, 272
WARNING = "without --document-mask, attention crosses their borders"
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": VOCAB, "seq_len": SEQ_LEN}
MODEL = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a data set, {folder}/packed, and of the model configuration {folder}/model.json."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = write_chat_tokenizer(folder / "chat")
    make_data(folder / "packed", tokenizer, [write_jsonl(folder / "a.jsonl", random_chats(36))], seq_len=SEQ_LEN)
    model = {**MODEL, "post_embed_norm": False, "weight_tying": False}
    (folder / "model.json").write_text(json.dumps(model))
    return folder


# --- packed equals unpacked ------------------------------------------------------------------------------------------
def unpacked(conversations: list[tuple[list[int], list[bool]]]) -> list[np.ndarray]:
    """Return one padded sequence with flags for each conversation."""
    rows = []
    for ids, trained in conversations:
        row = np.full(SEQ_LEN + 1, PAD, np.uint32)
        row[: len(ids)] = flag_document(np.array(ids), np.array(trained))
        rows.append(row)
    return rows


def step(rows: list[np.ndarray], accum_freq: int = 1, document_mask: bool = True) -> list[float]:
    """Return loss, gradient norm, trained tokens and moments of the weights after one step on sequences with flags."""
    stored = torch.from_numpy(np.stack(rows).view(np.int32))
    filled = torch.ones(len(rows), dtype=torch.bool)
    batch = Batch(stored, filled, len(rows), (len(rows),), 0, VOCAB, TargetMask())
    model = Transformer(Params(**SHAPE))
    init_weights(model, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = StepOptions(
        Runtime(device=torch.device("cpu")),
        MeshLayout(),
        get_autocast("fp32"),
        accum_freq=accum_freq,
        end_of_text_id=257 if document_mask else None,
    )
    documents = batch.documents(257) if document_mask else None
    result = train_step(model, batch.inputs, batch.targets, optimizer, options, documents=documents)
    sums = [parameter.double().sum().item() for parameter in model.parameters()]
    return [result.values["loss"].item(), result.grad_norm.item(), float(result.valid_tokens), *sums]


def test_packed_conversations_train_like_unpacked_ones(data: Path) -> None:
    packed, conversations = stored_sequences(data / "packed"), stored_conversations(data / "packed")
    rows = unpacked(conversations)
    trained = sum(sum(mask) for _, mask in conversations)
    expected = step(rows)
    assert len(packed) < len(rows) / 2 and expected[2] == trained
    assert step(packed) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    even = packed[: len(packed) // 2 * 2]
    # With micro-batches that have different numbers of trained tokens, the loss is still the mean of all of them.
    assert step(even, accum_freq=len(even) // 2) == pytest.approx(step(even), rel=1e-5, abs=1e-5)
    crossing = step(packed, document_mask=False)
    assert abs(crossing[0] - expected[0]) > 1e-4  # what the document mask prevents


# --- the recipe ------------------------------------------------------------------------------------------------------
def test_recipe_is_a_default_that_files_and_flags_override(tmp_path: Path, data: Path) -> None:
    assert "sft" in recipe_names()
    words = ["--recipe", "sft", "--train-data", str(data / "packed"), "--model", str(data / "model.json")]
    settings = parse_args(words, for_run=True)
    assert settings.document_mask and settings.wd == 0.0 and settings.data_key == "npy" and settings.epochs == 2
    (tmp_path / "own.yaml").write_text("wd: 0.1\nlr: 0.5\n")
    settings = parse_args([*words, "--config", str(tmp_path / "own.yaml"), "--lr", "0.25", "--no-document-mask"])
    assert (settings.wd, settings.lr, settings.document_mask, settings.warmup) == (0.1, 0.25, False, 10)
    assert parse_args([*words, "--batch-size", "4"], for_run=True).batch_size == 4  # the recipe's global size yields
    assert parse_args([*words, "--recipe", str(tmp_path / "own.yaml")]).wd == 0.1
    with pytest.raises(ConfigError, match=r"--recipe: found .none., expected .*sft"):
        parse_args(["--recipe", "none"])
    with pytest.raises(ConfigError, match="--train-num-samples is missing"):
        parse_args(words[2:], for_run=True)


def test_epoch_needs_a_manifest(tmp_path: Path, data: Path) -> None:
    shard = next((data / "packed").glob("*.tar"))
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    words = ["--recipe", "sft", "--train-data", str(tmp_path / shard.name), "--model", str(data / "model.json")]
    with pytest.raises(ConfigError, match="has no manifest; set it"):
        main([*words, "--logs", str(tmp_path / "logs")])


@pytest.mark.parametrize("flag", ["--dataset-manifest", "--train-data"])
def test_two_passes_with_adapters(tmp_path: Path, data: Path, flag: str) -> None:
    main(flags(data, tmp_path, "base", "--epochs", "1"))
    source = data / "packed" / ("manifest.jsonl" if flag == "--dataset-manifest" else "")
    words = flags(data, tmp_path, "tuned", "--pretrained", str(tmp_path / "base"), "--lora", "targets=all-linear")
    at = words.index("--train-data")
    main([*words[:at], flag, str(source), *words[words.index("--logs") :]])
    assert len(losses(tmp_path / "tuned")) == 2 * len(stored_sequences(data / "packed")) // 4
    assert "no effect" not in (tmp_path / "tuned" / "out.log").read_text()
    assert WARNING not in (tmp_path / "tuned" / "out.log").read_text()


def test_conversations_without_a_document_mask_are_a_warning(tmp_path: Path, data: Path) -> None:
    main(flags(data, tmp_path, "crossing", "--epochs", "1", "--no-document-mask"))
    assert (tmp_path / "crossing" / "out.log").read_text().count(WARNING) == 1


def flags(data: Path, logs: Path, name: str, *more: str) -> list[str]:
    return [
        "--recipe", "sft", "--train-data", str(data / "packed"), "--model", str(data / "model.json"), "--logs",
        str(logs), "--name", name, "--global-batch-size", "4", "--precision", "fp32", "--lr", "1e-2", "--workers", "0",
        "--log-every-n-steps", "1", "--warmup", "2", *more,
    ]  # fmt: skip


def losses(run: Path) -> list[list[float]]:
    return [[row["train/loss"], row["train/grad_norm"]] for row in train_rows(run)]


@pytest.mark.processes
def test_layouts_have_equal_losses(tmp_path: Path, data: Path, ranks: Callable[..., Any]) -> None:
    val = ["--val-data", str(data / "packed"), "--epochs", "1"]
    main(flags(data, tmp_path, "one", *val))
    expected = losses(tmp_path / "one")
    sequences = len(stored_sequences(data / "packed"))
    assert len(expected) == sequences // 4  # one pass
    results = json.loads((tmp_path / "one" / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    masks = [mask for _, mask in stored_conversations(data / "packed")]
    assert results[0]["tokens"] == sum(map(sum, masks))  # the validation has the masks too
    for name, layout in (
        ("accumulated", ["--accum-freq", "2"]),
        ("fsdp", ["--fsdp"]),
        ("tensor", ["--tensor-parallel", "2"]),
    ):
        if name == "accumulated":
            main(flags(data, tmp_path, name, *val, *layout))
        else:
            ranks(2, "open_lm.main", *flags(data, tmp_path, name, *val, *layout))
        for found, wanted in zip(losses(tmp_path / name), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
        other = json.loads((tmp_path / name / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
        assert other[0]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5), name


def test_model_comes_from_the_pretrained_run_and_training_resumes_exactly(tmp_path: Path, data: Path) -> None:
    main(flags(data, tmp_path, "base", "--epochs", "1"))
    words = flags(data, tmp_path, "tuned", "--pretrained", str(tmp_path / "base" / "checkpoints" / "epoch_1.pt"))
    del words[words.index("--model") : words.index("--model") + 2]
    args = main(words)
    assert json.loads(Path(args.model).read_text())["hidden_dim"] == 16
    expected = losses(tmp_path / "tuned")
    assert expected[0][0] < losses(tmp_path / "base")[0][0]
    half = [*words, "--name", "resumed"]
    main([*half, "--epochs", "1", "--lr-scheduler", "const"])
    rows = train_rows(tmp_path / "resumed")
    main([*half, "--epochs", "2", "--lr-scheduler", "const", "--resume", "latest"])
    main([*words, "--name", "through", "--lr-scheduler", "const"])
    assert losses(tmp_path / "resumed")[len(rows) :] == losses(tmp_path / "through")[len(rows) :]
    assert (tmp_path / "tuned" / "tokenizer" / "tokenizer_config.json").read_text().count("chat_template")


@pytest.mark.processes
def test_chat_program(tmp_path: Path, data: Path, forked_python: str) -> None:
    """The program finds model, tokenizer and template in the run; it ends with 0 after Ctrl-C."""
    main(flags(data, tmp_path, "run", "--epochs", "1"))
    command = [forked_python, str(ROOT / "scripts" / "chat.py"), "--checkpoint", str(tmp_path / "run")]
    command += ["--max-new-tokens", "3", "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            url = line.split(" on ")[1].split()[0]
            assert url.startswith("http://127.0.0.1:")
            body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
            request = urllib.request.Request(url + "v1/chat/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as response:
                assert json.load(response)["usage"]["completion_tokens"] <= 3
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    chat = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("chat", command[1]))  # type: ignore[arg-type]
    spec.loader.exec_module(chat)  # type: ignore[union-attr]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there"):
            chat.main([*command[2:-1], port])
    with pytest.raises(ConfigError, match="--port: found 70000"):
        chat.main([*command[2:-1], "70000"])


def test_masks_without_targets_are_ignored_in_sequences_of_context_only() -> None:
    ids = np.arange(SEQ_LEN + 1) % VOCAB
    context = flag_document(ids, np.zeros(SEQ_LEN + 1, bool))
    stored = torch.from_numpy(context[None].view(np.int32))
    batch = Batch(stored, torch.ones(1, dtype=torch.bool), 1, (1,), 0, VOCAB, TargetMask())
    assert (batch.targets == IGNORE_INDEX).all() and step([context])[:3] == [0.0, 0.0, 0.0]
