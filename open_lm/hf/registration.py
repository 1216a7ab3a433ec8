"""Register model_type "openlm" with the automatic classes of transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from open_lm.hf.configuration import OpenLMConfig
from open_lm.hf.modeling import OpenLMForCausalLM, OpenLMModel
from open_lm.hf.tokenization import OpenLMTokenizerFast, load_hf_tokenizer

AutoConfig.register(OpenLMConfig.model_type, OpenLMConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenLMConfig, OpenLMForCausalLM, exist_ok=True)
AutoTokenizer.register(OpenLMConfig, fast_tokenizer_class=OpenLMTokenizerFast, exist_ok=True)

__all__ = ["OpenLMConfig", "OpenLMForCausalLM", "OpenLMModel", "OpenLMTokenizerFast", "load_hf_tokenizer"]
