"""Models trained on real text and their tables, for vLLM's tests; run by the Python that trains.

usage: .venv/bin/python -m tests.vllm.prepare FOLDER
"""

import sys
from pathlib import Path

from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import Scheme
from tests.commands import mlm_train
from tests.vllm.conftest import MODELS, TABLES

SHAPE = (
    "model.vocab_size=512", "model.hidden_size=128", "model.num_hidden_layers=4",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.intermediate_size=256",
    "model.max_position_embeddings=640", "data.sequence_length=128", "train.steps=60",
    "train.micro_batch_size=16", "train.precision=fp32", "train.eval_interval=1000", "checkpoint.interval=60",
)  # fmt: skip
MIXED = [
    Scheme(dtype="int4", group_size=8, symmetric=False),
    Scheme(dtype="float16", rank=60),
    Scheme(dtype="int8", group_size=16),
    Scheme(dtype="int8", group_size=16, rank=100),
]
SPECS = {
    "bfloat16": TableSpec(dtype="bfloat16"),
    "float16": TableSpec(dtype="float16"),
    "int8": TableSpec(dtype="int8", group_size=64),
    "int4": TableSpec(dtype="int4", group_size=32),
    "rank": TableSpec(dtype="bfloat16", rank=90),
    "mixed": TableSpec(schemes=MIXED),
    "dropped": TableSpec(dtype="int8", group_size=16, layers=[0, 3]),
}
assert tuple(SPECS) == TABLES


def main(folder: Path) -> None:
    """Train, export, build."""
    mlm_train("data", "collect", "--output", folder / "text", "--max-bytes", "2MB")
    data = folder / "data"
    mlm_train("data", "prepare", "--input", folder / "text", "--output", data, "--tokenizer", "train:512")
    for name, fields in MODELS.items():
        run, model = folder / f"run {name}", [f"model.{field}" for field in fields]
        given = (f"data.path={data}", f"train.output={run}", *SHAPE, *model)
        mlm_train("pretrain", "configs/micro.yaml", *given)
        mlm_train("export", run, "--output", folder / name)
    with ray_cluster(workers=1):
        for name in MODELS.keys() - {"base"}:
            Build(folder / name, folder / f"{name}-tol", TableSpec(dtype="float32"), partitions=3).run(1)
        for name, spec in SPECS.items():
            Build(folder / "flex", folder / f"flex-tol-{name}", spec, partitions=2).run(1)
    patch = ["tol", "patch", "create", folder / "flex-tol", "--output", folder / "patch.safetensors"]
    mlm_train(*patch, "--scale", *(f"{token}=-3" for token in range(400, 450)))  # frequent ones


if __name__ == "__main__":
    main(Path(sys.argv[1]))
