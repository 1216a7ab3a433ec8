"""Freeze the public interface: import paths, signatures, attributes and command-line entry points.

Programs and scripts of existing users depend on everything listed here. A failure means that a change breaks them.

Other parts of the public interface are frozen in these tests:
    config/test_command_line.py                    flags of the trainer: types, defaults, abbreviations
    training/test_trainer.py                       training lines in out.log ("Train Epoch: ...")
    training/test_main.py                          files of a run, params.txt, format of log lines
    evaluate/test_evaluate.py                      keys of results.jsonl
    evaluate/test_eval_environment.py              import paths in the environment of llm-foundry
    checkpoint/test_checkpoint.py                  files and keys of checkpoints
    data/test_shard_format.py, test_provenance.py  shard formats, keys of manifests
    datapreprocess/test_make_2048.py, test_tokenize_shuffle.py  output folders and manifests of preprocessing
    model/test_architecture.py, test_model.py      model configurations and their numbers of parameters
    model/test_golden_models.py                    state-dict names, logits and losses of old checkpoints
    distributed/test_distributed.py                environment variables of the rank
    test_package.py                                name and version of the distribution
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from public_signatures import SIGNATURES

ROOT = Path(__file__).resolve().parents[1]

# Commands with --help, by the way in which users start them.
MODULES = (
    "open_lm.main",
    "open_lm.evaluate.compare",
    "open_lm.evaluate.export",
    "open_lm.evaluate.icl.download",
    "open_lm.evaluate.lm_eval",
    "open_lm.finetune.cache_teacher",
    "open_lm.finetune.dpo",
    "open_lm.finetune.grpo",
    "open_lm.finetune.merge",
    "open_lm.finetune.prune",
    "open_lm.hf.convert",
    "open_lm.plan",
    "open_lm.release",
    "open_lm.report",
    "open_lm.scaling",
    "open_lm.datapreprocess.make_2048",
    "open_lm.datapreprocess.ray.tokenize_shuffle",
    "open_lm.utils.convert_checkpoint",
    "open_lm.utils.inspect_shards",
    "open_lm.utils.make_wds_manifest",
    "open_lm.utils.torchrun",
)
SCRIPTS = (
    "datapreprocess/make_2048.py",
    "datapreprocess/make_sft.py",
    "datapreprocess/ray/tokenize_shuffle.py",
    "eval/eval_openlm_ckpt.py",
    "scripts/bench_checkpoint.py",
    "scripts/bench_cpu_kernels.py",
    "scripts/bench_loader.py",
    "scripts/bench_loss.py",
    "scripts/bench_preprocess.py",
    "scripts/bench_s3.py",
    "scripts/bench_shuffle.py",
    "scripts/bench_train.py",
    "scripts/chat.py",
    "scripts/check_plan.py",
    "scripts/checks/check_distillation.py",
    "scripts/checks/check_icl_agreement.py",
    "scripts/checks/check_preferences.py",
    "scripts/checks/check_published.py",
    "scripts/checks/harness_differences.py",
    "scripts/compare_curves.py",
    "scripts/download.py",
    "scripts/generate.py",
    "scripts/kill_preprocess.py",
    "scripts/kill_training.py",
    "scripts/launch.py",
    "scripts/parity.py",
    "scripts/python_docs.py",
    "scripts/quickstart.py",
)

# Run every command in its own fork of a process that has imported torch: importing it for each command is slow.
RUN_HELP = """
import json, os, runpy, sys, traceback
import numpy, torch
import open_lm.model
folder, commands = sys.argv[1], json.loads(sys.argv[2])
children = {}
for number, (kind, target) in enumerate(commands):
    pid = os.fork()
    if pid:
        children[pid] = target
        continue
    output = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    code = 0
    try:
        sys.argv = [target, "--help"]
        if kind == "script":
            sys.path[0] = os.path.dirname(os.path.realpath(target))
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
codes = {}
while children:
    pid, status = os.wait()
    codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes))
