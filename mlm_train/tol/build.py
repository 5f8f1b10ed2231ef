"""Building a ToL on Ray: a task for each range of the vocabulary, resumable after any death."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train import __version__
from mlm_train.checkpoint.hf_folder import fingerprint, open_tensors, read_config
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.files import writing
from mlm_train.model.counts import count_parameters
from mlm_train.ownership import owned
from mlm_train.tol.cluster import ray_cluster
from mlm_train.tol.compute import (
    EMBEDDING,
    chunks_of,
    ffn_m_blocks,
    ffn_m_weights,
    from_numpy,
    table_rows,
    to_numpy,
)
from mlm_train.tol.format import (
    TORCH_DTYPE,
    Partition,
    PlainDtype,
    Source,
    TolIndex,
    draft_pattern,
    partition_bytes,
    write_index,
    write_partition,
)
from mlm_train.tol.progress import ByteProgress
from mlm_train.tol.state import STATE, Plan, State, begin, remove_drafts

CHUNK_ROWS = 2048
_PARTITION_BYTES = 512 * 2**20
_LEAST_PARTITIONS = 8
_ATTEMPTS = 4


def build_tol(
    model: str | Path,
    output: str | Path,
    dtype: PlainDtype = "bfloat16",
    partitions: int | None = None,
    workers: int = 2,
    ray_address: str | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> TolIndex:
    """Write the ToL of an export into a folder, or finish an unfinished one of the same plan.

    FFN-M is computed in fp32 by one thread a worker, `chunk_rows` rows at once, and stored as `dtype`.
    A partition's bytes depend on the plan alone. Raises UserError for a model without FFN-M, weights
    that are not finite, a folder in use, too many partitions, and too little space.
    """
    model, output = Path(model).absolute(), Path(output).absolute()
    config = read_config(model)
    if not config.has_memory:
        raise UserError(f"{model} is a base model and has no FFN-M; give a memory or flex export")
    with open_tensors(model) as tensors:
        tensors.check(config)
    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    plan = _plan(config, fingerprint(model), dtype, partitions, chunk_rows)
    with writing(output), owned(output, "being built"):
        state = begin(output, plan)
        _check_space(output, sum(map(plan.bytes, state.missing)))
        if state.missing:
            shared = 4 * count_parameters(config).ffn_m
            with ray_cluster(min(workers, len(state.missing)), ray_address, shared):
                _run(model, config, output, state, workers)
        return _commit(output, state)


def _plan(
    config: ModelConfig, checkpoint: str, dtype: PlainDtype, partitions: int | None, chunk_rows: int
) -> Plan:
    vocab, layers, hidden = config.vocab_size, config.num_hidden_layers, config.hidden_size
    if partitions is None:
        total = partition_bytes(vocab, layers, hidden, TORCH_DTYPE[dtype])
        # Not a function of the workers, so that any number of them can resume and gives the same files.
        partitions = min(vocab, max(_LEAST_PARTITIONS, -(-total // _PARTITION_BYTES)))
    if not 1 <= partitions <= vocab:
        raise UserError(f"--partitions {partitions}: give 1 to {vocab} (the vocabulary)")
    return Plan(
        checkpoint=checkpoint,
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        dtype=dtype,
        partitions=partitions,
        chunk_rows=chunk_rows,
    )


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB free; choose another folder"
        )


def _run(model: Path, config: ModelConfig, output: Path, state: State, workers: int) -> None:
    """Keep `workers` tasks under way until every missing partition is committed."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    plan = state.plan
    with open_tensors(model) as tensors:
        weights = [ray.put(to_numpy(layer)) for layer in ffn_m_weights(tensors, config)]
    # retry_exceptions stays off: a lost worker is tried again, an error in the data is not.
    task = ray.remote(num_cpus=1, max_retries=_ATTEMPTS - 1)(_build_partition)
    waiting = state.missing[::-1]
    running: dict[Any, int] = {}
    with ByteProgress("rows", sum(map(plan.bytes, range(plan.partitions)))) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    number = waiting.pop()
                    running[task.remote(str(model), config, str(output), plan, number, weights)] = number
                ready, _ = ray.wait(list(running), timeout=0.5)
                for reference in ready:
                    number = running.pop(reference)
                    state.done[number] = ray.get(reference)
                    state.save(output)
                progress.show(_bytes_so_far(output, state, running.values()))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error.cause, OSError):
                raise error.cause from error
            raise
        except RayError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"a worker died {_ATTEMPTS} times ({reason}); give it memory or fewer --workers "
                "and run again: finished partitions are kept"
            ) from error
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _bytes_so_far(output: Path, state: State, running: Any) -> int:
    """Committed bytes, and those that running tasks have written."""
    total = sum(partition.bytes for partition in state.done.values())
    for number in running:
        drafts = output.glob(draft_pattern(state.plan.file(number)))
        total += max((_size(draft) for draft in drafts), default=0)
    return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed meanwhile
        return 0


def _build_partition(
    model: str, config: ModelConfig, output: str, plan: Plan, number: int, weights: list[Any]
) -> Partition:
    """The Ray task: compute and write one partition. `weights`: a reference a layer, shared on a node."""
    import ray

    torch.set_num_threads(1)
    blocks = ffn_m_blocks(config, [from_numpy(arrays) for arrays in ray.get(weights)])
    start, stop = plan.rows(number)
    dtype = TORCH_DTYPE[plan.dtype]

    def compute() -> Iterator[Tensor]:
        with open_tensors(model) as tensors:
            for first, last in chunks_of(start, stop, plan.chunk_rows):
                rows = table_rows(blocks, tensors.rows(EMBEDDING, first, last).float(), dtype)
                _check_finite(rows, first, plan.dtype)
                yield rows

    path = Path(output) / plan.file(number)
    return write_partition(path, (start, stop), plan.num_layers, plan.hidden_size, dtype, compute())


def _check_finite(rows: Tensor, first: int, dtype: str) -> None:
    if rows.isfinite().all():
        return
    token, layer, _ = (~rows.isfinite()).nonzero()[0].tolist()
    advice = "build with --dtype bfloat16" if dtype == "float16" else "the embedding has NaN: train again"
    raise UserError(f"FFN-M of token {first + token} in layer {layer} is not finite in {dtype}; {advice}")


def _commit(output: Path, state: State) -> TolIndex:
    """Write the index, the last file; then the state goes."""
    plan = state.plan
    remove_drafts(output)
    index = TolIndex(
        vocab_size=plan.vocab_size,
        num_layers=plan.num_layers,
        hidden_size=plan.hidden_size,
        dtype=plan.dtype,
        layers=list(range(plan.num_layers)),
        partitions=[state.done[number] for number in range(plan.partitions)],
        source=Source(
            checkpoint=plan.checkpoint,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
        ),
    )
    write_index(output, index)
    (output / STATE).unlink()
    return index
