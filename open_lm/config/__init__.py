"""Settings: flags, their checks, the command line, registries and model configuration files. Imports no torch."""