"""


def resolve(path: str) -> Any:
    """Return the object at an import path; attributes of classes are allowed."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise ModuleNotFoundError(path)


def frozen_parameters(text: str) -> list[inspect.Parameter]:
    """Parse a parameter list of SIGNATURES; several positional parameters may be called "_"."""
    names = iter(range(100))
    source = re.sub(r"(^|(?<=, ))_(?=,|$)", lambda match: f"positional_{next(names)}", text)
    namespace: dict[str, Any] = {}
    exec(f"def function({source}): ...", namespace)
    return list(inspect.signature(namespace["function"]).parameters.values())


def difference(function: Callable[..., Any], text: str) -> str:
    """Return how a callable's parameters differ from the frozen ones; empty if they are compatible."""
    empty = inspect.Parameter.empty
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    actual = [p for p in inspect.signature(function).parameters.values() if p.kind not in variadic]
    frozen = frozen_parameters(text)
    if len(actual) < len(frozen):
        return f"{len(frozen) - len(actual)} parameters are missing"
    for old, new in zip(frozen, actual, strict=False):
        if not old.name.startswith("positional_") and old.name != new.name:
            return f"{new.name} instead of {old.name}"
        if new.kind is inspect.Parameter.KEYWORD_ONLY:
            return f"{new.name} must be accepted by position"
        if old.default is not empty and old.default != new.default:
            return f"the default of {new.name} is {new.default!r} instead of {old.default!r}"
    required = [p.name for p in actual[len(frozen) :] if p.default is empty]
    return f"new required parameters {required}" if required else ""


# --- Python -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path: str) -> None:
    assert not difference(resolve(path), SIGNATURES[path])


def test_signature_check_detects_breaking_changes() -> None:
    def function(first: int, second: int = 2, *, third: int = 3) -> None: ...

    for compatible in ("first", "_", "first, second=2", "first, second"):
        assert not difference(function, compatible)
    for broken in ("", "one", "first, second=1", "first, second=2, third=3", "first, second=2, third=3, fourth=4"):
        assert difference(function, broken)


def test_attention_tables() -> None:
    attention = importlib.import_module("open_lm.attention")
    assert {"relu", "relu_squared", "softplus", "identity", "relu6", "sigmoid", "softmax"} <= set(
        attention.ATTN_ACTIVATIONS
    )
    assert {"max", "avg", "none"} <= set(attention.ATTN_SEQ_SCALARS)
    assert isinstance(attention.ATTN_ACTIVATIONS, dict) and isinstance(attention.ATTN_SEQ_SCALARS, dict)


def test_model_attributes_and_outputs(tmp_path: Path) -> None:
    from open_lm.model import create_model, create_params
    from open_lm.params import parse_args

    args = parse_args(["--model", "open_lm_test_tiny"])
    model = create_model(args)
    assert (model.vocab_size, model.seq_len, type(model.params).__name__) == (16, 16, "Params")
    assert {"attn_func", "norm_type"} <= set(vars(model.params)) == set(vars(create_params(args)))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    logits, hidden, cache = model(ids)
    assert (logits.shape, logits.dtype, hidden.shape, cache) == ((1, 4, 16), torch.float32, (1, 4, 16), None)
    cache = model(ids, use_cache=True)[2]
    assert cache is not None and len(cache) == 2
    assert model(ids[:, :1], past_key_values=cache)[0].shape == (1, 1, 16)
    config = {"hidden_dim": 8, "n_layers": 1, "n_heads": 2, "seq_len": 4, "vocab_size": 5}
    (tmp_path / "own.json").write_text(json.dumps({**config, "post_embed_norm": False, "weight_tying": False}))
    assert create_params(parse_args(["--model", str(tmp_path / "own.json")])).vocab_size == 5


