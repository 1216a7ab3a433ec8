"""Every setting of a training run, in frozen sections. THE FIELD IS THE FLAG.

A field's name is its flag (`train_data` is `--train-data`), its annotation the type, `Literal` the choices, and its
metadata the help text. Command line, configuration files and `params.txt` are all derived from here (see params.py).
Builders take a section, or any object with the same attributes: `Section.from_object(obj)` fills gaps with defaults.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

S = TypeVar("S", bound="Section")


def flag(default: Any, help: str) -> Any:
    """A field with its default and help text."""
    return field(default=default, metadata={"help": help})


def ineffective(default: Any, why: str) -> Any:
    """A field that is accepted so that existing scripts run, and the reason why it changes nothing."""
    return field(default=default, metadata={"help": f"no effect: {why}", "ineffective": why})


@dataclass(frozen=True)
class FieldSpec:
    """What a field's annotation says, in the terms of a command line."""

    name: str
    kind: type  # str, int, float or bool
    many: bool  # takes one or more values
    optional: bool  # None is a legal value
    choices: tuple[str, ...] | None
    default: Any
    help: str
    ineffective: str | None  # why it changes nothing

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Section:
    """Base of all sections."""

    title: ClassVar[str] = ""

    @classmethod
    def specs(cls) -> Iterator[FieldSpec]:
        hints = typing.get_type_hints(cls)
        for item in fields(cls):
            yield _field_spec(item, hints[item.name])

    @classmethod
    def from_object(cls: type[S], obj: object) -> S:
        """This section from any object with (some of) its attributes, such as an argparse Namespace."""
        if isinstance(obj, cls):
            return obj
        return cls(**{item.name: getattr(obj, item.name) for item in fields(cls) if hasattr(obj, item.name)})


def _field_spec(item: Field[Any], annotation: Any) -> FieldSpec:
    optional = False
    if get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (arm for arm in get_args(annotation) if arm is not type(None))
        optional = True
    many = get_origin(annotation) is list
    if many:
        (annotation,) = get_args(annotation)
    choices = get_args(annotation) if get_origin(annotation) is Literal else None
    kind = str if choices else annotation
    default = None if item.default is MISSING else item.default
    return FieldSpec(
        item.name, kind, many, optional, choices, default, item.metadata["help"], item.metadata.get("ineffective")
    )


@dataclass(frozen=True)
class RunConfig(Section):
    title: ClassVar[str] = "run"

    config: str | None = flag(None, "YAML or JSON file with flags as keys; flags on the command line win over it")
    name: str | None = flag(None, "name of the run, its folder below --logs; default: date, model, lr and batch size")
    seed: int = flag(0, "seed of initialisation, data order and shuffling")
    deterministic: bool = flag(False, "the same numbers bit for bit from run to run, at some cost in speed")
    debug: bool = flag(False, "log at debug level")


