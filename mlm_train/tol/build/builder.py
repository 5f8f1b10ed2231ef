"""Building a ToL on Ray: a task is a range of rows and a group of layers; resumable after any crash."""

import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from mlm_train import __version__
from mlm_train.checkpoint.reading.logical_folder import OpenedModel, open_model
from mlm_train.config import ModelConfig
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.tol.build.budget import bases_of, check_budget, has_ranks, lay_out, warn_dropped
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.build.row_source import EMBEDDING
from mlm_train.tol.build.row_weights import row_weights_of
from mlm_train.tol.build.scheduler import Group, PartitionScheduler
from mlm_train.tol.build.spectra import compute_spectra, rank_errors_of
from mlm_train.tol.build.state import BuildPlan, BuildState, remove_spectra, start_or_resume
from mlm_train.tol.build.weight_store import Weights, shared_weights
from mlm_train.tol.build.worker import WorkerJob
from mlm_train.tol.build.worker_pool import WorkerPool
from mlm_train.tol.format.codec import TORCH_DTYPE
from mlm_train.tol.format.index import INDEX, STATE, Partition, TolIndex, schemes_of, summary
from mlm_train.tol.format.index_file import index_at, is_intact, read_index, write_index
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.schemes import PlainDtype
from mlm_train.tol.serve.reader import check_rows, write_bases
from mlm_train.tol.storage.base import Storage, check_space, remove_drafts
from mlm_train.tol.storage.resolve import storage_at
from mlm_train.utils.checks import Check
from mlm_train.utils.files import sha256_of
from mlm_train.utils.progress import ByteProgress
from mlm_train.utils.signals import held

CHUNK_ROWS = 2048
GROUP_BYTES = 2 * 2**30
_BUFFER_BYTES = 256 * 2**20  # of a chunk's rows; two per worker
_TASKS = 8  # per worker, at least, so that all workers end at about the same time
_PARTITION_BYTES = 512 * 2**20
_MIN_PARTITIONS = 8
_SOURCE = ("checkpoint", "table", "compute", "text")
_DEVICES = ("cpu", "cuda", "cuda:0")


Committed = Callable[[BuildState], None]


