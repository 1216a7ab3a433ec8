"""Validation: exact losses, intervals, and the interface of existing callers."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_worker

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import DataConfig, ValidationConfig
from open_lm.data import get_data
from open_lm.data.batch import Batch, TargetMask
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.validation_loader import build_val_loaders
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError
from open_lm.evaluate.validation import EvaluationOptions, evaluate_loop, evaluate_sets, validation_metrics
from open_lm.main import load_model, main
from open_lm.model.transformer import Params, Transformer, create_model

GOLDEN = "compat/run/logs/upstream/checkpoints"


def golden_results(shared_dir: Path) -> list[dict[str, Any]]:
    return json.loads((shared_dir / GOLDEN / "results.jsonl").read_text().splitlines()[-1])


def golden_flags(shared_dir: Path) -> list[str]:
    run = shared_dir / "compat/run"
    sets = [str(run / "data/00000007.tar"), str(run / "data/00000008.tar")]
    return ["--model", str(run / "tiny_bytes.json"), "--val-data", *sets, "--data-key", "json.gz", "--workers", "0"]


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_evaluation_without_training_reproduces_the_golden_losses(flag: str, shared_dir: Path, tmp_path: Path) -> None:
    checkpoint = str(shared_dir / GOLDEN / "epoch_2.pt")
    flags = [flag, checkpoint, "--precision", "fp32", "--logs", str(tmp_path), "--name", "run"]
    main([*golden_flags(shared_dir), *flags])
    (results,) = [json.loads(line) for line in (tmp_path / "run/checkpoints/results.jsonl").read_text().splitlines()]
    for result, golden in zip(results, golden_results(shared_dir), strict=True):
        assert set(result) == set(golden)
        assert result["loss"] == pytest.approx(golden["loss"], abs=1e-4)
        for key in ("sequences", "tokens", "train_tokens", "loss_tokens_lower_95"):
            assert result[key] == golden[key]
        assert [Path(name).name for name in result["val_data"]] == [Path(name).name for name in golden["val_data"]]
        assert result["checkpoint_path"] == checkpoint
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 128 and rows[-1]["val/loss"] == pytest.approx(2.385682, abs=1e-4)


def test_evaluate_loop_for_existing_callers(shared_dir: Path) -> None:
    run = shared_dir / "compat/run"
    args = argparse.Namespace(
        model=str(run / "tiny_bytes.json"),
        resume=str(shared_dir / GOLDEN / "epoch_2.pt"),
        val_data=[str(run / "data/00000007.tar")],
        val_data_key=["json.gz"],
        per_gpu_val_batch_size=16,
        workers=0,
        seed=3,
        precision="fp32",
        device="cpu",
        rank=0,
        world_size=1,
        distributed=False,
        seq_len=64,
        vocab_size=256,
        train_num_samples=512,
        val_seq_ci=True,
        val_tok_ci=True,
        val_iter_ci=200,
        val_max_pop_ci=300,
    )

    class Writer:
        def __init__(self) -> None:
            self.scalars: dict[str, float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars[name] = value

    model = create_model(args)
    assert load_model(args, model, different_seed=True)[:2] == (2, 128)
    writer = Writer()
    (result,) = evaluate_loop(model, get_data(args, skip_train=True)["val_list"], 2, args, writer)
    assert result["loss"] == pytest.approx(golden_results(shared_dir)[0]["loss"], abs=1e-4)
    assert result["train_tokens"] == 2 * 512 * 64
    for kind in ("sequences", "tokens"):
        assert result[f"loss_{kind}_lower_95"] < result["loss"] < result[f"loss_{kind}_upper_95"]
    assert writer.scalars["valid/loss"] == result["loss"]
    assert model.training


@dataclass(frozen=True)
class Masked(Batch):
    """A batch with arbitrary masked targets."""

    masked_targets: torch.Tensor | None = None

    @property
    def targets(self) -> torch.Tensor:
        assert self.masked_targets is not None
        return self.masked_targets


class Batches:
    """A validation set that consists of the given batches."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], name: str = "set/part-0001.tar") -> None:
        self.batches, self.val_data = batches, [name]

    def __iter__(self) -> Any:
        for inputs, targets in self.batches:
            is_real = (targets != IGNORE_INDEX).any(1)
            ids = torch.cat([inputs, inputs[:, -1:]], dim=1).to(torch.uint8)
            num_real = int(is_real.sum())
            yield Masked(ids, is_real, num_real, (num_real,), 0, 256, TargetMask(), masked_targets=targets)


