"""Public import path `open_lm.utils.transformers.hf_model`; the code is in open_lm.hf."""

from open_lm.hf import OpenLMForCausalLM as OpenLMforCausalLM
from open_lm.hf import OpenLMModel

__all__ = ["OpenLMModel", "OpenLMforCausalLM"]