class Build:
    """Builds a table from a model's FFN-M, or with `table` from the rows of a ToL.

    output: a folder or URL that all workers see under that name, or a Storage. group_bytes: weights of the
    layers that a worker holds at once, at least one layer. If it holds all layers, which sequential writing
    requires, a partition is written and hashed while it is computed; filled group by group, it is read again.
    verify: how much of the model's files is checked. with_embeddings: rows hold x0 too, in the type of the
    weights; a table that is compressed keeps it. text: low rank has the least error over the tokens of its
    training split, as often as each occurs there, instead of over the rows of the vocabulary.
    """

    def __init__(
        self,
        model: str | Path | None,
        output: str | Path | Storage,
        spec: TableSpec,
        *,
        table: str | Path | None = None,
        partitions: int | None = None,
        compute: PlainDtype | Literal["auto"] = "auto",
        chunk_rows: int = CHUNK_ROWS,
        threads: int = 1,
        device: str = "cpu",
        group_bytes: int = GROUP_BYTES,
        verify: Check = "full",
        with_embeddings: bool = False,
        text: PreparedData | None = None,
    ) -> None:
        if threads < 1:
            raise UserError(f"--threads {threads}: give at least 1")
        if device not in _DEVICES:
            raise UserError(
                f"--device {device or repr('')}: give cpu or cuda (Ray assigns each worker its own GPU)"
            )
        self.storage, self.group_bytes = storage_at(output), group_bytes
        self.config: ModelConfig | None = None
        if table is None:
            assert model is not None
            with open_model(Path(model).absolute(), needs_ffn_m=True, verify=verify) as opened:
                folder, self.config = opened.path, opened.config
                checkpoint, own = opened.fingerprint, compute_of(opened)
                embedding = embedding_of(opened) if with_embeddings else None
            source: dict[str, Any] = {
                "checkpoint": checkpoint,
                "vocab_size": self.config.vocab_size,
                "num_layers": self.config.num_hidden_layers,
                "hidden_size": self.config.hidden_size,
                "compute": own if compute == "auto" else compute,
                "chunk_rows": chunk_rows,
            }
        else:
            index, folder = read_index(table), Path(table).absolute()
            embedding = index.embedding_dtype
            source = {name: getattr(index, name) for name in ("vocab_size", "num_layers", "hidden_size")}
            source |= {"checkpoint": index.source.checkpoint, "table": sha256_of(folder / INDEX)}
            source |= {"compute": index.source.compute, "chunk_rows": chunk_rows}
            if spec.layers is None:
                spec = spec.model_copy(update={"layers": index.layers})
        spec = spec.model_copy(update={"embedding": embedding})
        largest = spec.largest(source["num_layers"], source["hidden_size"])
        size = largest.shape.file_bytes(source["vocab_size"])
        count = partitions_of(partitions, source["vocab_size"], min(size, spec.budget or size))
        weighing = None if text is None else row_weights_of(text, source["vocab_size"], spec)
        fingerprint = None if text is None else text.manifest.fingerprint
        self.plan = BuildPlan(**source, spec=spec, partitions=count, threads=threads, text=fingerprint)
        check_budget(self.plan)
        origin = {"model": None, "table": str(folder)} if table else {"model": str(folder), "table": None}
        self.job = WorkerJob(
            **origin, output=self.storage.address, plan=self.plan, device=device, row_weights=weighing
        )

    def run(self, workers: int = 2, ray_address: str | None = None) -> TolIndex:
        """Build the table, or resume an unfinished build of the same plan.

        Raises UserError if the storage is in use, unreachable or too small, and for values that the type
        cannot hold.
        """
        _check_workers(workers)
        with self.storage.locked("being built"):
            state = start_or_resume(self.storage, self.plan)
            if state.layout is None and not has_ranks(self.plan.spec):
                state.layout = lay_out(self.plan)
            if state.layout is not None:
                check_space(self.storage, sum(map(state.bytes, state.missing)))
            if state.layout is None or state.missing:
                self._work(state, workers, ray_address, lambda state: state.save(self.storage))
            with held():
                return self._commit(state)

    def finished(self) -> TolIndex | None:
        """The index if this build is finished, else None. UserError for a missing file or another table."""
        if self.storage.read(INDEX) is None or self.storage.read(STATE) is not None:
            return None
        index, plan = index_at(self.storage), self.plan
        same = all(getattr(index.source, name) == getattr(plan, name) for name in _SOURCE)
        schemes, spec = schemes_of(index.fields), plan.spec
        same &= (len(index.partitions), index.embedding_dtype) == (plan.partitions, spec.embedding)
        if spec.budget is None:
            layout = lay_out(plan)
            same &= (index.layers, schemes) == (layout.layers, layout.schemes)
        else:  # the ranks within a budget depend on the weights
            same &= {scheme.model_copy(update={"rank": None}) for scheme in schemes} <= set(spec.searched)
            same &= set(index.layers) <= set(plan.layers) and index.bytes <= spec.budget
        if not same:
            raise UserError(f"{self.storage} holds another table; name a new folder, or remove it")
        for file in index.files:
            if not is_intact(self.storage, file, by_size=True):
                raise UserError(
                    f"{self.storage.at(file.file)}, of a finished table, is missing or damaged: "
                    f"repair it with {index.repair}"
                )
        return index

    def repair(self, workers: int = 2, ray_address: str | None = None) -> list[Partition]:
        """Rebuild the damaged partitions of a finished table, and return them.

        For a build from `like_index`. Raises UserError for a damaged basis, without which rows of low rank
        cannot be rebuilt.
        """
        _check_workers(workers)
        with self.storage.locked("being built"):
            index = index_at(self.storage)
            if index.basis is not None and not is_intact(self.storage, index.basis):
                raise UserError(
                    f"{self.storage.at(index.basis.file)} is damaged: build the table again into a new folder"
                )
            layout = Layout(
                hidden_size=index.hidden_size,
                layers=index.layers,
                schemes=schemes_of(index.fields),
                embedding=index.embedding_dtype,
            )
            intact = {
                number: partition
                for number, partition in enumerate(index.partitions)
                if is_intact(self.storage, partition)
            }
            state = BuildState(plan=self.plan, layout=layout, basis=index.basis, done=dict(intact))
            if state.missing:
                # No state is saved: partitions that a killed repair has rebuilt are intact.
                self._work(state, workers, ray_address, lambda _: None)
            partitions = [state.done[number] for number in range(self.plan.partitions)]
            write_index(self.storage, index.model_copy(update={"partitions": partitions}))
            return [partition for number, partition in state.done.items() if number not in intact]

    @classmethod
    def like_index(
        cls,
        output: str | Path | Storage,
        model: str | Path | None,
        table: str | Path | None,
        device: str = "cpu",
    ) -> Self:
        """The build that wrote a finished table. UserError if it was built from another model or table."""
        output = storage_at(output)
        index = index_at(output)
        schemes = schemes_of(index.fields)
        spec = TableSpec(layers=index.layers, schemes=schemes)
        if index.encodings is None:
            spec = TableSpec(layers=index.layers, dtype=schemes[0].dtype)
        source = index.source
        build = cls(
            model,
            output,
            spec,
            table=table,
            partitions=len(index.partitions),
            compute=source.compute,
            chunk_rows=source.chunk_rows or CHUNK_ROWS,
            threads=source.threads,
            device=device,
            with_embeddings=index.embedding is not None,
        )
        if (build.plan.checkpoint, build.plan.table) != (source.checkpoint, source.table):
            raise UserError(f"{output} was not built from {model or table}; give what it was built from")
        ours = [(build.plan.file(n), build.plan.rows(n)) for n in range(build.plan.partitions)]
        if ours != [(partition.file, partition.rows) for partition in index.partitions]:
            raise UserError(f"{output} has partitions that this program does not write: build it again")
        return build

    def _check_source(self, state: BuildState, threads: int) -> None:
        """Check the rows that will be compressed; a model was checked when it was opened."""
        if self.job.table is not None:
            rows = [(0, self.plan.vocab_size)] if state.layout is None else map(self.plan.rows, state.missing)
            check_rows(self.job.table, rows, threads)

    def _work(self, state: BuildState, workers: int, ray_address: str | None, committed: Committed) -> None:
        """Do everything that needs Ray. committed: called after each partition."""
        self._check_source(state, workers)
        groups, threads = self.groups(len(state.missing), workers), self.plan.threads
        size = min(workers, len(state.missing) * len(groups))
        shared = self._weight_bytes() * len(self.plan.layers)
        try:
            with ray_cluster(size * threads, ray_address, shared), self.storage.served():
                pool = WorkerPool(self.job, size, threads, gpus=float(self.job.device.startswith("cuda")))
                try:
                    with shared_weights(self.job.model, self.plan, size * len(groups[0])) as weights:
                        if state.layout is None:
                            self._choose_layout(state, pool, weights)
                        self._fill(state, pool, weights, groups, committed)
                finally:
                    pool.shutdown()
        finally:
            with held():
                remove_drafts(self.storage)  # after an error, such as a full disk

    def _choose_layout(self, state: BuildState, pool: WorkerPool, weights: Weights) -> None:
        """Choose the ranks, write the bases, and commit both."""
        compute_spectra(pool, state, self.storage, weights)
        errors = [rank_errors_of(state, self.storage, layer).errors for layer in self.plan.layers]
        layout = lay_out(self.plan, errors)
        warn_dropped(self.plan.layers, layout)
        bases = bases_of(self.plan, layout, state, self.storage)
        state.basis = write_bases(self.storage, bases) if bases else None
        state.layout, state.spectra = layout, {}
        check_space(self.storage, sum(map(state.bytes, state.missing)))
        state.save(self.storage)
        remove_spectra(self.storage)

    def _weight_bytes(self) -> int:
        """Bytes of one layer of FFN-M; 0 if rows come from a table."""
        if self.config is None:
            return 0
        parameters = 3 * self.config.hidden_size * self.config.intermediate_size
        return parameters * TORCH_DTYPE[self.plan.compute].itemsize

    def groups(self, partitions: int, workers: int) -> list[Group]:
        """Groups of neighbouring layers: small enough for a worker's memory, and for enough tasks."""
        layers = self.plan.layers
        if self.storage.in_order:
            return [tuple(layers)]
        chunk = self.plan.chunk_rows * self.plan.hidden_size * TORCH_DTYPE[self.plan.compute].itemsize
        size = min(self.group_bytes // max(1, self._weight_bytes()), _BUFFER_BYTES // chunk)
        count = max(-(-len(layers) // max(1, size)), -(-_TASKS * workers // partitions))
        count = min(count, len(layers))
        edges = [i * len(layers) // count for i in range(count + 1)]
        return [tuple(layers[a:b]) for a, b in itertools.pairwise(edges)]

    def _fill(
        self, state: BuildState, pool: WorkerPool, weights: Weights, groups: list[Group], committed: Committed
    ) -> None:
        """Keep the workers busy until every missing partition is committed."""
        layout = state.layout
        assert layout is not None
        kept = [tuple(layer for layer in group if layer in layout.layers) for group in groups]
        groups = [group for group in kept if group]
        scheduler = PartitionScheduler(self.storage, self.plan, layout.shape, state.missing, groups)
        spans = {group: layout.span(group) for group in groups}
        sizes = {group: stop - start for group, (start, stop) in spans.items()}
        total = sum(state.bytes(number) for number in range(self.plan.partitions))
        with ByteProgress("rows", total) as progress:
            while state.missing:
                for worker in list(pool.idle):
                    task = scheduler.next(worker.group)
                    if task is None:
                        break
                    draft, basis = task.draft, state.basis
                    if task.layers is None:
                        pool.submit(worker, task, "hash", draft, task.number)
                        continue
                    worker.group = task.layers
                    shared = weights(task.layers)
                    pool.submit(worker, task, "fill", draft, task.number, task.layers, shared, layout, basis)
                for task, result in pool.finished():
                    if (done := scheduler.on_result(task, result)) is not None:
                        state.done[task.number], state.sums[task.number] = done
                        committed(state)
                finished = sum(partition.bytes for partition in state.done.values())
                progress.show(finished + scheduler.written(sizes))

    def _commit(self, state: BuildState) -> TolIndex:
        """Write the index, the last file, and remove the state."""
        plan, layout = self.plan, state.layout
        assert layout is not None
        remove_spectra(self.storage)  # a build that was killed right after it chose its layout left them
        index = TolIndex(
            vocab_size=plan.vocab_size,
            num_layers=plan.num_layers,
            hidden_size=plan.hidden_size,
            layers=layout.layers,
            encodings=None if layout.plain else layout.fields,
            embedding=layout.embedding_field,
            errors=None if layout.plain else _errors(state),
            basis=state.basis,
            partitions=[state.done[number] for number in range(plan.partitions)],
            source={
                "checkpoint": plan.checkpoint,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "tool_version": __version__,
                "table": plan.table,
                "compute": plan.compute,
                "chunk_rows": plan.chunk_rows,
                "threads": plan.threads,
                "text": plan.text,
            },
            **summary(layout.schemes),
        )
        write_index(self.storage, index)
        self.storage.remove(STATE)
        return index


def compute_of(model: OpenedModel) -> PlainDtype:
    """The type of a model's FFN-M matmuls: bfloat16 if its weights are, else float32."""
    stored = {model.dtype(name) for name in model.tensors.names() if "memory_mlp" in name}
    return "bfloat16" if stored == {"BF16"} else "float32"


def embedding_of(model: OpenedModel) -> PlainDtype:
    """The type that a model's embedding is stored in: its own. UserError where the head needs it anyway."""
    if model.config.tie_word_embeddings:
        raise UserError(
            f"--with-embeddings: {model.path} ties its embedding to its head, which needs it in memory: "
            "leave the option out"
        )
    stored: dict[str, PlainDtype] = {"BF16": "bfloat16", "F16": "float16"}
    return stored.get(model.dtype(EMBEDDING), "float32")


def _check_workers(count: int) -> None:
    if count < 1:
        raise UserError(f"--workers {count}: give at least 1")


def partitions_of(asked: int | None, vocab: int, size: int) -> int:
    """The number of partitions: `asked`, or by the table's bytes `size`. UserError beyond 1 to `vocab`.

    It does not depend on the number of workers, so that any number of them can resume the build.
    """
    if asked is None:
        asked = min(vocab, max(_MIN_PARTITIONS, -(-size // _PARTITION_BYTES)))
    if not 1 <= asked <= vocab:
        raise UserError(f"--partitions {asked}: give 1 to {vocab} (the vocabulary)")
    return asked


def _errors(state: BuildState) -> list[float | None]:
    """The relative error of each kept layer over all rows; None if it was not measured."""
    errors: list[float | None] = []
    sums = [state.sums[number] for number in range(state.plan.partitions)]  # in a fixed order
    for pairs in zip(*sums, strict=True):
        error, norm = (sum(pair[i] for pair in pairs) for i in (0, 1))
        errors.append((error / norm) ** 0.5 if norm else None)
    return errors
