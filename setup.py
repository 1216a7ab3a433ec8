"""The distribution `open_lm`: trainer, preprocessor and model configurations."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    """Return the lower bounds in requirements/NAME.in, from which the pinned .txt files are compiled."""
    lines = (ROOT / "requirements" / f"{name}.in").read_text().split("\n")
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


FEATURES = ("train", "preprocess", "hf", "hub", "finetune", "lm-eval", "report", "release", "scaling")
extras = {name: requirements(name) for name in (*FEATURES, "s3fs", "cuda", "notebooks", "dev", "eval")}
extras["all"] = sorted({line for name in FEATURES for line in extras[name]})

setup(
    name="open_lm",
    version="1.0.0",
    description="Language models of 11M to 7B parameters: raw text in, an evaluated and openly released model out",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The OpenLM authors",
    keywords=["language model", "pretraining", "fine-tuning", "evaluation", "FSDP", "webdataset", "PyTorch"],
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="MIT",
    license_files=["LICENSE"],
    packages=find_namespace_packages(include=["open_lm", "open_lm.*"], exclude=["*__pycache__*"]),
    package_data={"": ["*"]},  # templates, recipes, sources of kernels, …: every file of the package
    exclude_package_data={"": ["*.pyc"]},
    entry_points={"console_scripts": ["open-lm = open_lm.cli.main:main"]},
    python_requires=">=3.10,<3.14",
    install_requires=requirements("core"),
    extras_require=extras,
)
