"""The end-to-end pipeline: the debug form offline, killed twice and continued, and its errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.planner.command import make_plan

ROOT = Path(__file__).resolve().parents[2]
E2E = ROOT / "scripts" / "e2e"
DEBUG, FULL = "run_pre_training_e2e_debug.sh", "run_pre_training_e2e.sh"
SMALL = {
    "text.offline_mb": 0.4, "text.offline_vocab_size": 512, "preprocess.ray-address": "null", "plan.most-devices": 0,
    "model.hidden_dim": 32, "model.n_layers": 2, "model.n_heads": 2, "model.ffn_dim": 128, "model.seq_len": 64,
    "train.train-num-samples": 8192, "train.epochs": 1, "train.global-batch-size": 8, "train.warmup": 2,
    "train.icl-max-examples": 8, "train.icl-every-n-steps": 8, "train.log-every-n-steps": 1,
    "train.save-every-n-steps": 2, "train.fsdp": "false", "train.workers": 0, "train.report-to": "null",
}  # fmt: skip
SMALL_FLAGS = [
    "--offline",
    "--launcher",
    "",
    *(word for item in SMALL.items() for word in ("--set", "{}={}".format(*item))),
]


def start(folder: Path, *flags: str, script: str = DEBUG, python: str = sys.executable) -> subprocess.Popen[str]:
    """Start a script in `folder`, with its results in the folder work. The environment has no llm-foundry."""
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1", "OPEN_LM_EVAL_PYTHON": "nowhere"}
    command = [str(ROOT / "scripts" / script), "--work-dir", "work", *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(python: str, folder: Path, *flags: str, script: str = DEBUG, code: int = 0) -> str:
    with start(folder, *flags, script=script, python=python) as process:
        output, _ = process.communicate()
    assert process.returncode == code, output[-6000:]
    return output


def interrupt_at(folder: Path, pattern: str, number: signal.Signals) -> str:
    """Start the pipeline, send a signal to it, but not to the commands of stages, once a line matches."""
    lines = []
    with start(folder, *SMALL_FLAGS) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if re.search(pattern, line):
                process.send_signal(number)
                break
        lines += [] if number == signal.SIGKILL else process.stdout.readlines()
        assert process.wait() == (-number if number == signal.SIGKILL else 130)
    return "".join(lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, forked_python: str) -> tuple[Path, str]:
    """Run the debug form, stopped while it downloads, killed while it trains; return its folder and the last output.

    The programs that are stopped and killed are new processes; those of the last start are forked.
    """
    folder = tmp_path_factory.mktemp("e2e")
    output = interrupt_at(folder, r"\$ python \S*text\.py save", signal.SIGTERM)
    assert output.endswith("stopped; start the same command again to continue\n")
    interrupt_at(folder, r"saved checkpoint \S*step_0+4 ", signal.SIGKILL)
    return folder, run(forked_python, folder, *SMALL_FLAGS)


@pytest.mark.processes
def test_killed_pipeline_continues_to_a_complete_result(finished: tuple[Path, str]) -> None:
    folder, output = finished
    work = folder / "work"
    assert re.search(r"tokenize +finished before", output) and "download    " in output
    assert "llm_foundry  skipped: nowhere does not exist; `make install-eval` installs llm-foundry" in output
    # The training continued from the checkpoint that it saved when its parent was killed.
    log = (work / "runs" / "debug" / "out.log").read_text()
    assert re.search(r"(?i)resum\w+ .*step_0+\d", log)
    metrics = [json.loads(line) for line in (work / "runs" / "debug" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in metrics if "train/loss" in row]
    assert steps == list(range(1, 17))  # 128 sequences, 8 per step: each step once
    assert sum("val/loss" in row for row in metrics) == 1
    moments = [json.loads(line)["step"] for line in (work / "runs" / "debug" / "icl.jsonl").read_text().splitlines()]
    assert moments == [0, 8, 16]
    samples = [json.loads(line) for line in (work / "runs" / "debug" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 0, 16, 16, 16]
    assert samples[1]["prompt"] == samples[4]["prompt"] == "HTML stands for "


@pytest.mark.processes
def test_results_of_all_stages(finished: tuple[Path, str]) -> None:
    work = finished[0] / "work"
    (evaluation,) = (work / "runs" / "debug" / "checkpoints" / "evals").glob("*.json")
    task = json.loads(evaluation.read_text())["tasks"][0]
    rows = (work / "offline" / "tasks" / "continuations.jsonl").read_text().splitlines()
    assert task["task"] == "continuations" and task["n"] == len(rows) > 5 and task["baseline"] == 0.25
    plots = (work / "plots.svg").read_text()
    assert "training and validation loss" in plots and "continuations 0-shot, accuracy" in plots
    config = json.loads((work / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 512  # that of the tokenizer of --offline
    assert "continuations" in (work / "report.html").read_text()
    assert "Class II" in (work / "stages" / "release.log").read_text()  # open tooling: all but a research paper
    assert (work / "bundle" / "reproduce.sh").exists()
    # No record of the run has a path of this machine.
    assert str(ROOT) not in (work / "runs" / "debug" / "params.txt").read_text()


@pytest.mark.processes
def test_notebooks_run_on_the_results(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext = pytest.importorskip("jupytext", reason="the extra notebooks is not installed")
    from nbclient import NotebookClient

    monkeypatch.setenv("OPEN_LM_RUN", str(finished[0] / "work" / "runs" / "debug"))
    book, other = (jupytext.read(ROOT / "notebooks" / f"{name}.py") for name in ("metric_graphs", "parameters_tuning"))
    book.cells += other.cells  # one kernel for both
    folder = {"metadata": {"path": ROOT / "notebooks"}}
    NotebookClient(book, kernel_name="python3", startup_timeout=600, resources=folder).execute()
    shown = [output.get("data", {}) for cell in book.cells for output in cell.get("outputs", [])]
    assert any("training and validation loss" in data.get("image/svg+xml", "") for data in shown)
    assert any("Step 16" in data.get("text/html", "") and "color:blue" in data["text/html"] for data in shown)
    assert any("268.7" in data.get("text/html", "") for data in shown)  # millions of parameters of LF_LLM-269M


@pytest.mark.processes
def test_finished_stages_are_skipped_and_changed_settings_are_reported(
    finished: tuple[Path, str], forked_python: str
) -> None:
    folder, _ = finished
    again = run(forked_python, folder, *SMALL_FLAGS)
    assert "done in" not in again and again.count("finished before") == 9 * 2  # while running, and in the summary
    changed = run(forked_python, folder, *SMALL_FLAGS, "--set", "train.lr=0.1", "--set", "plan.devices=4", code=2)
    assert "train.lr 0.003 -> 0.1" in changed and "--restart train" in changed and "plan" not in changed
    (folder / "work" / "plots.svg").unlink()
    assert "done in" in run(forked_python, folder, *SMALL_FLAGS, "--until", "plots").partition("plots: draw")[2]


@pytest.mark.processes
@pytest.mark.parametrize("script", [FULL, "e2e/open_lm_1b.sh"])
def test_dry_run_prints_every_command(tmp_path: Path, forked_python: str, script: str) -> None:
    output = run(forked_python, tmp_path, "--dry-run", script=script)
    assert len(re.findall(r"^\[\d+/\d+\]", output, re.MULTILINE)) == output.count("/10]") == 10
    for text in ("hellaswag.yaml", "in_memory_hf_eval.yaml", "make_2048.py", "-m open_lm.main", "hf.convert export"):
        assert text in output
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_dry_run_of_the_debug_form_checks_the_settings(tmp_path: Path, forked_python: str) -> None:
    output = run(forked_python, tmp_path, "--offline", "--dry-run")
    assert "--seqlen 256" in output and not list(tmp_path.iterdir())
    assert "n_layers" in run(forked_python, tmp_path, "--offline", "--dry-run", "--set", "model.n_layers=many", code=2)
    assert "--ofline; see --help" in run(forked_python, tmp_path, "--ofline", code=2)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(E2E)


@pytest.mark.parametrize("name", ["lf_llm_269m", "open_lm_1b", "debug"])
def test_planner_accepts_the_settings(modules: None, name: str, tmp_path: Path) -> None:
    from pipeline_settings import flag_words, read_settings
    from pipeline_stages import Work

    work = Work(tmp_path, read_settings(E2E / f"{name}.yaml"), offline=name == "debug")
    work.write_model()
    plan = make_plan(
        ["--most-devices", "0", "--model", work.model, *flag_words({**work.settings.plan, **work.settings.train})]
    )
    assert plan.recommended is not None and plan.recommended.fits
    if name == "lf_llm_269m":
        embedding = plan.shape.vocab_size * plan.shape.dim
        assert round((plan.shape.num_params - embedding) / 1e6) == 269  # the name counts them without the embedding
        assert plan.shape.ffn_dim == 4 * plan.shape.dim and plan.shape.residual_dropout > 0


def test_problems_of_settings_are_reported_together(modules: None, tmp_path: Path) -> None:
    from pipeline_settings import read_settings

    path = tmp_path / "settings.yaml"
    content = {"name": 3, "text": {"datasett": "x"}, "model": "m", "train": {"resume": "latest"}, "prompts": "one"}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        read_settings(path)
    for text in ("name: found 3", "text.datasett: unknown key; did you mean dataset?", "text.dataset: missing",
                 "train.resume: the pipeline relies on its own value", "prompts: found 'one'"):  # fmt: skip
        assert text in str(error.value)
    with pytest.raises(ConfigError, match=r"--set train\.lr: expected KEY=VALUE"):
        read_settings(E2E / "debug.yaml", ["train.lr"])
    with pytest.raises(StorageError, match=r"missing\.yaml: no such file"):
        read_settings(tmp_path / "missing.yaml")


def test_launchers(modules: None) -> None:
    from pipeline_stages import launcher_words

    assert launcher_words("") == [sys.executable]
    torchrun = [sys.executable, "-m", "open_lm.utils.torchrun", "--nproc-per-node", "2"]
    assert launcher_words("torchrun --nproc-per-node 2") == torchrun
    assert launcher_words("srun --ntasks=8") == ["srun", "--ntasks=8", sys.executable]
    hosts = [sys.executable, "scripts/launch.py", "--hosts", "h"]
    assert launcher_words("scripts/launch.py --hosts h") == hosts


def test_work_folder_must_be_writable(modules: None, tmp_path: Path) -> None:
    from pipeline_state import locked

    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), locked(tmp_path / "file" / "work"):
        pass
    with locked(tmp_path / "work"), pytest.raises(ConfigError, match=r"another pipeline \(process \d+\)"):
        locked(tmp_path / "work").__enter__()


def test_damaged_stamp_is_reported(modules: None, tmp_path: Path) -> None:
    from pipeline_state import Stamps

    stamps = Stamps(tmp_path)
    stamps.path("train").write_text("{")
    with pytest.raises(DataError, match=r"train\.json: expected the JSON of a stage .* delete the file"):
        stamps.read("train")


# --------------------------------------------------------------------------------------------------- text on disk
SOURCES = ("RedPajamaCommonCrawl", "RedPajamaC4", "RedPajamaGithub")


@pytest.fixture
def slimpajama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in SlimPajama's schema: columns text and meta, with the name of the source in meta."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "slimpajama"
    folder.mkdir()
    for split, number in (("train", 60), ("validation", 6)):
        rows = [
            {"text": f"Text {i}: €. " * 9, "meta": {"redpajama_set_name": SOURCES[min(i % 6, 2)]}}
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_slices_are_saved_and_counted_by_source(
    modules: None, slimpajama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    from text import main

    key = ["--source-key", "meta.redpajama_set_name", "--output", str(tmp_path / "text")]
    main(["save", "--dataset", str(slimpajama), "--split", "train=train[:50%]", "--split", "valid=validation", *key])
    main(["save", "--dataset", str(slimpajama), "--split", "part=train[3:9]", "--streaming", *key])
    counts = json.loads((tmp_path / "text" / "train" / "sources.json").read_text())["sources"]
    assert [counts[name]["documents"] for name in SOURCES] == [5, 5, 20]
    texts = []
    for name in SOURCES:
        saved = datasets.load_from_disk(str(tmp_path / "text" / "train" / name))
        assert {meta["redpajama_set_name"] for meta in saved["meta"]} == {name}
        assert sum(len(text.encode()) for text in saved["text"]) == counts[name]["bytes"]
        texts += saved["text"]
    assert sorted(texts) == sorted(f"Text {i}: €. " * 9 for i in range(30))
    part = json.loads((tmp_path / "text" / "part" / "sources.json").read_text())["sources"]
    assert sum(values["documents"] for values in part.values()) == 6

    capsys.readouterr()
    main(["count", str(tmp_path / "text" / "train")])
    assert re.search(r"RedPajamaGithub +20 ", capsys.readouterr().out)
    main(["save", "--dataset", "gone", "--split", "train=train", *key])  # finished: the source is not read again
    assert "already saved" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    (["--split", "train=train[:2000"], "cannot be loaded"),
    (["--split", "train=test"], "cannot be loaded"),
    (["--split", "train"], "expected NAME=SPLIT"),
    (["--split", "train=train", "--key", "content"], "--key: .* has no column content: found"),
    (["--split", "train=train", "--source-key", "source"], "--source-key: .* has no column source"),
    (["--split", "train=train[:10%]", "--streaming"], "expected a slice by numbers"),
    (["--split", "train=train", "--key", "meta"], "row 0 has dict in column meta, expected text"),
])  # fmt: skip
def test_text_errors(modules: None, slimpajama: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    from text import main

    with pytest.raises((ConfigError, DataError), match=message):
        main(["save", "--dataset", str(slimpajama), "--output", str(tmp_path / "text"), *flags])
    assert not (tmp_path / "text" / "train").exists()


@pytest.mark.processes
def test_slimpajama_script_explains_itself(tmp_path: Path) -> None:
    script = E2E / "slimpajama.sh"
    result = subprocess.run([script, "--help"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout.startswith("SlimPajama") and "STREAMING=1" in result.stdout and "#" not in result.stdout
    for words in ((), ("--num-workers", "1")):
        result = subprocess.run([script, *words], cwd=tmp_path, check=False, capture_output=True, text=True)
        assert result.returncode == 2 and "FOLDER [flags" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.processes
def test_slimpajama_script_writes_shards_with_the_tokens_of_each_source(slimpajama: Path, tmp_path: Path) -> None:
    from tokenizer_helpers import write_tokenizer

    tokenizer = tmp_path / "tokenizer.json"
    write_tokenizer(tokenizer)
    variables = {"PYTHON": sys.executable, "DATASET": str(slimpajama), "TRAIN": "train[:10%]", "SEQLEN": "64"}
    variables |= {"TOKENIZER": str(tokenizer), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run(
        [E2E / "slimpajama.sh", tmp_path / "out", "--num-workers", "1"],
        env={**os.environ, **variables}, check=True, capture_output=True,
    )  # fmt: skip
    data = json.loads((tmp_path / "out" / "shards" / "train" / "64-v1" / "0" / "dataset.json").read_text())
    assert [data["sources"][name]["documents"] for name in SOURCES] == [1, 1, 4]
