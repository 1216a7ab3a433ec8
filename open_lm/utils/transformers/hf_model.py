"""The model classes under the names that existing callers import."""

from open_lm.hf import OpenLMForCausalLM as OpenLMforCausalLM
from open_lm.hf import OpenLMModel

__all__ = ["OpenLMModel", "OpenLMforCausalLM"]
