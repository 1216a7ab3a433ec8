"""Every setting of a run: sections, checks, command line, model architecture files. Imports no torch."""
