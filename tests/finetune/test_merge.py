"""`python -m open_lm.finetune.merge`: merged weights, other bases, undo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_source
from run_helpers import tiny_flags, train

from open_lm.checkpoint import adapter_record, read_model_state, weights_sha256
from open_lm.errors import CheckpointError, ConfigError
from open_lm.finetune.merge import main
from open_lm.hf.convert import main as convert


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs base, lora and dora."""
    folder = tmp_path_factory.mktemp("merge")
    data = write_source(folder / "data", [40, 40])
    flags = tiny_flags(folder, logs=folder)
    train(flags, data, 2, "--name", "base")
    flags += ["--pretrained", str(folder / "base")]
    train([*flags, "--lora", "r=4,targets=all-linear"], data, 2, "--name", "lora")
    train([*flags, "--lora", "r=2,dora=true"], data, 2, "--name", "dora")
    return folder


def state(path: Path) -> dict[str, torch.Tensor]:
    return read_model_state(path)[0]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_and_undo(kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run / kind), str(tmp_path / "merged")])
    merged = state(tmp_path / "merged/epoch_1.pt")
    assert same(merged, state(run / kind / "checkpoints/epoch_1.pt"))
    base = state(run / "base/checkpoints/epoch_1.pt")
    assert not same(merged, base)
    convert(["export", str(tmp_path / "merged"), str(tmp_path / "exported"), "--verify"])
    main(["--undo", str(tmp_path / "merged"), str(tmp_path / "base")])
    assert same(state(tmp_path / "base/epoch_0.pt"), base)
    assert "bit-equal to the base" in capsys.readouterr().out


def test_undo_without_the_base(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    base = state(run / "base/checkpoints/epoch_1.pt")
    for kind in ("lora", "dora"):
        checkpoint = tmp_path / f"run/{kind}/checkpoints/epoch_1.pt"
        content = torch.load(checkpoint, weights_only=True)
        content["lora"]["base"] = str(tmp_path / "run/base/checkpoints/epoch_1.pt")
        torch.save(content, checkpoint)
        main([str(checkpoint), str(tmp_path / kind)])
    shutil.rmtree(tmp_path / "run")
    main(["--undo", str(tmp_path / "lora"), str(tmp_path / "undone")])
    found = state(tmp_path / "undone/epoch_0.pt")
    is_exact = weights_sha256(found) == weights_sha256(base)
    assert ("bit-equal" if is_exact else "up to rounding") in capsys.readouterr().out
    for name, value in base.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    with pytest.raises(CheckpointError, match="DoRA, which cannot be subtracted"):
        main(["--undo", str(tmp_path / "dora"), str(tmp_path / "other")])
    main(
        ["--undo", str(tmp_path / "dora"), str(tmp_path / "other"), "--base", str(run / "base/checkpoints/epoch_1.pt")]
    )
    assert same(state(tmp_path / "other/epoch_0.pt"), base)


def test_peft_folder_with_the_exported_base(run: Path, tmp_path: Path) -> None:
    """Adapters merged into the exported base equal the exported run, and PEFT's logits are those of both."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    convert(["export", str(run / "base"), str(tmp_path / "base")])
    convert(["export", str(run / "lora"), str(tmp_path / "lora")])
    adapter = str(run / "lora/checkpoints/adapter_1")
    with pytest.raises(ConfigError, match="--base is missing"):
        main([adapter, str(tmp_path / "merged")])
    with pytest.raises(CheckpointError, match=r"adapters belong to another base: .*lora has the weights with sha256"):
        main([adapter, str(tmp_path / "merged"), "--base", str(tmp_path / "lora")])
    main([adapter, str(tmp_path / "merged"), "--base", str(tmp_path / "base")])
    with pytest.raises(ConfigError, match="exists already"):
        main([adapter, str(tmp_path / "merged"), "--base", str(tmp_path / "base")])

    def load(name: str) -> Any:
        options = {"trust_remote_code": True}
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, **options).eval()

    ids = torch.randint(0, VOCAB_SIZE, (2, SEQ_LEN))
    expected = load("lora")(ids).logits
    torch.testing.assert_close(load("merged")(ids).logits, expected, rtol=1e-5, atol=1e-5)
    adapted = peft.PeftModel.from_pretrained(load("base"), adapter)
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(load("base")(ids).logits, expected, atol=1e-3)
    main(["--undo", str(tmp_path / "merged"), str(tmp_path / "undone")])
    assert same(state(tmp_path / "undone"), state(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    main(["--undo", str(tmp_path / "merged"), str(tmp_path / "subtracted")])
    for name, value in state(tmp_path / "undone").items():
        torch.testing.assert_close(state(tmp_path / "subtracted")[name], value, rtol=1e-6, atol=1e-7)


def test_sources_without_adapters_are_refused(run: Path, tmp_path: Path) -> None:
    assert adapter_record(str(run / "base/checkpoints/epoch_1.pt")) is None
    with pytest.raises(CheckpointError, match="is a checkpoint of a full model"):
        main([str(run / "base"), str(tmp_path / "merged")])
    with pytest.raises(CheckpointError, match=r"has no merge\.json"):
        main(["--undo", str(run / "base"), str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()
