"""Registries: entries are found without imports, and one new file adds a norm, an optimizer, a schedule or a logger."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

from open_lm.config import registry
from open_lm.config.command_line import all_specs, parse_args
from open_lm.config.registry import LOGGERS, NORMS, OPTIMIZERS, SCHEDULES, Registry
from open_lm.errors import ConfigError

REGISTRIES = {name: value for name, value in vars(registry).items() if isinstance(value, Registry)}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry TOYS of a package `toy_package` with two modules."""
    package = tmp_path / "toy_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").touch()
    write_module(package / "a.py", 'TOYS.register("late", weight=2.5)(len)\n@TOYS.register("round")\nclass Ball: pass')
    write_module(
        package / "inner" / "b.py", 'registry.TOYS.register("first", help="the " "default", parts=("x",))(max)'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "TOYS", Registry("TOYS", "--toy", "toy_package", default="first"), raising=False)
    registry._declarations.cache_clear()
    yield registry.TOYS  # type: ignore[attr-defined]
    registry._declarations.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_package"]:
        del sys.modules[name]


def write_module(path: Path, code: str) -> None:
    path.write_text(f"from open_lm.config import registry\nfrom open_lm.config.registry import TOYS\n{code}\n")


def test_entries_are_read_without_importing_their_modules(toys: Registry) -> None:
    assert toys.names() == ("first", "late", "round")
    assert toys.entry("first").module == "toy_package.inner.b"
    assert (toys.entry("first").help, toys.fact("first", "parts")) == ("the default", ("x",))
    assert (toys.fact("late", "weight"), toys.fact("round", "weight", 1)) == (2.5, 1)
    assert toys.summary() == "first (the default)"
    assert "toy_package.a" not in sys.modules and toys.objects == {}


def test_get_imports_only_the_declaring_module(toys: Registry) -> None:
    assert toys.get("first") is max
    assert "toy_package.inner.b" in sys.modules and "toy_package.a" not in sys.modules
    assert toys.get("round").__name__ == "Ball"
    assert toys.names() == ("first", "late", "round")


def test_unknown_names_list_the_valid_ones(toys: Registry) -> None:
    for call in (toys.get, toys.entry):
        with pytest.raises(ConfigError, match=r"^--toy: found 'cube', expected one of first, late, round$"):
            call("cube")
    assert "cube" not in toys and "late" in toys and len(toys) == 3


def test_objects_registered_at_run_time(toys: Registry) -> None:
    toys.register("own", help="registered by a program", weight=4)(min)
    toys.objects["bare"] = abs
    assert toys.names() == ("first", "late", "round", "own", "bare")
    assert (toys.get("own"), toys.fact("own", "weight"), toys.get("bare")) == (min, 4, abs)


def test_a_name_belongs_to_one_module(toys: Registry, tmp_path: Path) -> None:
    toys.register("late")(min)
    with pytest.raises(ValueError, match=f"TOYS: both {__name__} and toy_package.a register 'late'"):
        toys.get("round")
    write_module(tmp_path / "toy_package" / "c.py", 'TOYS.register("first")(min)')
    registry._declarations.cache_clear()
    with pytest.raises(ValueError, match=r"TOYS: both toy_package\.c and toy_package\.inner\.b register 'first'"):
        toys.names()


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("NAME = 'x'\nTOYS.register(NAME)(min)", ValueError, r"c\.py, line 4: arguments of TOYS.register must be lit"),
        (
            "TOYS.register('x', fact=1 + len([]))(min)",
            ValueError,
            "line 3: arguments of TOYS.register must be literals",
        ),
        ("TOYS.register('x')(min", ConfigError, r"c\.py, line 3: .*; fix or remove this file"),
    ],
)
def test_declarations_that_cannot_be_read(
    toys: Registry, tmp_path: Path, code: str, error: type[Exception], message: str
) -> None:
    write_module(tmp_path / "toy_package" / "c.py", code)
    registry._declarations.cache_clear()
    with pytest.raises(error, match=message):
        toys.names()


def test_a_fact_that_the_planner_requires(toys: Registry) -> None:
    assert toys.required_fact("first", "parts") == ("x",)
    with pytest.raises(ConfigError, match=r"--toy late: toy_package\.a does not declare the fact 'parts', which"):
        toys.required_fact("late", "parts")


@pytest.mark.parametrize("name", sorted(REGISTRIES))
def test_every_declared_entry_can_be_loaded(name: str) -> None:
    for entry in REGISTRIES[name].entries().values():
        value = REGISTRIES[name].get(entry.name)
        assert callable(value) or is_dataclass(value)


def test_defaults_are_listed_first() -> None:
    for spec in all_specs().values():
        if spec.registry is not None and spec.default is not None:
            assert spec.choices is not None and spec.choices[0] == spec.default


def test_a_norm_that_a_program_registers_is_a_valid_flag_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NORMS, "objects", dict(NORMS.objects))
    monkeypatch.setattr(NORMS, "_registered", dict(NORMS._registered))
    with pytest.raises(ConfigError, match="--model-norm: found 'own_norm', expected one of default_layer_norm"):
        parse_args(["--model-norm", "own_norm"])
    NORMS.register("own_norm", help="a norm of this test")(torch.nn.LayerNorm)
    assert parse_args(["--model-norm", "own_norm"]).model_norm == "own_norm"
    assert "own_norm (a norm of this test)" in all_specs()["model_norm"].help


