"""Whole states of models and optimizers, handed out from rank 0 to their (sharded) places, and whether they fit.

Names are clean (see param_names.py). Every function that moves tensors is collective: all ranks call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from open_lm.checkpoint.files import read_model_state, shape_problems
from open_lm.distributed.param_names import clean_name
from open_lm.distributed.processes import run_on_master
from open_lm.distributed.sharded_tensor import copy_from_rank0, fused_weight_parts
from open_lm.errors import CheckpointError, join_problems
from open_lm.optim.build import optimizer_moments, infer_optimizer_name
from open_lm.parallel.parallelize import unwrap


def fitting(weights: Mapping[str, Tensor], model: nn.Module, path: str) -> dict[str, Tensor]:
    """The weights that the model takes; CheckpointError with everything that does not fit.

    A tied weight may be stored under one of its names only, and rotary frequencies, which follow from the
    configuration, may be missing. Expert biases of old mixtures of experts, which nothing used, are left out.
    """
    targets = named_tensors(model)
    state = {name: value for name, value in weights.items() if not name.endswith("experts.bias") or name in targets}
    by_tensor: dict[int, list[str]] = {}
    for name, value in targets.items():
        by_tensor.setdefault(id(value), []).append(name)
    for names in by_tensor.values():
        present = [name for name in names if name in state]
        state.update({name: state[present[0]] for name in names if present and name not in state})
    absent = {name for name in targets if name.endswith("inv_freq") and name not in state}
    expected = {name: value.shape for name, value in targets.items() if name not in absent}
    problems = shape_problems(state, expected)
    if problems:
        heading = f"{path}: does not fit the model (check --model and the flags that shape it)"
        raise CheckpointError(join_problems(problems, heading))
    return state


def set_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put rank 0's whole weights into the model, each rank its part; buffers that `state` lacks stay as they are."""
    present = set(run_on_master(lambda: list(state)))
    parts, filled = fused_weight_parts(unwrap(model)), set()
    for name, value in named_tensors(model).items():
        if name in present and id(value) not in filled:
            filled.add(id(value))
            copy_from_rank0(value, state.get(name), parts.get(name, 1))


def check_moments(stored: Mapping[str, Set[str]], model: nn.Module, optimizer: Optimizer, path: str) -> None:
    """CheckpointError where a checkpoint's moments, whose names are given by those of the parameters, are another
    optimizer's."""
    expected = optimizer_moments(optimizer)
    params = trained(model, optimizer)
    wrong = [name for name in stored if name in params and not expected.get(params[name], frozenset()) <= stored[name]]
    if not wrong:
        return
    found, wanted = infer_optimizer_name(stored.values()), infer_optimizer_name(expected.values())
    saved_by = f"--optimizer {found}" if found else "another program"
    first = wrong[0]
    has, lacks = (", ".join(sorted(names)) for names in (stored[first], expected[params[first]] - stored[first]))
    raise CheckpointError(
        f"{path}: was saved by {saved_by}, this run has --optimizer {wanted}, which keeps other moments of "
        f"{len(wrong)} parameters ({first} has {has} and no {lacks}); "
        f"{f'continue with {saved_by}, or ' if found else ''}begin a new run from its weights with --pretrained"
    )


def moments_by_name(
    state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, path: str
) -> dict[str, dict[str, Any]]:
    """An optimizer's per-parameter states by clean name, checked against this optimizer and the model's shapes."""
    params = {name: p for name, p in named_tensors(model).items() if isinstance(p, nn.Parameter)}
    per_param = state["state"]
    if per_param and all(isinstance(key, int) for key in per_param):
        # Numbers count the parameters in the order of the model that was saved, which epoch_N.pt keeps.
        order, seen = [], set()
        for name in read_model_state(path)[0]:
            if name in params and id(params[name]) not in seen:
                seen.add(id(params[name]))
                order.append(name)
        numbers = sorted({number for group in state["param_groups"] for number in group["params"]})
        if len(numbers) != len(order):
            raise CheckpointError(f"{path}: its optimizer has {len(numbers)} parameters, the model {len(order)}")
        per_param = {order[number]: value for number, value in per_param.items()}
    per_param = {clean_name(name): value for name, value in per_param.items()}
    check_moments({name: moments.keys() for name, moments in per_param.items()}, model, optimizer, path)
    wrong = [
        f"{name}.{key} is {tuple(value.shape)}"
        + (f", the model's {tuple(params[name].shape)}" if name in params else "")
        for name, moments in per_param.items()
        for key, value in moments.items()
        if isinstance(value, Tensor) and value.dim() and (name not in params or value.shape != params[name].shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: its optimizer does not fit the model: {len(wrong)} moments have no place, such as {wrong[0]}"
        )
    return {name: {key: _as_tensor(value) for key, value in moments.items()} for name, moments in per_param.items()}


def _as_tensor(value: Any) -> Any:
    """A count of steps, which may be a number, as torch's optimizers keep it now."""
    return torch.tensor(float(value)) if isinstance(value, int | float) else value


def set_moments(model: nn.Module, optimizer: Optimizer, per_param: dict[str, dict[str, Any]]) -> None:
    """Put rank 0's whole moments into the optimizer, each rank its part; its hyperparameters stay its own. A parameter
    without moments there has none afterwards."""
    found = run_on_master(lambda: {name: _described(moments) for name, moments in per_param.items()})
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    parts = fused_weight_parts(unwrap(model))
    for name, param in trained(model, optimizer).items():
        if name not in found:
            optimizer.state.pop(param, None)
            continue
        moments = optimizer.state[param]
        for key, (shape, dtype) in found[name].items():
            if key not in moments:
                moments[key] = empty_moment(param, shape, param.dtype if shape else dtype, groups[id(param)])
            copy_from_rank0(moments[key], per_param.get(name, {}).get(key), parts.get(name, 1))


def _described(moments: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(value.shape), value.dtype) for key, value in moments.items() if isinstance(value, Tensor)}


def empty_moment(param: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
    """Of the parameter's shape and sharding, or a scalar (a count of steps) where torch's optimizers keep one: on the
    host, unless the whole step runs on the device."""
    if shape == tuple(param.shape):
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
    local = param.to_local() if isinstance(param, DTensor) else param
    on_device = group.get("fused") or group.get("capturable")
    return torch.empty(shape, dtype=dtype, device=local.device if on_device else "cpu")


def trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer holds, by clean name."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return {clean_name(name): param for name, param in unwrap(model).named_parameters() if id(param) in held}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by clean name; tied ones under each of their names."""
    return {clean_name(name): value for name, value in unwrap(model).state_dict(keep_vars=True).items()}
