"""The training step of torchtitan's Llama 3 at the size of one of our models: a reference for benchmarks.

    step = build("open_lm_160m", "amp_bfloat16", torch.device("cuda"), config=config)
    loss = step(inputs, targets)

It was tested with torchtitan 0.3.0 (https://github.com/pytorch/torchtitan) and computes what that release trains on one
device: its model, FSDP2 on a mesh of size one for mixed precision, its compilation of blocks, its activation
checkpointing, its loss over chunks of a sequence, its fused AdamW, and CUDA graphs of the forward and backward pass. It
differs from torchtitan's defaults only where the benchmark's batches allow it: attention is ScaledDotProductAttention
(which prefers cuDNN's kernel to FlashAttention) and not FlexAttention, because there is no document mask. The data
loading, logs and checkpoints of torchtitan's trainer are not used.

The model has the widths, layers, heads and vocabulary of ours. It differs in three ways: its norms have only a gain
(ours do with --model-norm rms_norm; then both have the same number of parameters), the matrices of its feed-forward are
separate, and its rotary embedding rotates adjacent pairs. Legend: B batch, T sequence, D model width, H heads, K head
width, F width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from open_lm.config.architecture import read_architecture
from open_lm.config.model_keys import gated_width
from open_lm.config.sections import Config
from open_lm.distributed.precision import compute_dtype, parameter_dtype
from open_lm.errors import ConfigError, join_problems

LOSS_CHUNKS = 8  # chunks of a sequence, torchtitan's default
# Our policies that torchtitan has as well. Its SelectiveAC also computes every second matrix product again.
CHECKPOINTING = ("none", "half-op", "full")
SUPPORTED = {
    "ffn_type": ("swiglu", "swiglu_torch"),
    "positional_embedding_type": ("rotary", "llama_rotary"),
    "moe_freq": (0,),
    "qk_norm": (False,),
    "post_embed_norm": (False,),
}


def build(model: str, precision: str, device: torch.device, *, config: Config) -> TitanStep:
    """Return the training step of a model. Raise the ConfigError of `check`.

    model: as in --model.
    config: sets compilation, activation checkpointing, micro-batches, offloading, 8-bit products and the optimizer's
        hyperparameters.
    """
    check(model, precision, device, config=config)
    return TitanStep(read_architecture(model), config, device)


def check(model: str, precision: str, device: torch.device, *, config: Config) -> None:
    """Raise ConfigError with all settings that torchtitan does not support, or if it is not installed."""
    shape = read_architecture(model)
    problems = [
        f"--model {model}: {key} is {shape[key]!r}, expected {' or '.join(map(repr, values))}"
        for key, values in SUPPORTED.items()
        if shape.get(key, values[0]) not in values
    ]
    if shape["seq_len"] % LOSS_CHUNKS:
        problems.append(
            f"--seq-len {shape['seq_len']}: expected a multiple of {LOSS_CHUNKS}, its number of loss chunks"
        )
    if torch.float16 in (compute_dtype(precision, device.type), parameter_dtype(precision)):
        problems.append(f"--precision {precision}: float16 is not supported; expected amp_bfloat16, bf16 or fp32")
    if (policy := config.model.activation_checkpointing) not in CHECKPOINTING:
        problems.append(f"--activation-checkpointing {policy}: expected {', '.join(CHECKPOINTING)}")
    if config.optim.optimizer != "adamw":
        problems.append(f"--optimizer {config.optim.optimizer}: expected adamw")
    if config.optim.z_loss_coefficient:
        problems.append(f"--z-loss-coefficient {config.optim.z_loss_coefficient}: its loss has no z-loss; expected 0")
    if problems:
        raise ConfigError(join_problems(problems, "--against torchtitan"))
    _import_torchtitan(device)


def _import_torchtitan(device: torch.device) -> None:
    """Import torchtitan and set its device type, because its utilities assume a GPU.

    Raise ConfigError if it is not installed.
    """
    try:
        utils = importlib.import_module("torchtitan.tools.utils")
        if device.type == "cpu":
            utils.device_type, utils.device_module = "cpu", torch.cpu  # type: ignore[attr-defined]
        importlib.import_module("torchtitan.models.llama3")
    except ImportError as error:
        raise ConfigError(
            f"--against torchtitan: {sys.executable} cannot import it ({error}); run `make install-titan` and pass "
            "--peer-python .venv-titan/bin/python"
        ) from error


# --- torchtitan's configuration -------------------------------------------------------------------------------------
def model_config(shape: Mapping[str, Any]) -> Any:
    """Return torchtitan's Llama3Model.Config for `shape`, the content of a model's JSON file.

    Weights are initialized as in torchtitan.
    """
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.common.param_init import depth_scaled_std, skip_param_init
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    dim, heads, vocab = shape["hidden_dim"], shape["n_heads"], shape["vocab_size"]
    rope = ComplexRoPE.Config(dim=dim // heads, max_seq_len=shape["seq_len"], theta=10000.0, scaling="none")
    input_init, tied = _truncated_normal(0.02), shape["weight_tying"]

    def norm() -> Any:
        return RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_})

    def block(depth: int) -> Any:
        output_init = _truncated_normal(depth_scaled_std(0.02, depth))
        attention = make_gqa_config(
            dim=dim,
            n_heads=heads,
            wqkv_param_init=input_init,
            wo_param_init=output_init,
            inner_attention=ScaledDotProductAttention.Config(),
            rope=rope,
            fuse_qkv=True,
        )
        feed_forward = make_ffn_config(
            dim=dim, hidden_dim=gated_width(dim), w1_param_init=input_init, w2w3_param_init=output_init
        )
        return Llama3TransformerBlock.Config(
            attention=attention, feed_forward=feed_forward, attention_norm=norm(), ffn_norm=norm()
        )

    embedding = {"weight": skip_param_init if tied else nn.init.normal_}
    return Llama3Model.Config(
        dim=dim,
        vocab_size=vocab,
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim, param_init=embedding),
        norm=norm(),
        lm_head=Linear.Config(
            in_features=dim, out_features=vocab, param_init=_truncated_normal(dim**-0.5, 3 * dim**-0.5)
        ),
        layers=[block(depth) for depth in range(shape["n_layers"])],
    )


def _truncated_normal(std: float, bound: float = 2.0) -> dict[str, Callable[..., Any]]:
    return {"weight": partial(nn.init.trunc_normal_, std=std, a=-bound, b=bound)}


def training_config(config: Config, device: torch.device) -> Any:
    """Return torchtitan's TrainingConfig: types of weights and products, offloading and CUDA graphs."""
    from torchtitan.config import TrainingConfig

    name = config.precision.precision
    offload = device.type != "cpu" and config.parallel.fsdp and config.parallel.fsdp_cpu_offload
    return TrainingConfig(
        dtype=_dtype_name(parameter_dtype(name)),
        mixed_precision_param=_dtype_name(compute_dtype(name, device.type)),
        enable_cpu_offload=offload,
        disable_cuda_graphs=offload or device.type != "cuda",
    )


