"""The engines of `open-lm evaluate`: the package's own, lm-eval and llm-foundry."""
