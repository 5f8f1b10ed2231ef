"""The state of an unfinished build, tol.build.json: its plan, and what is committed."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from mlm_train.errors import UserError
from mlm_train.tol.format.index import BASIS, STATE, Partition, TableFile
from mlm_train.tol.format.index_file import is_intact
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.schemes import PlainDtype
from mlm_train.tol.storage.base import Storage, refuse_used, remove_drafts, remove_matching
from mlm_train.utils.files import json_text
from mlm_train.utils.records import SEAL, Record, json_value, seal_of

SPECTRA = ".spectrum-{}.safetensors"  # per layer, kept while a build is unfinished


class BuildPlan(Record):
    """Everything that the partitions' bytes depend on; a build is resumed only by an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    checkpoint: str
    table: str | None = None
    vocab_size: int
    num_layers: int
    hidden_size: int
    spec: TableSpec = Field(alias="storage")  # its name in the file
    partitions: int
    compute: PlainDtype
    chunk_rows: int
    threads: int
    text: str | None = None

    @property
    def layers(self) -> list[int]:
        """The kept layers."""
        kept = self.spec.layers
        return list(range(self.num_layers)) if kept is None else kept

    def rows(self, number: int) -> tuple[int, int]:
        """The row range [start, stop) of a partition: whole chunks, if there are enough of them.

        Matmul libraries are tuned for round sizes: on a Xeon with AMX 2,048 rows take two thirds of the time
        per row of 1,248 rows (docs/tol.md).
        """
        chunks = -(-self.vocab_size // self.chunk_rows)
        unit, count = (self.chunk_rows, chunks) if chunks >= self.partitions else (1, self.vocab_size)
        first, last = (i * count // self.partitions * unit for i in (number, number + 1))
        return first, min(last, self.vocab_size)

    def file(self, number: int) -> str:
        """The file name of a partition."""
        return f"rows-{number:05d}-of-{self.partitions:05d}.safetensors"


class BuildState(BaseModel):
    """tol.build.json: exists while a build is unfinished; it contains its own checksum.

    spectra: by layer, until the layout is known. done: committed partitions by number. sums: for each of them
    and each layer the squared error and the squared norm of its values.
    """

    model_config = ConfigDict(extra="forbid")
    plan: BuildPlan
    layout: Layout | None = None
    spectra: dict[int, TableFile] = Field(default_factory=dict)
    basis: TableFile | None = None
    done: dict[int, Partition] = Field(default_factory=dict)
    sums: dict[int, list[tuple[float, float]]] = Field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """Numbers of the partitions still to be built, ascending."""
        return [number for number in range(self.plan.partitions) if number not in self.done]

    def bytes(self, number: int) -> int:
        """Bytes of a partition's file, once the layout is known."""
        assert self.layout is not None
        start, stop = self.plan.rows(number)
        return self.layout.shape.file_bytes(stop - start)

    def save(self, storage: Storage) -> None:
        """Commit: the files that it names are not built again."""
        tree = self.model_dump(mode="json", by_alias=True)
        storage.write(STATE, json_text(tree | {SEAL: seal_of(tree)}).encode())

    @classmethod
    def load(cls, storage: Storage) -> Self | None:
        """Read what `save` wrote; None if there is nothing. UserError if it was changed since."""
        if (data := storage.read(STATE)) is None:
            return None
        try:
            tree = json_value(data)
            if not isinstance(tree, dict) or tree.pop(SEAL, None) != seal_of(tree):
                raise ValueError("its checksum differs")
            return cls.model_validate(tree)
        except (ValueError, UserError):
            raise UserError(f"{storage.at(STATE)} is damaged; remove {storage} and build again") from None


def start_or_resume(storage: Storage, plan: BuildPlan) -> BuildState:
    """Save and return the state to build from. Committed files are re-verified; damaged ones are dropped.

    Raises UserError for a storage with other contents, and for one with partitions of another plan.
    """
    state = BuildState.load(storage)
    if state is not None:
        state = _resumed(storage, plan, state)
    if state is None:
        refuse_used(storage, STATE)
        state = BuildState(plan=plan)
    state.save(storage)
    return state


def _resumed(storage: Storage, plan: BuildPlan, state: BuildState) -> BuildState | None:
    """The state of the unfinished build there; None, with its files removed, if it committed no partition."""
    remove_drafts(storage)
    if state.plan != plan and not state.done:
        remove_spectra(storage)
        for name in (*map(state.plan.file, state.missing), BASIS):
            storage.remove(name)
        storage.remove(STATE)
        return None
    if state.plan.checkpoint != plan.checkpoint:
        raise UserError(f"{storage} is an unfinished build of another model; give a new folder")
    if state.plan.table != plan.table:
        what = "build from a model" if state.plan.table is None else "compression of another table"
        raise UserError(f"{storage} is an unfinished {what}; give a new folder")
    for old, new in ((state.plan.spec, plan.spec), (state.plan, plan)):
        for name in type(old).model_fields:
            before, now = getattr(old, name), getattr(new, name)
            if before != now:
                old_value, new_value = (
                    f"no {name}" if value is None else f"{name}={value}" for value in (before, now)
                )
                raise UserError(
                    f"{storage} is an unfinished build with {old_value}, not {new_value}: "
                    "give the same options again, or a new folder"
                )
    spectra = {layer: file for layer, file in state.spectra.items() if is_intact(storage, file)}
    # Reading all rows back from a URL would take as long as building them.
    done = {n: part for n, part in state.done.items() if is_intact(storage, part, by_size=storage.remote)}
    if state.basis is not None and not is_intact(storage, state.basis):
        # A new basis may differ in its last bits: rows of the old one cannot be used with it.
        return state.model_copy(update={"layout": None, "basis": None, "done": {}, "sums": {}})
    return state.model_copy(update={"spectra": spectra, "done": done})


def spectrum_name(layer: int) -> str:
    """The file name of a layer's spectrum."""
    return SPECTRA.format(f"{layer:05d}")


def remove_spectra(storage: Storage) -> None:
    """Remove all spectra, once ranks are chosen or another plan starts."""
    remove_matching(storage, SPECTRA.format("*"))
