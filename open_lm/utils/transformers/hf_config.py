"""Public import path `open_lm.utils.transformers.hf_config`; the code is in open_lm.hf."""

from open_lm.hf import OpenLMConfig

__all__ = ["OpenLMConfig"]
