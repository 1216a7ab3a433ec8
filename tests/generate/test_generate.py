"""Generation: KV cache, batches, sampling, streaming, and the command."""

from __future__ import annotations

import io
import json
import os
import pty
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from model_helpers import small_model

from open_lm.errors import ConfigError, DataError, run_cli
from open_lm.generate.sampling import (
    Sampling,
    TextStream,
    choose,
    complete_texts,
    filtered_probabilities,
    generate_ids,
    stream_texts,
)
from open_lm.model.transformer import Transformer
from open_lm.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
PROMPTS = ([5, 9, 1], [3], [8, 8, 2, 60, 7, 7, 7, 1, 30, 31, 32])


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 256 bytes and an end-of-text token (id 256)."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.json"
    fast.save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_model() -> Transformer:
    return small_model(vocab_size=260, seq_len=64)


def tokens_by_sequence(steps: Sequence[Sequence[int | None]], count: int) -> list[list[int]]:
    return [[token for step in steps if (token := step[row]) is not None] for row in range(count)]


def run(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling, first_row: int = 0
) -> list[list[int]]:
    return tokens_by_sequence(list(generate_ids(model, prompts, sampling, first_row)), len(prompts))


# ------------------------------------------------------------------------------------------------------- tokens
def test_greedy_selects_the_argmax_of_the_full_sequence(model: Transformer) -> None:
    ids = list(PROMPTS[0])
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert run(model, [PROMPTS[0]], GREEDY) == [ids[3:]]


