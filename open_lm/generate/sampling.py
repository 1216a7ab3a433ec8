"""Text generation: sampling with a KV cache, for batches of prompts of different lengths.

Legend: B batch (one sequence per prompt), T sequence, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from open_lm.errors import ConfigError, DataError, join_problems
from open_lm.kernels.threads import limit_threads
from open_lm.model.initialization import reset_buffers
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer, create_model
from open_lm.tokenizer import Tokenizer

# Prompts are prefilled in chunks of this many tokens, which limits the memory of activations.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling the next token.

    Attributes:
        max_new_tokens: maximum number of tokens added to a prompt; the model's sequence length is also a limit.
        temperature: divisor of the logits; 0 always selects the most likely token.
        top_k: sample from this number of most likely tokens; 0 disables the limit.
        top_p: sample from the smallest set of most likely tokens with this total probability (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751).
        repetition_penalty: logits of tokens already in the sequence are divided by it if positive, else multiplied
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858); 1 disables it.
        seed: seed of the random choices. Each sequence has its own generator, independent of the rest of the batch.
        stop_ids: token ids that end a sequence.
        vocab_limit: number of ids that may be sampled, if the tokenizer has fewer than the model; None for all.
        use_cache: use a KV cache; without it all keys and values are recomputed for every token.

    Raises:
        ConfigError: values out of range, reported together.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    vocab_limit: int | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        rules = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
        )
        problems = [f"{flag} is {value}, expected {expected}" for flag, value, valid, expected in rules if not valid]
        if problems:
            raise ConfigError(join_problems(problems, "generation"))


def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    first_row: int = 0,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts token by token.

    Args:
        model: set to evaluation mode during generation, and back to its mode afterwards.
        prompts: B non-empty lists of token ids, of any lengths.
        sampling: the sampling settings.
        first_row: index of the first prompt among all prompts that share a seed, if they are split into batches.
        agree: maps the B ids that this rank has chosen to those that all ranks take, if several ranks compute each
            forward pass together.

    Yields:
        B entries per step: the id of the new token, or None for a sequence that has ended. Ids in stop_ids end their
        sequence and are also yielded.

    Raises:
        ConfigError: a prompt that is as long as the model's sequence length or longer.
        DataError: a prompt that is empty or contains an id outside the model's vocabulary.
    """
    _check_prompts(model, prompts)
    was_training = model.training
    model.eval()
    try:
        yield from _Batch(model, prompts, sampling, first_row, agree).steps()
    finally:
        model.train(was_training)


