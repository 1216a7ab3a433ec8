"""The types of in-context-learning tasks: the text of their prompts, as in llm-foundry 0.22.

A type says which columns a line of data has, how a solved example reads in a prompt, and which contexts and
continuations the model scores. A new type is one class with a `register` decorator.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from open_lm.config.registry import Registry
from open_lm.errors import ConfigError, join_problems

TASK_TYPES = Registry("TASK_TYPES", "icl_task_type", "open_lm.evaluate.icl")

# Keys of a task's entry that select the data, the batches or the metrics; they do not change a prompt.
OTHER_KEYS = frozenset({"label", "icl_task_type", "dataset_uri", "num_fewshot", "metric_names", "batch_size"})
OTHER_KEYS |= {"has_categories", "max_seq_len"}

Row = Mapping[str, Any]  # a line of task data


@dataclass(frozen=True)
class PromptOptions:
    """The options of a task's entry that change its prompts or the comparison of answers, with llm-foundry's defaults.

    Attributes:
        prompt_string: text before everything else.
        example_delimiter: text between examples.
        continuation_delimiter: text between context and answer.
        prelimiter: text before each context; `question_prelimiter` is an older name.
        context_key: column of the context; empty for the type's own.
        choices_key: column of the choices; empty for the type's own.
        answer_key: column of the answer of a generation task.
        strip_dataset: strip white space around the texts of a line, and at the end of a context.
        fewshot_random_seed: seed of the choice of examples for the prompts.
        cot_delimiter: text between a chain of thought and the answer.
        early_stopping_criteria: regular expressions; a generated text ends before the first match.
        do_normalization: compare answers without case, punctuation, articles and repeated white space.
        generation_kwargs: settings of generation; only max_new_tokens, and values that mean greedy search.
    """

    prompt_string: str = ""
    example_delimiter: str = "\n"
    continuation_delimiter: str = " "
    prelimiter: str = ""
    context_key: str = ""
    choices_key: str = ""
    answer_key: str = ""
    strip_dataset: bool = True
    fewshot_random_seed: int = 1234
    cot_delimiter: str = ""
    early_stopping_criteria: tuple[str, ...] = ()
    do_normalization: bool = True
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """What the model scores for an example.

    Attributes:
        contexts: text after the few-shot examples, one per choice; a single one is common to all choices.
        continuations: text whose probability is computed, one per choice; a single one is common to all contexts.
        gold: index of the correct choice.
        answers: accepted answers, for generated text.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    answers: tuple[str, ...] = ()


class TaskType(ABC):
    """The texts of one type of task.

    Attributes:
        columns: required columns of a line of data; the first one is the context.
        column_options: options that rename columns, by column; without an entry, context_key renames the first one.
        metric: llm-foundry's name of the score.
        calibration_metric: llm-foundry's name of the calibration error, if the type has one.
        extra_options: names of the PromptOptions that only this type supports.
    """

    columns: tuple[str, ...]
    column_options: Mapping[str, str] = MappingProxyType({})
    metric: str
    calibration_metric: str | None = None
    extra_options: frozenset[str] = frozenset()

    def __init__(self, options: PromptOptions, prefix_space: bool) -> None:
        self.options = options
        self.prefix_space = prefix_space  # whether continuations begin with a space, as this tokenizer needs
        self.names = self.column_names(vars(options))
        self.context_key = self.names[self.columns[0]]
        self.has_chain_of_thought = False

    @classmethod
    def column_names(cls, options: Mapping[str, Any]) -> dict[str, str]:
        """Return the names that the required columns have in the data, by column; options rename some of them."""
        renaming = {cls.columns[0]: "context_key", **cls.column_options}
        names = {column: options.get(renaming.get(column, "")) for column in cls.columns}
        return {column: name if name and isinstance(name, str) else column for column, name in names.items()}

    @abstractmethod
    def check(self, row: Row) -> str | None:
        """Return the problem of a line of data, or None."""

    @abstractmethod
    def answer(self, row: Row) -> str:
        """Return the correct answer as it reads in a solved example."""

    @abstractmethod
    def question(self, row: Row, preceding: str) -> Question:
        """Return what the model scores after the text `preceding` (prompt string and solved examples)."""

    def solved(self, row: Row, preceding: str) -> str:
        """Return an example with its answer, as it follows the text `preceding`."""
        return self._context(row, preceding) + self.answer(row)

    def _context(self, row: Row, preceding: str) -> str:
        options = self.options
        delimiter = options.example_delimiter if preceding else ""
        return f"{delimiter}{options.prelimiter}{row[self.context_key]}{options.continuation_delimiter}"

    def _stripped_context(self, row: Row, preceding: str) -> str:
        context = self._context(row, preceding)
        return context.rstrip() if self.options.strip_dataset else context

    def _spaced(self, continuation: str) -> str:
        return f" {continuation}" if self.prefix_space and not continuation.startswith(" ") else continuation


