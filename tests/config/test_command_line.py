"""Flags, abbreviations and configuration files, and the contract of the original flags (flags.json)."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.config.command_line import LATER_FLAGS, add_model_args, all_specs, build_parser, parse_args
from open_lm.config.no_effect import flags_without_effect
from open_lm.config.sections import ArchitectureConfig, Config, ModelConfig
from open_lm.config.suggestions import _OTHER_NAMES
from open_lm.errors import ConfigError


@pytest.fixture
def original_flags(shared_dir: Path) -> list[dict]:
    return json.loads((shared_dir / "compat" / "flags.json").read_text())


# Flags without choices in the contract whose unknown values have always been errors here.
CHECKED_FLAGS = ("optimizer", "lr_scheduler")


def test_original_flags_keep_type_default_and_choices(original_flags: list[dict]) -> None:
    specs = all_specs()
    defaults = vars(parse_args([]))
    assert len(original_flags) == 114
    for flag in original_flags:
        spec = specs[flag["dest"]]
        kind = "switch" if spec.kind is bool else spec.kind.__name__
        assert (kind, "+" if spec.many else None) == (flag["kind"], flag["nargs"]), flag
        assert (spec.choices is None) == (flag["choices"] is None) or flag["dest"] in CHECKED_FLAGS, flag
        assert set(spec.choices or ()) >= set(flag["choices"] or ()), flag
        assert defaults[flag["dest"]] == flag["default"], flag
    assert set(specs) - {flag["dest"] for flag in original_flags} == LATER_FLAGS


def test_unique_abbreviations_of_original_flags_stay_unique(original_flags: list[dict]) -> None:
    names = [flag["flag"] for flag in original_flags]
    samples = {"int": "3", "float": "0.5", "str": "x"}
    parser = build_parser()
    checked = 0
    for flag in original_flags:
        for length in range(3, len(flag["flag"])):
            prefix = flag["flag"][:length]
            if [name for name in names if name.startswith(prefix)] != [flag["flag"]]:
                continue
            if prefix == "--report":  # a flag of its own, whose error names --report-to
                continue
            value = flag["choices"][0] if flag["choices"] else samples.get(flag["kind"])
            given, unknown = parser.parse_known_args([prefix] if value is None else [prefix, value])
            assert list(vars(given)) == [flag["dest"]] and not unknown, prefix
            checked += 1
    assert checked > 500


def test_all_problems_are_reported_at_once() -> None:
    argv = "--tran-data x --lr abc --precision fp8 --epochs 2.5 --fsdp-amp --fsdp-pure-bf16 --beta1 1.5 --workers -1"
    with pytest.raises(ConfigError) as caught:
        parse_args([*argv.split(), "--eps", "nan"])
    message = str(caught.value)
    for expected in (
        "unknown flag --tran-data; did you mean --train-data",
        "--lr: found 'abc', expected a number",
        "--precision: found 'fp8', expected one of amp,",
        "--epochs: found '2.5', expected an integer",
        "--fsdp-amp reduces gradients in float32",
        "--beta1: found 1.5",
        "--workers: found -1, expected 0 or more",
        "--eps: found nan, expected 0 or more",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train-data a --dataset-manifest b", "--train-data and --dataset-manifest are mutually exclusive"),
        ("--dataset-manifest b --dataset-resampled", "with replacement"),
        ("--batch-size 2 --global-batch-size 8", "--batch-size 2 is per device, --global-batch-size 8 is over all"),
        ("--train-data a b --train-data-mix-weights 1", "found 1 values for 2 sources"),
        ("--lr-scheduler cosin", "expected one of cosine, const, const-cooldown"),
        ("--lr-scheduler const-cooldown", "--lr-scheduler const-cooldown requires --epochs-cooldown"),
        ("--report-to tensorbord", "found tensorbord"),
        ("--report wandb", "--report: found 'wandb', expected one of html, none; metrics go to other loggers with"),
        ("--attn-name custom_attn", "requires --attn-activation, --attn-seq-scalar, --attn-seq-scalar-alpha"),
        ("--squash-mask-left", "--squash-mask-left requires --target-mask-left"),
        ("--logs none --remote-sync s3://b/x", "but --logs none writes none"),
        ("--remote-sync gs://b/x", "set --remote-sync-protocol fsspec"),
        ("--name ../x", "--name: found '../x', expected the name of a folder inside --logs"),
        ("--moe-freq 2", "--moe-freq 2 requires --moe-num-experts"),
        ("--global-batch-size 6 --accum-freq 4", "--global-batch-size 6 is not divisible by --accum-freq 4"),
        ("--val-data a b c --val-data-key npy txt", "found 2 values for 3 validation sets"),
        ("--load-pretrained-state", "--load-pretrained-state requires --pretrained"),
        (
            "--recipe sft --hf-model x --hf-seq-len 8",
            "--document-mask of --recipe sft is not supported with --hf-model, which computes attention over full "
            "sequences; set --no-document-mask",
        ),
        ("--hf-model x --hf-seq-len 8 --document-mask", "--document-mask is not supported with --hf-model"),
        ("--hf-model x --hf-seq-len 8 --fp8", "--hf-model with --fp8 requires --hf-fsdp-block"),
        (
            "--hf-model x --hf-seq-len 8 --activation-checkpointing op",
            "--activation-checkpointing op: --hf-model supports only none and full",
        ),
        (
            "--hf-model x --hf-seq-len 8 --activation-checkpointing 2",
            "--activation-checkpointing 2: --hf-model supports only none and full",
        ),
        ("--torchcompile --torchcompile-mode max-autotune --accum-freq 2", "remove --accum-freq"),
        ("--deterministic --attn-name xformers_attn", "--attn-name xformers_attn: its kernels are not deterministic"),
        ("--lr", "expected one argument"),
    ],
)
def test_contradictions_are_errors_that_name_the_flags(argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_args(argv.split())


@pytest.mark.parametrize(
    ("argv", "checked_with"),
    [
        ("--val-data x --train-data-mix-weights 1 2", "--train-data y"),
        ("--val-data x --accum-freq 3", "--train-data y"),
        ("--val-data x --log-avg-model-training-loss 5", "--train-data y"),
        ("--val-data x --torchcompile --torchcompile-mode max-autotune --accum-freq 2", "--train-data y"),
        ("--val-data-key npy txt", "--val-data x y z"),
        ("--epochs-cooldown 50", "--lr-scheduler const-cooldown"),
        ("--moe-num-experts 1", "--moe-freq 2"),
        ("--lr-scheduler const-cooldown --skip-scheduler", "--no-skip-scheduler"),
        ("--deterministic --attn-name xformers_attn --hf-seq-len 8", None),
        ("--resume a.pt --average-coefficients 1 2", "--resume latest"),
        ("--resume a.pt --average b c --pretrained d", "--resume latest"),
    ],
)
def test_settings_that_are_off_contradict_nothing(argv: str, checked_with: str | None) -> None:
    """The same settings are errors once `checked_with` makes them take effect."""
    if checked_with is None:
        parse_args([*argv.split(), "--hf-model", "x"])
        return
    parse_args(argv.split())
    with pytest.raises(ConfigError):
        parse_args([*argv.split(), *checked_with.split()])


def test_a_run_requires_data_and_the_number_of_tokens() -> None:
    with pytest.raises(ConfigError, match="nothing to do"):
        parse_args([], for_run=True)
    with pytest.raises(ConfigError, match="--train-num-samples is missing"):
        parse_args(["--train-data", "x"], for_run=True)
    assert parse_args(["--val-data", "x"], for_run=True).val_data == ["x"]


def test_config_file_overrides_defaults_and_command_line_overrides_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train-data: shard.tar\nlr: 1e-4\nfsdp_amp: true\nepochs: 7\nval_data: [a, b]\nresume: null\n")
    args = parse_args(["--config", str(path), "--epochs", "3"])
    assert (args.train_data, args.lr, args.fsdp_amp, args.epochs) == (["shard.tar"], 1e-4, True, 3)
    assert args.val_data == ["a", "b"] and args.resume is None and args.config == str(path)

    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps({"train_data": ["shard.tar"], "lr": 1e-4}))
    assert parse_args(["--config", str(as_json)]).lr == 1e-4


def test_every_boolean_flag_has_a_negation_that_overrides_the_config_file(tmp_path: Path) -> None:
    switches = [spec for spec in all_specs().values() if spec.kind is bool]
    path = tmp_path / "run.json"
    for value in (True, False):
        path.write_text(json.dumps({spec.name: value for spec in switches}))
        negations = [f"--no-{spec.flag[2:]}" for spec in switches]
        args = vars(parse_args(["--config", str(path), *negations]))
        assert not any(args[spec.name] for spec in switches)
    assert parse_args(["--no-fsdp", "--fsdp"]).fsdp and not parse_args(["--fsdp", "--no-fsdp"]).fsdp
    path.write_text('{"fsdp": false}')
    assert not parse_args(["--config", str(path)]).fsdp and parse_args(["--config", str(path), "--fsdp"]).fsdp


def test_negations_are_absent_from_the_list_of_flags_and_do_not_change_abbreviations() -> None:
    assert "--fsdp " in (text := build_parser().format_help()) and text.count("--no-fsdp") == 1
    for prefix in ("--no", "--no-", "--no-s"):
        assert parse_args([prefix]).no_set_device_rank
    assert not parse_args(["--grad-checkpointing", "--no-grad-c"]).grad_checkpointing
    assert not parse_args(["--no-set-device-rank", "--no-no-set-device-rank"]).no_set_device_rank


def test_no_fsdp_contradicts_a_mesh_that_shards() -> None:
    with pytest.raises(ConfigError, match="--no-fsdp contradicts --mesh-dim 1,2,1, which shards"):
        parse_args(["--mesh-dim", "1,2,1", "--no-fsdp"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learning-rate", "--lr"),
        ("--weight-decay", "--wd"),
        ("--gradient-accumulation-steps", "--accum-freq"),
        ("--warmup-steps", "--warmup"),
        ("--num-workers", "--workers"),
        ("--clip-grad-norm", "--grad-clip-norm"),
        ("--micro-batch-size", "--batch-size"),
        ("--max-steps", "--train-num-samples or --epochs"),
        ("--bf16", "--precision"),
        ("--train_data", "--train-data"),
    ],
)
def test_unknown_flags_are_explained_by_meaning_and_spelling(given: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown flag {given}; did you mean {meant}?")):
        parse_args([given, "1"])
    path = tmp_path / "run.json"
    path.write_text('{"learning_rate": 1}')
    with pytest.raises(ConfigError, match=re.escape("unknown key 'learning_rate'; did you mean lr?")):
        parse_args(["--config", str(path)])


def test_names_of_other_programs_map_to_flags() -> None:
    assert {name for names in _OTHER_NAMES.values() for name in names} <= set(all_specs())
    assert not set(_OTHER_NAMES) & set(all_specs())


def test_invalid_config_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("traindata: x\nlr: fast\nepochs: true\nname: 5\nfsdp: 'yes'\nworkers: null\n")
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(path)])
    message = str(caught.value)
    assert f"{path}: unknown key 'traindata'; did you mean train_data" in message
    for flag in ("--lr: found 'fast'", "--epochs: found True", "--name: found 5", "--fsdp: found 'yes'", "--workers"):
        assert flag in message
    path.write_text("- just\n- a list\n")
    with pytest.raises(ConfigError, match="contains a list, expected a mapping"):
        parse_args(["--config", str(path)])
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match="neither valid YAML nor JSON"):
        parse_args(["--config", str(path)])
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml"):
        parse_args(["--config", str(tmp_path / "missing.yaml")])


def test_sections_from_namespaces() -> None:
    args = parse_args(["--lr", "0.1", "--model-norm", "rms_norm"])
    config = Config.from_namespace(args)
    assert (config.optim.lr, config.model.model_norm) == (0.1, "rms_norm")
    partial = ModelConfig.from_object(argparse.Namespace(model="open_lm_11m", something_else=1))
    assert (partial.model, partial.qk_norm) == ("open_lm_11m", False)


def test_flags_without_effect_are_reported_only_when_set() -> None:
    assert flags_without_effect(Config.from_namespace(parse_args([]))) == []
    used = parse_args(["--torchscript", "--fsdp-hybrid", "--use-bnb-linear", "x"])
    notes = flags_without_effect(Config.from_namespace(used))
    assert len(notes) == 3 and any("--fsdp-hybrid has no effect without --fsdp" in note for note in notes)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--attn-activation relu", "--attn-activation has no effect without --attn-name custom_attn"),
        ("--epochs-cooldown 1", "--epochs-cooldown has no effect without --lr-scheduler const-cooldown"),
        ("--skip-scheduler --warmup 5", "--warmup has no effect with --skip-scheduler"),
        ("--hf-model x --hf-seq-len 8 --qk-norm", "--qk-norm has no effect with --hf-model"),
        (
            "--hf-model x --hf-seq-len 8 --torchcompile",
            "--torchcompile has no effect with --hf-model but without --hf-fsdp-block",
        ),
        ("--resume a.pt --pretrained b.pt", "--pretrained has no effect with --resume"),
        ("--val-data a --log-gradient-noise", "--log-gradient-noise has no effect without training data"),
        ("--val-seq-ci", "--val-seq-ci has no effect without --val-data"),
        ("--muon-momentum 0.5", "--muon-momentum has no effect without --optimizer muon"),
        ("--lr-decay-shape linear", "--lr-decay-shape has no effect without --lr-scheduler wsd"),
        ("--lr-scheduler const --lr-cooldown-end 1", "--lr-cooldown-end has no effect with --lr-scheduler const"),
        ("--remote-sync-frequency 5", "--remote-sync-frequency has no effect without --remote-sync"),
        ("--mup-base-width 64", "--mup-base-width has no effect without --mup"),
        ("--moe-top-k 1", "--moe-top-k has no effect without --moe-freq"),
        ("--accum-freq 2 --accum-reduce every-micro-batch", "--accum-reduce has no effect without --fsdp"),
        ("--fsdp --accum-reduce every-micro-batch", "--accum-reduce has no effect without --accum-freq above 1"),
        ("--torchcompile --async-tensor-parallel", "--async-tensor-parallel has no effect without --tensor-parallel"),
        (
            "--mesh-dim 1,1,2 --async-tensor-parallel",
            "--async-tensor-parallel has no effect without --torchcompile",
        ),
        ("--model-norm rms_norm", "--model-norm has no effect: the --model file sets model_norm to default_layer_norm"),
    ],
)
def test_flags_that_other_settings_disable_are_reported(argv: str, expected: str) -> None:
    file = {"model_norm": "default_layer_norm"}
    (note,) = flags_without_effect(Config.from_namespace(parse_args(argv.split())), file)
    assert note.startswith(expected)


def test_flags_with_an_effect_are_not_reported() -> None:
    argv = "--resume latest --pretrained b.pt --moe-top-k 1 --val-data x --val-seq-ci --report-to all --wandb-notes n"
    assert flags_without_effect(Config.from_namespace(parse_args(argv.split())), {"moe_freq": 2, "moe_top_k": 1}) == []
    assert flags_without_effect(Config.from_namespace(parse_args([])), {"mup": True, "mup_base_width": 64}) == []
    argv = "--hf-model x --hf-seq-len 8 --hf-fsdp-block Layer --torchcompile"
    assert flags_without_effect(Config.from_namespace(parse_args(argv.split()))) == []


def test_add_model_args_to_the_parser_of_another_program() -> None:
    parser = argparse.ArgumentParser()
    add_model_args(parser)
    args = parser.parse_args(["--qk-norm", "--model-norm", "gain_only_lp_layer_norm", "--moe-freq", "2"])
    assert (args.qk_norm, args.model_norm, args.moe_freq) == (True, "gain_only_lp_layer_norm", 2)
    assert vars(parser.parse_args([])) == {spec.name: spec.default for spec in ArchitectureConfig.specs()}


@pytest.mark.processes
def test_help_imports_no_large_library() -> None:
    code = (
        "import sys; from open_lm.config.command_line import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
