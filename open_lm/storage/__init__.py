"""Read and write local and remote files with one set of functions; see open_lm.storage.files."""

from open_lm.storage.files import *  # noqa: F403 - files.__all__ lists the functions
