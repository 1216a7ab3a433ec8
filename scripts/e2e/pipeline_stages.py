"""The stages of the pipeline: each is a list of commands, the settings that they depend on, and what they write."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_settings import Settings, flag_words
from text import ONE_SOURCE

from open_lm.config.architecture import read_architecture
from open_lm.storage import write_text
from open_lm.storage.strict_json import to_json

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[2]))  # relative, so that no record has a machine's paths
HERE = ROOT / "scripts" / "e2e"
PYTHON = sys.executable
SPLITS = ("train", "valid")
Command = list[str]


@dataclass(frozen=True)
class Work:
    """The folder of a pipeline, its settings, and the paths of all results."""

    folder: Path
    settings: Settings
    offline: bool

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.settings.name

    @property
    def final_checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"epoch_{self.settings.train.get('epochs', 32)}.pt"

    @property
    def evaluation(self) -> Path:
        """The results of the native engine, where the export looks for them."""
        names = "_".join(Path(path).stem for path in self.task_files(self.settings.evaluation_tasks))
        return self.run / "checkpoints" / "evals" / f"{self.final_checkpoint.stem}_{names}.json"

    @property
    def offline_data(self) -> Path:
        return self.folder / "offline"

    @property
    def model(self) -> str:
        """The value of --model: a name or a file, or the copy that `write_model` writes."""
        model = self.settings.model
        return model if isinstance(model, str) and not self.offline else str(self.folder / "model.json")

    @property
    def architecture(self) -> dict[str, Any]:
        """The model's configuration; offline, its vocabulary is that of the tokenizer that is trained then."""
        model = self.settings.model
        content = dict(read_architecture(model) if isinstance(model, str) else model)
        return {**content, "vocab_size": self.settings.text.offline_vocab_size} if self.offline else content

    def write_model(self) -> None:
        """Write the model's configuration if it is part of the settings, or has another vocabulary offline."""
        if self.model != self.settings.model:
            write_text(self.model, to_json(self.architecture, indent=2) + "\n")

    @property
    def tokenizer(self) -> str:
        return str(self.offline_data / "tokenizer.json") if self.offline else self.settings.tokenizer

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.txt"

    @property
    def tasks(self) -> Path:
        return self.offline_data / "tasks" if self.offline else self.folder / "tasks"

    def task_files(self, names: Sequence[str]) -> list[str]:
        """Return the YAML files of tasks, which are relative to the repository; offline the bundled tasks."""
        return [str(self.tasks / "tasks.yaml")] if self.offline and names else [str(ROOT / name) for name in names]

    def sources_file(self, split: str) -> Path:
        return self.folder / "text" / split / "sources.json"

    def inputs(self, split: str) -> list[str]:
        """Return --input-files or --source with the text of a split; its sources are known after the download."""
        path = self.sources_file(split)
        if self.settings.text.source_key is None:
            return ["--input-files", str(path.parent / ONE_SOURCE)]
        names = json.loads(path.read_text(encoding="utf-8"))["sources"] if path.exists() else ["SOURCE"]
        return [word for name in names for word in ("--source", f"{name}={path.parent / name}")]

    def shards(self, split: str) -> Path:
        return self.folder / "shards" / split

    def manifest(self, split: str) -> Path:
        seq_len = self.architecture["seq_len"]
        return self.shards(split) / f"{seq_len}-v1" / "0" / "manifest.jsonl"


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        help: what it does.
        settings: names of the settings that its result depends on.
        commands: returns the commands.
        results: returns the files that exist once it is finished.
        writes: returns the files and folders that a restart deletes.
        skip: returns why this stage is left out, or "".
    """

    name: str
    help: str
    settings: tuple[str, ...]
    commands: Callable[[Work], list[Command]]
    results: Callable[[Work], list[Path]]
    writes: Callable[[Work], list[Path]]
    skip: Callable[[Work], str]


STAGES: dict[str, Stage] = {}


def stage(
    name: str,
    help: str,
    settings: tuple[str, ...],
    *,
    results: Callable[[Work], list[Path]],
    writes: Callable[[Work], list[Path]] | None = None,
    skip: Callable[[Work], str] = lambda work: "",
) -> Callable[[Callable[[Work], list[Command]]], Callable[[Work], list[Command]]]:
    """Register a function that returns the commands of a stage. Stages run in the order of registration."""

    def register(commands: Callable[[Work], list[Command]]) -> Callable[[Work], list[Command]]:
        STAGES[name] = Stage(name, help, settings, commands, results, writes or results, skip)
        return commands

    return register


@stage(
    "plan",
    "check the flags, the size and the memory with the planner",
    ("model", "train", "plan"),
    results=lambda work: [],
)
def plan(work: Work) -> list[Command]:
    flags = flag_words({**work.settings.plan, **work.settings.train})
    return [[PYTHON, "-m", "open_lm.plan", "--model", work.model, *flags]]


@stage(
    "download",
    "fetch the text and the data of the tasks",
    ("offline", "text", "training_tasks", "evaluation_tasks"),
    results=lambda work: [work.sources_file(split) for split in SPLITS],
    writes=lambda work: [work.folder / "text", work.folder / "tasks", work.offline_data],
)
def download(work: Work) -> list[Command]:
    text = work.settings.text
    fetch = [PYTHON, str(HERE / "text.py"), "save", "--output", str(work.folder / "text"), "--key", text.key]
    if work.offline:
        make = [PYTHON, str(HERE / "offline_data.py"), str(work.offline_data), "--text-mb", str(text.offline_mb)]
        make += ["--vocab-size", str(text.offline_vocab_size)]
        fetch += ["--dataset", str(work.offline_data / "text"), "--split", "train=train", "--split", "valid=validation"]
        return [make, fetch]
    fetch += ["--dataset", text.dataset, "--split", f"train={text.train}", "--split", f"valid={text.valid}"]
    fetch += flag_words({"subset": text.subset, "source-key": text.source_key, "streaming": text.streaming})
    tasks = work.task_files(list(dict.fromkeys([*work.settings.training_tasks, *work.settings.evaluation_tasks])))
    icl = [PYTHON, "-m", "open_lm.evaluate.icl.download", "--output", str(work.tasks), "--eval-yaml", *tasks]
    return [fetch, icl] if tasks else [fetch]


@stage(
    "tokenize",
    "tokenize, shuffle and write shards",
    ("offline", "text", "tokenizer", "model", "preprocess"),
    results=lambda work: [work.manifest(split).with_name("dataset.json") for split in SPLITS],
    writes=lambda work: [work.folder / "shards"],
)
def tokenize(work: Work) -> list[Command]:
    seq_len, key = str(work.architecture["seq_len"]), work.settings.text.key
    common = ["--tokenizer", work.tokenizer, "--seqlen", seq_len, "--content-key", key]
    program = [PYTHON, str(ROOT / "datapreprocess" / "make_2048.py"), *common, *flag_words(work.settings.preprocess)]
    return [[*program, "--output-dir", str(work.shards(split)), *work.inputs(split)] for split in SPLITS]


@stage(
    "train",
    "train, with validation, tasks and text samples",
    ("offline", "text", "tokenizer", "model", "preprocess", "training_tasks", "prompts", "train"),
    results=lambda work: [work.final_checkpoint],
    writes=lambda work: [work.run],
)
def train(work: Work) -> list[Command]:
    flags = ["--name", work.settings.name, "--logs", str(work.run.parent), "--resume", "latest", "--model", work.model]
    flags += ["--dataset-manifest", str(work.manifest("train")), "--data-key", "npy"]
    flags += ["--val-data", str(work.manifest("valid").parent / "*.tar"), "--val-names", "valid"]
    if work.settings.training_tasks:
        tasks = work.task_files(work.settings.training_tasks)
        flags += ["--icl-yaml", *tasks, "--icl-data-dir", str(work.tasks)]
    if work.settings.prompts:
        flags += ["--sample-prompts", str(work.prompts)]
    return [[*launcher_words(work.settings.launcher), "-m", "open_lm.main", *flags, *flag_words(work.settings.train)]]


def launcher_words(launcher: str) -> Command:
    """Return the command that starts `-m MODULE` on all ranks.

    torchrun is the package's own; launch.py starts torchrun itself; others, such as srun, start Python.
    """
    words = shlex.split(launcher)
    if not words:
        return [PYTHON]
    if words[0] == "torchrun":
        return [PYTHON, "-m", "open_lm.utils.torchrun", *words[1:]]
    if words[0].endswith("launch.py"):
        return [PYTHON, words[0] if Path(words[0]).exists() else str(ROOT / words[0]), *words[1:]]
    return [*words, PYTHON]


@stage("plots", "draw the curves of the training", (), results=lambda work: [work.folder / "plots.svg"])
def plots(work: Work) -> list[Command]:
    return [[PYTHON, str(HERE / "plots.py"), str(work.run), "--output", str(work.folder / "plots.svg")]]


def evaluation_command(work: Work, engine: str) -> Command:
    tasks = work.task_files(work.settings.evaluation_tasks)
    command = [PYTHON, str(ROOT / "eval" / "eval_openlm_ckpt.py"), "--engine", engine]
    return [*command, "--checkpoint", str(work.final_checkpoint), "--eval-yaml", *tasks, "--data-dir", str(work.tasks)]


def without_tasks(work: Work) -> str:
    return "" if work.settings.evaluation_tasks else "evaluation_tasks is empty"


@stage(
    "evaluate",
    "evaluate the last checkpoint with the native engine",
    ("evaluation_tasks",),
    results=lambda work: [work.evaluation],
    writes=lambda work: [work.run / "checkpoints" / "evals"],
    skip=without_tasks,
)
def evaluate(work: Work) -> list[Command]:
    return [evaluation_command(work, "native")]


def foundry_python() -> str:
    """Return the Python of the environment with llm-foundry, as eval_openlm_ckpt.py chooses it."""
    return os.path.expanduser(os.environ.get("OPEN_LM_EVAL_PYTHON") or str(ROOT / ".venv-eval" / "bin" / "python"))


def without_foundry(work: Work) -> str:
    missing = f"{foundry_python()} does not exist; `make install-eval` installs llm-foundry"
    return without_tasks(work) or ("" if os.access(foundry_python(), os.X_OK) else missing)


@stage(
    "llm_foundry",
    "evaluate the last checkpoint with llm-foundry",
    ("evaluation_tasks",),
    results=lambda work: [work.folder / "llm_foundry.json"],
    skip=without_foundry,
)
def llm_foundry(work: Work) -> list[Command]:
    model = ["--model-config", str(work.run / "model.json"), "--output", str(work.folder / "llm_foundry.json")]
    return [[*evaluation_command(work, "llm-foundry"), *model]]


@stage(
    "export",
    "write the model as a Hugging Face folder",
    (),
    results=lambda work: [work.folder / "hf" / "config.json"],
    writes=lambda work: [work.folder / "hf"],
)
def export(work: Work) -> list[Command]:
    return [[PYTHON, "-m", "open_lm.hf.convert", "export", str(work.final_checkpoint), str(work.folder / "hf")]]


@stage("report", "write the report of the run", (), results=lambda work: [work.folder / "report.html"])
def report(work: Work) -> list[Command]:
    return [[PYTHON, "-m", "open_lm.report", str(work.run), "--out", str(work.folder / "report.html")]]


@stage(
    "release",
    "build and verify the release, and rate its openness",
    ("release",),
    results=lambda work: [work.folder / "bundle" / "mof.yml"],
    writes=lambda work: [work.folder / "bundle"],
    skip=lambda work: "" if work.settings.release else "release is empty",
)
def release(work: Work) -> list[Command]:
    bundle, program = work.folder / "bundle", [PYTHON, "-m", "open_lm.release"]
    flags = flag_words(work.settings.release, repeat=True)
    return [[*program, str(work.run), "--out", str(bundle), *flags], [*program, "--verify", str(bundle)]]
