"""Build the prompts of a task as token ids, the same ids that llm-foundry 0.22 builds.

The few-shot examples of each example come from one random generator per task and category. Context and continuation are
encoded separately. A tokenizer's special tokens are added only to the text before the example. A prompt that is too
long loses tokens on its left.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from open_lm.errors import DataError
from open_lm.evaluate.icl.task_types import (
    TASK_TYPES,
    GenerationWithAnswers,
    PromptOptions,
    Question,
    TaskType,
    parse_options,
)
from open_lm.evaluate.icl.tasks import Task, first_examples
from open_lm.storage.strict_json import to_json
from open_lm.tokenizer import Tokenizer

_EXTRA_ANSWER_TOKENS = 10  # more than the longest answer has, for chains of thought
_BATCH_TEXTS = 4096  # texts that are encoded at once

Ids = np.ndarray  # (n,) int32


class PromptTooLong(Exception):
    """An answer that is so long that no context fits into the sequence length."""


@dataclass(frozen=True)
class Choice:
    """A context and the continuation whose probability is computed; the continuation is empty for generation."""

    context: Ids
    continuation: Ids


@dataclass(frozen=True)
class Example:
    """The prompts of one example.

    Attributes:
        index: position among the examples of the task.
        category: its category; empty for tasks without.
        choices: one per choice; a single one if there is nothing to choose.
        gold: index of the correct choice.
        answers: accepted answers, for generation.
        max_new_tokens: tokens to generate at most; 0 if the answer is not generated.
    """

    index: int
    category: str
    choices: tuple[Choice, ...]
    gold: int = 0
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0


@dataclass
class Prompts:
    """The prompts of a task with one number of few-shot examples.

    Attributes:
        task: the entry of the YAML file.
        shots: examples in the prompt.
        options: the options of the entry.
        examples: in the order of the data, category by category.
        num_sequences: prompts, one per choice.
        num_truncated: prompts whose context was truncated.
        prefix_space: whether the tokenizer needs a space before a continuation.
    """

    task: Task
    shots: int
    options: PromptOptions
    examples: list[Example] = field(default_factory=list)
    num_sequences: int = 0
    num_truncated: int = 0
    prefix_space: bool = True

    @property
    def baseline(self) -> float:
        """The expected score of random guessing: that of the entry, or the mean of 1 / number of choices."""
        if self.task.baseline is not None:
            return self.task.baseline
        by_category: dict[str, list[float]] = {}
        for example in self.examples:
            chance = 1 / len(example.choices) if len(example.choices) > 1 else 0.0
            by_category.setdefault(example.category, []).append(chance)
        means = [sum(values) / len(values) for values in by_category.values()]
        return sum(means) / len(means) if means else 0.0

    def digest(self) -> str:
        """Return the sha256 (hex) of all token ids and of everything else that the scores depend on."""
        digest = hashlib.sha256()
        options = [self.task.kind, self.options.cot_delimiter, self.options.do_normalization]
        options += [list(self.options.early_stopping_criteria), sorted(self.task.config.get("metric_names") or [])]
        digest.update(to_json(options).encode())
        for example in self.examples:
            sizes = [[len(choice.context), len(choice.continuation)] for choice in example.choices]
            facts = [example.category, example.gold, example.answers, example.max_new_tokens, sizes]
            digest.update(to_json(facts).encode())
            for choice in example.choices:
                digest.update(choice.context.tobytes())
                digest.update(choice.continuation.tobytes())
        return digest.hexdigest()


def build_prompts(  # noqa: PLR0917 (the settings of a task)
    task: Task,
    shots: int,
    tokenizer: Tokenizer,
    seq_len: int,
    max_examples: int | None = None,
    special_tokens: bool = False,
) -> Prompts:
    """Build the prompts of a task.

    Args:
        task: the entry of the YAML file.
        shots: examples in the prompt; fewer if the data has fewer.
        tokenizer: the tokenizer of the model's training data.
        seq_len: maximum number of tokens of a prompt with its answer; the entry may lower it.
        max_examples: use only the first examples of the data, of each category if it has categories.
        special_tokens: add the tokenizer's special tokens, such as Llama's <s>, to the text before the example.

    Raises:
        ConfigError: an option that is not supported.
        DataError: a line of data that the type of task cannot use.
        PromptTooLong: an answer that leaves no place for a context.
    """
    options = parse_options(task.label, task.kind, task.config)
    prefix_space = len(tokenizer.encode(" a")) == 1
    kind: TaskType = TASK_TYPES.get(task.kind)(options, prefix_space)
    prompts = Prompts(task, shots, options, prefix_space=prefix_space)
    encoder = _Encoder(tokenizer, special_tokens)
    rows = _read(task, kind, max_examples)
    length = min(task.config.get("max_seq_len") or seq_len, seq_len)
    for category, members in _by_category(rows, task).items():
        _add_category(prompts, kind, category, members, encoder, length)
    return prompts


def _add_category(  # noqa: PLR0917 (the settings of a task)
    prompts: Prompts, kind: TaskType, category: str, rows: list[dict[str, Any]], encoder: _Encoder, length: int
) -> None:
    """Add the prompts of the examples of a category; few-shot examples come from the same category."""
    new_tokens = 0
    if isinstance(kind, GenerationWithAnswers):
        longest = _answer_length(kind, encoder, rows, length)
        new_tokens = int(kind.options.generation_kwargs.get("max_new_tokens", max(longest, 1)))
        length -= longest
    if prompts.options.strip_dataset:
        rows = [{key: _stripped(value) for key, value in row.items()} for row in rows]
    texts = list(_texts(rows, kind, prompts.options, prompts.shots))
    for text, (contexts, continuations) in zip(texts, encoder.encode(texts), strict=True):
        question = text.question
        choices = tuple(_choice(*pair, length, prompts) for pair in _pairs(contexts, continuations))
        index = len(prompts.examples)
        prompts.examples.append(Example(index, category, choices, question.gold, question.answers, new_tokens))


# --------------------------------------------------------------------------------------------------- reading
def _read(task: Task, kind: TaskType, max_examples: int | None) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(first_examples(task, max_examples), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{task.data}: example {number} is not JSON ({error})") from error
        problem = kind.check(row) if isinstance(row, dict) else "expected a JSON object"
        if problem is not None:
            raise DataError(f"{task.data}: example {number}, a {task.kind} task: {problem}")
        rows.append(row)
    if not rows:
        raise DataError(f"{task.data}: there are no examples in this file; restore the file")
    kind.has_chain_of_thought = any("chain_of_thought" in row for row in rows)
    return rows


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _by_category(rows: list[dict[str, Any]], task: Task) -> dict[str, list[dict[str, Any]]]:
    """Return the examples of each category, sorted by name; those of tasks without categories under ""."""
    if not task.config.get("has_categories"):
        return {"": rows}
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted({str(row["category"]) for row in rows})}
    for row in rows:
        groups[str(row["category"])].append(row)
    return groups


def _answer_length(kind: GenerationWithAnswers, encoder: _Encoder, rows: Sequence[dict[str, Any]], length: int) -> int:
    """Return the number of tokens that are reserved for an answer: those of the longest one.

    Raises:
        PromptTooLong: an answer that leaves no place for a question.
    """
    texts = list(dict.fromkeys(text for row in rows for text in kind.responses(row)))
    longest = max(len(ids) for ids in encoder.with_special_tokens(texts))
    longest += _EXTRA_ANSWER_TOKENS if kind.options.cot_delimiter else 0
    if longest >= length:
        raise PromptTooLong(
            f"the longest answer has {longest} tokens, but question and answer together may have only {length}"
        )
    return longest


# ----------------------------------------------------------------------------------------------------- texts
@dataclass(frozen=True)
class _Text:
    """The text before an example, and the texts that the model scores."""

    preamble: str
    question: Question


def _texts(rows: Sequence[dict[str, Any]], kind: TaskType, options: PromptOptions, shots: int) -> Iterator[_Text]:
    """Yield the texts of the examples of a category."""
    generator = random.Random(options.fewshot_random_seed)
    for index, row in enumerate(rows):
        preamble = options.prompt_string
        for shot in few_shot_indices(len(rows), shots, index, generator):
            preamble += kind.solved(rows[shot], preamble)
        yield _Text(preamble, kind.question(row, preamble))


def few_shot_indices(size: int, shots: int, index: int, generator: random.Random) -> set[int]:
    """Draw the examples for the prompt of example `index` out of `size`, without that example.

    The result is a set because the examples appear in its order. The order and the draws are those of llm-foundry:
    results are comparable only between prompts with the same examples in the same order.
    """
    drawn = set(generator.sample(range(size), min(shots, size - 1))) if shots else set()
    if index not in drawn:
        return drawn
    drawn.remove(index)
    if len(drawn) >= size - 1:
        return drawn
    candidate = generator.choice(range(size))
    while candidate == index or candidate in drawn:
        candidate = generator.choice(range(size))
    drawn.add(candidate)
    return drawn


# -------------------------------------------------------------------------------------------------- token ids
class _Encoder:
    """Encodes the texts of examples; each different text once."""

    def __init__(self, tokenizer: Tokenizer, special_tokens: bool) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens

    def encode(self, texts: Sequence[_Text]) -> Iterator[tuple[list[Ids], list[Ids]]]:
        """Yield the ids of contexts (with the text before them) and continuations of each example."""
        for start in range(0, len(texts), _BATCH_TEXTS):
            part = texts[start : start + _BATCH_TEXTS]
            preambles = self.with_special_tokens([text.preamble for text in part])
            strings = [text for item in part for text in (*item.question.contexts, *item.question.continuations)]
            unique = list(dict.fromkeys(strings))
            ids = dict(zip(unique, map(_as_array, self.tokenizer.encode_batch(unique)), strict=True))
            for item, preamble in zip(part, preambles, strict=True):
                before = _as_array(self._without_end(preamble))
                contexts = [np.concatenate((before, ids[text])) for text in item.question.contexts]
                yield contexts, [ids[text] for text in item.question.continuations]

    def with_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, with the tokenizer's special tokens if they are requested."""
        if self.special_tokens:
            return self.tokenizer.encode_with_special_tokens(texts)
        return self.tokenizer.encode_batch(texts)

    def _without_end(self, ids: list[int]) -> list[int]:
        """Remove the end-of-text token that a tokenizer has added: more text follows."""
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eot_id else ids


def _as_array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)


def _pairs(contexts: list[Ids], continuations: list[Ids]) -> Iterator[tuple[Ids, Ids]]:
    count = max(len(contexts), len(continuations))
    for index in range(count):
        yield contexts[index % len(contexts)], continuations[index % len(continuations)]


def _choice(context: Ids, continuation: Ids, length: int, prompts: Prompts) -> Choice:
    """Return the prompt of a choice with a context that fits into `length` tokens, and count it."""
    scored = prompts.task.kind != "generation_task_with_answers"
    if scored and len(continuation) >= length:
        raise PromptTooLong(
            f"an answer has {len(continuation)} tokens, so that no context fits into the sequence length {length}"
        )
    if not len(context) or (scored and not len(continuation)):
        empty = "context" if not len(context) else "continuation"
        raise DataError(
            f"{prompts.task.data}: an example has an empty {empty}, so that its answer has no probability; correct the "
            "data, or set prompt_string"
        )
    prompts.num_sequences += 1
    if len(context) + len(continuation) > length:
        prompts.num_truncated += 1
        context = context[len(context) + len(continuation) - length :]
    return Choice(context, continuation)
