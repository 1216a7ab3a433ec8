"""Running averages of a model's weights during training (`--averagers`), sharded like the weights.

An averager is named METHOD[_VALUE[_FREQ]] and is updated every FREQ optimizer steps (default 1).
With t = 1, 2, … the number of the update, w the current weights and a the average:

    poly_ETA     a <- (1 - c) a + c w,  c = (ETA + 1) / (ETA + t)   (default ETA 0: the plain mean)
                 polynomial-decay averaging, equation 10 of Shamir & Zhang 2012 (arXiv:1212.1824)
    ema_GAMMA    a <- GAMMA a + (1 - GAMMA) w                       (default GAMMA 0.99), a starts as the first weights
    none         a is the model itself
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_lm.distributed.param_names import clean_name
from open_lm.distributed.processes import run_on_master
from open_lm.distributed.sharded_tensor import copy_from_rank0, full_tensor, fused_weight_parts
from open_lm.errors import CheckpointError, ConfigError, join_problems
from open_lm.optim.adamw import local_tensor


@dataclass(frozen=True)
class AveragerSpec:
    """A parsed averager name: `value` is eta of poly or gamma of ema, `freq` is in optimizer steps."""

    name: str
    method: str
    value: float
    freq: int


_DEFAULTS = {"poly": 0.0, "ema": 0.99, "none": 0.0}


def parse_averagers(text: str) -> list[AveragerSpec]:
    """Parse a comma-separated list of averagers; raise ConfigError with all problems."""
    specs, problems = [], []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        try:
            specs.append(_parse_one(name))
        except ConfigError as error:
            problems.append(str(error))
    problems += [f"{name!r} is given more than once" for name in sorted(set(names)) if names.count(name) > 1]
    if problems or not names:
        raise ConfigError(join_problems(problems or ["found no averager"], f"--averagers {text!r}"))
    return specs


def _parse_one(name: str) -> AveragerSpec:
    method, *rest = name.split("_")
    if method not in _DEFAULTS or len(rest) > 2:
        raise ConfigError(f"{name!r}: expected poly_ETA_FREQ, ema_GAMMA_FREQ or none, such as poly_8_1 or ema_0.999")
    try:
        value = float(rest[0]) if rest else _DEFAULTS[method]
        freq = int(rest[1]) if len(rest) > 1 else 1
    except ValueError:
        raise ConfigError(f"{name!r}: expected a number, then a whole number of steps, after {method!r}") from None
    if method == "ema" and not 0.0 <= value < 1.0:
        raise ConfigError(f"{name!r}: the decay is {value}, expected 0 <= decay < 1")
    if method == "poly" and value < 0.0:
        raise ConfigError(f"{name!r}: eta is {value}, expected 0 or more")
    if freq < 1:
        raise ConfigError(f"{name!r}: the frequency is {freq}, expected 1 or more steps")
    return AveragerSpec(name, method, value, freq)


class Averager:
    """A running average. Weights of less than 32 bits are averaged in float32, so that small updates are not lost.

    Code that changes the model's weights other than by an optimizer step must also load the average or call `reset`.

    Attributes:
        is_loaded: whether the average comes from a checkpoint.
    """

    def __init__(self, model: nn.Module, spec: AveragerSpec) -> None:
        self.spec = spec
        self.model = model
        self.update_counter = 1
        self.step_counter = 1
        self.is_loaded = False
        params = list(model.parameters()) if spec.method != "none" else []
        # The average of a frozen weight, such as the base of adapters, is the weight.
        self._params = [param for param in params if param.is_floating_point() and param.requires_grad]
        self._averages = [_float_copy(param) for param in self._params]

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step, and update the average every `freq` steps."""
        if self.update_counter == self.spec.freq:
            self._update()
            self.update_counter = 0
        self.update_counter += 1

    def _update(self) -> None:
        t, value = self.step_counter, self.spec.value
        new_weight = (value + 1.0) / (value + t) if self.spec.method == "poly" else 1.0 - value
        if self._averages:
            averages = [_local(average) for average in self._averages]
            weights = [_local(param).to(average.dtype) for param, average in zip(self._params, averages, strict=True)]
            torch._foreach_lerp_(averages, weights, new_weight)
        self.step_counter += 1

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[nn.Module]:
        """Replace the model's weights in place by the averages, and restore them when the `with` block ends."""
        saved = [_local(param).clone() for param in self._params]
        for param, average in zip(self._params, self._averages, strict=True):
            _local(param).copy_(_local(average))
        try:
            yield self.model
        finally:
            for param, weights in zip(self._params, saved, strict=True):
                _local(param).copy_(weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages, sharded like the weights, by clean name; a tied weight has its first name."""
        return {clean_name(name): average for name, _, average in self._named()}

    @torch.no_grad()
    def reset(self) -> None:
        """Restart the average from the current weights."""
        self.update_counter = self.step_counter = 1
        self.is_loaded = False
        for _, param, average in self._named():
            _local(average).copy_(_local(param))

    def counters(self) -> dict[str, Any]:
        """Return the state without the averages, as plain values."""
        method = self.spec.method
        return {
            "update_counter": self.update_counter,
            "step_counter": self.step_counter,
            "freq": self.spec.freq,
            "method": method,
            "eta": self.spec.value if method == "poly" else None,
            "gamma": self.spec.value if method == "ema" else None,
            "suffix_steps": None,
            "power": None,
            "start": None,
        }

    def load_counters(self, state: Mapping[str, Any]) -> None:
        """Load the counters of `counters`; method and value remain those of this run's flags."""
        self.update_counter = int(state["update_counter"])
        self.step_counter = int(state["step_counter"])
        self.is_loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the full averaged weights, by the model's clean names. Collective.

        Only rank 0 gets the weights, in host memory.
        """
        on_rank0 = not dist.is_initialized() or dist.get_rank() == 0
        by_id = {id(param): average for _, param, average in self._named()}
        weights: dict[str, Tensor] = {}
        parts = fused_weight_parts(self.model)
        copies: dict[int, Tensor] = {}  # tied weights are gathered and stored once
        for wrapped_name, value in self.model.state_dict(keep_vars=True).items():
            name = clean_name(wrapped_name)
            if id(value) not in copies:
                full = full_tensor(by_id.get(id(value), value), parts.get(name, 1))
                copies[id(value)] = full.cpu() if on_rank0 else full.new_empty(0)
            weights[name] = copies[id(value)]
        return {**self.counters(), "av_model_sd": weights if on_rank0 else {}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved average. Collective; only rank 0 needs the weights (`av_model_sd`)."""
        saved = {clean_name(name): value for name, value in state["av_model_sd"].items()}
        averages = self.tensors()

        def check() -> None:
            wrong = [name for name, value in averages.items() if name not in saved or saved[name].shape != value.shape]
            if wrong:
                raise CheckpointError(
                    f"averager {self.spec.name}: {len(wrong)} saved weights are missing or differ in shape from the "
                    f"model's, such as {wrong[0]}"
                )

        run_on_master(check)
        parts = fused_weight_parts(self.model)
        for name, average in averages.items():
            copy_from_rank0(average, saved.get(name), parts.get(name, 1))
        self.load_counters(state)

    def _named(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, parameter, average) of all averaged parameters."""
        by_id = {id(param): average for param, average in zip(self._params, self._averages, strict=True)}
        return [(name, p, by_id[id(p)]) for name, p in self.model.named_parameters() if id(p) in by_id]


class ModelAverager:
    """The averagers of a run, by name in `avgs_dict`."""

    def __init__(self, model: nn.Module, methods: str) -> None:
        self.avgs_dict = {spec.name: Averager(model, spec) for spec in parse_averagers(methods)}

    def step(self) -> None:
        """Update all averagers; call it after each optimizer step."""
        for averager in self.avgs_dict.values():
            averager.step()

    def reset(self) -> None:
        """Restart all averagers from the current weights."""
        for averager in self.avgs_dict.values():
            averager.reset()


def _float_copy(param: Tensor) -> Tensor:
    """Return a copy of a parameter in at least 32 bits, with the same sharding."""
    return param.detach().to(torch.promote_types(param.dtype, torch.float32)).clone()


def _local(tensor: Tensor) -> Tensor:
    return local_tensor(tensor).detach()