def test_transformers_names() -> None:
    from transformers import AutoConfig

    import open_lm.hf
    import open_lm.utils.transformers.hf_config
    import open_lm.utils.transformers.hf_model

    assert open_lm.hf.OpenLMConfig.model_type == "openlm" and AutoConfig.for_model("openlm").model_type == "openlm"
    assert open_lm.utils.transformers.hf_config.OpenLMConfig is open_lm.hf.OpenLMConfig
    assert open_lm.utils.transformers.hf_model.OpenLMforCausalLM is open_lm.hf.OpenLMForCausalLM
    assert open_lm.utils.transformers.hf_model.OpenLMModel is open_lm.hf.OpenLMModel


def test_composer_wrapper() -> None:
    """Composer is installed only in .venv-eval, so read the source."""
    tree = ast.parse((ROOT / "open_lm" / "evaluate" / "engines" / "foundry_model.py").read_text(encoding="utf-8"))
    (wrapper,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SimpleComposerOpenLMCausalLM"
    )
    (init,) = (node for node in wrapper.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert [argument.arg for argument in init.args.args] == ["self", "model", "tokenizer"]


def test_imports_in_the_documentation() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    imports = [
        match
        for page in pages
        for match in re.findall(r"^ *from (open_lm[\w.]*) import ([\w, ]+)$", page.read_text("utf-8"), re.MULTILINE)
    ]
    assert imports
    for module, names in imports:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name.strip()}"


# --- command line -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def help_codes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[int, str]]:
    """Return the exit code and the output of `--help` of every command."""
    folder = tmp_path_factory.mktemp("help")
    commands = [("module", name) for name in MODULES] + [("script", str(ROOT / name)) for name in SCRIPTS]
    command = [sys.executable, "-c", RUN_HELP, str(folder), json.dumps(commands)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    codes = json.loads(result.stdout)
    outputs = [(folder / str(number)).read_text() for number in range(len(commands))]
    return {target.removeprefix(f"{ROOT}/"): (codes[target], output)
            for (_, target), output in zip(commands, outputs, strict=True)}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("command", [*MODULES, *SCRIPTS])
def test_help(command: str, help_codes: Mapping[str, tuple[int, str]]) -> None:
    code, output = help_codes[command]
    assert code == 0, output
    assert "usage:" in output.lower()


def test_documented_commands_are_tested() -> None:
    """Every module and script that a page starts with python is in the tables above."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    modules = set(re.findall(r"python -m (open_lm[\w.]*\w)", text))
    scripts = set(re.findall(r"python (?:\.\./)?((?:scripts|datapreprocess)/[\w/]+\.py)", text))
    assert "open_lm.main" in modules and "scripts/generate.py" in scripts
    assert modules <= set(MODULES)
    tested = {(ROOT / name).resolve() for name in SCRIPTS}  # several scripts have an old path, a link
    assert {name for name in scripts if (ROOT / name).resolve() not in tested} == set()


@pytest.mark.processes
def test_flags_of_preprocessing_and_manifest_commands(help_codes: Mapping[str, tuple[int, str]]) -> None:
    """The trainer's flags are frozen in tests/config/test_command_line.py."""
    flags = {
        "datapreprocess/make_2048.py": (
            "--input-files --output-dir --tokenizer --num-workers --num-consumers --upload-to-s3"
        ),
        "datapreprocess/ray/tokenize_shuffle.py": (
            "--input --output --content_key --seqlen --tokenizer --vocab_size --wds_chunk_size --seed --subset "
            "--subfraction --ray_address --ray_spill_location --ray_dashboard_host --force_parallelism "
            "--force_num_cores --num_writers_per_node --no_shuffle --do_sample --default_dataset_yaml --suffixes "
            "--presort --allow_imbalanced_write"
        ),
        "open_lm.utils.make_wds_manifest": "--data-dir --manifest-filename --num-workers --tmp-dir",
        "eval/eval_openlm_ckpt.py": "--checkpoint --eval-yaml --model --model-config --tokenizer --data-dir",
    }
    for command, names in flags.items():
        listed = set(re.findall(r"(?<![\w-])--[\w-]+", help_codes[command][1]))
        assert set(shlex.split(names)) <= listed, command
