"""The Transformer and its components: attention, norms, feed-forward networks, position embeddings, losses."""

from open_lm.model.transformer import Block, Params, Transformer, create_model, create_params

__all__ = ["Block", "Params", "Transformer", "create_model", "create_params"]
