"""Text generation: sampling with a KV cache."""

from open_lm.generate.sampling import (
    Sampling,
    complete_texts,
    generate_ids,
    load_model_for_generation,
    stream_texts,
)

__all__ = ["Sampling", "complete_texts", "generate_ids", "load_model_for_generation", "stream_texts"]
