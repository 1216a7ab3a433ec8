"""Model configuration files: names, paths, and errors for invalid ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm import storage
from open_lm.config.architecture import COUNTS, FAMILY_KEY, SWITCHES, model_names, read_architecture, read_run_settings
from open_lm.config.command_line import parse_args
from open_lm.config.model_keys import ModelKeys
from open_lm.config.no_effect import flags_without_effect
from open_lm.config.sections import ArchitectureConfig, Config, ModelConfig
from open_lm.errors import ConfigError
from open_lm.model.params import create_params

GOOD = {"hidden_dim": 8, "n_layers": 1, "n_heads": 2, "seq_len": 4, "vocab_size": 5}


def write(folder: Path, content: object, name: str = "mine.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", model_names())
def test_bundled_configurations_are_valid(name: str) -> None:
    assert read_architecture(name)["n_layers"] > 0


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
    assert read_architecture(alias) == read_architecture(name)


def test_m1b_tiktoken_differs_from_1b_in_vocabulary_only() -> None:
    assert read_architecture("m1b_tiktoken") == {**read_architecture("open_lm_1b"), "vocab_size": 50304}


def test_model_names_are_in_natural_order() -> None:
    names = model_names()
    assert names.index("open_lm_25m") < names.index("open_lm_160m")


def test_read_from_a_path_with_defaults(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, GOOD)) == {**GOOD, "post_embed_norm": False, "weight_tying": False}


def test_unknown_name_lists_similar_names() -> None:
    with pytest.raises(ConfigError, match=r"--model open_lm_1bb: unknown model; similar names: .*open_lm_1b"):
        read_architecture("open_lm_1bb")
    with pytest.raises(ConfigError, match="open_lm_160m"):
        read_architecture("zzz")


def test_missing_file_suggests_the_bundled_model() -> None:
    with pytest.raises(ConfigError, match="file not found; to use the model of this name, set --model open_lm_1b"):
        read_architecture("nowhere/open_lm_1b.json")


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    content = {**GOOD, "hidden_dim": "8", "n_heads": 0, "ffn_type": "relu", "qk_norm": 1, "weight_tying": "no"}
    del content["seq_len"]
    with pytest.raises(ConfigError) as caught:
        read_architecture(write(tmp_path, content))
    for part in ("seq_len is missing", "hidden_dim is '8'", "n_heads is 0", "ffn_type is 'relu'", "qk_norm is 1"):
        assert part in str(caught.value)
    assert "weight_tying is 'no'" in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "contains a list")])
def test_invalid_files_are_errors(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_architecture(write(tmp_path, content))


def test_unknown_keys_are_errors(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, {**GOOD, "norm_type": "rms_norm", "name": "mine"}))["n_layers"] == 1
    with pytest.raises(ConfigError, match=r"the key n_layer is unknown; did you mean n_layers\?") as caught:
        read_architecture(write(tmp_path, {**GOOD, "n_layer": 3, "zzz": 1}))
    assert "the key zzz is unknown; remove it" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads is 3, expected a divisor of n_heads 4"),
        ({"n_kv_heads": 1.0}, "n_kv_heads is 1.0, expected an integer"),
        ({"head_dim": 0}, "head_dim is 0, expected at least 1"),
        ({"attn_soft_cap": 0}, "attn_soft_cap is 0, expected a number above 0"),
        ({"residual_dropout": 1.0}, "residual_dropout is 1.0, expected a number from 0 to below 1"),
        ({"attn_window_pattern": [True]}, "no effect without attn_window"),
        ({"attn_window": 4, "attn_window_pattern": True}, "is True, expected a list, each true or false"),
        ({"attn_window": 4, "attn_window_pattern": []}, "attn_window_pattern is empty"),
        ({"qk_norm": False, "qk_norm_per_head": True}, "qk_norm_per_head has no effect without qk_norm"),
        ({"attn_window": 4, "attn_window_pattern": [False]}, "attn_window has no effect because attn_window_pattern"),
        (
            {"positional_embedding_type": "none", "rope_base": 1e5, "rope_pattern": [True, False]},
            r"(?s)rope_base has no effect without rotary embeddings.*rope_pattern has no effect",
        ),
        ({"rope_pattern": [False], "rope_fraction": 0.5}, "rope_fraction has no effect because rope_pattern is false"),
        (
            {"moe_freq": 0, "moe_ffn_dim": 5, "moe_loss_scope": "model", "moe_ffn_type": "swiglu"},
            r"(?s)moe_ffn_type has no effect without moe_freq.*moe_ffn_dim has.*moe_loss_scope has",
        ),
        ({"moe_freq": 1, "moe_num_experts": 2, "ffn_dim": 5}, "ffn_dim has no effect because moe_freq 1 puts experts"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5, expected at most 1"),
        ({"unpadded_vocab_size": 9}, "unpadded_vocab_size is 9, above vocab_size 5"),
        ({"norm_position": "around"}, "norm_position is 'around', expected one of pre, post, both"),
        ({"rope_frequency_scaling": 2}, "rope_frequency_scaling is 2, expected an object"),
        (
            {"rope_frequency_scaling": {"type": "spiral"}},
            "type 'spiral', expected one of linear, llama3, yarn, dynamic, longrope, proportional; others are not",
        ),
        (
            {"rope_frequency_scaling": {"type": "linear", "factr": 2}},
            r"(?s)factor is missing.*the key factr is unknown",
        ),
        ({"rope_frequency_scaling": {"type": "linear", "factor": -1}}, "factor is -1, expected a number above 0"),
        (
            {"rope_frequency_scaling": {"type": "longrope", "short_factor": 1, "long_factor": [1, 0]}},
            r"(?s)factor is missing.*original_seq_len is missing.*short_factor is 1, expected a list.*long_factor is",
        ),
        (
            {"rope_frequency_scaling": {"type": "yarn", "factor": 2, "original_seq_len": 8, "truncate": 1}},
            "truncate is 1, expected true or false",
        ),
    ],
)
def test_invalid_values_of_keys(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_architecture(write(tmp_path, {**GOOD, **keys}))


def test_keys_without_effect_depend_on_flags_too(tmp_path: Path) -> None:
    """New keys without effect are errors; keys that older files contain are reported as flags are."""
    model = write(tmp_path, {**GOOD, "moe_ffn_dim": 6, "qk_norm_per_head": True})
    assert read_architecture(model)["moe_ffn_dim"] == 6
    params = create_params(ModelConfig(model=model, qk_norm=True, moe_freq=1, moe_num_experts=2))
    assert (params.moe_ffn_dim, params.qk_norm_per_head) == (6, True)
    with pytest.raises(
        ConfigError, match=r"(?s)qk_norm_per_head has no effect without qk_norm.*moe_ffn_dim has no eff"
    ):
        create_params(ModelConfig(model=model))
    older = {**GOOD, "moe_freq": 0, "moe_top_k": 3, "attn_seq_scalar": "max", "moe_weight_parallelism": True}
    file = read_architecture(write(tmp_path, older))
    config = Config.from_namespace(parse_args([]))
    sentences = flags_without_effect(config, file)
    for part in (
        "moe_top_k of the --model file has no effect without --moe-freq",
        "attn_seq_scalar of",
        "moe_weight_par",
    ):
        assert any(part in sentence for sentence in sentences), sentences
    assert not flags_without_effect(config, read_architecture("open_lm_1b_old"))


def test_every_key_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "model_configs.md").read_text(encoding="utf-8")
    keys = page.partition("\n## Keys\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", keys, flags=re.MULTILINE))
    specs = {spec.name: spec for spec in (*ArchitectureConfig.specs(), *ModelKeys.specs())}
    assert set(rows) == {*COUNTS, *SWITCHES, *specs, FAMILY_KEY}
    for name, spec in specs.items():
        default = "—" if spec.default is None else json.dumps(spec.default).strip('"')
        assert rows[name].strip().strip("`") == default, name


def test_read_run_settings(shared_dir: Path, tmp_path: Path) -> None:
    checkpoint = shared_dir / "compat" / "run" / "logs" / "upstream" / "checkpoints" / "epoch_2.pt"
    settings = read_run_settings(str(checkpoint))
    assert settings["model_norm"] == "default_layer_norm"
    assert (settings["qk_norm"], settings["moe_num_experts"], settings["moe_capacity_factor"]) == (False, None, 1.25)
    assert read_run_settings(str(tmp_path / "epoch_2.pt")) == {}


def test_run_settings_use_the_copied_model_file_if_the_original_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "params.txt").write_text("model: gone/mine.json\n")
    checkpoint = str(tmp_path / "checkpoints" / "epoch_1.pt")
    assert read_run_settings(checkpoint)["model"] == "gone/mine.json"
    (tmp_path / "model.json").write_text(json.dumps(GOOD))
    assert read_architecture(read_run_settings(checkpoint)["model"]) == read_architecture(write(tmp_path, GOOD))


@pytest.mark.parametrize("run", ["relative", "remote"])
def test_run_settings_use_the_copied_model_file_of_a_remote_run_or_from_within_the_run_folder(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if run == "relative" else f"s3://{request.getfixturevalue('s3_bucket')}/run"
    storage.write_text(f"{root}/params.txt", "model: gone/mine.json\nqk_norm: True\n")
    storage.write_text(f"{root}/model.json", json.dumps(GOOD))
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoints")
    settings = read_run_settings("epoch_1.pt" if run == "relative" else f"{root}/checkpoints/step_00000010")
    assert settings["qk_norm"] is True
    assert read_architecture(settings["model"]) == read_architecture(write(tmp_path, GOOD))


@pytest.mark.processes
def test_no_torch_is_imported() -> None:
    code = "import sys, open_lm.config.architecture, open_lm.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
