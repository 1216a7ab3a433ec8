"""Check full model and optimizer states against a model, and distribute them from rank 0 to its (sharded) tensors.

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
from open_lm.distributed.param_names import clean_name, is_adapter_name
from open_lm.distributed.processes import run_on_master
from open_lm.distributed.sharded_tensor import copy_from_rank0, fused_weight_parts
from open_lm.errors import CheckpointError, join_problems
from open_lm.model.quantization import quantized_layers
from open_lm.optim.build import infer_optimizer_name, optimizer_moments
from open_lm.parallel.parallelize import unwrap


def select_weights(weights: Mapping[str, Tensor], model: nn.Module, path: str) -> dict[str, Tensor]:
    """Return the weights to load into the model; raise CheckpointError with everything that does not fit.

    A tied weight may be stored under only one of its names. Rotary frequencies may be missing, because the model
    computes them. Expert biases of old mixture-of-experts checkpoints are dropped, because no model used them.
    """
    targets = base_tensors(model)
    quantized = quantized_layers(model)
    state = {name: value for name, value in weights.items() if not name.endswith("experts.bias") or name in targets}
    by_tensor: dict[int, list[str]] = {}
    for name, value in targets.items():
        by_tensor.setdefault(id(value), []).append(name)
    for names in by_tensor.values():
        present = [name for name in names if name in state]
        state.update({name: state[present[0]] for name in names if present and name not in state})
    absent = {name for name in targets if name.endswith("inv_freq") and name not in state}
    expected = {name: value.shape for name, value in targets.items() if name not in absent}
    expected |= {name: torch.Size((layer.out_features, layer.in_features)) for name, layer in quantized.items()}
    problems = shape_problems(state, expected)
    if problems:
        heading = f"{path}: does not fit the model (check --model and the flags that change the architecture)"
        raise CheckpointError(join_problems(problems, heading))
    return state


def set_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Distribute rank 0's full weights to the model's local shards; tensors that `state` lacks do not change.

    Quantized layers quantize their weights; see model/quantization.py.
    """
    shapes = run_on_master(lambda: {name: (tuple(value.shape), value.dtype) for name, value in state.items()})
    present = set(shapes)
    for name, layer in quantized_layers(unwrap(model)).items():
        if name in present:
            full = torch.empty(shapes[name][0], dtype=shapes[name][1], device=layer.nf4.device)
            copy_from_rank0(full, state.get(name))
            layer.set_weight(full)
    parts, filled = fused_weight_parts(unwrap(model)), set()
    for name, value in named_tensors(model).items():
        if name in present and id(value) not in filled:
            filled.add(id(value))
            copy_from_rank0(value, state.get(name), parts.get(name, 1))


def check_moments(stored: Mapping[str, Set[str]], model: nn.Module, optimizer: Optimizer, path: str) -> None:
    """Raise CheckpointError if a checkpoint's moments belong to another optimizer.

    stored: the names of the moments of each parameter.
    """
    expected = optimizer_moments(optimizer)
    params = trained_params(model, optimizer)
    wrong = [name for name in stored if name in params and not expected.get(params[name], frozenset()) <= stored[name]]
    if not wrong:
        return
    saved_optimizer, run_optimizer = infer_optimizer_name(stored.values()), infer_optimizer_name(expected.values())
    saved_by = f"--optimizer {saved_optimizer}" if saved_optimizer else "another program"
    first = wrong[0]
    has, lacks = (", ".join(sorted(names)) for names in (stored[first], expected[params[first]] - stored[first]))
    raise CheckpointError(
        f"{path}: was saved by {saved_by}, but this run has --optimizer {run_optimizer}, which needs different state "
        f"for {len(wrong)} parameters (e.g. {first} has {has} but not {lacks}); "
        f"{f'continue with {saved_by}, or ' if saved_optimizer else ''}start a new run from its weights with "
        "--pretrained"
    )


