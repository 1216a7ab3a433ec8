"""Distillation in the trainer: load the teacher, run it next to the student, or use its stored distributions.

The teacher is a native model of any family and size, without gradients, in evaluation mode. Its parameters are sharded
by FSDP2 and split by tensor parallelism as the student's are; without either, each rank has all of them.
Legend: B sequences of this rank's batch, T sequence, D model width.
"""

from __future__ import annotations

import hashlib
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_lm.checkpoint import candidates_at, load_weights, read_model_state, weights_sha256
from open_lm.checkpoint.folders import is_transformers_folder
from open_lm.config.architecture import model_names, read_run_settings
from open_lm.config.distill_section import DistillConfig
from open_lm.config.layout import MeshLayout
from open_lm.config.model_keys import MUP_KEYS
from open_lm.config.sections import Config, ModelConfig, ParallelConfig
from open_lm.data.loader import TrainLoader
from open_lm.data.order import Source
from open_lm.data.teacher_cache import CacheSettings
from open_lm.data.tokenizers import find_run_tokenizer
from open_lm.distributed.processes import Runtime, run_on_all_ranks, run_on_master
from open_lm.errors import ConfigError, join_problems
from open_lm.kernels.linear_distillation import DenseTargets, DistillationSettings
from open_lm.kernels.sparse_targets import SparseTargets
from open_lm.model.distillation import DistillationLoss, HiddenStates
from open_lm.model.initialization import reset_buffers
from open_lm.model.losses import TokenLoss, batch_loss
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer, create_model
from open_lm.parallel.parallelize import parallelize

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TeacherSource:
    """The architecture of a teacher (Params, or a ModelConfig that selects it) and the path of its weights."""

    architecture: Params | ModelConfig
    weights: str

    def create(self) -> Transformer:
        """Create the model. Under torch.device("meta") it uses no memory."""
        if isinstance(self.architecture, Params):
            return Transformer(self.architecture)
        return create_model(self.architecture)


def find_teacher(cfg: DistillConfig) -> TeacherSource:
    """Return the teacher of --distill-model and --distill-pretrained.

    Raises:
        ConfigError: nothing says which architecture or which weights it has.
        CheckpointError: there is no such checkpoint.
    """
    name, weights = cfg.distill_model, cfg.distill_pretrained
    is_named = name is not None and (name.endswith(".json") or name in model_names())
    if weights is None:
        if is_named:
            raise ConfigError(
                f"--distill-model {name} is an architecture without weights; set --distill-pretrained to its checkpoint"
            )
        from open_lm.hf.folders import find_source

        weights = find_source(str(name))
    url = candidates_at(weights)[0].url
    folder = next((path for path in (name, url) if path and not is_named and is_transformers_folder(path)), None)
    if folder is not None:
        from open_lm.hf.native_weights import read_params

        return TeacherSource(read_params(folder), url)
    settings = {**read_run_settings(url), **({"model": name} if cfg.distill_pretrained and name else {})}
    if not settings.get("model"):
        raise ConfigError(
            f"{url}: neither a params.txt nor a model.json of its run says which model the teacher is; set "
            "--distill-model to a model name or a .json file"
        )
    return TeacherSource(ModelConfig.from_object(Namespace(**settings)), url)


@dataclass
class Teacher:
    """A frozen model that computes the hidden states for the loss, with the attributes of `ForwardOptions`."""

    model: nn.Module
    layout: MeshLayout
    end_of_text_id: int | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    _head: Any = field(default=None, repr=False)

    @torch.no_grad()
    def targets(self, ids: Tensor, documents: Tensor | None) -> DenseTargets:
        """Return the hidden states (B,T,D) of this rank's tokens and the output layer, for ids (B,T) int64."""
        loss = HiddenStates(ids)
        batch_loss(self.model, ids, loss, self, documents)
        (targets,) = loss.results
        # Keep the rows that tensor parallelism makes ranks exchange. FSDP2 may replace other weights.
        if self._head is None or not isinstance(self._head.weight, DTensor):
            self._head = targets.head
        return DenseTargets(targets.hidden, self._head)


@dataclass(frozen=True)
class Distillation:
    """The loss of a run that learns from a teacher: a live one, or stored distributions if `teacher` is None.

    `weights` are the paths of the live teacher's weights, whose tokenizer must be that of the data.
    """

    settings: DistillationSettings
    teacher: Teacher | None = None
    weights: tuple[str, ...] = ()

    def loss(
        self, loss: TokenLoss, ids: Tensor, documents: Tensor | None, stored: SparseTargets | None
    ) -> DistillationLoss:
        """Return the loss in place of `loss`, for the inputs ids (B,T) of a micro-batch. Collective."""
        if self.teacher is not None:
            targets: DenseTargets | SparseTargets = self.teacher.targets(ids, documents)
        else:
            assert stored is not None
            targets = stored
        return DistillationLoss(
            loss.targets,
            loss.z_loss_coefficient,
            logit_means=loss.logit_means,
            teacher=targets,
            settings=replace(self.settings, z_loss_coefficient=loss.z_loss_coefficient),
        )


