"""All settings of a run, in frozen sections. Each field defines one flag (see fields.py).

The command line, configuration files and `params.txt` are derived from these sections (see command_line.py). The
sections of training data and evaluations have separate modules.
Functions that build a part of a run take its section, or any object with the same attributes
(`Section.from_object`).
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from open_lm.config import registry
from open_lm.config.adapters import AdapterConfig
from open_lm.config.data_section import DataConfig
from open_lm.config.diagnostics_section import DiagnosticsConfig
from open_lm.config.distill_section import DistillConfig
from open_lm.config.evaluation_sections import LiveEvaluationConfig, ValidationConfig
from open_lm.config.fields import FieldSpec, Section, flag, no_effect
from open_lm.config.recipe_files import recipe_names
from open_lm.config.report_flags import energy_flag, report_flag
from open_lm.system.names import user_path, weights_path

PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "fp32")
ACCUM_REDUCE = ("last", "every-micro-batch")
CHECKPOINTING_POLICIES = ("none", "full", "op", "half-op")  # of --activation-checkpointing, in addition to a number


@dataclass(frozen=True)
class RunConfig(Section):
    title: ClassVar[str] = "run"

    config: str | None = flag(
        None, "YAML or JSON file with flags as keys; flags on the command line take precedence over it", path=user_path
    )
    recipe: str | None = flag(
        None,
        f"settings of a stage after pretraining: {', '.join(recipe_names())}, or a YAML file; --config and flags take "
        "precedence. The model is that of --pretrained, and an epoch is one pass over the data, unless they are set",
        path=user_path,
    )
    name: str | None = flag(
        None, "name of the run and of its folder in --logs; default: made of date, model, learning rate and batch size"
    )
    seed: int = flag(0, "random seed for weight initialization, data order and shuffling")
    deterministic: bool = flag(False, "make results bitwise reproducible, at some cost in speed")
    debug: bool = flag(False, "log messages of level DEBUG too")


@dataclass(frozen=True)
class ArchitectureConfig(Section):
    """Settings that define the model. The model's JSON file may contain them too; it takes precedence."""

    model_norm: str = flag("default_layer_norm", "normalization layer", choices=registry.NORMS)
    ffn_type: str = flag("swiglu", "feed-forward network", choices=registry.FEED_FORWARDS)
    qk_norm: bool = flag(False, "normalize queries and keys, over the width of all heads together")
    positional_embedding_type: str = flag("rotary", "position embedding", choices=registry.POSITIONAL_EMBEDDINGS)
    moe_freq: int = flag(
        0, "use a mixture of experts (MoE) as feed-forward network in every N-th block; 0: in no block"
    )
    moe_num_experts: int | None = flag(None, "number of experts per MoE block; required with --moe-freq")
    moe_top_k: int = flag(2, "number of experts that process each token")
    moe_capacity_factor: float = flag(
        1.25,
        "in training, maximum number of tokens per expert, relative to an even distribution; further tokens skip the "
        "expert; 0: unlimited",
    )
    moe_loss_weight: float = flag(0.1, "weight of the load-balancing loss")
    moe_weight_parallelism: bool = no_effect(False, "--fsdp shards the weights of experts like all others")
    moe_expert_model_parallelism: bool = no_effect(
        False, "--expert-parallel N divides the experts over N ranks, with the same result"
    )
    attn_name: str = flag("auto", "attention implementation", choices=registry.ATTENTION)
    attn_activation: str | None = flag(
        None,
        "with custom_attn, function that is applied to the attention scores",
        choices=registry.ATTENTION_ACTIVATIONS,
    )
    attn_seq_scalar: str | None = flag(
        None, "with custom_attn, length by which the attention weights are divided", choices=registry.ATTENTION_LENGTHS
    )
    attn_seq_scalar_alpha: float | None = flag(None, "with custom_attn, exponent of the --attn-seq-scalar length")
    mup: bool = flag(
        False,
        "maximal-update parametrization (muP): scale initialization, learning rates, attention and logits with the "
        "width, so that the best learning rate is that of the narrow base model",
    )
    mup_base_width: int | None = flag(None, "with --mup, hidden_dim of the base model; required there")
    mup_base_head_dim: int | None = flag(
        None,
        "with --mup, width of a head of the base model; default: head_dim of the model's file, without it "
        "--mup-base-width divided by n_heads",
    )