def moments_by_name(
    state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, path: str
) -> dict[str, dict[str, Any]]:
    """Return an optimizer's per-parameter states by clean name, checked against this optimizer and the model."""
    params = {name: p for name, p in named_tensors(model).items() if isinstance(p, nn.Parameter)}
    per_param = state["state"]
    if per_param and all(isinstance(key, int) for key in per_param):
        # The numbers follow the order of the parameters in the saved model, which epoch_N.pt preserves.
        order, seen = [], set()
        for name in read_model_state(path)[0]:
            if name in params and id(params[name]) not in seen:
                seen.add(id(params[name]))
                order.append(name)
        numbers = sorted({number for group in state["param_groups"] for number in group["params"]})
        if len(numbers) != len(order):
            raise CheckpointError(
                f"{path}: its optimizer state has {len(numbers)} parameters, but the model has {len(order)}; "
                "check --model and the flags that change the architecture"
            )
        per_param = {order[number]: value for number, value in per_param.items()}
    per_param = {clean_name(name): value for name, value in per_param.items()}
    check_moments({name: moments.keys() for name, moments in per_param.items()}, model, optimizer, path)
    wrong = [
        f"{name}.{key}: found {tuple(value.shape)}, "
        + (f"the model has {tuple(params[name].shape)}" if name in params else "the model has no such parameter")
        for name, moments in per_param.items()
        for key, value in moments.items()
        if isinstance(value, Tensor) and value.dim() and (name not in params or value.shape != params[name].shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: the optimizer state does not fit the model: {len(wrong)} moments differ, e.g. {wrong[0]}"
        )
    return {name: {key: _as_tensor(value) for key, value in moments.items()} for name, moments in per_param.items()}


def _as_tensor(value: Any) -> Any:
    """Convert a step count that is a plain number to a tensor, as torch's optimizers store it now."""
    return torch.tensor(float(value)) if isinstance(value, int | float) else value


def set_moments(model: nn.Module, optimizer: Optimizer, per_param: dict[str, dict[str, Any]]) -> None:
    """Distribute rank 0's full moments to the optimizer's local shards.

    The optimizer's hyperparameters do not change. A parameter that `per_param` lacks has no moments afterwards.
    """
    specs = run_on_master(lambda: {name: _tensor_specs(moments) for name, moments in per_param.items()})
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    parts = fused_weight_parts(unwrap(model))
    for name, param in trained_params(model, optimizer).items():
        if name not in specs:
            optimizer.state.pop(param, None)
            continue
        moments = optimizer.state[param]
        for key, (shape, dtype) in specs[name].items():
            if key not in moments:
                moments[key] = empty_moment(param, shape, param.dtype if shape else dtype, groups[id(param)])
            copy_from_rank0(moments[key], per_param.get(name, {}).get(key), parts.get(name, 1))


def _tensor_specs(moments: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor."""
    return {key: (tuple(value.shape), value.dtype) for key, value in moments.items() if isinstance(value, Tensor)}


def empty_moment(param: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
    """Return an uninitialized moment with the parameter's shape and sharding, or a scalar (a step count).

    Like in torch's optimizers, scalars are on the host unless the optimizer is fused or capturable.
    """
    if shape == tuple(param.shape):
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
    local = param.to_local() if isinstance(param, DTensor) else param
    on_device = group.get("fused") or group.get("capturable")
    return torch.empty(shape, dtype=dtype, device=local.device if on_device else "cpu")


def trained_params(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the model's parameters that the optimizer updates, by clean name."""
    param_ids = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return {clean_name(name): param for name, param in unwrap(model).named_parameters() if id(param) in param_ids}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return `named_tensors` without adapters: the tensors that a checkpoint of a full model contains."""
    return {name: value for name, value in named_tensors(model).items() if not is_adapter_name(name)}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of a run contains: those of the adapters, or all if there are none."""
    tensors = named_tensors(model)
    return {name: value for name, value in tensors.items() if is_adapter_name(name)} or tensors


def check_adapters(stored: Mapping[str, Any], model: nn.Module, path: str) -> None:
    """Raise CheckpointError if the adapters of a checkpoint, tensors by name, do not fit those of the model."""
    problems = shape_problems(stored, {name: value.shape for name, value in stored_tensors(model).items()})
    if problems:
        raise CheckpointError(join_problems(problems, f"{path}: the adapters do not fit the model (check --lora)"))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by clean name; a tied tensor occurs under each of its names."""
    return {clean_name(name): value for name, value in unwrap(model).state_dict(keep_vars=True).items()}