def _dtype_name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


# --- the step -------------------------------------------------------------------------------------------------------
class TitanStep:
    """A model of torchtitan, its optimizer and their training step, as in its Trainer."""

    def __init__(self, shape: Mapping[str, Any], config: Config, device: torch.device) -> None:
        from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
        from torchtitan.components.optimizer import default_adamw
        from torchtitan.config import CompileConfig, ParallelismConfig
        from torchtitan.distributed import ParallelDims
        from torchtitan.distributed import utils as titan
        from torchtitan.distributed.cudagraph import wrap_with_cuda_graph

        self._training = training_config(config, device)
        self._optim = config.optim
        _init_process_group(device, self._training.enable_cpu_offload)
        parallelism, compilation = ParallelismConfig(), CompileConfig(enable=config.model.torchcompile)
        dims = ParallelDims.from_config(parallelism, world_size=1)
        self.model = _build_model(shape, config, device, self._training, (parallelism, dims, compilation))
        loss = CrossEntropyLoss.Config(global_vocab_size=shape["vocab_size"])
        self._loss = ChunkedLossWrapper.Config(num_chunks=LOSS_CHUNKS, loss_fn=loss).build(compile_config=compilation)
        self._loss.set_lm_head(self.model.lm_head)
        self.model._skip_lm_head = True  # the loss applies it chunk by chunk
        optim = config.optim
        hyperparameters = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "weight_decay": optim.wd}
        self.optimizer = default_adamw(lr=optim.lr, **hyperparameters).build(model_parts=[self.model])
        self._clip, self._context = titan.clip_grad_norm_, titan.get_spmd_context(parallel_dims=dims)
        graphs = not self._training.disable_cuda_graphs
        self._forward_backward = wrap_with_cuda_graph(self._pass) if graphs else self._pass

    def _pass(self, inputs: Tensor, targets: Tensor, valid: Tensor, _extra: dict[str, Any]) -> Tensor:
        """Run the forward and backward pass of a micro-batch (B,T); return its sum of losses divided by `valid`."""
        with self._context():
            loss, _ = self._loss(self.model(inputs), targets, valid)
            loss.backward()
        return loss

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Update the model from inputs and targets (B,T) int64; targets of -100 are ignored.

        Return the loss before the update, a float32 scalar.
        """
        self.optimizer.zero_grad(set_to_none=self._training.disable_cuda_graphs)
        valid = (targets != -100).sum()
        loss = torch.zeros((), device=inputs.device)
        micro_batches = zip(*(ids.chunk(self._optim.accum_freq) for ids in (inputs, targets)), strict=True)
        for micro_inputs, micro_targets in micro_batches:
            loss = loss + self._forward_backward(micro_inputs, micro_targets, valid, {}).detach()
        if self._optim.grad_clip_norm is not None:
            self._clip(list(self.model.parameters()), self._optim.grad_clip_norm, foreach=True)
        self.optimizer.step()
        return loss


def _init_process_group(device: torch.device, offload: bool) -> None:
    """Initialize the process group of one rank that FSDP2 needs, without a port or a file."""
    torch.autograd.set_multithreading_enabled(False)  # as in torchtitan
    if distributed.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo" if offload else "nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def _build_model(
    shape: Mapping[str, Any], config: Config, device: torch.device, training: Any, distribution: Any
) -> Any:
    """Return torchtitan's model on `device`, initialized, with activation checkpointing, compilation and sharding."""
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.models.llama3 import parallelize_llama

    parallelism, dims, compilation = distribution
    settings = model_config(shape)
    settings.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    if config.precision.fp8:
        from torchtitan.components.quantization import Float8LinearConverter

        converter = Float8LinearConverter.Config(filter_fqns=["lm_head"], model_compile_enabled=compilation.enable)
        settings = converter.build().convert(settings)
    policies = dict(zip(CHECKPOINTING, (None, SelectiveAC.Config(), FullAC.Config()), strict=True))
    policy = "full" if config.model.grad_checkpointing else config.model.activation_checkpointing
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, training.dtype))
    try:
        with torch.device("meta"):
            model = settings.build()
    finally:
        torch.set_default_dtype(before)
    model = parallelize_llama(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=compilation,
        ac_config=policies[policy],
        dump_folder="",
    )
    model.to_empty(device="cpu" if training.enable_cpu_offload else device)
    with torch.no_grad():
        model.init_weights(buffer_device=device if training.enable_cpu_offload else None)
    return model.train()
