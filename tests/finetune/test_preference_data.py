"""Rows of preference data and prompts, reward functions, and the flags of the commands that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from open_lm.errors import ConfigError, DataError
from open_lm.finetune.dpo import DpoConfig
from open_lm.finetune.flags import parse, recipe_names
from open_lm.finetune.grpo import GrpoConfig
from open_lm.finetune.grpo import main as grpo
from open_lm.finetune.preference_data import read_pairs, read_prompts
from open_lm.finetune.rewards import load_rewards

USER, BOT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
OTHER = {"role": "assistant", "content": "5"}
TEXT = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_pairs_of_text_and_of_messages(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", TEXT, "", {**TEXT, "source": "x"})
    pairs = read_pairs([text])
    assert pairs == [{**TEXT, "location": f"{text}:1"}, {**TEXT, "location": f"{text}:3"}]
    split = {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}
    forms = [split, {"chosen": [USER, BOT], "rejected": [USER, OTHER]}]
    forms.append({"prompt": "2+2?", "chosen": [USER, BOT], "rejected": [USER, OTHER]})
    for pair in read_pairs([write(tmp_path / "messages.jsonl", *forms)]):
        assert {key: pair[key] for key in split} == split


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "Expecting property name"),
        ([1], "found a list, expected a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "rejected missing; found the keys prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "prompt missing"),
        ({**TEXT, "chosen": " "}, "chosen is empty"),
        ({**TEXT, "rejected": 4}, "chosen: found text, expected a list of messages"),
        ({**TEXT, "rejected": "4"}, "are equal"),
        ({"prompt": [USER], "chosen": [{"role": "robot", "content": "4"}], "rejected": [BOT]}, "'robot'"),
        ({"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [BOT]}, "empty"),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [BOT]},
            "chosen does not end with a message of the assistant",
        ),
        ({"chosen": [BOT], "rejected": [OTHER]}, "begin with different messages"),
        ({"prompt": [USER, BOT], "chosen": [BOT], "rejected": [OTHER]}, "the prompt ends with a message of the assis"),
        ({**TEXT, "chosen": "a\udc00"}, "'chosen': found .*, half of a surrogate pair"),
        ({"prompt": [USER], "chosen": [{**BOT, "content": "\ud800"}], "rejected": [BOT]}, "chosen, message 1: found"),
        ({"prompt": "3+3?", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, "not part of the messages"),
    ],
)
def test_bad_pairs_are_errors_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", TEXT, row)
    with pytest.raises(DataError, match=message) as caught:
        read_pairs([path])
    assert f"{path}:2" in str(caught.value)


def test_files_that_mix_forms_or_have_many_bad_rows(tmp_path: Path) -> None:
    messages = {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}
    mixed = write(tmp_path / "mixed.jsonl", TEXT, messages)
    with pytest.raises(DataError, match=f"{mixed}:1 has text, but {mixed}:2 has messages"):
        read_pairs([mixed])
    with pytest.raises(DataError, match="and 5 further rows"):
        read_pairs([write(tmp_path / "many.jsonl", *[{}] * 15)])
    with pytest.raises(DataError, match="has no rows"):
        read_pairs([write(tmp_path / "empty.jsonl")])


def test_prompts_keep_their_other_keys_and_their_types(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"})
    assert read_prompts([path])[1] == {"prompt": "1+2=", "answer": "3", "location": f"{path}:2"}
    mixed = write(tmp_path / "mixed.jsonl", {"prompt": "1+1=", "answer": 2}, {"prompt": "1+2="})
    with pytest.raises(DataError, match=rf"'answer': found a number \({mixed}:1\), null \({mixed}:2\)"):
        read_prompts([mixed])
    with pytest.raises(DataError, match="'completions' is reserved"):
        read_prompts([write(tmp_path / "reserved.jsonl", {"prompt": "1", "completions": "2"})])
    with pytest.raises(DataError, match=r"p.jsonl:2: 'answer': found .*, half of a surrogate pair"):
        read_prompts([write(tmp_path / "p.jsonl", "", {"prompt": "1", "answer": "\ud800"})])


# --- rewards ---------------------------------------------------------------------------------------------------------
def reward(name: str, completions: list[Any], **columns: Any) -> list[float | None]:
    (function,) = load_rewards([name])
    return function(prompts=["p"] * len(completions), completions=completions, **columns)


def test_exact_match_compares_the_last_marked_number() -> None:
    completions = ["so #### 1,234", "#### 7\n#### 8", "#### $8.0", "8", "#### eight", "####  -3"]
    answers = ["1234", "8", "2 + 6 = 8\n#### 8", "8", "8", "-3"]
    assert reward("exact_match", completions, answer=answers) == [1, 1, 1, 0, 0, 1]
    assert reward("exact_match", [[{"role": "assistant", "content": "#### 5"}]], answer=[5]) == [1]
    unusual = ["#### --5", "#### -$-5", "#### ,", "#### .", "#### -", "#### 1,,5", "#### $-15", "#### .5", "#### 1.2.3"]
    expected = [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert reward("exact_match", unusual, answer=[15] * len(unusual)) == expected
    assert reward("exact_match", ["#### $-5", "#### -$5", "#### - 5"], answer=[-5] * 3) == [1, 1, 1]
    with pytest.raises(DataError, match=r"answer 'many' is not a number .* for the row f:9 and the completion 'b'"):
        reward("exact_match", ["a", "b"], answer=["1", "many"], location=["f:8", "f:9"])


def test_format_rewards() -> None:
    completions = ["1 + 1 is\n#### 2", "#### 2 #### 2", "#### 2 apples", "####", "#### -1,000.5\n"]
    assert reward("answer_format", completions) == [1, 0, 0, 0, 1]
    thoughts = ["<think>a\nb</think>c", "<think></think>c", "<think>a</think> ", "c", "<think>a</think>b</think>"]
    assert reward("think_format", thoughts) == [1, 0, 0, 0, 0]


def test_rewards_from_a_file_and_their_errors(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def length(completions, **columns):\n    return [len(text) for text in completions]\n\n\n"
        "def fail(completions, limit, **columns):\n"
        "    return [1 / (len(text) - n) for text, n in zip(completions, limit)]\n"
        "\n\ndef wrong(completions, **columns):\n    return ['much'] * len(completions)\n"
        "\n\ndef short(completions, **columns):\n    return []\n"
        "\n\ndef nothing(completions, **columns):\n    pass\n"
        "\n\ndef numpy(completions, **columns):\n"
        "    import numpy\n    return [None, *numpy.ones(1, numpy.float32), 10**400][: len(completions)]\n"
    )
    found = reward(f"{path}:numpy", ["a", "b"])
    assert found == [None, 1.0] and type(found[1]) is float
    with pytest.raises(DataError, match=r"returned 1000.* for the row d:3; expected a finite number"):
        reward(f"{path}:numpy", ["a", "b", "c"], location=["d:1", "d:2", "d:3"])
    with pytest.raises(DataError, match=rf"--reward {path}:nothing: returned NoneType; return a list of numbers"):
        reward(f"{path}:nothing", ["a"])
    assert reward(f"{path}:length", ["ab", "c"]) == [2, 1]
    where = {"location": ["d:1", "d:2"], "limit": [1, 1]}
    with pytest.raises(
        DataError, match=rf"{path}:6: raised ZeroDivisionError: .* for the row d:2 and the completion 'c'"
    ):
        reward(f"{path}:fail", ["ab", "c"], **where)
    with pytest.raises(DataError, match="returned 'much' for the row d:1; expected a finite number"):
        reward(f"{path}:wrong", ["ab", "c"], **where)
    with pytest.raises(DataError, match="returned 0 rewards for 2 completions"):
        reward(f"{path}:short", ["ab", "c"], **where)


def test_a_reward_file_may_define_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "json.py"  # the name of a module of Python
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Score:\n    value: float\n\n\n"
        "def score(completions, **columns):\n    return [Score(2.0).value for _ in completions]\n"
    )
    assert reward(f"{path}:score", ["a"]) == [2]


def test_unusable_reward_files(tmp_path: Path) -> None:
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("\nimport no_such_module\n")
    (tmp_path / "empty.py").write_text("def other():\n    pass\n")
    cases = {
        "syntax.py:f": r"syntax.py:1: invalid syntax",
        "raises.py:f": r"raises.py:2: importing it raised ModuleNotFoundError",
        "empty.py:f": "has no function 'f'; found other",
        "missing.py:f": "found no file",
    }
    for spec, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_rewards([f"{tmp_path}/{spec}"])
    with pytest.raises(ConfigError, match="expected one of exact_match, answer_format, think_format"):
        load_rewards(["exact"])


# --- flags -----------------------------------------------------------------------------------------------------------
def parsed(command: str, *flags: str) -> Any:
    section = {"dpo": DpoConfig, "grpo": GrpoConfig}[command]
    return parse(["--pretrained", "m", "--train-data", "d", *flags], command, "Help.", section)


@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_recipes_are_valid_and_flags_and_files_take_precedence(tmp_path: Path, command: str) -> None:
    names = recipe_names(command)
    assert len(names) >= 2
    for name in names:
        recipe = parsed(command, "--recipe", name)
        assert recipe.lr < 1e-5 and recipe.beta >= 0
        assert parsed(command, "--recipe", name, "--lr", "0.5").lr == 0.5
    own = write(tmp_path / "own.yaml", f"recipe: {names[0]}\nlr: 0.25\ntrl: [logging_first_step=true]")
    assert parsed(command, "--config", own).lr == 0.25
    both = parsed(command, "--config", own, "--trl", "eval_delay=1")
    assert both.trl[-2:] == ["logging_first_step=true", "eval_delay=1"]


def test_problems_with_flags_are_reported_together(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", "learning_rate: 1")
    with pytest.raises(ConfigError) as caught:
        parse(["--config", own, "--lora", "rank=4", "--wd", "-1", "--lr", "x"], "dpo", "Help.", DpoConfig)
    message = str(caught.value)
    for part in ("--pretrained is missing", "--train-data is missing", "'rank'", "--wd: found -1", "--lr: found 'x'"):
        assert part in message
    assert f"{own}: unknown key 'learning_rate'; did you mean" in message
    for command in ("dpo", "grpo"):
        with pytest.raises(ConfigError, match=r"--loss-type: found 'sigmoidd', expected one of \w+"):
            parsed(command, "--loss-type", "sigmoidd")
    assert parsed("dpo", "--loss-type", "sigmoid", "sft").loss_type == ["sigmoid", "sft"]
    with pytest.raises(ConfigError, match="--recipe nope: found no such recipe or file"):
        parsed("dpo", "--recipe", "nope")


def test_grpo_checks_its_batch_and_rewards() -> None:
    flags = ["--pretrained", "m", "--train-data", "d", "--num-generations", "8", "--global-batch-size", "12"]
    flags += ["--num-iterations", "2", "--save-every-n-steps", "5"]
    with pytest.raises(ConfigError) as caught:
        grpo(flags)
    for part in ("--reward is missing", "a multiple of --num-generations 8", "a multiple of --num-iterations 2"):
        assert part in str(caught.value)
