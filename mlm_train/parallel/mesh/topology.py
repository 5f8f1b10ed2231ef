"""The layout of ranks: one frozen object, created and validated without processes."""

from dataclasses import dataclass, replace

from mlm_train.config import Config, ParallelConfig, TrainConfig
from mlm_train.config.parallel import INTERLEAVED
from mlm_train.config.section import reject
from mlm_train.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel axes and this rank's position; tensor varies fastest, then data, then pipeline.

    That is megatron-core's order: neighbouring ranks, on one node, shard a layer.
    """

    world: int
    rank: int
    tensor: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int, rank: int = 0) -> "Topology":
        """The layout of `world` ranks. Raises UserError where tensor x pipeline does not divide it."""
        model_ranks = parallel.tensor * parallel.pipeline
        if world % model_ranks:
            fewer, more = world // model_ranks * model_ranks, (world // model_ranks + 1) * model_ranks
            raise UserError(
                f"{world} processes cannot hold parallel.tensor={parallel.tensor} x "
                f"parallel.pipeline={parallel.pipeline}: start {f'{fewer} or ' if fewer else ''}{more}"
            )
        parallel.sharding(world // model_ranks)
        return cls(world, rank, parallel.tensor, parallel.pipeline)

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Rank in the data-parallel group: which part of the global batch this rank trains on."""
        return self.rank // self.tensor % self.data

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage: data x tensor."""
        return self.tensor * self.data

    @property
    def stage_rank(self) -> int:
        """Rank among those of the stage."""
        return self.rank % self.stage_ranks

    @property
    def pipeline_rank(self) -> int:
        """Rank in the pipeline group."""
        return self.rank // self.stage_ranks

    @property
    def is_replica_rank_0(self) -> bool:
        """Whether this is the first of the ranks that hold one replica of the model."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    def along_pipeline(self) -> "list[Topology]":
        """The topology of the first rank of each pipeline rank."""
        return [replace(self, rank=stage * self.tensor * self.data) for stage in range(self.pipeline)]

    def micro_batches(self, train: TrainConfig) -> int:
        """Micro-batches per step on each data-parallel rank, after the batch-size warm-up."""
        return train.global_batch_size // (train.micro_batch_size * self.data)

    def check_batch(self, config: Config) -> None:
        """Raise UserError for a global batch that the data-parallel ranks cannot split evenly, or that the
        pipeline schedule cannot run.
        """
        train = config.train
        unit = train.micro_batch_size * self.data
        sizes = {"train.global_batch_size": train.global_batch_size}
        if (warmup := train.batch_size_warmup) is not None:
            sizes |= {
                "train.batch_size_warmup.start": warmup.start,
                "train.batch_size_warmup.increment": warmup.increment,
            }
        for name, value in sizes.items():
            if value % unit:
                nearest = max(unit, round(value / unit) * unit)
                reject(
                    name,
                    value,
                    f"must be a multiple of train.micro_batch_size={train.micro_batch_size} x "
                    f"{self.data} data-parallel processes = {unit}; the nearest is {nearest}",
                )
        if self.pipeline > 1:
            self._check_schedule(config)

    def _check_schedule(self, config: Config) -> None:
        """Raise UserError for numbers of micro-batches that torch's pipeline schedule cannot run."""
        train, schedule = config.train, config.parallel.order
        sizes = [train.global_batch_size]
        if (warmup := train.batch_size_warmup) is not None:
            sizes += range(warmup.start, train.global_batch_size, warmup.increment)
        unit = train.micro_batch_size * self.data
        for size in sizes:
            if supports(schedule, size // unit, self.pipeline):
                continue
            near = sorted(range(1, 2 * size // unit + 2 * self.pipeline), key=lambda n: abs(n - size // unit))
            nearest = next(n for n in near if supports(schedule, n, self.pipeline)) * unit
            reject(
                "train.global_batch_size" if size == train.global_batch_size else "train.batch_size_warmup",
                size,
                f"gives {size // unit} micro-batches, which parallel.pipeline_schedule={schedule} cannot "
                f"run with parallel.pipeline={self.pipeline}; the nearest batch size it can run is {nearest}",
            )


def supports(schedule: str, micro_batches: int, pipeline: int) -> bool:
    """Whether a schedule can run this number of micro-batches on `pipeline` ranks."""
    if schedule == "1f1b":
        return micro_batches >= pipeline
    if schedule in INTERLEAVED:
        return micro_batches % max(1, micro_batches // pipeline) == 0
    if schedule == "dualpipe_v":
        return micro_batches >= 2 * pipeline
    return True
