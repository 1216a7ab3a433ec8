"""Training of low-rank adapters (--lora, --qlora): checkpoints, resuming, evaluation, layouts, errors."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_source
from run_helpers import before_step, tiny_flags, tokens, train, train_rows
from torch import Tensor

from open_lm.checkpoint import adapter_record, read_model_state
from open_lm.checkpoint.files import read_adapters, read_file
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.config.sections import ModelConfig
from open_lm.errors import CheckpointError, ConfigError
from open_lm.generate.sampling import load_model_for_generation
from open_lm.main import main
from open_lm.training.guard import Guard
from open_lm.training.trainer import Trainer

LORA = "r=4,targets=all-linear"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and a base model after three steps."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_source(folder / "data", [40, 40])
    train(tiny_flags(folder, logs=folder), data, 3, "--name", "base")
    return folder


@pytest.fixture
def flags(base: Path, tmp_path: Path) -> list[str]:
    return [*tiny_flags(base, logs=tmp_path), "--pretrained", str(weights(base / "base")), "--lora", LORA, "--wd", "0"]


def weights(run: Path, epoch: int = 1) -> Path:
    return run / f"checkpoints/epoch_{epoch}.pt"


def data(base: Path) -> str:
    return str(base / "data/manifest.jsonl")


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in train_rows(run)]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def ids() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def live_logits(patches: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets the logits of the live model after each epoch."""
    found: list[Tensor] = []
    run_epoch = Trainer.run_epoch

    def run_and_record(trainer: Trainer, *args: Any) -> None:
        run_epoch(trainer, *args)
        with torch.no_grad():
            found.append(trainer.model(ids())[0])

    patches.setattr(Trainer, "run_epoch", run_and_record)
    return found


