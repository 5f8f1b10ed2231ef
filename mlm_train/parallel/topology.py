"""How ranks are laid out. One frozen object, made and validated without processes."""

from dataclasses import dataclass

from mlm_train.config import Config, ParallelConfig
from mlm_train.config.section import blame
from mlm_train.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes and this rank's place; tensor runs fastest, then data, then pipeline.

    That is megatron-core's order: neighbours in a node share a layer.
    """

    world: int
    rank: int
    tensor: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int, rank: int = 0) -> "Topology":
        """The layout of a world. Raises UserError where the axes do not fit it."""
        model_ranks = parallel.tensor * parallel.pipeline
        if world % model_ranks:
            raise UserError(
                f"{world} processes cannot hold parallel.tensor={parallel.tensor} x "
                f"parallel.pipeline={parallel.pipeline}: start a multiple of {model_ranks}"
            )
        return cls(world, rank, parallel.tensor, parallel.pipeline)

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        """Place in the group that shares each layer."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank trains on."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Which stage this rank holds."""
        return self.rank // (self.tensor * self.data)

    def check_batch(self, config: Config) -> None:
        """Refuse a global batch that the data-parallel ranks cannot share evenly."""
        train = config.train
        unit = train.micro_batch * self.data
        sizes = {"train.global_batch": train.global_batch}
        if train.ramp is not None:
            sizes |= {"train.ramp.start": train.ramp.start, "train.ramp.increment": train.ramp.increment}
        for name, value in sizes.items():
            if value % unit:
                nearest = max(unit, round(value / unit) * unit)
                blame(
                    name,
                    value,
                    f"must be a multiple of train.micro_batch={train.micro_batch} x "
                    f"{self.data} data-parallel processes = {unit}; the nearest is {nearest}",
                )