@pytest.mark.parametrize("positions", ["rotary", "head_rotary", "llama_rotary", "none"])
@pytest.mark.parametrize("moe_freq", [0, 1])
def test_cache_and_batching_do_not_change_tokens(positions: str, moe_freq: int) -> None:
    model = small_model(positional_embedding_type=positions, moe_freq=moe_freq, moe_num_experts=3)
    separate = [run(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert run(model, PROMPTS, GREEDY) == separate
    assert run(model, PROMPTS, replace(GREEDY, use_cache=False)) == separate
    assert len({tuple(row) for row in separate}) == 3


def test_long_prompts_are_prefilled_in_chunks(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model, PROMPTS, GREEDY)
    monkeypatch.setattr("open_lm.generate.sampling.PREFILL_TOKENS", 4)
    assert run(model, PROMPTS, GREEDY) == expected


def test_sampling_depends_only_on_seed_and_row(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=1.0, top_p=1.0, seed=4)
    batched = run(model, PROMPTS, sampling)
    assert run(model, PROMPTS[1:], sampling, first_row=1) == batched[1:]
    assert run(model, PROMPTS, replace(sampling, use_cache=False)) == batched
    assert run(model, PROMPTS, replace(sampling, seed=5)) != batched
    same_prompt = run(model, [PROMPTS[0], PROMPTS[0]], sampling)
    assert same_prompt[0] != same_prompt[1]


def test_stop_ids_end_sequences(model: Transformer) -> None:
    full = run(model, PROMPTS, GREEDY)
    stop = next(token for token in full[0] if token not in full[1][:1])
    ended = run(model, PROMPTS, replace(GREEDY, stop_ids=(stop,)))
    for row, full_row in zip(ended, full, strict=True):
        assert row == full_row[: full_row.index(stop) + 1 if stop in full_row else None]
    assert len(ended[0]) < 12 or full[0][-1] == stop


def test_the_sequence_length_ends_sequences(model: Transformer) -> None:
    prompts = [[1] * 45, [1] * 3]
    rows = run(model, prompts, replace(GREEDY, max_new_tokens=40))
    assert [len(row) for row in rows] == [3, 40]


def test_training_mode_is_restored(model: Transformer) -> None:
    model.train()
    steps = generate_ids(model, [[1]], GREEDY)
    next(steps)
    assert not model.training
    steps.close()  # type: ignore[attr-defined]
    assert model.training
    model.eval()


def test_invalid_prompts(model: Transformer) -> None:
    with pytest.raises(DataError) as caught:
        run(model, [[], [61], [1]], GREEDY)
    assert "prompt 1 has no tokens" in str(caught.value)
    assert "prompt 2 contains the id 61, expected 0 to 60" in str(caught.value)
    with pytest.raises(ConfigError, match="prompt 2 has 48 tokens, expected at most 47"):
        run(model, [[1], [1] * 48], GREEDY)


# -------------------------------------------------------------------------------------------------------- sampling
def test_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    torch.testing.assert_close(filtered_probabilities(logits), logits.exp())
    top_2 = filtered_probabilities(logits[:1], top_k=2)
    torch.testing.assert_close(top_2, torch.tensor([[0, 4 / 7, 0, 3 / 7]]))
    nucleus = filtered_probabilities(logits, top_p=0.65)
    torch.testing.assert_close(nucleus, torch.tensor([[0, 4 / 7, 0, 3 / 7], [1 / 3, 1 / 3, 1 / 3, 0]]))
    torch.testing.assert_close(filtered_probabilities(logits[:1], top_p=1e-6), torch.tensor([[0.0, 1, 0, 0]]))
    both = filtered_probabilities(logits[:1], top_k=3, top_p=0.7)
    torch.testing.assert_close(both, torch.tensor([[0, 4 / 7, 0, 3 / 7]]))


def test_repetition_penalty_reduces_repeated_tokens() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -3.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    generators = [torch.Generator(), torch.Generator()]
    assert choose(logits, seen, Sampling(temperature=0), generators) == [0, 0]
    assert choose(logits, seen, Sampling(temperature=0, repetition_penalty=2.0), generators) == [1, 1]


def test_ids_outside_the_tokenizer_are_not_sampled() -> None:
    logits, seen = torch.tensor([[0.0, 1.0, 9.0]]), torch.zeros(1, 3, dtype=torch.bool)
    assert choose(logits, seen, Sampling(temperature=0, vocab_limit=2), [torch.Generator()]) == [1]


def test_sampled_frequencies() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    logits, seen = probabilities.log()[None], torch.zeros(1, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    draws = [choose(logits, seen, Sampling(temperature=1, top_p=1), [generator])[0] for _ in range(3000)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=3) / 3000
    torch.testing.assert_close(frequencies, probabilities, atol=0.03, rtol=0)


def test_invalid_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=-1, top_k=-1, top_p=0, repetition_penalty=0)
    for flag in ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty"):
        assert flag in str(caught.value)


# --------------------------------------------------------------------------------------------------------- text
def test_stream_waits_for_complete_characters(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    pieces = [stream.push(token) for token in tokenizer.encode("bé日c")]
    assert pieces == ["b", "", "é", "", "", "日", "c"]
    assert stream.push(tokenizer.encode("é")[0], final=True) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["gpt-neox-20b.json", "llama2.model", "mistral.model"])
def test_streamed_text_is_the_decoded_text(shared_dir: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(shared_dir / "data" / "tokenizers" / name))
    text = "The quick  brown fox, über den Zaun.\n\n    def f(x):\n\treturn 日本 + x 🙂!"
    prompt, rest = tokenizer.encode("Once upon a time"), tokenizer.encode(text)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in rest]
    assert "".join(pieces) == tokenizer.decode([*prompt, *rest])[len(tokenizer.decode(prompt)) :]
    assert sum(1 for piece in pieces if piece) > 10


def test_texts_do_not_contain_the_end_of_text_token(byte_model: Transformer, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    with torch.no_grad():
        weight = byte_model.output.weight.clone()
        byte_model.output.weight[tokenizer.eot_id] = 100 * byte_model(torch.tensor([tokenizer.encode("x")]))[1][0, 0]
    try:
        assert complete_texts(byte_model, tokenizer, ["x"], GREEDY) == [""]
        assert list(stream_texts(byte_model, tokenizer, ["x"], GREEDY)) == [[""]]
    finally:
        byte_model.output.weight.data.copy_(weight)


def test_batched_texts(byte_model: Transformer, tokenizer_file: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(str(tokenizer_file))
    texts = ["hello", "", "a much longer beginning"]
    batched = complete_texts(byte_model, tokenizer, texts, GREEDY)
    assert batched == [complete_texts(byte_model, tokenizer, [text], GREEDY)[0] for text in texts]
    steps = list(stream_texts(byte_model, tokenizer, texts, GREEDY))
    assert ["".join(step[row] for step in steps) for row in range(3)] == batched


# ------------------------------------------------------------------------------------------------------ command
@pytest.fixture
def trained(tmp_path: Path, byte_model: Transformer) -> Path:
    """A checkpoint in a run folder whose params.txt names the model's file and a flag."""
    folder = tmp_path / "logs" / "ex" / "checkpoints"
    folder.mkdir(parents=True)
    architecture = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 260, "seq_len": 64}
    (tmp_path / "bytes.json").write_text(json.dumps(architecture))
    (folder.parent / "params.txt").write_text(f"model: {tmp_path / 'bytes.json'}\nqk_norm: False\nseed: 0\n")
    torch.save({"epoch": 1, "name": "ex", "state_dict": byte_model.state_dict()}, folder / "epoch_1.pt")
    return folder / "epoch_1.pt"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return a function that runs scripts/generate.py in this process."""
    script = runpy.run_path(str(ROOT / "scripts" / "generate.py"))

    def run_command(*args: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run_cli(script["main"], [str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run_command


def test_command_prints_the_same_text_with_and_without_cache(
    command: Callable[..., Result], trained: Path, tokenizer_file: Path, byte_model: Transformer
) -> None:
    texts = ["hello", "a longer one"]
    tokenizer = load_tokenizer(str(tokenizer_file))
    expected = complete_texts(byte_model, tokenizer, texts, GREEDY)
    base = ["--checkpoint", trained, "--tokenizer", tokenizer_file, "--temperature", 0, "--max-new-tokens", 12]
    cached = command(*base, "--json", "--prompt", texts[0], "--prompt", texts[1])
    assert cached.returncode == 0, cached.stderr
    rows = [json.loads(line) for line in cached.stdout.splitlines()]
    assert rows == [{"prompt": p, "completion": c} for p, c in zip(texts, expected, strict=True)]
    piped = command(*base, "--json", "--no-cache", "--batch-size", 1, stdin="hello\n\na longer one\n")
    assert piped.stdout == cached.stdout


def test_command_reads_files(
    command: Callable[..., Result], trained: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    base = ["--checkpoint", trained, "--tokenizer", tokenizer_file, "--max-new-tokens", 2, "--json"]
    lines = command(*base, "--prompt-file", tmp_path / "prompts.txt", "--prompt", "zero").stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["zero", "one", "two"]
    whole_file = command(*base, "--prompt-file", tmp_path / "prompts.txt", "--whole-file").stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in whole_file] == ["one\ntwo"]


@pytest.mark.processes
def test_command_streams_to_a_terminal(
    trained: Path, tokenizer_file: Path, byte_model: Transformer, forked_python: str
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    (expected,) = complete_texts(byte_model, tokenizer, ["hello"], GREEDY)
    words = [forked_python, str(ROOT / "scripts" / "generate.py"), "--checkpoint", str(trained), "--prompt", "hello"]
    words += ["--tokenizer", str(tokenizer_file), "--temperature", "0", "--max-new-tokens", "12"]
    main_fd, terminal_fd = pty.openpty()
    process = subprocess.Popen(words, stdout=terminal_fd, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(terminal_fd)
    shown = io.BytesIO()
    try:
        while piece := os.read(main_fd, 4096):
            shown.write(piece)
    except OSError:  # Linux raises this when the other side has closed
        pass
    finally:
        os.close(main_fd)
    assert process.wait() == 0
    assert shown.getvalue().decode().replace("\r\n", "\n") == f"hello{expected}\n"


def test_command_without_a_model_name(
    command: Callable[..., Result], tmp_path: Path, tokenizer_file: Path, byte_model: Transformer
) -> None:
    torch.save(byte_model.state_dict(), tmp_path / "bare.pt")
    result = command("--checkpoint", tmp_path / "bare.pt", "--tokenizer", tokenizer_file, "--prompt", "x")
    assert result.returncode == 2
    assert "--model is missing" in result.stderr
    result = command("--checkpoint", tmp_path / "none.pt", "--tokenizer", tokenizer_file, "--prompt", "x")
    assert result.returncode == 2
    assert "none.pt: no such checkpoint" in result.stderr


def test_command_with_a_run_folder(command: Callable[..., Result], trained: Path, tokenizer_file: Path) -> None:
    run, flags = trained.parent.parent, ["--tokenizer", tokenizer_file, "--prompt", "x", "--max-new-tokens", 2]
    result = command("--checkpoint", run, *flags)
    assert result.returncode == 0, result.stderr
    assert f"using the newest checkpoint: {trained}" in result.stderr
    trained.unlink()
    result = command("--checkpoint", run, *flags)
    assert result.returncode == 2
    assert f"{run}: no such checkpoint; expected an epoch_N.pt, a step_N folder, or a run fol" in result.stderr


def test_command_with_a_checkpoint_of_another_model(
    command: Callable[..., Result], trained: Path, tokenizer_file: Path
) -> None:
    result = command(
        "--checkpoint", trained, "--model", "open_lm_test_tiny", "--tokenizer", tokenizer_file, "--prompt", "x"
    )
    assert result.returncode == 2
    assert "tok_embeddings.weight: found (260, 32), the model has (16, 16)" in result.stderr


@pytest.mark.processes
def test_command_help_imports_no_torch() -> None:
    code = "import sys, runpy; sys.argv = ['generate.py', '--help']\n"
    code += f"try: runpy.run_path({str(ROOT / 'scripts' / 'generate.py')!r}, run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 0\nassert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--repetition-penalty" in shown.stdout
