"""Public import path `open_lm.file_utils`; the code is in open_lm.utils.file_utils."""

from open_lm.utils.file_utils import check_exists, get_metadata_file, get_string_for_epoch, pt_load

__all__ = ["check_exists", "get_metadata_file", "get_string_for_epoch", "pt_load"]
