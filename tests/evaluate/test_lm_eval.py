"""Test the model for lm-eval: equal to lm-eval's own model "hf" on the exported checkpoint, and its command lines."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from family_models import hf_model
from model_helpers import random_ids

from open_lm.errors import ConfigError, DataError
from open_lm.evaluate import compare
from open_lm.evaluate.checkpoints import find_checkpoints, load_checkpoint, results_file
from open_lm.evaluate.lm_eval import MODEL_NAME, register
from open_lm.hf.exporting import export_model
from open_lm.model.transformer import create_model

pytest.importorskip("lm_eval")

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 48
TOKENIZERS = {"gpt-neox-20b.json": 50277, "llama2.model": 32000}


@dataclass
class Trained:
    """A checkpoint with random weights, its tokenizer, and the folder to which it is exported."""

    folder: Path
    tokenizer: str
    exported: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the model "open_lm"."""
        checkpoint, model = self.folder / "epoch_1.pt", self.folder / "small.json"
        return {"checkpoint": str(checkpoint), "model": str(model), "tokenizer": self.tokenizer, "device": "cpu"}


def make_checkpoint(folder: Path, tokenizer: Path) -> Trained:
    shape = {
        "hidden_dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "seq_len": SEQ_LEN,
        "vocab_size": TOKENIZERS[tokenizer.name],
    }
    (folder / "small.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    model = create_model(SimpleNamespace(model=str(folder / "small.json")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    torch.save({"epoch": 1, "name": "small", "state_dict": model.state_dict()}, folder / "epoch_1.pt")
    checkpoint, exported = str(folder / "epoch_1.pt"), str(folder / "exported")
    export_model(checkpoint, exported, model=str(folder / "small.json"), tokenizer=str(tokenizer))
    return Trained(folder, str(tokenizer), exported)


@pytest.fixture(scope="module", params=TOKENIZERS)
def trained(request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    return make_checkpoint(folder, shared_dir / "data" / "tokenizers" / request.param)


@pytest.fixture(scope="module")
def neox(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("neox")
    return make_checkpoint(folder, shared_dir / "data" / "tokenizers" / "gpt-neox-20b.json")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def questions(shared_dir: Path) -> list[dict[str, Any]]:
    with open(shared_dir / "data" / "eval" / "arc_easy.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(12), strict=False)]


def ours(**arguments: Any) -> Any:
    """Return a model for lm-eval, whose module imports lm-eval."""
    from open_lm.evaluate.lm_eval.model import OpenLM

    return OpenLM(**arguments)


def instances(kind: str, arguments: list[tuple[Any, ...]], docs: list[int] | None = None) -> list[Any]:
    from lm_eval.api.instance import Instance

    docs = docs or list(range(len(arguments)))
    return [Instance(kind, {}, a, i, ("task", doc, 1)) for i, (a, doc) in enumerate(zip(arguments, docs, strict=True))]


def requests(questions: list[dict[str, Any]], prefix: str) -> list[Any]:
    """Return requests whose contexts are empty, too long, end with spaces or begin with a special token."""
    arguments: list[tuple[str, str]] = []
    docs: list[int] = []
    for index, row in enumerate(questions):
        context = ["", row["query"], f"{row['query']}  ", row["query"] * 6][index % 4]
        for choice in row["choices"]:
            arguments.append((context, choice if index % 3 == 0 else f" {choice}"))
            docs.append(index)
    arguments += [("", f"{prefix} one"), (f"{prefix}The answer", " is 4"), ("The", " é🙂"), ("no space", "between")]
    return instances("loglikelihood", arguments, [*docs, 100, 101, 102, 103])


def test_requests_have_the_results_of_the_exported_model(trained: Trained, questions: list[dict[str, Any]]) -> None:
    """Native and exported checkpoints give what lm-eval's model "hf" gives: values within 1e-4, and the same texts."""
    from lm_eval.models.huggingface import HFLM

    reference = HFLM(trained.exported, trust_remote_code=True, device="cpu", dtype="float32", batch_size=4)
    native, exported = ours(**trained.arguments), ours(checkpoint=trained.exported, device="cpu")
    prefix = native.text_tokenizer.token(native.prefix_token_id)
    scored = requests(questions, prefix)
    expected = reference.loglikelihood(scored, disable_tqdm=True)
    # lm-eval's model reuses the logits of equal windows, with wrong positions: no text here repeats itself.
    long = [" ".join(row["query"] for row in questions[:count]) for count in (1, 4, 9)]
    rolling = instances("loglikelihood_rolling", [(text,) for text in (*long, "", "é🙂")])
    texts = [(row["query"], {"until": ["e", "\n"], "max_gen_toks": 12}) for row in questions[:3]]
    texts += [(row["query"] * 4, {"until": "zzz", "max_gen_toks": 7, "do_sample": False}) for row in questions[:3]]
    generated = instances("generate_until", texts)
    for model in (native, exported):
        assert (model.prefix_token_id, model.eot_token_id) == (reference.prefix_token_id, reference.eot_token_id)
        assert model.max_length == reference.max_length == SEQ_LEN
        actual = model.loglikelihood(scored, disable_tqdm=True)
        assert [value for value, _ in actual] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
        values = model.loglikelihood_rolling(rolling, disable_tqdm=True)
        assert values == pytest.approx(reference.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-6, abs=1e-4)
        assert model.generate_until(generated, disable_tqdm=True) == reference.generate_until(
            generated, disable_tqdm=True
        )


def test_results_do_not_depend_on_groups_and_batches(neox: Trained, questions: list[dict[str, Any]]) -> None:
    """Equal contexts are computed once, in batches of any size, and the order of requests stays."""
    from open_lm.evaluate.lm_eval.scoring import Pair, split_groups

    small, large = ours(**neox.arguments, batch_size=2), ours(**neox.arguments, batch_size=64)
    scored = requests(questions, "<|endoftext|>")
    first = small.loglikelihood(scored, disable_tqdm=True)
    second = large.loglikelihood(scored[::-1], disable_tqdm=True)[::-1]
    assert [value for value, _ in first] == pytest.approx([value for value, _ in second], abs=1e-4)
    assert split_groups([Pair([1], [2])] * 70, [0] * 66 + [1] * 4) == [
        list(range(64)), [64, 65], [66, 67, 68, 69],
    ]  # fmt: skip
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 5, "top_p": 0.9}
    sampled = instances("generate_until", [(row["query"], settings) for row in questions[:5]])
    texts = []
    for model in (small, large, large):
        torch.manual_seed(7)
        texts.append(model.generate_until(sampled, disable_tqdm=True))
    assert texts[0] == texts[1] == texts[2]
    torch.manual_seed(8)
    assert large.generate_until(sampled, disable_tqdm=True) != texts[0]


def test_unusable_arguments_and_requests_are_errors(neox: Trained) -> None:
    with pytest.raises(ConfigError, match=r"batch_sise=4 is unknown(.|\n)*precision=int8"):
        ours(**neox.arguments, batch_sise=4, precision="int8")
    words = r"checkpoint is missing(.|\n)*device=cdua, expected cpu, cuda(.|\n)*max_length=abc, expected a number"
    with pytest.raises(ConfigError, match=words):
        ours(device="cdua", max_length="abc")
    model = ours(**neox.arguments)
    with pytest.raises(DataError, match=r"a continuation has \d+ tokens, expected 1 to 48"):
        model.loglikelihood(instances("loglikelihood", [("a", " word" * 60)]), disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"num_beams=4 are not supported"):
        model.generate_until(instances("generate_until", [("a", {"num_beams": 4, "max_gen_toks": 2})]))
    with pytest.raises(ConfigError, match=r"max_gen_toks is 48, expected less than max_length 48"):
        model.generate_until(instances("generate_until", [("a", {"max_gen_toks": 48})]))
    with pytest.raises(ConfigError, match=r"--apply_chat_template: the tokenizer of .* has no chat template"):
        model.chat_template(True)


@pytest.fixture
def tasks(tmp_path: Path, questions: list[dict[str, Any]]) -> Path:
    """Return a folder with a task of each type of request."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [json.dumps({"question": row["query"], **row}) for row in questions[:7]]
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(folder / "data.jsonl")}}}
    common |= {"validation_split": "validation", "doc_to_text": "{{question}}", "metadata": {"version": 1}}
    mean = {"aggregation": "mean", "higher_is_better": True}
    entries: dict[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
        },
        "local_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "local_text": {
            "output_type": "generate_until", "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }  # fmt: skip
    for name, entry in entries.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **entry}))
    return folder


@pytest.mark.processes
def test_two_ranks_have_the_results_of_one(neox: Trained, tasks: Path, tmp_path: Path, forked_python: str) -> None:
    """Two processes of eval_openlm_ckpt.py share the requests; lm-eval finds the model by name in one process."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    command = [forked_python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "eval" / "eval_openlm_ckpt.py"), "--no-cache"]
    command += [*script_arguments(neox, tasks), "--output", str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    content = json.loads((tmp_path / "two.json").read_text())
    assert content["processes"] == 2
    register()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [task["task"] for task in content["tasks"]]
    expected = simple_evaluate(MODEL_NAME, neox.arguments, tasks=names, task_manager=manager, bootstrap_iters=0)
    for task in content["tasks"]:
        values = expected["results"][task["task"]]
        assert task["metrics"] == pytest.approx({name: values[f"{name},none"] for name in task["metrics"]}, rel=1e-6)
        assert task["n"] == expected["n-samples"][task["task"]]["effective"] == 7


@pytest.fixture
def program() -> ModuleType:
    """Return the command that evaluates checkpoints."""
    return importlib.import_module("open_lm.evaluate.command")


def script_arguments(trained: Trained, tasks: Path) -> list[str]:
    arguments = ["--engine", "lm-eval", "--checkpoint", str(trained.folder / "epoch_1.pt"), "--device", "cpu"]
    arguments += ["--model", str(trained.folder / "small.json"), "--tokenizer", trained.tokenizer]
    return [*arguments, "--tasks", "local_choice", "local_rolling", "local_text", "--include-path", str(tasks)]


@pytest.mark.processes
def test_results_of_the_script(
    neox: Trained, tasks: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON results have the documented keys, and compare reads them with the results of single examples."""
    program.main(script_arguments(neox, tasks))
    folder = neox.folder / "evals"
    (path,) = folder.glob("epoch_1_lm_eval_*.json")
    content = json.loads(path.read_text())
    assert (content["schema"], content["engine"], content["max_examples"]) == ("open_lm.icl/1", "lm-eval", None)
    by_name = {task["task"]: task for task in content["tasks"]}
    choice, rolling, text = (by_name[f"local_{name}"] for name in ("choice", "rolling", "text"))
    assert (choice["kind"], choice["metric"], choice["n"]) == ("lm-eval/multiple_choice", "acc", 7)
    assert choice["score"] == choice["metrics"]["acc"] and choice["baseline"] == 0.25
    assert choice["interval"][0] <= choice["score"] <= choice["interval"][1]
    assert rolling["score"] is None and rolling["metrics"]["bits_per_byte"] > 0
    assert text["metric"] == "exact_match" and content["lm_eval"]["n-shot"]["local_choice"] == 0
    lines = [json.loads(line) for line in Path(choice["examples_file"]).read_text().splitlines()]
    assert len(lines) == 8 and {"index", "doc_id", "correct", "nll"} <= set(lines[1])
    capsys.readouterr()
    compare.main([str(path), str(path)])
    assert "McNemar" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "directions", "metric", "score"),
    [
        ({"perplexity,none": 0.5, "acc,none": 0.25}, {"perplexity": False, "acc": True}, "acc", 0.25),
        ({"perplexity,none": 0.5}, {"perplexity": False}, "", None),
        ({"bleu,none": 31.5, "acc,none": 0.25}, {"bleu": True, "acc": True}, "", None),
        ({"custom,none": 0.5}, {}, "custom", 0.5),
    ],
)
def test_scores_are_shares_of_which_higher_is_better(
    values: dict[str, float], directions: dict[str, bool], metric: str, score: float | None
) -> None:
    """Other metrics would distort the averages; `metrics` has them."""
    from open_lm.evaluate.lm_eval.results import outcomes_of

    samples = [{"doc_id": i, "filter": "none", "resps": [[(-1.0, True)]], "arguments": [("a", "b")]} for i in range(4)]
    samples = [{**sample, "target": "b", "acc": float(sample["doc_id"] == 0)} for sample in samples]
    results = {
        "results": {"t": {"alias": "t", **values}}, "higher_is_better": {"t": directions}, "n-shot": {"t": 0},
        "configs": {"t": {"output_type": "loglikelihood"}}, "samples": {"t": samples},
    }  # fmt: skip
    (outcome,) = outcomes_of(results, "")
    assert (outcome.metric, outcome.score, outcome.n) == (metric, score, 4)
    assert outcome.metrics == {key.partition(",")[0]: value for key, value in values.items()}


def test_the_process_group_of_the_first_checkpoint_is_destroyed(
    program: ModuleType, neox: Trained, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model is released before the next one is loaded."""
    engine = importlib.import_module("open_lm.evaluate.engines.lm_eval")
    models: list[weakref.ref[Any]] = []
    ended: list[Any] = []

    class Model:
        def __init__(self, checkpoint: str, **_: Any) -> None:
            assert all(model() is None for model in models)
            self.runtime = checkpoint
            models.append(weakref.ref(self))

    monkeypatch.setattr(engine, "OpenLM", Model)
    monkeypatch.setattr(engine, "find_checkpoints", lambda *_: ["first", "second"])
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(engine, "shutdown", ended.append)
    program.main(script_arguments(neox, tasks))
    assert ended == ["first"] and len(models) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--include-path", "absent"], r"--include-path absent: no such folder"),
        (["--eval-yaml", "a.yaml"], r"--eval-yaml needs --engine native or llm-foundry"),
        (["--num-fewshot", "-1"], r"--num-fewshot -1: expected at least 0"),
        (["--engine", "native", "--eval-yaml", "a.yaml"], r"--include-path needs --engine lm-eval"),
    ],
)
def test_unusable_flags_of_the_script(
    flags: list[str], message: str, neox: Trained, tasks: Path, program: ModuleType
) -> None:
    """Errors name the flag."""
    with pytest.raises(ConfigError, match=message):
        program.main([*script_arguments(neox, tasks), *flags])


@pytest.mark.parametrize("case", ["llama_2", "gemma_2", "qwen_3"])
def test_folders_of_transformers_are_checkpoints(case: str, tmp_path: Path) -> None:
    """A folder of a model family gives the logits of transformers, without a conversion."""
    reference = hf_model(case)
    reference.save_pretrained(tmp_path / "hf")
    (checkpoint,) = find_checkpoints([f"{tmp_path}/hf/"])
    model = load_checkpoint(checkpoint)
    ids = random_ids(2, 12, vocab_size=reference.config.vocab_size)
    with torch.no_grad():
        assert torch.allclose(model(ids)[0], reference(ids).logits, atol=1e-4)
    assert results_file(checkpoint, ["core"], is_partial=True) == f"{tmp_path}/evals/hf_core_partial.json"


TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}
{%- for message in messages %}
<|{{ message['role'] }}|>{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}

{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("has_prompt", [True, False])
def test_conversations_are_formatted_as_in_transformers(has_prompt: bool, shared_dir: Path) -> None:
    from open_lm.evaluate.lm_eval.chat import render_chat
    from open_lm.hf.tokenization import load_hf_tokenizer
    from open_lm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_dir / "data" / "tokenizers" / "gpt-neox-20b.json"))
    messages = [{"role": "user", "content": " What is 2+2? "}, {"role": "assistant", "content": "The answer is"}]
    expected = load_hf_tokenizer(tokenizer).apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=has_prompt,
        continue_final_message=not has_prompt,
    )  # fmt: skip
    assert render_chat(TEMPLATE, messages, has_prompt, tokenizer) == expected
    system = {"role": "system", "content": "Be brief."}
    assert render_chat(TEMPLATE, [system, *messages], has_prompt, tokenizer) == expected
    with pytest.raises(ConfigError, match="does not accept the messages: no system message"):
        render_chat("{{ raise_exception('no system message') }}", messages, has_prompt, tokenizer)
    with pytest.raises(ConfigError, match=r"chat template of .*, line 1: Encountered unknown tag 'wrong'"):
        render_chat("{% wrong %}", messages, has_prompt, tokenizer)
    with pytest.raises(ConfigError, match=r"does not accept the messages: unsupported operand"):
        render_chat("{{ messages | length - 'a' }}", messages, has_prompt, tokenizer)
    if not has_prompt:
        with pytest.raises(ConfigError, match=r"changes the last message"):
            render_chat("{{ messages[-1]['content'] | upper }}", messages, has_prompt, tokenizer)