class _Batch:
    """The state of a batch of sequences during generation."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        first_row: int,
        agree: Callable[[list[int]], list[int]] | None,
    ) -> None:
        self.model, self.sampling, self.agree = model, sampling, agree
        device = model.get_input_embeddings().weight.device
        width = max(len(prompt) for prompt in prompts)
        self.ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        self.mask = torch.zeros_like(self.ids)
        self.seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
            self.mask[row, width - len(prompt) :] = 1
            self.seen[row, list(prompt)] = True
        self.has_padding = any(len(prompt) < width for prompt in prompts)
        self.num_remaining = _tokens_to_generate(model, prompts, sampling)
        self.generators = [_generator(sampling.seed, first_row + row) for row in range(len(prompts))]
        self.cache: list[list[Tensor]] | None = None
        self.num_cached = 0  # positions in the cache

    def steps(self) -> Iterator[list[int | None]]:
        while any(self.num_remaining):
            chosen = self._step()
            yield [token if remaining else None for token, remaining in zip(chosen, self.num_remaining, strict=True)]
            for row, token in enumerate(chosen):
                is_stop = token in self.sampling.stop_ids
                self.num_remaining[row] = 0 if is_stop else max(0, self.num_remaining[row] - 1)

    @torch.no_grad()
    def _step(self) -> list[int]:
        num_tokens = self.ids.numel() if self.cache is None else len(self.ids)
        with limit_threads(self.model, num_tokens, self.ids.device):
            return self._choose_and_append()

    def _choose_and_append(self) -> list[int]:
        chosen = choose(self._next_logits(), self.seen, self.sampling, self.generators)
        if self.agree is not None:
            chosen = self.agree(chosen)
        column = torch.tensor(chosen, device=self.ids.device)[:, None]
        self.ids = torch.cat((self.ids, column), dim=1)
        self.mask = torch.cat((self.mask, torch.ones_like(column)), dim=1)
        self.seen.scatter_(1, column, True)
        return chosen

    def _next_logits(self) -> Tensor:
        """Return the logits of the next token of each sequence: (B,V) float32."""
        start, total = self.num_cached, self.ids.shape[1]
        ends = [*range(start + PREFILL_TOKENS, total, PREFILL_TOKENS), total] if self.sampling.use_cache else [total]
        for end in ends:
            logits, _, self.cache = self.model(
                self.ids[:, start:end],
                past_key_values=self.cache,
                use_cache=self.sampling.use_cache,
                attention_mask=self.mask[:, :end] if self.has_padding else None,
                logits_to_keep=1,
            )
            start = end
        self.num_cached = total if self.sampling.use_cache else 0
        last: Tensor = logits[:, -1]
        return last


def _tokens_to_generate(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[int]:
    """Return the maximum number of new tokens of each prompt."""
    return [min(sampling.max_new_tokens, model.seq_len - len(prompt)) for prompt in prompts]


def _generator(seed: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        invalid = [i for i in prompt if not 0 <= i < model.vocab_size]
        if not prompt:
            problems.append(f"prompt {number} has no tokens")
        elif invalid:
            problems.append(f"prompt {number} contains the id {invalid[0]}, expected 0 to {model.vocab_size - 1}")
    if problems:
        raise DataError(join_problems(problems, "these prompts do not fit the model; check --tokenizer"))
    too_long = [
        f"prompt {number} has {len(prompt)} tokens, expected at most {model.seq_len - 1}"
        for number, prompt in enumerate(prompts, start=1)
        if len(prompt) >= model.seq_len
    ]
    if too_long:
        raise ConfigError(
            join_problems(too_long, f"the model's sequence length is {model.seq_len}; shorten the prompts")
        )


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Sample the next token of each sequence.

    Args:
        logits: (B,V) float32.
        seen: (B,V) bool, true for tokens that are already in the sequence.
        sampling: the sampling settings.
        generators: B generators on the CPU.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.vocab_limit is not None and sampling.vocab_limit < logits.shape[-1]:
        logits = logits[:, : sampling.vocab_limit]
    if sampling.temperature == 0:
        return [int(i) for i in logits.argmax(-1).tolist()]
    probabilities = filtered_probabilities(logits / sampling.temperature, sampling.top_k, sampling.top_p).cpu()
    draws = zip(probabilities, generators, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in draws]


def filtered_probabilities(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the softmax of logits (B,V), 0 outside the top_k most likely tokens and outside the top_p nucleus."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative_before = ordered.cumsum(-1) - ordered
    kept = torch.where(cumulative_before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(1, order, kept / kept.sum(-1, keepdim=True))


class TextStream:
    """An incremental decoder that returns text as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = max(0, len(self._ids) - 8)  # a few tokens of context, on which spaces depend
        self._read = len(self._ids)

    def push(self, token: int, final: bool = False) -> str:
        """Add a token and return the text that it completes; with `final`, including an incomplete character."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        after = self._tokenizer.decode(self._ids[self._start :])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]


def stream_texts(  # noqa: PLR0917 (existing callers pass first_row by position)
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    first_row: int = 0,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> Iterator[list[str]]:
    """Continue texts. Each step yields B strings, "" for sequences that have ended or have an incomplete character.

    An end-of-text token ends its sequence and yields no text. An empty prompt starts a document. See `generate_ids`.
    """
    ids = [tokenizer.encode(prompt) or [tokenizer.eot_id] for prompt in prompts]
    sampling = replace(
        sampling,
        stop_ids=tuple({*sampling.stop_ids, tokenizer.eot_id}),
        vocab_limit=min(tokenizer.vocab_size, sampling.vocab_limit or tokenizer.vocab_size),
    )
    streams = [TextStream(tokenizer, prompt) for prompt in ids]
    limits = _tokens_to_generate(model, ids, sampling)
    for count, step in enumerate(generate_ids(model, ids, sampling, first_row, agree), start=1):
        yield [
            "" if token is None else stream.push(token, final=count == limit or token in sampling.stop_ids)
            for token, stream, limit in zip(step, streams, limits, strict=True)
        ]


def complete_texts(  # noqa: PLR0917 (existing callers pass first_row by position)
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    first_row: int = 0,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> list[str]:
    """Return the continuations of B texts, without the texts. See `stream_texts`."""
    steps = list(stream_texts(model, tokenizer, prompts, sampling, first_row, agree))
    return ["".join(step[row] for step in steps) for row in range(len(prompts))]


def load_model_for_generation(
    checkpoint: str, cfg: object, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Create a model, load a checkpoint, and set evaluation mode.

    Args:
        checkpoint: see `open_lm.checkpoint.load_weights`.
        cfg: Params, a ModelConfig, or an object with its attributes.
        device: where the weights are placed.
        dtype: of the weights.

    Raises:
        ConfigError: an unknown model.
        CheckpointError: a checkpoint that is missing or damaged, or has other shapes.
    """
    from open_lm.checkpoint import load_weights

    with torch.device("meta"):
        model = Transformer(cfg) if isinstance(cfg, Params) else create_model(cfg)
    model.to_empty(device=device)
    reset_buffers(model)
    load_weights(checkpoint, model)
    return model.to(dtype).eval()
