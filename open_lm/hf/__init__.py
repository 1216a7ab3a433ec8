"""Integration with transformers; the only package that imports it.

Importing this package registers model_type "openlm" with AutoConfig, AutoTokenizer and AutoModelForCausalLM.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["OpenLMConfig", "OpenLMForCausalLM", "OpenLMModel", "OpenLMTokenizerFast", "load_hf_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from open_lm.hf import registration

    return getattr(registration, name)


# `python -m open_lm.hf.convert` imports this package first (sys.argv is then ["-m", …]). The program registers when it
# converts, so that its --help does not wait for transformers.
if not (sys.argv[:1] == ["-m"] and "open_lm.hf.convert" in sys.orig_argv):
    from open_lm.hf.registration import (
        OpenLMConfig,
        OpenLMForCausalLM,
        OpenLMModel,
        OpenLMTokenizerFast,
        load_hf_tokenizer,
    )
