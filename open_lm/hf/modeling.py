"""The model as a transformers causal language model.

Legend: B batch, T sequence, P cached positions, D model width, V vocabulary, L layers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from open_lm.errors import CheckpointError, join_problems
from open_lm.hf.cache import read_cache, write_cache
from open_lm.hf.configuration import OpenLMConfig
from open_lm.kernels.threads import limit_threads
from open_lm.model.embedding import ScaledEmbedding
from open_lm.model.initialization import reset_buffers
from open_lm.model.losses import token_loss
from open_lm.model.transformer import Head, Transformer

MAX_LISTED_KEYS = 8


class OpenLMPreTrainedModel(PreTrainedModel):
    """The base class: it holds a native `Transformer` as `self.model`, so that weight names start with "model."."""

    config_class = OpenLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_cache_class = True
    _supports_static_cache = False
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads a plain class attribute

    def __init__(self, config: OpenLMConfig, model: Transformer | None = None) -> None:
        super().__init__(config)
        self.model = Transformer(config.to_params()) if model is None else model
        if config.weight_tying:
            # A dict (tied name to source) for transformers 5; version 4 reads only the names.
            self._tied_weights_keys = {"model.output.weight": "model.tok_embeddings.weight"}
        # The gelu network's weights have second names for the same modules, so saving one name is enough.
        aliases = [
            f"model.{name}" for name, _ in self.model.named_parameters(remove_duplicate=False) if "._ff_w" in name
        ]
        self._keys_to_ignore_on_save = aliases or None
        self.post_init()

    @classmethod
    def from_open_lm(cls, model: Transformer) -> Any:
        """Wrap a native model without copying its weights."""
        return cls(OpenLMConfig(model.params), model)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, but raise an error for missing weights instead of initializing them.

        Raises:
            CheckpointError: weights that are missing from the folder's files.
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        tied = ("model.output.weight",) if model.config.weight_tying else ()
        missing = [key for key in info["missing_keys"] if not key.endswith("inv_freq") and "._ff_w" not in key]
        missing = sorted(key for key in missing if key not in tied)
        if missing:
            shown = ", ".join(missing[:MAX_LISTED_KEYS]) + (", …" if len(missing) > MAX_LISTED_KEYS else "")
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise CheckpointError(join_problems([f"{len(missing)} weights are missing: {shown}"], str(source)))
        reset_buffers(model)  # loading in half precision rounds the rotary frequencies
        return (model, info) if return_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `Transformer` initializes itself, and `from_pretrained` accepts no missing weights."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activation checkpointing is on; transformers reads and sets this attribute."""
        return self.model.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.set_grad_checkpointing(enable)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        with torch.device("meta"):
            embeddings = ScaledEmbedding(value.num_embeddings, value.embedding_dim, self.model.params.embedding_scale)
        embeddings.weight = value.weight
        self.model.tok_embeddings = embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        with torch.device("meta"):
            multiplier = self.model.params.parametrization.output_multiplier
            bias = new_embeddings.bias is not None
            head = Head(new_embeddings.in_features, new_embeddings.out_features, bias, multiplier)
        head.weight, head.bias = new_embeddings.weight, new_embeddings.bias
        self.model.output = head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embeddings as transformers does, and update the native model's vocabulary size."""
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.vocab_size = self.model.params.vocab_size = embeddings.num_embeddings
        return embeddings


class OpenLMModel(OpenLMPreTrainedModel):
    """The native model with loading and saving as in transformers."""

    def forward(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
        """Run `Transformer.forward`: tokens (B,T) int64 -> logits (B,T,V), hidden (B,T,D), cache or None."""
        return self.model(tokens, **kwargs)


class OpenLMForCausalLM(OpenLMPreTrainedModel, GenerationMixin):
    """The model for transformers' generate(), pipelines and trainers. Its logits equal the native model's."""

    def forward(  # noqa: PLR0917 (the order in transformers)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute next-token logits and, with labels, the loss.

        Args:
            input_ids: (B,T) int64, or inputs_embeds: (B,T,D) float.
            attention_mask: (B,P+T), nonzero for real tokens, with left or right padding. Positions are derived from it;
                a `position_ids` argument is ignored.
            past_key_values: a transformers Cache (extended in place) or L native pairs (B,P,H,K).
            labels: (B,T) int64, a copy of the input ids with -100 for tokens that are not targets. Shifted here.
            use_cache: return past_key_values.
            output_hidden_states: return the final normalized states (B,T,D) as the only element of hidden_states.
            num_items_in_batch: divide the summed loss by this number instead of the number of targets.
            logits_to_keep: compute the logits of only this number of last positions; 0 for all T, which labels need.

        Returns:
            loss float32 scalar or None, logits (B,T,V) float32, past_key_values, hidden_states.

        Raises:
            ValueError: output_attentions, which fused kernels do not support, or a mask that is not (B,P+T).
        """
        if output_attentions:
            raise ValueError("output_attentions: the fused attention kernels do not return attention weights")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected 2 dimensions (B,P+T)")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        threads: AbstractContextManager[None] = nullcontext()
        if use_cache and inputs is not None:
            threads = limit_threads(self.model, inputs.shape[:2].numel(), inputs.device)
        with threads:
            logits, hidden, native_cache = self.model(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                past_key_values=read_cache(past_key_values),
                use_cache=bool(use_cache),
                attention_mask=attention_mask,
                logits_to_keep=0 if labels is not None else logits_to_keep,
            )
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=write_cache(past_key_values, native_cache, hidden.shape[1]),
            hidden_states=(hidden,) if output_hidden_states else None,
        )
        return_as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_as_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        loss_sum, num_valid = token_loss(logits[:, :-1], labels[:, 1:].to(logits.device))
        loss = loss_sum / (num_valid if num_items is None else num_items)
        auxiliary = self.model.auxiliary_loss() if self.training else None
        return loss if auxiliary is None else loss + auxiliary
