"""The model and its parts: Transformer, blocks, attention, norms, feed-forward, position embeddings, losses."""

from open_lm.model.transformer import Block, Params, Transformer, create_model, create_params

__all__ = ["Block", "Params", "Transformer", "create_model", "create_params"]
