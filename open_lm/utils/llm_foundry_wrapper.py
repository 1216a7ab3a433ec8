"""Public import path `open_lm.utils.llm_foundry_wrapper`; the code is in open_lm.evaluate.engines."""

from open_lm.evaluate.engines.foundry_model import SimpleComposerOpenLMCausalLM

__all__ = ["SimpleComposerOpenLMCausalLM"]
