"""Preference optimization and reinforcement learning on native checkpoints: results, resuming, metrics, errors."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizer_helpers import write_tokenizer

from open_lm.checkpoint.files import write_file
from open_lm.config.command_line import parse_args
from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.finetune import tuning_trainer
from open_lm.finetune.dpo import DpoConfig
from open_lm.finetune.dpo import main as dpo
from open_lm.finetune.flags import parse
from open_lm.finetune.grpo import GrpoConfig, _trainer
from open_lm.finetune.grpo import main as grpo
from open_lm.finetune.merging import merge_transformers
from open_lm.finetune.preference_data import read_prompts
from open_lm.finetune.rewards import load_rewards
from open_lm.finetune.trl_settings import lora_targets
from open_lm.finetune.tuning_run import TuningRun
from open_lm.generate.sampling import Sampling, generate_ids, load_model_for_generation
from open_lm.hf.native_weights import read_native_weights
from open_lm.hf.peft_adapters import native_sha256, read_peft_folder
from open_lm.model.transformer import Transformer, create_model
from open_lm.monitor.exhausted_memory import OutOfMemory
from open_lm.tokenizer import load_tokenizer

SHAPE = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 32, "vocab_size": 258, "weight_tying": False}
# An architecture of no family, exported as model_type openlm, and one of Llama.
OPENLM = {**SHAPE, "post_embed_norm": False, "qk_norm": True}
LLAMA = {**SHAPE, "post_embed_norm": False, "model_norm": "rms_norm", "positional_embedding_type": "llama_rotary"}
WORDS = ("cat", "dog", "bird", "fish", "horse", "mouse", "snake", "bear")


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_model(folder: Path, shape: dict[str, Any]) -> list[str]:
    """Write a checkpoint, its model.json and a tokenizer; return the flags that name them."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder / "tokenizer.json")
    (folder / "model.json").write_text(json.dumps(shape))
    model = create_model(parse_args(["--model", str(folder / "model.json")]))
    model.reset_parameters(seed=1)
    write_file(str(folder / "epoch_1.pt"), {"epoch": 1, "name": "x", "state_dict": model.state_dict()})
    return ["--pretrained", str(folder / "epoch_1.pt"), "--tokenizer", str(folder / "tokenizer.json")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(words: tuple[str, ...], as_messages: bool = False) -> list[dict[str, Any]]:
    """Return pairs in which the chosen completion is in capitals."""
    rows = [{"prompt": f"say {word}: ", "chosen": word.upper(), "rejected": word} for word in words]
    if not as_messages:
        return rows
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]


def dpo_flags(folder: Path, shape: dict[str, Any]) -> list[str]:
    flags = write_model(folder, shape)
    flags += ["--train-data", write_rows(folder / "train.jsonl", pairs(WORDS[:6]))]
    flags += ["--val-data", write_rows(folder / "val.jsonl", pairs(WORDS[6:]))]
    return [*flags, "--logs", str(folder / "logs"), "--global-batch-size", "2", "--lr", "3e-3", "--epochs", "2",
            "--log-every-n-steps", "1", "--save-every-n-steps", "2"]  # fmt: skip


def grpo_flags(folder: Path, shape: dict[str, Any]) -> list[str]:
    flags = write_model(folder, shape)
    rows = [{"prompt": f"{number}:", "answer": str(number)} for number in range(5)]
    flags += ["--train-data", write_rows(folder / "prompts.jsonl", rows), "--logs", str(folder / "logs")]
    return [*flags, "--global-batch-size", "4", "--num-generations", "2", "--max-completion-tokens", "4", "--lr",
            "1e-3", "--log-every-n-steps", "1", "--save-every-n-steps", "3", "--max-steps", "5"]  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def kill_at(step: int, patches: pytest.MonkeyPatch) -> None:
    """Let trainers raise Killed before the update after `step`."""
    original: Callable[..., type] = tuning_trainer.with_run

    def with_run(trainer_class: type, run: TuningRun) -> type:
        class Trainer(original(trainer_class, run)):  # type: ignore[misc]
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step == step:
                    raise Killed
                return super().training_step(*args, **kwargs)

        return Trainer

    patches.setattr(tuning_trainer, "with_run", with_run)