def build_distillation(  # noqa: PLR0917 - the parts of a run
    config: Config,
    runtime: Runtime,
    layout: MeshLayout,
    student: Any,
    loader: TrainLoader,
    end_of_text_id: int | None,
) -> Distillation | None:
    """Load the teacher of a training run; None if it has none. Collective.

    Args:
        student: architecture of the student (vocab_size, seq_len).
        loader: the training data, and the stored distributions of --distill-cache.
        end_of_text_id: see `ForwardOptions`.

    Raises:
        ConfigError: a teacher that cannot be used with this data or layout.
    """
    cfg = config.distillation
    if not cfg.distills:
        return None
    settings = DistillationSettings(cfg.distill_loss, cfg.distill_weight, cfg.distill_temperature)
    if loader.cache is not None:
        cached = loader.cache.settings
        run_on_master(lambda: _check_cache(cached, cfg, student, end_of_text_id))
        if runtime.is_master:
            logging.info(f"distilling from the {cached.method} distributions of teacher {cached.teacher[:12]}…")
        return Distillation(settings)
    source = run_on_master(lambda: find_teacher(cfg))
    with torch.device("meta"):
        model = source.create().requires_grad_(False)
    run_on_all_ranks(lambda: _check_teacher(model.params, student, loader.sources))
    model.eval()
    sharded = parallelize(
        model,
        layout,
        ParallelConfig(fsdp=config.parallel.fsdp, fsdp_cpu_offload=config.parallel.fsdp_cpu_offload),
        device=runtime.device,
        model_cfg=ModelConfig(torchcompile=config.model.torchcompile),
        dtype=_DTYPES[cfg.distill_precision],
        initialise=reset_buffers,
        replicates=False,
    )
    load_weights(source.weights, sharded)
    if runtime.is_master:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        logging.info(
            f"distilling from {source.weights}: {parameters:,} parameters in {cfg.distill_precision}, "
            f"{cfg.distill_loss} with weight {cfg.distill_weight:g} and temperature {cfg.distill_temperature:g}"
        )
        if student.seq_len > model.params.seq_len:
            logging.warning(
                f"the sequences have {student.seq_len} tokens, but the teacher was made for {model.params.seq_len}; it "
                "may predict later tokens badly"
            )
        if find_run_tokenizer(source.weights) is None:
            logging.warning(
                f"{source.weights}: records no tokenizer, so that it was not compared with that of the data"
            )
    return Distillation(settings, Teacher(sharded, layout, end_of_text_id), (source.weights,))


def load_teacher_alone(
    source: TeacherSource, precision: str, device: torch.device | str, end_of_text_id: int | None = None
) -> Teacher:
    """Load a teacher that is not sharded, in evaluation mode. `precision` is an entry of TEACHER_PRECISIONS."""
    with torch.device("meta"):
        model = source.create().requires_grad_(False)
    model.to_empty(device=device)
    reset_buffers(model)
    load_weights(source.weights, model)
    return Teacher(model.to(_DTYPES[precision]).eval(), MeshLayout(), end_of_text_id)


def teacher_fingerprint(source: TeacherSource) -> str:
    """Return a hash of a teacher's weights and architecture; reads all of its weights."""
    with torch.device("meta"):
        params = source.create().params
    left_out = ("attn_name", *(MUP_KEYS if params.parametrization.is_standard else ()))  # as in existing caches
    shape = {name: value for name, value in vars(params).items() if name not in left_out and not callable(value)}
    text = f"{weights_sha256(read_model_state(source.weights)[0])}\n{dict(sorted(shape.items()))}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def num_token_ids(params: Any) -> int:
    """Return the number of token ids of a model, without padding of its vocabulary."""
    return getattr(params, "unpadded_vocab_size", None) or int(params.vocab_size)


def _check_teacher(teacher: Params, student: Any, sources: Sequence[Source]) -> None:
    """Raise ConfigError if the data may have ids that the teacher lacks."""
    recorded = [dataset["settings"].get("vocab_size") for source in sources for dataset in source.datasets]
    known = [size for size in recorded if isinstance(size, int)]
    num_ids = max(known) if known and len(known) == len(recorded) else num_token_ids(student)
    if num_ids > teacher.vocab_size:
        origin = "the data have" if known else "the student has"
        raise ConfigError(
            f"the teacher has {teacher.vocab_size} token ids, but {origin} {num_ids}: use a teacher with the tokenizer "
            "of the data, or set unpadded_vocab_size in the student's JSON file to the number of ids of its tokenizer"
        )


def _check_cache(cached: CacheSettings, cfg: DistillConfig, student: Any, end_of_text_id: int | None) -> None:
    """Raise ConfigError if a cache was made with other settings than those of the run, or by another teacher."""
    problems = []
    if cached.seq_len != student.seq_len:
        problems.append(f"has sequences of {cached.seq_len} tokens, but the model's seq_len is {student.seq_len}")
    if cached.num_ids > num_token_ids(student):
        problems.append(
            f"has distributions over {cached.num_ids} ids, but the student has {num_token_ids(student)}; create it "
            f"with --num-ids {num_token_ids(student)}"
        )
    if cached.temperature != cfg.distill_temperature:
        problems.append(f"has temperature {cached.temperature:g}: set --distill-temperature {cached.temperature:g}")
    if cached.end_of_text_id != end_of_text_id:
        theirs, ours = (_describe_attention(end_id) for end_id in (cached.end_of_text_id, end_of_text_id))
        problems.append(f"was made with {theirs}, but this run has {ours}")
    if cfg.distill_model or cfg.distill_pretrained:
        found = teacher_fingerprint(find_teacher(cfg))
        if found != cached.teacher:
            problems.append(f"was made by teacher {cached.teacher}, but --distill-pretrained is teacher {found}")
    if problems:
        raise ConfigError(join_problems([f"--distill-cache {problem}" for problem in problems]))


def _describe_attention(end_of_text_id: int | None) -> str:
    if end_of_text_id is None:
        return "attention over full sequences"
    return f"attention within documents that id {end_of_text_id} ends"