def test_checkpoints_contain_the_adapters_and_programs_read_them_merged(
    flags: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_logits(monkeypatch)
    train(flags, data(base), 3, "--name", "run", "--averagers", "ema_0.5", "--val-data", data(base), epochs=2)
    stored = StoredTensors(str(tmp_path / "run/checkpoints/step_00000006"))
    names = stored.names()
    assert all(".adapter.lora_" in name for name in names if not name.startswith("rng/"))
    assert sum(name.startswith("model/") for name in names) == 8, "A and B of four layers"
    record = adapter_record(stored.folder)
    assert record is not None and record.base == str(weights(base / "base")) and len(record.base_sha256) == 64
    assert same(read_adapters(str(weights(tmp_path / "run", 2)))[0], read_adapters(stored.folder)[0])
    cfg = ModelConfig(model=flags[1])
    for path in (stored.folder, str(weights(tmp_path / "run", 2))):
        model = load_model_for_generation(path, cfg)
        torch.testing.assert_close(model(ids())[0], live[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(load_model_for_generation(record.base, cfg)(ids())[0], live[1], atol=1e-2)
    results = [json.loads(line)[0]["loss"] for line in (tmp_path / "run/checkpoints/results.jsonl").open()]
    for option in ("--resume", "--pretrained"):
        evaluation = ["--val-data", data(base), option, str(tmp_path / "run"), "--name", f"evaluation{option}"]
        main([*tiny_flags(base, logs=tmp_path), *evaluation])
        (found,) = json.loads((tmp_path / f"evaluation{option}/checkpoints/results.jsonl").read_text())
        assert found["loss"] == pytest.approx(results[1], abs=1e-5)
    averaged = read_model_state(tmp_path / "run/checkpoints/ema_0.5_2.pt")[0]
    assert averaged.keys() == read_model_state(record.base)[0].keys()
    assert not same(averaged, read_model_state(stored.folder)[0]) and not same(
        averaged, read_model_state(record.base)[0]
    )


@pytest.mark.parametrize("form", ["both", "interchange"])
def test_resumed_run_equals_an_uninterrupted_one(
    form: str, flags: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--averagers", "ema_0.5", "--checkpoint-format", form, "--save-most-recent")
    flags = [*flags[:-3], f"{LORA},dropout=0.2,dora=true", *flags[-2:]]
    train(flags, data(base), 3, "--name", "whole", *more, epochs=2)
    with monkeypatch.context() as patches:
        before_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM), patches)
        train(flags, data(base), 3, "--name", "cut", *more, epochs=2)
    assert len(losses(tmp_path / "cut")) == 5
    train(flags, data(base), 3, "--name", "cut", *more, "--resume", "latest", epochs=2)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for kind in ("epoch", "ema_0.5"):
        whole, cut = (read_file(tmp_path / name / f"checkpoints/{kind}_2.pt") for name in ("whole", "cut"))
        key = "state_dict" if kind == "epoch" else "av_model_sd"
        assert same(whole[key], cut[key])


def test_rollback_restores_the_adapters(
    flags: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def spike_once(guard: Guard, outcome: Any, step: int, lr: float) -> bool:
        calls.append(step)
        return step == 5 and calls.count(5) == 1

    monkeypatch.setattr(Guard, "handle_outcome", spike_once)
    train(flags, data(base), 8, "--name", "run", "--save-every-n-steps", "4", "--rollback-loss-spikes", "6")
    assert "rolled back to the state of step 4" in caplog.text
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 9))


def test_full_run_continues_from_merged_adapters(flags: list[str], base: Path, tmp_path: Path) -> None:
    train(flags, data(base), 2, "--name", "run")
    full = [*tiny_flags(base, logs=tmp_path), "--pretrained", str(tmp_path / "run"), "--lr", "0", "--warmup", "0"]
    train(full, data(base), 1, "--name", "full")
    merged = read_model_state(weights(tmp_path / "run"))[0]
    assert same(read_model_state(weights(tmp_path / "full"))[0], merged)


def test_mistakes_are_one_clear_error(flags: list[str], base: Path, tmp_path: Path) -> None:
    train(flags, data(base), 2, "--name", "run")
    other = tmp_path / "other.pt"
    state = read_model_state(weights(base / "base"))[0]
    torch.save({**state, "norm.weight": state["norm.weight"] + 1}, other)
    pretrained, lora = flags.index("--pretrained") + 1, flags.index("--lora") + 1

    def resume(message: str, index: int, value: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            changed = [*flags[:index], value, *flags[index + 1 :]]
            train(changed, data(base), 4, "--name", "run", "--resume", "latest")

    sha256 = str(adapter_record(str(weights(tmp_path / "run"))).base_sha256)  # type: ignore[union-attr]
    resume(
        rf"another base: {other} has the weights with sha256 (?!{sha256}).* on .*sha256 {sha256}",
        pretrained,
        str(other),
    )
    resume("was trained with --lora r=4.*but this run has r=8", lora, "r=8,targets=all-linear")
    resume("found the key 'rank'; did you mean r|valid keys", lora, "rank=8", ConfigError)
    with pytest.raises(CheckpointError, match="contains only adapters; continue with --lora r=4"):
        train(tiny_flags(base, logs=tmp_path), data(base), 4, "--name", "run", "--resume", "latest")
    shutil.copytree(base / "base", tmp_path / "base")
    with pytest.raises(CheckpointError, match="is a checkpoint of a full model without adapters"):
        train(flags, data(base), 4, "--name", "base", "--resume", "latest")
    record = read_file(weights(tmp_path / "run"))
    torch.save({**record, "lora": {**record["lora"], "base": str(tmp_path / "gone.pt")}}, tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match=r"gone\.pt, which cannot be read.*finetune\.merge .*--base COPY"):
        read_model_state(tmp_path / "moved.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--load-pretrained-state"], "--lora starts with a new optimizer"),
        (["--fp8"], "does not support --fp8"),
        (["--qlora", "nf4", "--fsdp"], "--qlora does not support --fsdp"),
        (["--hf-model", "gpt", "--hf-seq-len", "8"], "remove --pretrained"),
    ],
)
def test_settings_that_exclude_each_other(changes: list[str], message: str, flags: list[str], base: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(flags, data(base), 1, *changes)


def test_a_base_is_required(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny_flags(base, logs=tmp_path)
    with pytest.raises(ConfigError, match="--lora requires --pretrained"):
        train([*plain, "--lora", LORA], data(base), 1)
    with pytest.raises(ConfigError, match="--qlora quantizes the frozen weights of --lora"):
        train([*plain, "--qlora", "nf4"], data(base), 1)
    caplog.set_level(logging.WARNING)
    evaluation = ["--lora", LORA, "--val-data", data(base), "--pretrained", str(weights(base / "base"))]
    main([*plain, *evaluation, "--name", "evaluation"])
    assert "--lora has no effect without training data" in caplog.text


# ------------------------------------------------------------------------------------------------ quantized base
def test_qlora_trains_and_resumes(
    flags: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install -e '.[finetune]'")
    flags = [*flags, "--qlora", "nf4"]
    train(flags, data(base), 4, "--name", "whole")
    with monkeypatch.context() as patches:
        before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patches)
        train(flags, data(base), 4, "--name", "cut")
    train(flags, data(base), 4, "--name", "cut", "--resume", "latest")
    found = losses(tmp_path / "cut")
    assert found == losses(tmp_path / "whole") and found[-1] < found[0]
    train(flags[:-2], data(base), 4, "--name", "exact")
    assert found != losses(tmp_path / "exact") and found == pytest.approx(losses(tmp_path / "exact"), abs=0.05)
    with pytest.raises(CheckpointError, match=r"\(--qlora nf4\), but this run has .*\(--qlora None\)"):
        train(flags[:-2], data(base), 6, "--name", "whole", "--resume", "latest")


# ------------------------------------------------------------------------------------------------ --hf-model
def test_adapters_of_a_transformers_model(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=SEQ_LEN)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    common = tiny_flags(base, logs=tmp_path)[2:]
    flags = [*common, "--hf-model", str(tmp_path / "hf"), "--hf-seq-len", str(SEQ_LEN), "--name", "run"]
    live = live_logits(monkeypatch)
    train([*flags, "--lora", f"{LORA},dora=true"], data(base), 2, "--val-data", data(base), epochs=2)
    loaded = peft.PeftModel.from_pretrained(model.eval(), str(tmp_path / "run/checkpoints/adapter_2"))
    torch.testing.assert_close(loaded(ids()).logits, live[1], rtol=1e-5, atol=1e-5)
    main([*flags[:-1], "evaluation", "--val-data", data(base), "--resume", str(tmp_path / "run")])
    found = [json.loads((tmp_path / f"{name}/checkpoints/results.jsonl").read_text().splitlines()[-1])[0]["loss"]
             for name in ("run", "evaluation")]  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-5)


# ------------------------------------------------------------------------------------------------ layouts
def test_layouts_train_the_same(flags: list[str], base: Path, tmp_path: Path, ranks: Callable[..., Any]) -> None:
    """DDP, FSDP and tensor parallelism on two ranks equal one process over five steps; any layout resumes any other."""
    pytest.importorskip("bitsandbytes", reason="needs pip install -e '.[finetune]'")
    flags = [*flags, "--dataset-manifest", data(base), "--train-num-samples", tokens(5), "--workers", "0"]
    layouts = {"ddp": [], "fsdp": ["--fsdp"], "tensor": ["--tensor-parallel", "2"]}
    jobs, lora = [], flags.index("--lora") + 1
    tested = {"lora": ("fsdp", "tensor"), "dora": ("tensor",), "qlora": ("ddp",)}
    for kind, names in tested.items():
        text = f"{LORA},dora=true,rslora=true" if kind == "dora" else LORA
        changed = [*flags[:lora], text, *flags[lora + 1 :], "--epochs", "1"]
        changed += ["--qlora", "nf4"] if kind == "qlora" else []
        main([*changed, "--name", f"{kind}-one"])
        jobs += [[*changed, "--name", f"{kind}-{name}", *layouts[name]] for name in names]
    longer = [*flags, "--epochs", "2", "--resume", str(tmp_path / "lora-one/checkpoints/step_00000005")]
    main([*longer, "--name", "longer-one"])
    jobs.append([*longer, "--name", "longer-tensor", "--tensor-parallel", "2"])
    ranks(2, "lora_worker", *(json.dumps(job) for job in jobs))
    for kind, names in {**tested, "longer": ("tensor",)}.items():
        expected = losses(tmp_path / f"{kind}-one")
        epoch = 2 if kind == "longer" else 1
        state = read_adapters(str(weights(tmp_path / f"{kind}-one", epoch)))[0]
        assert len(expected) == 5
        for name in names:
            assert losses(tmp_path / f"{kind}-{name}") == pytest.approx(expected, abs=1e-5), (kind, name)
            found = read_adapters(str(weights(tmp_path / f"{kind}-{name}", epoch)))[0]
            for parameter, value in state.items():
                torch.testing.assert_close(found[parameter], value, rtol=1e-3, atol=1e-4, msg=f"{name} {parameter}")