@dataclass(frozen=True)
class DataConfig(Section):
    title: ClassVar[str] = "training data"

    train_data: list[str] | None = flag(
        None,
        "shards, one source a value: paths, s3:// urls, brace ranges, globs, '::' joins or a 'pipe:' command",
    )
    dataset_manifest: list[str] | None = flag(
        None, "manifest.jsonl files, one for each source; every sequence is read once a pass, without replacement"
    )
    train_data_mix_weights: list[float] | None = flag(
        None, "share of each source in the training sequences; default: equal shares"
    )
    train_data_upsampling_factors: str | None = flag(
        None, "factors joined by '::', one for each source: how often it counts beside the others"
    )
    dataset_type: Literal["webdataset", "auto", "synthetic"] = flag(
        "auto", "webdataset shards, or synthetic random tokens that need no data"
    )
    dataset_resampled: bool = flag(False, "draw the shards of --train-data with replacement")
    multiple_data_passes: bool = flag(False, "start another pass where the sources of --dataset-manifest run out")
    data_key: str = flag("txt", "kind of the shards' members: npy, json.gz, json or txt; another kind found is used")
    train_num_samples: int | None = flag(None, "tokens of an epoch, that is, between two checkpoints")
    epochs: int = flag(32, "number of epochs (checkpoint intervals) of --train-num-samples tokens")
    global_batch_size: int = flag(64, "sequences of an optimizer step, over all devices")
    batch_size: int | None = flag(
        None, "sequences of a micro-batch on each device, in place of --global-batch-size: N x devices x --accum-freq"
    )
    workers: int = flag(1, "data-loading processes for each device; 0 loads in the training process")
    disable_buffer: bool = flag(False, "read the sequences of a shard in their stored order, unshuffled")
    target_mask_left: int | None = flag(
        None, "token id: only what follows its last occurrence in a sequence is trained on"
    )
    squash_mask_left: bool = flag(False, "with --target-mask-left, also remove that token from the sequence")
    target_mask_individual: int | None = flag(None, "token id, such as the padding's, that is never a target")
    document_mask: bool = flag(False, "keep attention inside documents, whose positions each start at 0")
    end_of_text_id: int | None = flag(
        None, "with --document-mask, the id that ends a document; default: what the data's dataset.json says"
    )
    cache_dir: str | None = flag(None, "local folder that keeps remote shards for the next time they are read")
    cache_limit: str = flag("100GB", "most bytes that --cache-dir holds, such as 500MB or 2TB")
    read_timeout: float = flag(60.0, "seconds without a byte after which a read of a shard is given up and tried again")
    allow_changed_data: bool = flag(False, "continue on data that is not that of the checkpoint")
    ignore_parse_errors: bool = flag(False, "count broken members and shards and go on, up to --data-tolerate-error-p")
    data_tolerate_error_p: float = flag(0.09, "largest share of broken sequences that --ignore-parse-errors allows")
    data_tolerate_num_ckpts: int = ineffective(
        0, "epochs have exactly their number of tokens, so none has to be made up for"
    )


@dataclass(frozen=True)
class ArchitectureConfig(Section):
    """What shapes the model and may also stand in its JSON file, which wins."""

    model_norm: Literal[
        "default_layer_norm",
        "lp_layer_norm",
        "gain_only_lp_layer_norm",
        "gain_only_layer_norm",
        "no_wb_layer_norm",
        "rms_norm",
    ] = flag("default_layer_norm", "normalisation of the blocks")
    ffn_type: Literal["swiglu", "swiglu_torch", "gelu", "gemma_geglu"] = flag("swiglu", "feed-forward network")
    qk_norm: bool = flag(False, "normalise queries and keys over their full width")
    positional_embedding_type: Literal["rotary", "head_rotary", "llama_rotary", "none"] = flag(
        "rotary", "position embedding; head_rotary rotates over heads, as some historical models did"
    )
    moe_freq: int = flag(0, "every how many blocks the feed-forward is a mixture of experts; 0: none")
    moe_num_experts: int | None = flag(None, "number of experts of such a block")
    moe_top_k: int = flag(2, "experts that each token is sent to")
    moe_capacity_factor: float = flag(1.25, "places of an expert, as a multiple of an even share of the tokens")
    moe_loss_weight: float = flag(0.1, "weight of the load-balancing loss")
    moe_weight_parallelism: bool = ineffective(False, "--fsdp shards the experts' weights like all others")
    moe_expert_model_parallelism: bool = ineffective(False, "--fsdp shards the experts' weights like all others")
    attn_name: Literal[
        "auto",
        "xformers_attn",
        "xformers_attn_variable_length",
        "torch_attn",
        "custom_attn",
        "sdpa_flash",
        "sdpa_cudnn",
        "flash_attn_3",
    ] = flag("auto", "attention implementation; auto takes the fastest that is installed for the device")
    attn_activation: Literal["relu", "relu_squared", "softplus", "identity", "relu6", "sigmoid", "softmax"] | None = (
        flag(None, "with custom_attn, what is applied to the scores")
    )
    attn_seq_scalar: Literal["max", "avg", "none"] | None = flag(
        None, "with custom_attn, the length that scores are divided by: the longest, the mean, or none"
    )
    attn_seq_scalar_alpha: float | None = flag(None, "with custom_attn, the exponent of that length")


