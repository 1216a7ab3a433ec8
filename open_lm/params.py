"""Public import path `open_lm.params`; the code is in open_lm.config.command_line."""

from open_lm.config.command_line import add_model_args, parse_args

__all__ = ["add_model_args", "parse_args"]