def test_dpo_raises_the_margin_of_held_out_pairs_and_writes_a_run_that_continues(tmp_path: Path) -> None:
    flags = dpo_flags(tmp_path, OPENLM)
    dpo([*flags, "--name", "whole"])
    rows, run = metrics(tmp_path / "logs" / "whole"), tmp_path / "logs" / "whole"
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert rows[0]["val/margin"] == 0 and rows[-1]["val/margin"] > 0.05 and rows[-1]["val/accuracy"] == 1
    assert rows[1]["train/loss"] == pytest.approx(math.log(2)) and rows[6]["train/loss"] < 0.69
    phases = [rows[2][f"train/{name}_time"] for name in ("inputs", "forward", "backward", "optimizer")]
    assert min(phases) > 0 and sum(phases) <= rows[2]["train/batch_time"]
    # The result in both formats: equal weights, with a tokenizer and model.json next to the native ones.
    native = load_model_for_generation(
        str(run / "checkpoints" / "epoch_0.pt"), Namespace(model=str(run / "checkpoints" / "model.json"))
    )
    for name, tensor in read_native_weights(str(run / "hf"), native.params).items():
        assert torch.equal(native.state_dict()[name], tensor)
    with pytest.raises(ConfigError, match="the run already exists"):
        dpo([*flags, "--name", "whole"])
    dpo([*flags, "--name", "whole", "--resume", "latest"])  # finished: changes nothing
    assert metrics(run) == rows
    dpo([*flags[2:], "--pretrained", str(run), "--name", "next", "--max-steps", "1"][2:])
    assert metrics(tmp_path / "logs" / "next")[0]["val/margin"] == 0