@dataclass(frozen=True)
class ModelConfig(ArchitectureConfig):
    title: ClassVar[str] = "model"

    model: str = flag("open_lm_1b", "name of a model configuration, or the path of its .json file")
    hf_model: str | None = flag(None, "train a transformers causal language model: hub name or local folder")
    hf_seq_len: int | None = flag(None, "sequence length for --hf-model")
    hf_fsdp_block: str | None = flag(None, "class name of the --hf-model's layers, which --fsdp shards one by one")
    grad_checkpointing: bool = flag(False, "recompute each block's activations in the backward pass")
    activation_checkpointing: str = flag(
        "none",
        "what the backward pass recomputes: none; full, as --grad-checkpointing; op, all but matrix products and "
        "attention; or a number K, every K-th block in full",
    )
    torchcompile: bool = flag(False, "compile the model with torch.compile, one block for all")
    torchcompile_mode: Literal["default", "reduce-overhead", "max-autotune"] = flag(
        "default",
        "with --torchcompile and without --accum-freq: reduce-overhead replays CUDA graphs, max-autotune also tries "
        "out kernels",
    )
    experimental_meta_device: bool = ineffective(
        False, "models are always created without memory and initialised shard by shard"
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    title: ClassVar[str] = "optimisation"

    optimizer: str = flag("adamw", "adamw, or muon: Muon for the blocks' matrices and AdamW for all else")
    lr: float = flag(5.0e-4, "peak learning rate")
    beta1: float = flag(0.9, "AdamW beta 1")
    beta2: float = flag(0.95, "AdamW beta 2")
    eps: float = flag(1.0e-8, "AdamW epsilon")
    wd: float = flag(0.2, "weight decay, on all parameters but for --no-decay-norms")
    no_decay_norms: bool = flag(False, "no weight decay on norms and biases")
    muon_momentum: float = flag(0.95, "with --optimizer muon, its momentum")
    warmup: int = flag(10000, "steps of linear warmup")
    lr_scheduler: str = flag("cosine", "schedule after the warmup: cosine, const, const-cooldown or wsd")
    lr_cooldown_end: float = flag(0.0, "learning rate at the end of the cosine, the cooldown or wsd")
    lr_cooldown_power: float = flag(1.0, "power of the polynomial cooldown of const-cooldown; 1 is linear")
    epochs_cooldown: int | None = flag(None, "last epochs over which const-cooldown lowers the learning rate")
    lr_decay_fraction: float = flag(0.2, "with wsd, the last part of all steps over which the learning rate decays")
    lr_decay_shape: Literal["1-sqrt", "linear", "cosine"] = flag("1-sqrt", "with wsd, how it decays")
    force_min_lr: float = flag(0.0, "after the warmup the learning rate never goes below this")
    skip_scheduler: bool = flag(False, "keep the learning rate at --lr throughout")
    z_loss_coefficient: float = flag(0.0, "weight of the squared log-partition of the logits in the loss")
    grad_clip_norm: float | None = flag(None, "clip the gradient to this norm")
    accum_freq: int = flag(1, "micro-batches that a step's sequences are split into on each device")
    averagers: str | None = flag(None, "running averages of the weights, comma-separated, such as poly_8_1")
    log_avg_model_training_loss: int = flag(0, "every how many steps the averaged models' training loss is logged")


@dataclass(frozen=True)
class ParallelConfig(Section):
    title: ClassVar[str] = "devices and parallelism"

    fsdp: bool = flag(False, "shard parameters, gradients and optimizer state over the ranks")
    fsdp_amp: bool = flag(False, "with --fsdp, compute in bfloat16 and reduce gradients in float32")
    fsdp_pure_bf16: bool = flag(False, "with --fsdp, compute and reduce in bfloat16")
    fsdp_hybrid: bool = flag(False, "with --fsdp, shard inside a node and replicate across nodes")
    fsdp_hybrid_o2: bool = flag(False, "as --fsdp-hybrid, but keep parameters gathered from forward to backward")
    fsdp_zero2: bool = flag(False, "with --fsdp, keep parameters gathered from forward to backward")
    fsdp_cpu_offload: bool = flag(False, "with --fsdp, keep parameters and optimizer state in host memory")
    fsdp_backward_prefetch: bool = flag(
        False, "with --fsdp, gather the next block's parameters early in the backward pass"
    )
    fsdp_use_orig_params: bool = ineffective(False, "sharded parameters always keep their own names and shapes")
    fsdp_limit_all_gathers: bool = ineffective(False, "gathers are always limited")
    fsdp_checkpoint: bool = ineffective(False, "--grad-checkpointing recomputes activations under --fsdp too")
    tensor_parallel: int = flag(1, "ranks that each matrix and the vocabulary are split over")
    context_parallel: int = flag(1, "ranks that each sequence is split over")
    mesh_dim: str | None = flag(
        None, "ranks as data,fsdp,tensor in place of --fsdp-hybrid and --tensor-parallel; one may be -1, such as -1,2,4"
    )
    ddp_static_graph: bool = flag(False, "tell data-parallel training that every step uses the same parameters")
    dist_url: str = flag("env://", "how ranks that no launcher describes find each other")
    dist_backend: str = flag("nccl", "backend on CUDA devices; CPU devices use gloo")
    dist_timeout: float = flag(1800.0, "seconds that a rank waits for the others in one exchange")
    no_set_device_rank: bool = flag(False, "every rank uses the first device that it can see")
    force_distributed: bool = flag(False, "start a process group for a single process too")
    preset_world_size: int | None = flag(None, "refuse to start with any other number of ranks")
    use_bn_sync: bool = ineffective(False, "the models have no batch normalisation")


@dataclass(frozen=True)
class PrecisionConfig(Section):
    title: ClassVar[str] = "precision"

    precision: Literal["amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "fp32"] = flag(
        "amp", "amp computes in the device's own half precision, amp_bfloat16 in bfloat16; bf16 and fp16 also store so"
    )
    fp8: bool = flag(False, "matrix products of the blocks in 8-bit floating point, where the device has it (torchao)")
    torchscript: bool = ineffective(False, "use --torchcompile")
    trace: bool = ineffective(False, "use --torchcompile")
    use_bnb_linear: str | None = ineffective(None, "8-bit linear layers are not offered")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    title: ClassVar[str] = "checkpoints"

    resume: str | None = flag(None, "checkpoint to continue from: a path, or 'latest' for the newest of this run")
    pretrained: str | None = flag(None, "checkpoint whose weights a new run starts from")
    load_pretrained_state: bool = flag(False, "with --pretrained, also load its optimizer's state")
    average: list[str] | None = flag(None, "checkpoints whose weights are averaged, for evaluation or as a start")
    average_coefficients: list[float] | None = flag(None, "weights of that average; default: equal")
    save_frequency: int = flag(1, "every how many epochs a checkpoint is kept; 0: only the last")
    save_most_recent: bool = flag(False, "also keep epoch_latest.pt, written anew after every epoch")
    delete_previous_checkpoint: bool = flag(False, "delete a checkpoint once the next one is complete")
    checkpoint_format: Literal["both", "sharded", "interchange"] = flag(
        "both", "sharded: step_N/ folders, written by all ranks while training goes on; interchange: epoch_N.pt files"
    )
    checkpoint_dir: str | None = flag(
        None, "folder or s3:// url of checkpoints, in {name}/checkpoints there; default: the run's folder in --logs"
    )
    save_every_n_steps: int = flag(0, "steps between two sharded checkpoints; 0: at the end of an epoch only")
    save_every_minutes: float = flag(0.0, "minutes between two sharded checkpoints; 0: at the end of an epoch only")
    keep_last: int = flag(2, "how many of the newest sharded checkpoints are kept; 0: all")
    save_milestone_every: int = flag(0, "steps between two sharded checkpoints that are kept for good; 0: none")
    distill_model: str | None = ineffective(None, "training from a teacher is not offered")
    distill_pretrained: str | None = ineffective(None, "training from a teacher is not offered")


@dataclass(frozen=True)
class FaultConfig(Section):
    title: ClassVar[str] = "faults in training"

    max_skipped_steps: int = flag(
        10, "how many of the last 100 steps may be skipped for a loss or gradient that is not finite"
    )
    skip_loss_spikes: float | None = flag(
        None, "skip a step whose loss is more than this many standard deviations above the mean of the last 128"
    )
    rollback_loss_spikes: float | None = flag(
        None, "at such a loss go back to the newest checkpoint and pass over the data between"
    )
    hang_timeout: float = flag(
        1800.0, "seconds without progress after which a run ends with the stacks of all ranks; 0: never"
    )


@dataclass(frozen=True)
class LoggingConfig(Section):
    title: ClassVar[str] = "logging"

    logs: str = flag("./logs/", "folder of all runs; 'none' writes nothing")
    log_local: bool = flag(False, "log on each node's first rank, not on rank 0 alone")
    log_every_n_steps: int = flag(100, "steps between two log lines")
    log_logit_mean: bool = flag(False, "log the mean of the logits")
    report_to: str = flag("", "wandb, tensorboard, both joined by a comma, or all")
    wandb_project_name: str = flag("open-lm", "Weights & Biases project")
    wandb_notes: str = flag("", "Weights & Biases notes")
    copy_codebase: bool = flag(False, "copy the program's source into the run's folder")
    remote_sync: str | None = flag(None, "s3:// or other url that the run's folder is copied to")
    remote_sync_frequency: int = flag(300, "seconds between two such copies")
    remote_sync_protocol: Literal["s3", "fsspec"] = flag("s3", "protocol of --remote-sync")


@dataclass(frozen=True)
class ValidationConfig(Section):
    title: ClassVar[str] = "validation"

    val_data: list[str] | None = flag(None, "validation shards, one validation set for each value")
    val_data_key: list[str] | None = flag(None, "kind of members, one for each validation set; default: --data-key")
    val_num_samples: int | None = flag(None, "tokens of each validation set that are used; default: all")
    val_frequency: int = flag(1, "epochs between two validations")
    global_val_batch_size: int | None = flag(
        None, "sequences of a validation batch, over all devices; default: as training, or 8 a device without"
    )
    val_seq_ci: bool = flag(False, "bootstrap the validation loss over sequences for a 95 %% interval")
    val_tok_ci: bool = flag(False, "bootstrap the validation loss over tokens for a 95 %% interval")
    val_max_pop_ci: int | None = flag(None, "largest number of sequences or tokens to bootstrap from")
    val_iter_ci: int = flag(10000, "number of bootstrap resamples")


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    checkpoint: CheckpointConfig
    faults: FaultConfig
    logging: LoggingConfig
    validation: ValidationConfig

    @classmethod
    def from_namespace(cls, args: object) -> Config:
        """The sections of a flat object, such as `parse_args` returns."""
        sections = typing.get_type_hints(cls)
        return cls(**{name: section.from_object(args) for name, section in sections.items()})


def sections() -> list[type[Section]]:
    """The sections in the order of `Config`."""
    return list(typing.get_type_hints(Config).values())
