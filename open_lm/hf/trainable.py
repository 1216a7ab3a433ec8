"""A transformers causal language model that the trainer can train like a native model (--hf-model).

Legend: B batch, T sequence, P cached positions, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.model.losses import TokenLoss


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        *,
        loss: TokenLoss | None = None,
    ) -> tuple[Tensor, None, Any]:
        """Compute next-token logits, or their loss.

        Args:
            input_ids: (B,T) int64, or inputs_embeds: (B,T,D) float.
            past_key_values: the third result of an earlier call.
            use_cache: return a cache for the next call.
            attention_mask: (B,P+T), nonzero for real tokens.
            loss: return this loss instead of logits.

        Returns:
            logits (B,T,V) float32, or the loss; None instead of hidden states; the cache or None.
        """
        output = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_mask=attention_mask,
            return_dict=True,
        )
        cache = output.past_key_values if use_cache else None
        if loss is not None:
            return loss.from_logits(output.logits), None, cache
        return output.logits.float(), None, cache

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


def create_hf_model(cfg: object) -> TrainableHFModel:
    """Load the model that --hf-model names, with float32 weights.

    Args:
        cfg: a ModelConfig or any object with its attributes. Only hf_model (hub name or local folder) and hf_seq_len
            are used.

    Raises:
        ConfigError: no such model, a model that is not a causal language model, or one with fewer positions than
            hf_seq_len.
    """
    from transformers import AutoModelForCausalLM

    section = ModelConfig.from_object(cfg)
    name, seq_len = section.hf_model, section.hf_seq_len
    if not name or not seq_len:
        raise ConfigError("--hf-model requires --hf-seq-len, the number of tokens of a training sequence")
    try:
        model = AutoModelForCausalLM.from_pretrained(name).float()
    except (OSError, ValueError) as error:
        # transformers raises OSError for an unknown name and ValueError for another kind of model.
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--hf-model {name}: expected the folder or hub name of a transformers causal language model ({reason})"
        ) from error
    text_config = model.config.get_text_config()
    max_positions = getattr(text_config, "max_position_embeddings", None)
    if max_positions is not None and seq_len > max_positions:
        raise ConfigError(f"--hf-seq-len {seq_len}: --hf-model {name} has positions for {max_positions} tokens only")
    vocab_size = model.get_input_embeddings().num_embeddings
    params = HFParams(text_config.hidden_size, text_config.num_hidden_layers, vocab_size, seq_len, name)
    return TrainableHFModel(model, params)
