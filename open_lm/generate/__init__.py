"""Text generation: sampling with a KV cache."""
