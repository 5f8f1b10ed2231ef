"""Building a table with the defaults that most tests use."""

from pathlib import Path

from mlm_train.tol.build.builder import CHUNK_ROWS, Build
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import PlainDtype


def build_tol(
    model: str | Path,
    output: str | Path,
    dtype: PlainDtype = "bfloat16",
    partitions: int | None = None,
    workers: int = 2,
    ray_address: str | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> TolIndex:
    """Build the ToL of an export in a plain type, computed in fp32."""
    spec = TableSpec(dtype=dtype)
    build = Build(model, output, spec, partitions=partitions, compute="float32", chunk_rows=chunk_rows)
    return build.run(workers, ray_address)