@TASK_TYPES.register("language_modeling", help="the model must predict the continuation exactly")
class LanguageModeling(TaskType):
    """A context with one continuation, which the model must predict token by token."""

    columns = ("context", "continuation")
    metric = "InContextLearningLMAccuracy"
    calibration_metric = "InContextLearningLMExpectedCalibrationError"
    extra_options = frozenset({"context_key"})

    def check(self, row: Row) -> str | None:
        return _text_problem(row, self.context_key) or _text_problem(row, "continuation")

    def answer(self, row: Row) -> str:
        return str(row["continuation"])

    def question(self, row: Row, preceding: str) -> Question:
        return Question((self._stripped_context(row, preceding),), (self._spaced(row["continuation"]),))


@TASK_TYPES.register("multiple_choice", help="the model must prefer the correct choice")
class MultipleChoice(TaskType):
    """A question with several choices, of which the model must prefer the correct one."""

    columns = ("query", "choices", "gold")
    column_options = MappingProxyType({"choices": "choices_key"})
    metric = "InContextLearningMultipleChoiceAccuracy"
    calibration_metric = "InContextLearningMCExpectedCalibrationError"
    extra_options = frozenset({"context_key", "choices_key", "answer_key"})

    def __init__(self, options: PromptOptions, prefix_space: bool) -> None:
        super().__init__(options, prefix_space)
        self.choices_key = self.names["choices"]

    def check(self, row: Row) -> str | None:
        return _text_problem(row, self.context_key) or _choices_problem(row, self.choices_key)

    def answer(self, row: Row) -> str:
        return str(row[self.choices_key][row["gold"]])

    def question(self, row: Row, preceding: str) -> Question:
        continuations = tuple(self._spaced(choice) for choice in row[self.choices_key])
        return Question((self._stripped_context(row, preceding),), continuations, row["gold"])


@TASK_TYPES.register("schema", help="the model must prefer the correct context of a continuation")
class Schema(TaskType):
    """A continuation with several contexts, of which the model must prefer the correct one."""

    columns = ("context_options", "continuation", "gold")
    column_options = MappingProxyType({"context_options": "choices_key"})
    metric = "InContextLearningMultipleChoiceAccuracy"
    calibration_metric = "InContextLearningMCExpectedCalibrationError"
    extra_options = frozenset({"choices_key"})

    def check(self, row: Row) -> str | None:
        return _choices_problem(row, self.context_key) or _text_problem(row, "continuation")

    def answer(self, row: Row) -> str:
        return str(row["continuation"])

    def solved(self, row: Row, preceding: str) -> str:
        options = self.options
        delimiter = options.example_delimiter if preceding else ""
        context = f"{options.prelimiter}{delimiter}{row[self.context_key][row['gold']]}"
        return f"{context}{options.continuation_delimiter}{row['continuation']}"

    def question(self, row: Row, preceding: str) -> Question:
        options = self.options
        before, after = options.prelimiter, ""
        if preceding:
            before = f"{options.prelimiter}{options.example_delimiter}"
            after = options.continuation_delimiter
            after = after.rstrip() if options.strip_dataset else after
        contexts = tuple(f"{before}{context}{after}" for context in row[self.context_key])
        return Question(contexts, (self._spaced(row["continuation"]),), row["gold"])