def _repeatable(row: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a line that depend on settings and seeds only."""
    return {
        name: value for name, value in row.items() if name not in ("time", "energy/kwh") and not name.endswith("_time")
    }


def test_dpo_continues_after_a_kill_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = dpo_flags(tmp_path, LLAMA)
    dpo([*flags, "--name", "whole"])
    with monkeypatch.context() as patches:
        kill_at(5, patches)
        with pytest.raises(Killed):
            dpo([*flags, "--name", "cut"])
    run = tmp_path / "logs" / "cut"
    (run / "trl" / "checkpoint-4" / "complete.json").unlink()  # as if killed while it was written
    dpo([*flags, "--name", "cut", "--resume", "latest"])
    assert "checkpoint-4: incomplete, skipping it" in (run / "out.log").read_text()
    whole, cut = result(tmp_path / "logs" / "whole"), result(run)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for first, second in zip(metrics(tmp_path / "logs" / "whole"), metrics(run), strict=True):
        assert _repeatable(first) == _repeatable(second)
    before, after = json.loads((run / "environment.json").read_text())["starts"]
    assert (before["step"], after["step"], after["progress"]["step"]) == (0, 2, 6)
    assert after["progress"]["tokens"] > 0 and after["progress"]["energy_joules"] > 0
    assert (run / "report.html").stat().st_size > 1000


def test_dpo_trains_adapters_only_and_merges_them(tmp_path: Path) -> None:
    from peft import PeftModel

    from open_lm.hf.policy import load_policy

    flags = dpo_flags(tmp_path, LLAMA)
    dpo([*flags, "--name", "lora", "--lora", "r=4,targets=all-linear", "--max-steps", "2", "--grad-checkpointing"])
    run = tmp_path / "logs" / "lora"
    base, ids = load_policy(str(run / "base")), torch.arange(9)[None]
    adapted = PeftModel.from_pretrained(load_policy(str(run / "base")), str(run / "adapter"))
    merged = load_policy(str(run / "hf"))
    assert (adapted(ids).logits - base(ids).logits).abs().max() > 1e-4
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    # The adapters name their base, so that they are not merged into another one.
    assert read_peft_folder(str(run / "adapter"))[1] == native_sha256(str(run / "base"))
    merge_transformers(str(run / "adapter"), str(tmp_path / "merged"), str(run / "base"))
    with pytest.raises(CheckpointError, match="its adapters belong to another base"):
        merge_transformers(str(run / "adapter"), str(tmp_path / "wrong"), str(run / "hf"))


def test_settings_that_trl_refuses_are_one_clear_error(tmp_path: Path) -> None:
    flags = dpo_flags(tmp_path, OPENLM)
    with pytest.raises(ConfigError, match="TRL refuses these settings: Label smoothing must be greater"):
        dpo([*flags, "--name", "exo", "--loss-type", "exo_pair"])
    with pytest.raises(ConfigError, match="TRL refuses these settings: WPO-style weighting is not implemented"):
        dpo([*flags, "--name", "aot", "--loss-type", "aot", "--trl", "use_weighting=true"])


def test_an_exhausted_memory_names_settings_that_need_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(trainer_class: type, run: TuningRun) -> type:
        class Trainer(with_run(trainer_class, run)):  # type: ignore[misc]
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                return torch.empty(1 << 58)  # more than any machine has

        return Trainer

    with_run = tuning_trainer.with_run
    monkeypatch.setattr(tuning_trainer, "with_run", exhausted)
    with pytest.raises(OutOfMemory, match=r"(?s)memory of rank 0 is exhausted") as error:
        dpo([*dpo_flags(tmp_path, OPENLM), "--name", "large"])
    for text in ("--batch-size ", "--grad-checkpointing", "--lora", "--max-length"):
        assert text in str(error.value)


def test_routers_have_no_adapters() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("attention", "router", "gate", "up")})
    block = torch.nn.ModuleDict({"block": model})
    assert lora_targets(block, "all-linear") == ["block.attention", "block.up"]
    assert lora_targets(block, "attention") == ["block.attention"]
    with pytest.raises(ConfigError, match="--lora targets=attention: the model has no such layer"):
        lora_targets(torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)}), "attention")


def test_dpo_refuses_messages_without_a_template_and_rows_that_are_too_long(tmp_path: Path) -> None:
    flags = dpo_flags(tmp_path, OPENLM)
    messages = write_rows(tmp_path / "messages.jsonl", pairs(WORDS, as_messages=True))
    with pytest.raises(ConfigError, match=r"has messages, but the tokenizer of --pretrained .* has no chat template"):
        dpo([*flags, "--train-data", messages, "--name", "a"])
    long = write_rows(tmp_path / "long.jsonl", [*pairs(WORDS), *pairs(("a" * 30,))])
    with pytest.raises(DataError, match=rf"expected at most 32 tokens.*: {long}:9: has 67 tokens"):
        dpo([*flags, "--train-data", long, "--name", "b"])
    with pytest.raises(ConfigError, match=r"--trl.*lr_schedule: not a setting of DPOConfig"):
        dpo([*flags, "--name", "c", "--trl", "lr_schedule=x"])
    with pytest.raises(ConfigError, match=r"(?s)learning_rate: is set by a flag.*push_to_hub: is not available"):
        dpo([*flags, "--name", "c", "--trl", "learning_rate=1", "push_to_hub=true"])
    assert not (tmp_path / "logs" / "c").exists() or not (tmp_path / "logs" / "c" / "metrics.jsonl").exists()


def test_grpo_continues_after_a_kill_in_a_later_pass_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "def digits(completions, answer, **columns):\n"
        "    return [sum(letter.isalpha() for letter in text) for text in completions]\n"
    )
    flags = [*grpo_flags(tmp_path, OPENLM), "--reward", f"{tmp_path}/own.py:digits", "exact_match", "--beta", "0.01"]
    grpo([*flags, "--name", "whole"])
    with monkeypatch.context() as patches:
        kill_at(4, patches)
        with pytest.raises(Killed):
            grpo([*flags, "--name", "cut"])
    grpo([*flags, "--name", "cut", "--resume", "latest"])
    whole, cut = result(tmp_path / "logs" / "whole"), result(tmp_path / "logs" / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    rows = metrics(tmp_path / "logs" / "cut")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert {"train/reward", "train/reward/digits", "train/reward/exact_match", "train/kl", "train/loss"} <= set(
        rows[-1]
    )
    assert rows[0]["train/kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["train/kl"] > 0
    assert [row["train/reward"] for row in rows] == [
        row["train/reward"] for row in metrics(tmp_path / "logs" / "whole")
    ]
    log = (tmp_path / "logs" / "cut" / "out.log").read_text()
    assert "each pass omits 1 of 5 prompts" in log


def test_a_reward_that_raises_ends_the_run_with_the_file_the_line_and_the_row(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def fail(completions, **columns):\n    raise KeyError('nothing')\n")
    flags = grpo_flags(tmp_path, LLAMA)
    with pytest.raises(DataError, match=rf"own.py:2: raised KeyError: 'nothing' for the row {tmp_path}/prompts.jsonl:"):
        grpo([*flags, "--reward", f"{tmp_path}/own.py:fail", "--name", "x"])
    few = ["--global-batch-size", "32", "--num-generations", "2", "--reward", "exact_match", "--name", "y"]
    with pytest.raises(DataError, match="--train-data has 5 prompts, but an update has 16"):
        grpo([*flags, *few])
    with pytest.raises(ConfigError, match="--max-completion-tokens: found 40, but the model has sequences of 32"):
        grpo([*flags, "--max-completion-tokens", "40", "--reward", "exact_match", "--name", "z"])


@pytest.mark.parametrize("shape", [OPENLM, LLAMA], ids=["openlm", "llama"])
def test_trainer_and_generator_agree_on_log_probabilities(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Compare the native model with its KV cache, the exported model, and what TRL's trainer computes."""
    flags = [*grpo_flags(tmp_path, shape), "--reward", "exact_match", "--name", "x"]
    args = parse(flags, "grpo", "", GrpoConfig)
    native = load_model_for_generation(str(tmp_path / "epoch_1.pt"), Namespace(model=str(tmp_path / "model.json")))
    with torch.no_grad():
        for parameter in native.parameters():  # so that probabilities differ from each other
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    write_file(str(tmp_path / "epoch_1.pt"), {"epoch": 1, "name": "x", "state_dict": native.state_dict()})
    prompts = [load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text) for text in ("12+3=", "7:")]
    steps = list(generate_ids(native, prompts, Sampling(max_new_tokens=9, temperature=1.0, top_p=1.0, seed=3)))
    completions = torch.tensor(steps).T
    generated = _log_probs_with_cache(native, prompts, completions)

    run = TuningRun(args, "grpo")
    with run.claim():
        data = read_prompts(args.train_data), None
        trainer = _trainer(run, args, run.load_tokenizer(False), data, load_rewards(args.reward))
        width = max(map(len, prompts))
        ids = torch.stack(
            [torch.tensor([0] * (width - len(p)) + p + c) for p, c in zip(prompts, completions.tolist(), strict=True)]
        )
        mask = torch.ones_like(ids)
        for row, prompt in enumerate(prompts):
            mask[row, : width - len(prompt)] = 0
        with torch.no_grad():
            logits = trainer.model(ids, attention_mask=mask).logits
            exported = torch.log_softmax(logits[:, width - 1 : -1], -1).gather(-1, completions[..., None])[..., 0]
            trained, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, completions.shape[1])
    assert generated.std() > 0.1
    assert (exported - generated).abs().max() < 1e-5
    assert (trained - generated).abs().max() < 1e-5


def _log_probs_with_cache(model: Transformer, prompts: list[list[int]], completions: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token of completions (B,T), computed token by token."""
    rows = []
    for prompt, tokens in zip(prompts, completions.tolist(), strict=True):
        values, cache, inputs = [], None, prompt
        for token in tokens:
            with torch.no_grad():
                logits, _, cache = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True)
            values.append(torch.log_softmax(logits[0, -1], -1)[token].item())
            inputs = [token]
        rows.append(values)
    return torch.tensor(rows)


def test_a_missing_package_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ConfigError, match=r'the package trl is not installed; install it with: pip install "open_lm\[finet'
    ):
        dpo(["--pretrained", "m", "--train-data", "d"])


def test_sections_of_both_commands_have_no_flag_twice() -> None:
    for command, section in (("dpo", DpoConfig), ("grpo", GrpoConfig)):
        assert parse(["--pretrained", "m", "--train-data", "d"], command, "Help.", section).lr == 1e-6
