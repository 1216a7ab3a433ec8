"""The configuration class under the name that existing callers import."""

from open_lm.hf import OpenLMConfig

__all__ = ["OpenLMConfig"]