@TASK_TYPES.register("generation_task_with_answers", help="the generated text must begin with an accepted answer")
class GenerationWithAnswers(TaskType):
    """A context after which the model generates text, which must begin with one of the accepted answers."""

    columns = ("context", "answer")
    column_options = MappingProxyType({"answer": "answer_key"})
    metric = "InContextLearningGenerationExactMatchAccuracy"
    extra_options = frozenset({
        "context_key", "answer_key", "cot_delimiter", "early_stopping_criteria", "do_normalization",
        "generation_kwargs",
    })  # fmt: skip

    def __init__(self, options: PromptOptions, prefix_space: bool) -> None:
        super().__init__(options, prefix_space)
        self.answer_key = self.names["answer"]

    def check(self, row: Row) -> str | None:
        problem = _text_problem(row, self.context_key) or _text_problem(row, self.answer_key)
        aliases = row.get("aliases") or []
        if problem is None and not (isinstance(aliases, list) and all(isinstance(text, str) for text in aliases)):
            return f"aliases is {aliases!r}, expected a list of texts"
        return problem

    def answer(self, row: Row) -> str:
        return self._response(row, row[self.answer_key])

    def question(self, row: Row, preceding: str) -> Question:
        return Question((self._stripped_context(row, preceding),), ("",), answers=self._answers(row))

    def responses(self, row: Row) -> list[str]:
        """Return the texts whose longest one limits the length of a generated text."""
        return [self._response(row, answer) for answer in (row[self.answer_key], *self._answers(row))]

    def _answers(self, row: Row) -> tuple[str, ...]:
        """Return the accepted answers; as in llm-foundry, the column answer has one even if answer_key is set."""
        return tuple(sorted({row.get("answer", row[self.answer_key]), *(row.get("aliases") or [])}))

    def _response(self, row: Row, answer: str) -> str:
        if not self.has_chain_of_thought:
            return answer
        return f"{row.get('chain_of_thought') or ''}{self.options.cot_delimiter}{answer}"


def known_metrics() -> list[str]:
    """Return llm-foundry's names of the metrics of all types."""
    types = [TASK_TYPES.get(name) for name in TASK_TYPES]
    return list(dict.fromkeys(name for kind in types for name in (kind.metric, kind.calibration_metric) if name))


def parse_options(label: str, kind: str, entry: Mapping[str, Any]) -> PromptOptions:
    """Return the options of a task's entry.

    Raises:
        ConfigError: options that this engine does not support, or values of another type.
    """
    names = {item.name: item for item in fields(PromptOptions)}
    only_some_types = frozenset[str]().union(*(task_type.extra_options for task_type in TASK_TYPES.objects.values()))
    supported = names.keys() - only_some_types | TASK_TYPES.get(kind).extra_options
    problems, values = [], dict[str, Any]()
    if "question_prelimiter" in entry and "prelimiter" in entry:
        problems.append("prelimiter and question_prelimiter are two names of one option; remove one of them")
    for key, value in entry.items():
        name = "prelimiter" if key == "question_prelimiter" else key
        if key in OTHER_KEYS or value is None:
            continue
        if name not in supported:
            problems.append(f"{key} is not supported for {kind} tasks; remove it, or use --engine llm-foundry")
            continue
        values[name] = tuple(value) if isinstance(value, list) else value
        expected = type(getattr(PromptOptions(), name))
        if not isinstance(values[name], expected) or (isinstance(value, bool) and expected is not bool):
            problems.append(f"{key} is {value!r}, expected a value of type {expected.__name__}")
    problems += _pattern_problems(values.get("early_stopping_criteria") or ())
    problems += _generation_problems(values.get("generation_kwargs") or {})
    if problems:
        raise ConfigError(join_problems([f"task {label}: {problem}" for problem in problems]))
    return PromptOptions(**values)


def _pattern_problems(patterns: Any) -> list[str]:
    """Return a problem for each of the early_stopping_criteria that is no regular expression."""
    problems = []
    for pattern in patterns if isinstance(patterns, tuple) else ():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            problems.append(f"early_stopping_criteria has {pattern!r}, expected a regular expression ({error})")
    return problems


def _generation_problems(settings: Any) -> list[str]:
    """Return a problem for each setting of generation that is not greedy search."""
    if not isinstance(settings, Mapping):
        return []
    greedy = {"do_sample": (False,), "num_beams": (1,), "use_cache": (True, False)}
    problems = []
    for key, value in settings.items():
        if key == "max_new_tokens":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"generation_kwargs.max_new_tokens is {value!r}, expected an integer of at least 1")
        elif key not in greedy or value not in greedy[key]:
            problems.append(f"generation_kwargs.{key} is {value!r}, but only greedy search is supported")
    return problems


def _text_problem(row: Row, key: str) -> str | None:
    value = row.get(key)
    return None if isinstance(value, str) else f"{key} is {_shortened(value)}, expected a text"


def _choices_problem(row: Row, key: str) -> str | None:
    choices, gold = row.get(key), row.get("gold")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        return f"{key} is {_shortened(choices)}, expected a list of texts"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold is {gold!r}, expected an index of the {len(choices)} {key}"
    return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
