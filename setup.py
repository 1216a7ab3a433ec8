"""The distribution `open_lm`: the trainer, the preprocessor (open_lm.datapreprocess) and the model configurations."""

from setuptools import find_namespace_packages, setup

setup(
    name="open_lm",
    version="1.0.0",
    packages=find_namespace_packages(include=["open_lm", "open_lm.*"]),
    package_data={"open_lm.model_configs": ["*.json"]},
    python_requires=">=3.10",
)
