"""A transformers causal language model that the trainer can train like a native model (--hf-model).

Legend: B batch, T sequence, P cached positions, D model width, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.hf.modeling import OpenLMForCausalLM
from open_lm.model.losses import TokenLoss

# Names of submodules that only models with experts have: "experts" in all classes of transformers except for Doge.
_EXPERT_MODULES = {"experts", "router_gate"}
_ROUTER_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class HFParams:
    """The part of a model's architecture that the trainer reads.

    Attributes:
        dim: D.
        n_layers: number of blocks.
        vocab_size: V.
        seq_len: tokens of a training sequence, --hf-seq-len.
        hf_model: the name or folder that the model was loaded from.
    """

    dim: int
    n_layers: int
    vocab_size: int
    seq_len: int
    hf_model: str


class TrainableHFModel(nn.Module):
    """A transformers model with the interface of `open_lm.model.Transformer`. Its weight names start with "model."."""

    def __init__(self, model: Any, params: HFParams) -> None:
        super().__init__()
        self.model = model
        self.params = params
        self.vocab_size = params.vocab_size
        self.seq_len = params.seq_len
        self._router_loss_weight = router_loss_weight(model)
        self._router_loss: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        *,
        loss: TokenLoss | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, None, Any]:
        """Compute next-token logits, or their loss.

        Args:
            input_ids: (B,T) int64, or inputs_embeds: (B,T,D) float.
            past_key_values: the third result of an earlier call.
            use_cache: return a cache for the next call.
            attention_mask: (B,P+T), nonzero for real tokens.
            loss: return this loss instead of logits.
            logits_to_keep: return the logits of only this number of last positions; 0 for all T.

        Returns:
            logits (B,T,V) float32, or the loss; None instead of hidden states; the cache or None.
        """
        router_args = {"output_router_logits": self.training} if self._router_loss_weight else {}
        output = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_mask=attention_mask,
            return_dict=True,
            **router_args,
        )
        if self._router_loss_weight and self.training:
            self._router_loss = self._router_loss_weight * output.aux_loss.float()
        cache = output.past_key_values if use_cache else None
        if loss is not None:
            return loss.from_logits(output.logits), None, cache
        return output.logits[:, -logits_to_keep:].float(), None, cache

    def auxiliary_loss(self) -> Tensor | None:
        """Return the routers' loss of the last forward pass in training mode, as `Transformer.auxiliary_loss` does.

        It is what transformers adds to the loss with labels and output_router_logits: its load-balancing loss times the
        coefficient in the model's configuration. None without experts or with a coefficient of 0.
        """
        if isinstance(self.model, OpenLMForCausalLM):
            return self.model.model.auxiliary_loss()
        return self._router_loss

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of the blocks on or off."""
        has_new_name = hasattr(self.model, "activation_checkpointing_enable")
        prefix = "activation" if has_new_name else "gradient"  # the name in older versions of transformers
        if enable:
            enable_checkpointing = getattr(self.model, f"{prefix}_checkpointing_enable")
            enable_checkpointing(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
        else:
            getattr(self.model, f"{prefix}_checkpointing_disable")()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()


def has_experts(model: nn.Module) -> bool:
    """Return whether a router of the model distributes tokens over experts."""
    return any(name.rpartition(".")[2] in _EXPERT_MODULES for name, _ in model.named_modules())


def router_loss_weight(model: Any) -> float:
    """Return the coefficient with which a transformers model adds its routers' loss; 0 if it adds none.

    0 also if the class cannot compute the loss: see `check_router_loss`.
    """
    if not has_experts(model) or "output_router_logits" not in inspect.signature(model.forward).parameters:
        return 0.0
    return float(_configured_coefficient(model) or 0.0)


def _configured_coefficient(model: Any) -> float | None:
    """Return the coefficient that the model's class read from its configuration, or that is in the configuration."""
    sources = (model, model.config.get_text_config())
    found = (getattr(source, name, None) for source in sources for name in _ROUTER_LOSS_COEFFICIENTS)
    return next((value for value in found if value is not None), None)


def check_router_loss(model: TrainableHFModel) -> None:
    """Raise ConfigError if the model has experts whose class cannot compute the loss of their routers.

    Training would otherwise continue without load balancing. A coefficient of 0 in the configuration allows it.
    """
    inner = model.model
    is_native = isinstance(inner, OpenLMForCausalLM)
    if is_native or not has_experts(inner) or router_loss_weight(inner) or _configured_coefficient(inner) == 0:
        return
    raise ConfigError(
        f"--hf-model {model.params.hf_model}: {type(inner).__name__} has experts, but transformers cannot compute the "
        "load-balancing loss of their routers; choose a class that can, such as Mixtral, OLMoE or Qwen3-MoE, or set "
        '"router_aux_loss_coef": 0 in the config.json of a local folder to train without this loss'
    )


def read_hf_weights(name: str) -> dict[str, Tensor]:
    """Return the weights of the model that --hf-model names, in float32, by their names in `TrainableHFModel`."""
    return {f"model.{key}": value for key, value in _load_model(name).state_dict().items()}


def create_hf_model(cfg: object, for_training: bool = False) -> TrainableHFModel:
    """Load the model that --hf-model names, with float32 weights.

    Args:
        cfg: a ModelConfig or any object with its attributes. Only hf_model (hub name or local folder) and hf_seq_len
            are used.
        for_training: refuse a model whose router loss cannot be computed.

    Raises:
        ConfigError: no such model, a model that is not a causal language model, or one with fewer positions than
            hf_seq_len; for_training also a model that `check_router_loss` refuses.
    """
    section = ModelConfig.from_object(cfg)
    name, seq_len = section.hf_model, section.hf_seq_len
    if not name or not seq_len:
        raise ConfigError("--hf-model requires --hf-seq-len, the number of tokens of a training sequence")
    model = _load_model(name)
    text_config = model.config.get_text_config()
    max_positions = getattr(text_config, "max_position_embeddings", None)
    if max_positions is not None and seq_len > max_positions:
        raise ConfigError(f"--hf-seq-len {seq_len}: --hf-model {name} has positions for {max_positions} tokens only")
    vocab_size = model.get_input_embeddings().num_embeddings
    params = HFParams(text_config.hidden_size, text_config.num_hidden_layers, vocab_size, seq_len, name)
    trainable = TrainableHFModel(model, params)
    if for_training:
        check_router_loss(trainable)
    return trainable


def _load_model(name: str) -> Any:
    """Load a causal language model in float32; raise ConfigError if there is none of this name."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name).float()
    except (OSError, ValueError) as error:
        # transformers raises OSError for an unknown name and ValueError for another kind of model.
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--hf-model {name}: expected the folder or hub name of a transformers causal language model ({reason})"
        ) from error
