"""A transformers causal language model that the trainer treats like the package's own: --hf-model.

Legend: B batch, T sequence, P cached positions before it, D model width, V vocabulary.
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
    """What the trainer reads of a model's shape.

    Attributes:
        dim: D. n_layers: number of blocks. vocab_size: V. seq_len: tokens of a training sequence, --hf-seq-len.
        hf_model: what the model was loaded from.
    """

    dim: int
    n_layers: int
    vocab_size: int
    seq_len: int
    hf_model: str


class TrainableHFModel(nn.Module):
    """Gives a transformers model the interface of `open_lm.model.Transformer`. Its weights are prefixed "model."."""

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
        """Next-token logits, or their loss.

        Args:
            input_ids: (B,T) int64, or inputs_embeds: (B,T,D) float.
            past_key_values: the third result of an earlier call.
            use_cache: return a cache for the next call.
            attention_mask: (B,P+T), nonzero for real tokens.
            loss: compute this loss of the logits in their place.

        Returns:
            logits (B,T,V) float32, or the loss; None in place of the hidden states, and the cache or None.
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
        """Recompute the blocks' activations in the backward pass."""
        word = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"  # the older name
        if enable:
            switch = getattr(self.model, f"{word}_checkpointing_enable")
            switch(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
        else:
            getattr(self.model, f"{word}_checkpointing_disable")()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()


def create_hf_model(cfg: object) -> TrainableHFModel:
    """The model that --hf-model names, with its weights in float32.

    Args:
        cfg: a ModelConfig or any object with its attributes; hf_model (hub name or local folder) and hf_seq_len count.

    Raises:
        ConfigError: no such model, one that is no causal language model, or one whose positions end before hf_seq_len.
    """
    from transformers import AutoModelForCausalLM

    section = ModelConfig.from_object(cfg)
    name, seq_len = section.hf_model, section.hf_seq_len
    if not name or not seq_len:
        raise ConfigError("--hf-model needs --hf-seq-len, the length of its training sequences")
    try:
        model = AutoModelForCausalLM.from_pretrained(name).float()
    except (OSError, ValueError) as error:
        # Both come from transformers: nothing found under the name, or a model of another kind.
        raise ConfigError(
            f"--hf-model {name}: expected the folder or hub name of a transformers causal language model "
            f"({str(error).splitlines()[0]})"
        ) from error
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise ConfigError(f"--hf-seq-len {seq_len}: --hf-model {name} has positions for {longest} tokens only")
    rows = model.get_input_embeddings().num_embeddings
    return TrainableHFModel(model, HFParams(text.hidden_size, text.num_hidden_layers, rows, seq_len, name))