@dataclass(frozen=True)
class ModelConfig(ArchitectureConfig):
    title: ClassVar[str] = "model"

    model: str = flag("open_lm_1b", "name of a model configuration, or path of its .json file", path=user_path)
    hf_model: str | None = flag(
        None,
        "train this causal language model of transformers, a hub name or a local folder, in place of --model; experts "
        "train with the router loss of its configuration",
        path=user_path,
    )
    hf_seq_len: int | None = flag(None, "sequence length in tokens; required with --hf-model")
    hf_fsdp_block: str | None = flag(
        None,
        "class name of the layers of --hf-model, each of which --fsdp shards, and --torchcompile compiles, separately",
    )
    grad_checkpointing: bool = flag(
        False, "activation checkpointing: recompute the activations of every block in the backward pass"
    )
    activation_checkpointing: str = flag(
        "none",
        "activations that the backward pass recomputes: none; full (all, like --grad-checkpointing); op (all but the "
        "results of matrix products and attention); half-op (like op, and every second matrix product); a number K "
        "(all of every K-th block)",
    )
    torchcompile: bool = flag(False, "compile the blocks of the model with torch.compile")
    torchcompile_mode: str = flag(
        "default",
        "mode of --torchcompile: reduce-overhead uses CUDA graphs, max-autotune also autotunes kernels; both require "
        "--accum-freq 1",
        choices=("default", "reduce-overhead", "max-autotune"),
    )
    experimental_meta_device: bool = no_effect(
        False, "models are always created on the meta device and initialized shard by shard"
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    title: ClassVar[str] = "optimization"

    optimizer: str = flag("adamw", "optimizer", choices=registry.OPTIMIZERS)
    lr: float = flag(5.0e-4, "peak learning rate")
    beta1: float = flag(0.9, "AdamW decay rate of the first moment")
    beta2: float = flag(0.95, "AdamW decay rate of the second moment")
    eps: float = flag(1.0e-8, "AdamW epsilon")
    wd: float = flag(0.2, "weight decay; applies to all parameters unless --no-decay-norms is set")
    no_decay_norms: bool = flag(False, "disable weight decay for norms and biases")
    muon_momentum: float = flag(0.95, "with --optimizer muon, momentum of Muon")
    warmup: int = flag(10000, "steps of linear learning-rate warmup")
    lr_scheduler: str = flag("cosine", "learning-rate schedule after the warmup", choices=registry.SCHEDULES)
    lr_cooldown_end: float = flag(0.0, "final learning rate of the schedules that decay")
    lr_cooldown_power: float = flag(1.0, "with const-cooldown, exponent of the polynomial cooldown; 1: linear")
    epochs_cooldown: int | None = flag(
        None, "with const-cooldown, number of final epochs over which the learning rate decays; required there"
    )
    lr_decay_fraction: float = flag(0.2, "with wsd, final fraction of all steps over which the learning rate decays")
    lr_decay_shape: str = flag("1-sqrt", "with wsd, shape of the decay", choices=registry.DECAY_SHAPES)
    force_min_lr: float = flag(0.0, "minimum learning rate after the warmup")
    skip_scheduler: bool = flag(False, "use the constant learning rate --lr, without warmup and schedule")
    z_loss_coefficient: float = flag(
        0.0, "weight of the z-loss, the squared log of the partition function of the logits; 0: no z-loss"
    )
    grad_clip_norm: float | None = flag(None, "clip gradients to this global norm; default: no clipping")
    accum_freq: int = flag(1, "gradient accumulation: micro-batches per optimizer step")
    averagers: str | None = flag(None, "weight averages to maintain, comma-separated, such as poly_8_1; default: none")
    log_avg_model_training_loss: int = flag(0, "log the training loss of the averaged weights every N steps; 0: never")


@dataclass(frozen=True)
class ParallelConfig(Section):
    title: ClassVar[str] = "devices and parallelism"

    fsdp: bool = flag(False, "shard parameters, gradients and optimizer state over the ranks (FSDP)")
    fsdp_amp: bool = flag(False, "with --fsdp, compute in bfloat16 and reduce gradients in float32")
    fsdp_pure_bf16: bool = flag(False, "with --fsdp, compute and reduce gradients in bfloat16")
    fsdp_hybrid: bool = flag(False, "with --fsdp, shard within each node and replicate across nodes")
    fsdp_hybrid_o2: bool = flag(
        False, "like --fsdp-hybrid, but keep parameters unsharded from the forward to the backward pass"
    )
    fsdp_zero2: bool = flag(False, "with --fsdp, keep parameters unsharded from the forward to the backward pass")
    fsdp_cpu_offload: bool = flag(False, "with --fsdp, keep parameters and optimizer state in host memory")
    fsdp_backward_prefetch: bool = flag(
        False, "with --fsdp, prefetch the parameters of the next block earlier in the backward pass"
    )
    accum_reduce: str = flag(
        "last",
        "with --fsdp and --accum-freq, reduce and shard gradients after the last micro-batch (the others accumulate "
        "unsharded gradients), or after every micro-batch: 1/N of the memory on N sharding ranks, more communication",
        choices=ACCUM_REDUCE,
    )
    fsdp_use_orig_params: bool = no_effect(False, "sharded parameters always keep their original names and shapes")
    fsdp_limit_all_gathers: bool = no_effect(False, "the number of concurrent all-gathers is always limited")
    fsdp_checkpoint: bool = no_effect(False, "--grad-checkpointing recomputes activations under --fsdp too")
    tensor_parallel: int = flag(1, "number of ranks over which tensor parallelism splits each matrix; 1: no splitting")
    async_tensor_parallel: bool = flag(
        False,
        "with --tensor-parallel and --torchcompile, overlap the exchange of tokens with matrix products; the devices "
        "of a tensor-parallel group must be connected by NVLink",
    )
    context_parallel: int = flag(
        1, "number of ranks over which context parallelism splits each sequence; 1: no splitting"
    )
    expert_parallel: int = flag(
        1,
        "with --fsdp, number of ranks over which the experts of every mixture are divided; tokens travel to their "
        "experts and back; 1: every rank runs all experts",
    )
    mesh_dim: str | None = flag(
        None,
        "sizes of the device mesh as DATA,FSDP,TENSOR, such as -1,2,4, in place of --fsdp-hybrid and "
        "--tensor-parallel; one of them may be -1, which means all remaining ranks",
    )
    ddp_static_graph: bool = flag(
        False, "optimize data-parallel training on the assumption that every step uses the same parameters"
    )
    dist_url: str = flag("env://", "rendezvous URL for ranks that are started without a launcher")
    dist_backend: str = flag("nccl", "communication backend for CUDA devices; CPU ranks use gloo")
    dist_timeout: float = flag(1800.0, "timeout of a collective operation in seconds")
    no_set_device_rank: bool = flag(False, "use the first visible device on every rank")
    force_distributed: bool = flag(False, "initialize a process group even for a single process")
    preset_world_size: int | None = flag(
        None, "expected number of ranks; the run fails to start with any other number; default: any number"
    )
    use_bn_sync: bool = no_effect(False, "the models have no batch normalization")

    @property
    def reduces_every_micro_batch(self) -> bool:
        """Whether gradients are reduced and sharded after every micro-batch."""
        return self.fsdp and self.accum_reduce == "every-micro-batch"


@dataclass(frozen=True)
class PrecisionConfig(Section):
    title: ClassVar[str] = "precision"

    precision: str = flag(
        "amp",
        "numeric precision: amp (autocast to float16 on CUDA, to bfloat16 elsewhere); amp_bf16, amp_bfloat16 (autocast "
        "to bfloat16); bf16, fp16 (compute and store parameters in that type); fp32 (float32)",
        choices=PRECISIONS,
    )
    fp8: bool = flag(
        False, "compute the matrix products of the blocks in 8-bit floating point, on devices that support it (torchao)"
    )
    torchscript: bool = no_effect(False, "use --torchcompile")
    trace: bool = no_effect(False, "use --torchcompile")
    use_bnb_linear: str | None = no_effect(None, "8-bit linear layers are not supported")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    title: ClassVar[str] = "checkpoints"

    resume: str | None = flag(
        None, "checkpoint to resume from: a path, or 'latest' for the newest checkpoint of this run", path=user_path
    )
    pretrained: str | None = flag(
        None, "checkpoint or exported folder with the initial weights of a new run", path=weights_path
    )
    load_pretrained_state: bool = flag(
        False,
        "with --pretrained, also restore epoch, step, optimizer and schedule; new data start from the beginning",
    )
    average: list[str] | None = flag(
        None, "checkpoints to average, to start a new run from or to evaluate", path=user_path
    )
    average_coefficients: list[float] | None = flag(
        None, "a weight per --average checkpoint, with sum 1; default: equal"
    )
    save_frequency: int = flag(
        1, "keep the checkpoint of every N-th epoch, and that of the last one; 0: only that of the last one"
    )
    save_most_recent: bool = flag(False, "also write epoch_latest.pt after every epoch, replacing the previous one")
    delete_previous_checkpoint: bool = flag(False, "delete the previous checkpoint once the next one is complete")
    checkpoint_format: str = flag(
        "both",
        "checkpoint format: sharded (step_N/ folders, which all ranks write while training continues); interchange "
        "(epoch_N.pt files); both",
        choices=("both", "sharded", "interchange"),
    )
    checkpoint_dir: str | None = flag(
        None,
        "folder or s3:// URL for checkpoints, which are stored in its subfolder {name}/checkpoints; default: the run's "
        "folder in --logs",
        path=user_path,
    )
    save_every_n_steps: int = flag(0, "write a sharded checkpoint every N steps; 0: only at the end of an epoch")
    save_every_minutes: float = flag(0.0, "write a sharded checkpoint every N minutes; 0: only at the end of an epoch")
    keep_last: int = flag(2, "number of sharded checkpoints to keep; 0: all")
    save_milestone_every: int = flag(0, "keep a sharded checkpoint permanently every N steps; 0: none")


@dataclass(frozen=True)
class FaultConfig(Section):
    title: ClassVar[str] = "fault tolerance"

    max_skipped_steps: int = flag(
        10, "maximum number of skipped steps (loss or gradient not finite) among the last 100 before the run fails"
    )
    skip_loss_spikes: float | None = flag(
        None,
        "skip steps with a loss this many standard deviations above the mean of the last 128; default: skip none",
    )
    rollback_loss_spikes: float | None = flag(
        None,
        "return to the newest checkpoint and skip the data since then, after a step with a loss this many standard "
        "deviations above the mean of the last 128; default: never",
    )
    hang_timeout: float = flag(
        1800.0, "seconds without progress after which the run logs the stacks of all ranks and fails; 0: never"
    )


@dataclass(frozen=True)
class LoggingConfig(Section):
    title: ClassVar[str] = "logging"

    logs: str = flag("./logs/", "parent folder of all run folders; 'none': write no files", path=user_path)
    log_local: bool = flag(False, "log on the first rank of each node instead of on rank 0 only")
    log_every_n_steps: int = flag(100, "log every N steps")
    log_logit_mean: bool = flag(False, "log the mean of the logits")
    log_gradient_noise: bool = flag(
        False,
        "log the gradient noise scale, at which batch size the noise of the gradient equals the gradient; needs "
        "--accum-freq 2 or several data-parallel ranks",
    )
    report_to: str = flag(
        "",
        "comma-separated destinations of metrics in addition to metrics.jsonl, or all, which means tensorboard,wandb "
        "(default: only metrics.jsonl)",
        entries=registry.LOGGERS,
    )
    report: str = report_flag()
    energy: str = energy_flag()
    wandb_project_name: str = flag("open-lm", "project of Weights & Biases and of trackio")
    wandb_notes: str = flag("", "Weights & Biases notes")
    copy_codebase: bool = flag(False, "copy the source code of the program to the run's folder")
    remote_sync: str | None = flag(
        None, "s3:// or other URL to which the run's folder is copied periodically; default: no copy", path=user_path
    )
    remote_sync_frequency: int = flag(300, "copy to --remote-sync every N seconds")
    remote_sync_protocol: str = flag("s3", "protocol of --remote-sync", choices=("s3", "fsspec"))


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    adapters: AdapterConfig
    optim: OptimConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    checkpoint: CheckpointConfig
    distillation: DistillConfig
    faults: FaultConfig
    logging: LoggingConfig
    diagnostics: DiagnosticsConfig
    validation: ValidationConfig
    live_evaluation: LiveEvaluationConfig

    @classmethod
    def from_namespace(cls, args: object) -> Config:
        """Return the sections of a flat object, such as the result of `parse_args`."""
        return cls(**{name: section.from_object(args) for name, section in sections().items()})

    def settings(self) -> Iterator[tuple[FieldSpec, Any]]:
        """Yield the flag and the value of each setting."""
        for section in vars(self).values():
            for spec in section.specs():
                yield spec, getattr(section, spec.name)


@functools.cache
def sections() -> dict[str, type[Any]]:
    """Return the sections by their names in `Config`, in its order."""
    return typing.get_type_hints(Config)
