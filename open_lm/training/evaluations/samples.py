"""Continuations of given prompts by the live model (--sample-prompts)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from open_lm import storage
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import run_on_master
from open_lm.errors import ConfigError, UserError
from open_lm.evaluate.icl.evaluator import Ranks, without_compilation
from open_lm.generate import Sampling, complete_texts
from open_lm.monitor.watchdog import heartbeat
from open_lm.parallel.parallelize import evaluation_mode, unwrap
from open_lm.storage.strict_json import to_json
from open_lm.tokenizer import Tokenizer
from open_lm.training.build import RunParts
from open_lm.training.evaluations.moment import Moment, Results, StepFile, StepSchedule
from open_lm.training.evaluations.tokenizer import run_tokenizer

_BATCH_PROMPTS = 16


class TextSamples:
    """The continuations of the prompts of --sample-prompts. samples.jsonl in the run's folder has a line per sample.

    Sampling has its own generators, which start from --seed in every evaluation: texts of different steps differ only
    because the model does.
    """

    name = "samples"

    def __init__(self, parts: RunParts, prompts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._parts, self._prompts, self._tokenizer = parts, prompts, tokenizer
        self._cfg = parts.config.live_evaluation
        self._file = StepFile(parts.paths.samples if parts.paths.enabled else None)
        self._schedule = StepSchedule(self._cfg.sample_every_n_steps, self._file)
        self._in_lockstep = Ranks.of_layout(parts.layout).in_lockstep

    @classmethod
    def create(cls, parts: RunParts, weights: str | None) -> TextSamples | None:
        """Read the prompts; return None without --sample-prompts. Collective.

        Raises:
            UserError: a file that cannot be read, prompts that do not fit the model, or a run without a tokenizer.
        """
        path = parts.config.live_evaluation.sample_prompts
        if path is None:
            return None
        prompts = run_on_master(lambda: read_prompts(path))
        tokenizer = run_tokenizer(parts, weights, "--sample-prompts")
        run_on_master(lambda: _check_prompts(path, prompts, tokenizer, parts.params))
        return cls(parts, prompts, tokenizer)

    def is_due(self, moment: Moment) -> bool:
        return self._schedule.is_due(moment)

    def rewind(self, moment: Moment) -> None:
        self._file.rewind(moment.step)

    def run(self, moment: Moment) -> Results:
        """Continue the prompts, and append the texts to samples.jsonl and to the log."""
        samples = list(self._samples())
        self._file.append([{"step": moment.step, "tokens": moment.tokens, **sample} for sample in samples])
        if self._parts.runtime.is_master:
            for sample in samples:
                text = to_json(sample["text"], ensure_ascii=False)
                prompt = to_json(sample["prompt"], ensure_ascii=False)
                logging.info(f"Sample at step {moment.step}, temperature {sample['temperature']:g}: {prompt} -> {text}")
        return Results(texts={_title(sample): sample["prompt"] + sample["text"] for sample in samples})

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Yield the records of samples.jsonl, without step and tokens; the same on all ranks. Collective."""
        for temperature in self._cfg.sample_temperature or [0.0]:
            sampling = Sampling(
                max_new_tokens=self._cfg.sample_max_tokens,
                temperature=temperature,
                top_p=1.0,
                seed=self._parts.config.run.seed,
            )
            for start in range(0, len(self._prompts), _BATCH_PROMPTS):
                heartbeat("sampling text")
                prompts = self._prompts[start : start + _BATCH_PROMPTS]
                texts = self._complete(prompts, sampling, start)
                for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=start + 1):
                    yield {"number": number, "temperature": temperature, "prompt": prompt, "text": text}

    def _complete(self, prompts: Sequence[str], sampling: Sampling, start: int) -> list[str]:
        """Return the continuations. Ranks that compute each forward pass together all take rank 0's choices."""

        def complete() -> list[str]:
            model: Any = unwrap(self._parts.model)
            precision, device = self._parts.config.precision.precision, self._parts.runtime.device
            agree = self._first_rank_choice if self._in_lockstep else None
            with evaluation_mode(model), without_compilation(model), get_autocast(precision, device.type)():
                return complete_texts(model, self._tokenizer, prompts, sampling, start, agree)

        return complete() if self._in_lockstep else run_on_master(complete)

    def _first_rank_choice(self, ids: list[int]) -> list[int]:
        chosen = torch.tensor(ids, device=self._parts.runtime.device)
        dist.broadcast(chosen, src=0)
        return [int(i) for i in chosen.tolist()]


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file, one per line; empty lines are left out.

    Raises:
        ConfigError: the file cannot be read or has no prompt.
    """
    try:
        lines = storage.read_lines(path)
    except UserError as error:
        raise ConfigError(f"--sample-prompts {path}: cannot read the file as UTF-8 text ({error})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--sample-prompts {path}: found no prompt; write one prompt per line")
    return prompts


def _check_prompts(path: str, prompts: Sequence[str], tokenizer: Tokenizer, params: Any) -> None:
    """Raise ConfigError if the model cannot continue the prompts."""
    for number, ids in enumerate(tokenizer.encode_batch(prompts), start=1):
        if len(ids) >= params.seq_len:
            raise ConfigError(
                f"--sample-prompts {path}: prompt {number} has {len(ids)} tokens, expected at most "
                f"{params.seq_len - 1}, one less than the model's sequence length; shorten it"
            )
        if max(ids, default=0) >= params.vocab_size:
            raise ConfigError(
                f"--sample-prompts {path}: prompt {number} has the id {max(ids)}, but the model's vocabulary has "
                f"{params.vocab_size} ids; check --tokenizer"
            )


def _title(sample: Mapping[str, Any]) -> str:
    temperature = "greedy" if sample["temperature"] == 0 else f"temperature {sample['temperature']:g}"
    return f"samples/{sample['number']} ({temperature})"
