"""Config section `memory`, and its checks against the rest."""

from typing import Literal

from pydantic import Field

from mlm_train.config.choices import MemoryMode
from mlm_train.config.parallel import ZERO_BUBBLE, ParallelConfig
from mlm_train.config.section import Section, reject

Placement = Literal["replicated", "shared", "owned"]


class MemoryConfig(Section):
    """How FFN-M is executed in training."""

    mode: MemoryMode = Field(
        "auto",
        description="per_token: at every position, as in the paper. unique: once per distinct token of a "
        "micro-batch. table: once per distinct token of a step. All give the same gradients. auto: the "
        "fastest one, measured at the start of a run. Or a class of yours: package.module:Name "
        "(docs/extending.md)",
    )
    budget_gib: float | None = Field(
        None,
        gt=0,
        description="with mode=auto: GiB per rank for tables and kept activations; layers beyond it are "
        "computed as with mode=unique (default: four fifths of the memory that is free at the start, less "
        "the planned weights, gradients, optimizer and activations)",
    )
    placement: Placement | None = Field(
        None,
        description="with mode=table: which ranks compute FFN-M's rows. replicated (default): each those of "
        "its own tokens. shared: the data-parallel ranks split the rows, so that each is computed once. "
        "owned (engine=fsdp): each layer's FFN-M lies on few ranks of its stage, and rows travel instead of "
        "weights and gradients",
    )
    gradient_rows: Literal["fp32", "bf16"] | None = Field(
        None,
        description="with placement=owned and train.precision=bf16: in which the gradients of rows travel to "
        "their owners; default fp32",
    )
    table_layers: int | None = Field(
        None,
        ge=1,
        description="with mode=table: the first so many layers of a rank have a table; the others are "
        "computed as with mode=unique (default: all)",
    )
    kept_layers: int | None = Field(
        None,
        ge=1,
        description="with mode=table: the first so many layers of a rank keep FFN-M's activations of the "
        "step's distinct tokens until its end; the others recompute them (default: none)",
    )

    @property
    def shared(self) -> bool:
        """Whether the data-parallel ranks compute rows for each other."""
        return self.placement == "shared"

    @property
    def owned(self) -> bool:
        """Whether FFN-M's tabled layers lie on few ranks each."""
        return self.placement == "owned"

    def tabled(self, layers: int) -> int:
        """How many of a rank's `layers` layers have a table."""
        return min(layers, self.table_layers or layers) if self.mode == "table" else 0

    def kept(self, layers: int) -> int:
        """How many of a rank's `layers` layers keep their table's activations."""
        return min(self.tabled(layers), self.kept_layers or 0)


OF_TABLES = ("placement", "gradient_rows", "table_layers", "kept_layers")


def check_memory(memory: MemoryConfig, parallel: ParallelConfig, precision: str) -> None:
    """Raise UserError for fields that do not go together, or with the layout or train.precision."""
    if memory.mode != "auto" and memory.budget_gib is not None:
        fix = f"has an effect only with memory.mode=auto, not {memory.mode}"
        reject("memory.budget_gib", memory.budget_gib, fix)
    if memory.mode != "table":
        for field in OF_TABLES:
            if value := getattr(memory, field):
                reject(f"memory.{field}", value, f"has no effect with memory.mode={memory.mode}")
        return
    if parallel.zero == 3:
        fix = (
            "is incompatible with parallel.zero_stage=3, which has weights only during a layer's "
            "forward: use unique, or parallel.zero_stage=1"
        )
        reject("memory.mode", "table", fix)
    if memory.owned and parallel.engine != "fsdp":
        fix = f"is incompatible with parallel.engine={parallel.engine}: set parallel.engine=fsdp, or "
        reject("memory.placement", memory.placement, fix + "memory.placement=shared")
    if memory.gradient_rows == "bf16" and not (memory.owned and precision == "bf16"):
        fix = "has an effect only with memory.placement=owned and train.precision=bf16"
        reject("memory.gradient_rows", memory.gradient_rows, fix)
    if memory.table_layers is not None and parallel.order in ZERO_BUBBLE:
        fix = (
            f"is incompatible with parallel.pipeline_schedule={parallel.order}, where layers "
            "without a table need relay: leave it out"
        )
        reject("memory.table_layers", memory.table_layers, fix)