NEW_FILES = {
    "model/gain.py": '''
        """A norm that is only a gain."""
        import torch
        from torch import nn
        from open_lm.config.registry import NORMS

        @NORMS.register("only_gain", help="a gain without normalization", parameters=("weight",))
        class Gain(nn.Module):
            def __init__(self, width, eps=1e-5):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(width))

            def forward(self, x):
                return x * self.weight
        ''',
    "optim/harmonic.py": '''
        """A schedule that falls as 1 / step."""
        from open_lm.config.registry import SCHEDULES

        @SCHEDULES.register("harmonic", help="lr / (step + 1)")
        def harmonic(optimizer, cfg, total_steps, cooldown_start):
            def adjust(step):
                for group in optimizer.param_groups:
                    group["lr"] = cfg.lr / (step + 1)
                return cfg.lr / (step + 1)

            return adjust
        ''',
    "monitor/notes.py": '''
        """A logger that writes one line of text per step."""
        from open_lm.config.registry import LOGGERS

        @LOGGERS.register("notes", help="a text file")
        class Notes:
            def __init__(self, cfg, paths, params, start_step):
                self.path = f"{paths.root}/notes.txt"

            def log(self, values, step):
                with open(self.path, "a") as file:
                    file.writelines(f"{step} {name} {float(value)}\\n" for name, value in values.items())

            def rewind(self, step):
                pass

            def close(self):
                with open(self.path, "a") as file:
                    file.write(f"closed by {__file__}\\n")
        ''',
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of open_lm, to which NEW_FILES and the example of CONTRIBUTING.md are added."""
    folder = tmp_path_factory.mktemp("extended")
    package = Path(registry.__file__).parents[1]
    shutil.copytree(package, folder / "open_lm", ignore=shutil.ignore_patterns("datapreprocess", "__pycache__"))
    for name, code in {**NEW_FILES, **documented_file()}.items():
        path = folder / "open_lm" / name
        assert not path.exists()
        path.write_text(textwrap.dedent(code))
    return folder


def documented_file() -> dict[str, str]:
    """Return the example of CONTRIBUTING.md, an optimizer, by its path in the package."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"^    # open_lm/(optim/\w+\.py)$", text, flags=re.MULTILINE)
    example = text.partition(f"    # open_lm/{path}\n")[2]
    return {path: re.split(r"\n(?=\S)", example)[0]}


def run(folder: Path, *words: str, code: int = 0) -> str:
    """Run `python -m ...` with the package in `folder` and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    command = [sys.executable, "-m", *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


FLAGS = "--model open_lm_test_tiny --model-norm only_gain --optimizer sign_descent --lr-scheduler harmonic --lr 0.01"
TRAINING = (
    "--dataset-type synthetic --train-num-samples 512 --global-batch-size 8 --log-every-n-steps 1 --precision fp32 "
    "--workers 0 --name run --logs logs --checkpoint-format interchange"
)


@pytest.mark.processes
def test_new_names_are_in_the_help_text(extended: Path) -> None:
    text = " ".join(run(extended, "open_lm.main", "--help").split())
    for expected in (
        "only_gain (a gain without normalization)",
        "sign_descent (sign descent with momentum)",
        "harmonic (lr / (step + 1))",
        "notes (a text file)",
        "--optimizer {adamw,muon,sign_descent}",
    ):
        assert expected in text


@pytest.mark.processes
def test_the_planner_accepts_a_new_norm_and_optimizer(extended: Path) -> None:
    def optimizer_bytes(optimizer: str) -> int:
        flags = ["--model", "open_lm_160m", "--model-norm", "only_gain", "--optimizer", optimizer]
        plan = json.loads(run(extended, "open_lm.plan", *flags, "--strategies", "single", "--devices", "1", "--json"))
        size: int = plan["options"][0]["bytes"]["optimizer"]
        return size

    assert optimizer_bytes("adamw") == 2 * optimizer_bytes("sign_descent") > 0


@pytest.mark.processes
def test_a_training_uses_the_new_norm_optimizer_schedule_and_logger(extended: Path) -> None:
    run(extended, "open_lm.main", *FLAGS.split(), *TRAINING.split(), "--epochs", "1", "--report-to", "notes")
    folder = extended / "logs" / "run"
    weights = torch.load(folder / "checkpoints/epoch_1.pt")["state_dict"]
    assert {name.rpartition("norm.")[2] for name in weights if "norm." in name} == {"weight"}
    assert not torch.equal(weights["norm.weight"], torch.ones(16))
    state = torch.load(folder / "checkpoints/optimizer_1.pt")["optimizer"]["state"]
    assert {moment for moments in state.values() for moment in moments} == {"sign_average"}
    notes = (folder / "notes.txt").read_text().splitlines()
    rates = [float(line.split()[2]) for line in notes if line.split()[1] == "train/lr"]
    assert rates == pytest.approx([0.01 / (step + 1) for step in range(4)])
    assert notes[-1] == f"closed by {extended / 'open_lm/monitor/notes.py'}"

    resume = [*TRAINING.split(), "--epochs", "2", "--resume", "latest"]
    message = run(extended, "open_lm.main", *FLAGS.replace("sign_descent", "adamw").split(), *resume, code=2)
    assert "was saved by --optimizer sign_descent" in message
    run(extended, "open_lm.main", *FLAGS.split(), *resume)
    assert (folder / "checkpoints/optimizer_2.pt").exists()


def test_bundled_names_are_registered_once() -> None:
    assert OPTIMIZERS.names() == ("adamw", "muon")
    assert SCHEDULES.names() == ("cosine", "const", "const-cooldown", "wsd")
    assert LOGGERS.names() == ("tensorboard", "wandb", "trackio")
