"""OpenLM: preprocess text, and train and evaluate language models."""


def __getattr__(name: str) -> str:
    """Return `__version__`, the version of the installed distribution; it is read when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        return version("open_lm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
