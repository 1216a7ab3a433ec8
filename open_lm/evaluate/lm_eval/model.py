"""The model "open_lm" of lm-eval: a checkpoint of this package, or one that it can import, on the ICL engine.

The token ids of a request are those that lm-eval's model "hf" computes for the exported checkpoint: context and
continuation are encoded together, and an empty context is replaced by the token that begins a text, or by the one that
ends it. Training data has no token that begins a text, so none is added to other texts; a folder in the format of
transformers has the special tokens of its tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from open_lm.checkpoint.folders import is_transformers_folder
from open_lm.config.evaluation_sections import EVAL_PRECISIONS
from open_lm.config.sections import ParallelConfig
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, init_runtime
from open_lm.errors import ConfigError, DataError, join_problems
from open_lm.evaluate.checkpoints import find_checkpoints, load_checkpoint
from open_lm.evaluate.icl.evaluator import CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS
from open_lm.evaluate.icl.store import weights_hash
from open_lm.evaluate.lm_eval.chat import find_template, render_chat
from open_lm.evaluate.lm_eval.encoding import RequestEncoder
from open_lm.evaluate.lm_eval.scoring import Engine, Pair, Score, split_groups
from open_lm.generate.sampling import Sampling
from open_lm.model.transformer import Transformer
from open_lm.system.names import user_path
from open_lm.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # of a generated text, if the task sets no number; as in lm-eval's other models
_GREEDY_ONLY = {"num_beams": 1, "use_cache": True}  # settings of generation that are accepted with this value only


class OpenLM(TemplateLM):
    """A model for lm-eval. Under torchrun every process has the full model and evaluates a share of the requests.

    Attributes:
        checkpoint: the checkpoint that was found.
        model: the native model.
        text_tokenizer: its tokenizer.
    """

    def __init__(
        self,
        checkpoint: str = "",
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        eot_token: str | None = None,
        allow_other_tokenizer: bool = False,
        device: str | None = None,
        precision: str = "fp32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        model_settings: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: required; run folder (its newest checkpoint), step_N folder, epoch_N.pt, averager file, file of
                weights, or folder in the format of transformers.
            model: name or file of the model configuration; None for that of the run.
            tokenizer: as --tokenizer; None for that of the run.
            eot_token: token that ends a document; None for that of the training data.
            allow_other_tokenizer: accept a tokenizer that gives other ids than that of the run.
            device: cpu, cuda or cuda:N; None for CUDA if it is available.
            precision: fp32, amp_bf16 or amp_fp16.
            batch_size: N > 1 limits a batch to the tokens of N sequences of max_length; 1 and "auto" select a limit
                for the device.
            max_batch_size: the same limit; lm-eval passes it with "auto".
            max_length: longest context with its continuation; None for the sequence length of the model.
            add_bos_token: put the token that begins a text before each text; None for no in native checkpoints, and
                for what the tokenizer does in folders of transformers.
            prefix_token_id: token in place of an empty context; None for the one that begins or ends a text.
            model_settings: fields of ModelConfig that take precedence over those of the run.
            unknown: other arguments, which are errors.

        Raises:
            ConfigError: an unknown, missing or invalid argument, or settings that do not fit the model.
            CheckpointError: a checkpoint that is missing, damaged or does not fit the model.
        """
        super().__init__()
        given = {"checkpoint": checkpoint, "device": device, "precision": precision, "batch_size": batch_size}
        _check_arguments({**given, "max_length": max_length, "max_batch_size": max_batch_size}, unknown)
        self.runtime = _start_runtime(device)
        self._rank, self._world_size, self._device = self.runtime.rank, self.runtime.world_size, self.runtime.device
        if precision == "amp_fp16" and self._device.type == "cpu":
            raise ConfigError("precision=amp_fp16 needs a CUDA device; use amp_bf16 or fp32 on a CPU")
        (self.checkpoint,) = find_checkpoints([user_path(checkpoint)])
        spec = None if tokenizer is None else user_path(tokenizer)
        self.text_tokenizer = choose_tokenizer(self.checkpoint, spec, eot_token, allow_other=allow_other_tokenizer)
        config = None if model is None else user_path(model)
        self.model: Transformer = load_checkpoint(self.checkpoint, config, model_settings, self._device)
        _check_fit(self.text_tokenizer, self.model)
        self.precision = precision
        self._max_length = int(max_length or self.model.seq_len)
        adds_bos = is_transformers_folder(self.checkpoint) if add_bos_token is None else bool(add_bos_token)
        self.encoder = RequestEncoder(self.text_tokenizer, adds_bos, prefix_token_id)
        self._weights_hash: str | None = None
        self.batch_size = batch_size
        sequences = int(max_batch_size or 1) if str(batch_size).startswith("auto") else int(batch_size)
        default = CPU_BATCH_TOKENS if self._device.type == "cpu" else CUDA_BATCH_TOKENS
        autocast = get_autocast("amp" if precision == "amp_fp16" else precision, self._device.type)
        self.engine = Engine(
            self.model, self._device, autocast, sequences * self._max_length if sequences > 1 else default
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> OpenLM:
        """Create the model from "key=value,key=value"; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> OpenLM:
        """Create the model from its arguments, which take precedence over lm-eval's flags and their defaults."""
        flags = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **arg_dict})

    # ------------------------------------------------------------------------------------------ tokens
    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context: the one that begins a text, or else the one that ends it."""
        return self.encoder.prefix_token_id

    @property
    def max_length(self) -> int:
        return self._max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; see `RequestEncoder.encode`."""
        return self.encoder.encode([string], add_special_tokens)[0]

    # ------------------------------------------------------------------------------------------ requests
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is what greedy search generates."""
        texts = [request.args for request in requests]
        ordered = [(text, *pair) for text, pair in zip(texts, self.encoder.pairs(texts), strict=True)]
        return self._score(ordered, [_group_key(request) for request in requests], disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score token ids: each request is ((context, continuation), ids of the context, ids of the continuation)."""
        return self._score(requests, [tuple(request[1]) for request in requests], disable_tqdm)

    def _score(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], keys: Sequence[object], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        pairs = [self._truncated(Pair(context, continuation)) for _, context, continuation in requests]
        groups = split_groups(pairs, keys)
        results: list[Score | None] = [None] * len(requests)
        with self._progress(len(requests), "log-likelihoods", disable_tqdm) as progress:
            for index, scores in self.engine.score([[pairs[i] for i in group] for group in groups]):
                for i, score in zip(groups[index], scores, strict=True):
                    results[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], tuple(score))
                progress.update(len(scores))
        return [(score.log_prob, score.is_greedy) for score in results if score is not None]

    def _truncated(self, pair: Pair) -> Pair:
        """Return a pair whose context lost tokens on the left, so that the model reads at most max_length tokens.

        Raises:
            DataError: a continuation without tokens, or one that is longer than max_length.
        """
        context, continuation = pair
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length} (max_length); correct "
                "the task"
            )
        surplus = len(context) + len(continuation) - (self.max_length + 1)
        return pair if surplus <= 0 else Pair(context[surplus:], continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, with as much context as the model accepts for each token."""
        texts = [request.args[0] for request in requests]
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for ids in self.encoder.encode(texts):
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            new = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += new
            counts.append(len(new))
        scores = iter(self._score(windows, list(range(len(windows))), disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates after each context, up to the first stop string."""
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        results: list[str] = [""] * len(requests)
        with self._progress(len(requests), "generated texts", disable_tqdm) as progress:
            for indices in by_settings.values():
                settings = requests[indices[0]].args[1]
                sampling, stops = self._sampling(settings)
                prompts = self._prompts([requests[i].args[0] for i in indices], sampling.max_new_tokens)
                for i, text in self.engine.generate(prompts, sampling, self.text_tokenizer, stops):
                    results[indices[i]] = text
                    self.cache_hook.add_partial("generate_until", requests[indices[i]].args, text)
                    progress.update(1)
        return results

    def _prompts(self, texts: Sequence[str], new_tokens: int) -> list[list[int]]:
        """Return the ids of contexts, without those on the left that leave no place for the new tokens."""
        place = self.max_length - new_tokens
        if place < 1:
            raise ConfigError(
                f"max_gen_toks is {new_tokens}, expected less than max_length {self.max_length}; lower it with "
                "--gen_kwargs max_gen_toks=N"
            )
        return [ids[-place:] or [self.prefix_token_id] for ids in self.encoder.encode(texts)]

    def _sampling(self, settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """Return how to sample and the stop strings.

        The seed is that of torch, which lm-eval sets (--seed).

        Raises:
            ConfigError: settings that are not supported.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        stops = handle_stop_sequences(kwargs.pop("until"), eos=self.text_tokenizer.token(self.eot_token_id))
        samples = bool(kwargs.pop("do_sample"))
        new_tokens, temperature = int(kwargs.pop("max_gen_toks")), float(kwargs.pop("temperature", 0.0))
        values = {name: kwargs.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in kwargs}
        problems = [f"{name}={value}" for name, value in kwargs.items() if _GREEDY_ONLY.get(name) != value]
        if problems:
            raise ConfigError(
                f"generation settings {', '.join(problems)} are not supported, expected some of until, max_gen_toks, "
                "do_sample, temperature, top_k, top_p, repetition_penalty"
            )
        sampling = Sampling(
            max_new_tokens=new_tokens,
            temperature=temperature if samples else 0.0,
            seed=torch.initial_seed(),
            **{"top_p": 1.0, **values},
        )
        return sampling, [stop for stop in stops if stop]

    def _progress(self, total: int, name: str, disable: bool) -> Any:
        return tqdm(total=total, desc=f"Computing {name}", disable=disable or self.rank != 0)

    # ------------------------------------------------------------------------------------------ chat
    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer in file names of cached requests."""
        return f"open_lm_{self.text_tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template of the tokenizer.

        Raises:
            ConfigError: it has none, or a name is requested.
        """
        if chat_template is False or chat_template is None:
            return None
        template = find_template(self.text_tokenizer)
        if template is None or isinstance(chat_template, str):
            raise ConfigError(
                f"--apply_chat_template: the tokenizer of {self.checkpoint} has no chat template"
                + (f" {chat_template!r}; omit the name" if isinstance(chat_template, str) else "; remove the flag")
            )
        return template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation in the tokenizer's chat template."""
        template = self.chat_template(True)
        return render_chat(str(template), chat_history, add_generation_prompt, self.text_tokenizer)

    # ------------------------------------------------------------------------------------------ ranks
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, one after another."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat([torch.atleast_1d(part) for part in parts])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on rank `dst`, and None on the others."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """Return facts about the model for the result file of lm-eval."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(next(self.model.parameters()).dtype),
            "model_sha": self.weights_sha256,
            "checkpoint": self.checkpoint,
            "tokenizer_sha256": self.text_tokenizer.fingerprint,
        }

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights, as in the results of the native engine."""
        if self._weights_hash is None:
            self._weights_hash = weights_hash(self.model)
        return self._weights_hash


def _group_key(request: Instance) -> object:
    """Return what requests with a common context share: their document, or else their context."""
    doc_id = getattr(request, "doc_id", None)
    return request.args[0] if doc_id is None else (getattr(request, "task_name", None), doc_id)


def _check_arguments(given: dict[str, Any], unknown: dict[str, Any]) -> None:
    problems = [f"{name}={value} is unknown" for name, value in unknown.items()]
    if not given["checkpoint"]:
        problems.append("checkpoint is missing; add checkpoint=PATH")
    if given["device"] is not None and not _is_device(given["device"]):
        problems.append(f"device={given['device']}, expected cpu, cuda or cuda:N")
    if given["precision"] not in EVAL_PRECISIONS:
        problems.append(f"precision={given['precision']}, expected one of {', '.join(EVAL_PRECISIONS)}")
    if not _is_count(given["batch_size"]) and not str(given["batch_size"]).startswith("auto"):
        problems.append(f"batch_size={given['batch_size']}, expected a number above 0, or auto")
    for name in ("max_length", "max_batch_size"):
        if given[name] is not None and not _is_count(given[name]):
            problems.append(f"{name}={given[name]}, expected a number above 0")
    if problems:
        expected = "checkpoint, model, tokenizer, eot_token, allow_other_tokenizer, device, precision, batch_size, "
        expected += "max_length, add_bos_token and prefix_token_id"
        raise ConfigError(join_problems(problems, f"model arguments; known are {expected}"))


def _is_count(value: Any) -> bool:
    return str(value).isdigit() and int(value) > 0


def _is_device(device: str) -> bool:
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        return False
    return True


def _start_runtime(device: str | None) -> Runtime:
    """Join the process group, if there are several processes, and select this rank's device."""
    runtime = init_runtime(ParallelConfig())
    if device is None or (runtime.world_size > 1 and device.startswith("cuda")):
        return runtime
    if device.startswith("cuda") and not torch.cuda.is_available():  # lm-eval's default is cuda:0
        logging.warning(f"device={device}: there is no CUDA device; the model runs on the CPU")
        return runtime
    return replace(runtime, device=torch.device(device))


def _check_fit(tokenizer: Tokenizer, model: Transformer) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}, but the model accepts only ids "
            f"below {model.vocab_size}; pass the tokenizer of the model's training data"
        )