def evaluate(
    loaders: list[Any], end_of_text_id: int | None = None, **flags: Any
) -> tuple[Transformer, list[dict[str, Any]]]:
    model = Transformer(Params(**trainer_worker.SHAPE))
    model.reset_parameters(seed=1)
    options = EvaluationOptions(
        Runtime(),
        MeshLayout(),
        get_autocast("fp32"),
        ValidationConfig(**flags),
        model_name="small",
        end_of_text_id=end_of_text_id,
    )
    return model, evaluate_sets(model, loaders, options)


def test_masked_targets_and_filler_sequences_do_not_count() -> None:
    batches = [trainer_worker.batch(step) for step in range(3)]
    model, (result,) = evaluate([Batches(batches)])
    with torch.no_grad():
        logits = torch.cat([model(inputs)[0] for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    assert result["loss"] == pytest.approx(losses.item(), abs=1e-6)
    assert result["tokens"] == int((targets != IGNORE_INDEX).sum())
    assert result["sequences"] == int((targets != IGNORE_INDEX).any(1).sum()) < 24
    assert "train_tokens" not in result and result["loss_tokens_lower_95"] == -1.0


def test_documents_of_packed_sequences_are_evaluated_separately() -> None:
    end = 4
    inputs, targets = trainer_worker.batch(0)
    inputs[:, 5], inputs[1] = end, end
    documents = []
    for row, tokens in enumerate(inputs.tolist()):
        starts = [0, *(index + 1 for index, token in enumerate(tokens[:-1]) if token == end), len(tokens)]
        documents += [(inputs[row : row + 1, a:b], targets[row : row + 1, a:b]) for a, b in pairwise(starts)]
    _, (packed, separate) = evaluate([Batches([(inputs, targets)]), Batches(documents)], end_of_text_id=end)
    _, (unmasked, still_separate) = evaluate([Batches([(inputs, targets)]), Batches(documents)])
    assert packed["loss"] == pytest.approx(separate["loss"], abs=1e-6)
    assert packed["tokens"] == separate["tokens"] and still_separate["loss"] == separate["loss"]
    assert unmasked["loss"] != pytest.approx(packed["loss"], abs=1e-4)


def test_document_mask_of_evaluate_loop_needs_the_end_of_text_id() -> None:
    model = Transformer(Params(**trainer_worker.SHAPE))
    batches, losses = [trainer_worker.batch(0)], []
    for flags in ({}, {"end_of_text_id": 4}, {"document_mask": True, "end_of_text_id": 4}):
        (result,) = evaluate_loop(model, [Batches(batches)], 0, argparse.Namespace(device="cpu", **flags))
        losses.append(result["loss"])
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ConfigError, match="without end_of_text_id"):
        evaluate_loop(model, [Batches(batches)], 0, argparse.Namespace(device="cpu", document_mask=True))


def test_intervals_narrow_with_more_data() -> None:
    few = Batches([trainer_worker.batch(0)])
    many = Batches([trainer_worker.batch(step) for step in range(20)])
    _, results = evaluate([few, many], val_tok_ci=True, val_seq_ci=True, val_iter_ci=300)
    widths = {
        kind: [result[f"loss_{kind}_upper_95"] - result[f"loss_{kind}_lower_95"] for result in results]
        for kind in ("tokens", "sequences")
    }
    assert all(0 < many_width < few_width for few_width, many_width in widths.values())


def test_metrics_of_several_sets_and_their_token_weighted_mean() -> None:
    _, results = evaluate([Batches([trainer_worker.batch(0)]), Batches([trainer_worker.batch(1)], "b/x.tar")])
    metrics = validation_metrics(results)
    tokens = [result["tokens"] for result in results]
    expected = sum(result["loss"] * result["tokens"] for result in results) / sum(tokens)
    assert metrics["val/loss"] == pytest.approx(expected)
    assert metrics["val/part-0001/loss"] == results[0]["loss"] and metrics["val/x/tokens"] == tokens[1]
    assert "val/part-0001/loss_tokens_lower_95" not in metrics
    (single,) = evaluate([Batches([trainer_worker.batch(0)])])[1]
    assert validation_metrics([single])["val/loss"] == pytest.approx(single["loss"])


def test_a_set_without_targets_has_no_loss() -> None:
    inputs, targets = trainer_worker.batch(0)
    _, (result,) = evaluate([Batches([(inputs, torch.full_like(targets, IGNORE_INDEX))])], val_tok_ci=True)
    assert math.isnan(result["loss"]) and result["tokens"] == 0 and result["loss_tokens_upper_95"] == -1.0


def test_validation_logs_its_interval_its_progress_and_the_remaining_time(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(shared_dir / GOLDEN / "epoch_2.pt")
    flags = ["--resume", checkpoint, "--precision", "fp32", "--logs", str(tmp_path), "--val-iter-ci", "100"]

    def log(name: str, *extra: str) -> str:
        # The manifest lists 6, but neither 7 nor 8.
        shards = [str(shared_dir / f"compat/run/data/0000000{number}.tar") for number in ("6", "{7..8}")]
        main([*golden_flags(shared_dir), "--val-data", *shards, *flags, "--name", name, *extra])
        return (tmp_path / name / "out.log").read_text()

    text = log("every", "--val-seq-ci", "--val-tok-ci", "--global-val-batch-size", "64", "--log-every-n-steps", "1")
    (results,) = [json.loads(line) for line in (tmp_path / "every/checkpoints/results.jsonl").read_text().splitlines()]
    for result in results:
        for kind in ("sequences", "tokens"):
            bounds = [result[f"loss_{kind}_{bound}_95"] for bound in ("lower", "upper")]
            assert f", 95 % interval over {kind} {bounds[0]:.6f} to {bounds[1]:.6f}" in text
    total = -(-results[0]["sequences"] // 64)
    assert total > 1 and f" [1/{total} (" in text and f"/s/gpu [{total}/{total} (100%)] ETA: 0:00:00" in text
    assert text.count(" [1 batches done]") == 1, "the number of batches is not known"
    estimated = rf" \[\d+/about {2 * total} \(\d+%\)\] ETA: about 0:00:0"
    assert re.search(estimated, text), "the first of two shards is complete"
    assert "Validating on " in text and f" (set 1 of 2), {results[0]['sequences']} sequences in {total} batches" in text
    without = log("without", "--global-val-batch-size", "64")
    assert "interval" not in without and f" [{total}/{total} " not in without
    monkeypatch.setattr("open_lm.evaluate.validation._PROGRESS_S", 0.0)
    assert f" [{total}/{total} " in log("slow", "--global-val-batch-size", "64"), "a slow validation logs more often"


BOUND = ["--global-val-batch-size", "8", "--val-max-batches", "3"]
TOKENS = 3 * 8 * 64  # of these batches


def bounded_results(folder: Path) -> list[dict[str, Any]]:
    (results,) = [json.loads(line) for line in (folder / "checkpoints/results.jsonl").read_text().splitlines()]
    assert [result["tokens"] for result in results] == [TOKENS] * 2 and {r["max_batches"] for r in results} == {3}
    text = (folder / "out.log").read_text()
    assert text.count(f"{TOKENS} tokens of the first 3 batches (--val-max-batches)") == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (metrics,) = [row for row in rows if "val/tokens" in row]
    assert metrics["val/tokens"] == 2 * TOKENS and metrics["val/00000007/max_batches"] == 3
    return results


def test_max_batches_bounds_every_set(shared_dir: Path, tmp_path: Path) -> None:
    flags = [*golden_flags(shared_dir), "--precision", "fp32", "--logs", str(tmp_path)]
    flags += ["--resume", str(shared_dir / GOLDEN / "epoch_2.pt")]
    main([*flags, *BOUND, "--name", "bounded"])
    bounded = bounded_results(tmp_path / "bounded")
    text = (tmp_path / "bounded/out.log").read_text()
    assert text.count(", at most 3 batches (--val-max-batches)") == 2, "the manifest does not list these shards"
    listed = ["--val-data", str(shared_dir / "compat/run/data/00000006.tar"), *BOUND, "--name", "listed"]
    main([*flags, *listed])
    text = (tmp_path / "listed/out.log").read_text()
    assert "(set 1 of 1), 24 sequences in 3 batches (--val-max-batches; the set has 256 sequences)" in text
    main([*flags, "--val-num-samples", str(TOKENS), "--name", "same"])
    (same,) = [json.loads(line) for line in (tmp_path / "same/checkpoints/results.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in bounded] == pytest.approx([r["loss"] for r in same], rel=1e-6)
    main([*flags, "--val-max-batches", "1000000", "--name", "loose"])
    (loose,) = [json.loads(line) for line in (tmp_path / "loose/checkpoints/results.jsonl").read_text().splitlines()]
    assert loose[0]["loss"] == pytest.approx(golden_results(shared_dir)[0]["loss"], abs=1e-4)
    assert "max_batches" not in loose[0]


@pytest.mark.processes
def test_max_batches_bounds_context_parallel_ranks_and_validation_in_training(
    ranks: Callable[..., Any], shared_dir: Path, tmp_path: Path
) -> None:
    run = shared_dir / "compat/run"
    flags = [*golden_flags(shared_dir), *BOUND, "--precision", "fp32", "--log-every-n-steps", "1"]
    main([*flags, "--resume", str(shared_dir / GOLDEN / "epoch_2.pt"), "--logs", str(tmp_path), "--name", "single"])
    common = [*flags, "--logs", str(tmp_path), "--context-parallel", "2"]
    ranks(2, "open_lm.main", *common, "--resume", str(shared_dir / GOLDEN / "epoch_2.pt"), "--name", "context")
    for one, other in zip(*(bounded_results(tmp_path / name) for name in ("single", "context")), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    train = ["--train-data", str(run / "data/0000000[1-3].tar"), "--train-num-samples", "2048", "--epochs", "1"]
    train += ["--averagers", "poly_8_1", "--global-batch-size", "8", "--val-seq-ci", "--val-iter-ci", "50"]
    ranks(2, "open_lm.main", *flags, "--logs", str(tmp_path), *train, "--name", "train")
    (result, _) = bounded_results(tmp_path / "train")
    assert result["loss_sequences_lower_95"] < result["loss"] < result["loss_sequences_upper_95"]
    average = ["--resume", str(tmp_path / "train/checkpoints/epoch_1.pt"), "--averagers", "poly_8_1"]
    main([*flags, "--logs", str(tmp_path), "--name", "average", *average])
    assert bounded_results(tmp_path / "average")[0]["average"] == "poly_8_1"


def test_the_number_of_batches_of_unlisted_shards_is_estimated_then_known(shared_dir: Path, tmp_path: Path) -> None:
    for number in (6, 7, 8):  # shards without a manifest
        shutil.copy(shared_dir / f"compat/run/data/0000000{number}.tar", tmp_path)
    validation = ValidationConfig(val_data=[str(tmp_path / "*.tar")], val_data_key=["json.gz"])
    options = {"seq_len": 64, "vocab_size": 256, "batch_size": 32}
    (loader,) = build_val_loaders(validation, DataConfig(workers=0), **options)
    estimates = [loader.estimate_batches() for _ in loader]
    assert loader.num_sequences is None and loader.num_batches == len(estimates) and not loader.is_bounded
    assert estimates[0] is None and estimates[-1] == loader.num_batches
    assert {e for e in estimates if e is not None} <= set(range(len(estimates) - 2, len(estimates) + 3))
    bounded = replace(validation, val_max_batches=2)
    (loader,) = build_val_loaders(bounded, DataConfig(workers=0), **options)
    assert len(list(loader)) == 2 and loader.is_bounded and loader.num_batches == 2
    (loader,) = build_val_loaders(replace(bounded, val_max_batches=1000), DataConfig(workers=0), **options)
    assert len(list(loader)) == len(estimates) and not loader.is_bounded
