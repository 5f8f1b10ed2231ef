"""Packaging of mlm_train. The pins live in requirements.txt, shared with the Makefile."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def pins(name: str) -> list[str]:
    """The requirement lines of a file: comments, blanks and includes left out."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(("#", "-"))]


setup(
    name="mlm-train",
    version="0.1.0",
    description="Distributed pretraining of MemoryLLM: feed-forward memory that can be looked up",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["mlm_train", "mlm_train.*"]),
    install_requires=pins("requirements.txt"),
    extras_require={"dev": pins("requirements-dev.txt"), "wandb": pins("requirements-wandb.txt")},
    entry_points={"console_scripts": ["mlm-train = mlm_train.__main__:main"]},
)
