"""Model configurations: names, paths, and what is said about broken ones."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.config.architecture import architecture_of, model_names, settings_of_run
from open_lm.errors import ConfigError

GOOD = {"hidden_dim": 8, "n_layers": 1, "n_heads": 2, "seq_len": 4, "vocab_size": 5}


def written(folder: Path, content: object, name: str = "mine.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", model_names())
def test_all_configurations_are_valid(name: str) -> None:
    assert architecture_of(name)["n_layers"] > 0


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("open_lm_410m", "open_lm_411m"),
        ("m1b_neox", "open_lm_1b"),
        ("g3b_neox", "open_lm_3b"),
        ("l7b_neox", "open_lm_7b"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert architecture_of(alias) == architecture_of(name)


def test_m1b_tiktoken_is_the_1b_with_another_vocabulary() -> None:
    assert architecture_of("m1b_tiktoken") == {**architecture_of("open_lm_1b"), "vocab_size": 50304}


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = model_names()
    assert names.index("open_lm_25m") < names.index("open_lm_160m")


def test_a_path_and_its_defaults(tmp_path: Path) -> None:
    assert architecture_of(written(tmp_path, GOOD)) == {**GOOD, "post_embed_norm": False, "weight_tying": False}


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"--model open_lm_1bb: no such model; near names: .*open_lm_1b"):
        architecture_of("open_lm_1bb")
    with pytest.raises(ConfigError, match="open_lm_160m"):
        architecture_of("zzz")


def test_missing_file_points_to_the_name() -> None:
    with pytest.raises(ConfigError, match="no such file; without the path, --model open_lm_1b exists"):
        architecture_of("nowhere/open_lm_1b.json")


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    content = {**GOOD, "hidden_dim": "8", "n_heads": 0, "ffn_type": "relu", "qk_norm": 1, "weight_tying": "no"}
    del content["seq_len"]
    with pytest.raises(ConfigError) as caught:
        architecture_of(written(tmp_path, content))
    for part in ("seq_len is missing", "hidden_dim is '8'", "n_heads is 0", "ffn_type is 'relu'", "qk_norm is 1"):
        assert part in str(caught.value)
    assert "weight_tying is 'no'" in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "holds a list")])
def test_files_that_are_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture_of(written(tmp_path, content))


def test_unknown_keys_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        architecture_of(written(tmp_path, {**GOOD, "n_layer": 3, "norm_type": "rms_norm"}))
    assert [record.getMessage() for record in caplog.records] == [
        f"--model {tmp_path / 'mine.json'} (mine.json): the key n_layer is not known and has no effect"
    ]


def test_settings_of_a_run(shared_dir: Path, tmp_path: Path) -> None:
    checkpoint = shared_dir / "compat" / "run" / "logs" / "upstream" / "checkpoints" / "epoch_2.pt"
    settings = settings_of_run(str(checkpoint))
    assert settings["model_norm"] == "default_layer_norm"
    assert (settings["qk_norm"], settings["moe_num_experts"], settings["moe_capacity_factor"]) == (False, None, 1.25)
    assert settings_of_run(str(tmp_path / "epoch_2.pt")) == {}


def test_a_run_keeps_its_model_when_the_file_is_gone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "params.txt").write_text("model: gone/mine.json\n")
    checkpoint = str(tmp_path / "checkpoints" / "epoch_1.pt")
    assert settings_of_run(checkpoint)["model"] == "gone/mine.json"
    (tmp_path / "model.json").write_text(json.dumps(GOOD))
    assert architecture_of(settings_of_run(checkpoint)["model"]) == architecture_of(written(tmp_path, GOOD))


def test_no_torch_is_imported() -> None:
    code = "import sys, open_lm.config.architecture, open_lm.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
