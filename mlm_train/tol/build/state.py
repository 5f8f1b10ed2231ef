"""An unfinished build: what was asked for, and what is committed. tol.build.json, next to the partitions."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from mlm_train.errors import UserError
from mlm_train.tol.format.index import BASIS, STATE, Partition, TableFile
from mlm_train.tol.format.index_file import is_whole
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.schemes import PlainDtype
from mlm_train.tol.storage.base import Storage, refuse_used, remove_drafts, remove_matching
from mlm_train.utils.files import json_text
from mlm_train.utils.records import SEAL, Record, json_value, seal_of

SPECTRA = ".spectrum-{}.safetensors"  # of a layer, which an unfinished build keeps


class BuildPlan(Record):
    """All that the partitions' bytes depend on; an unfinished folder is resumed only by an equal plan."""

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

    @property
    def layers(self) -> list[int]:
        """The layers that are kept."""
        kept = self.spec.layers
        return list(range(self.num_layers)) if kept is None else kept

    def rows(self, number: int) -> tuple[int, int]:
        """The range of a partition: whole chunks, where there are enough; else single rows are shared out.

        The matrix products of a library are tuned for round sizes: on a Xeon with AMX those of 2,048 rows
        take two thirds of the time, a row, of those of 1,248 (docs/tol.md).
        """
        chunks = -(-self.vocab_size // self.chunk_rows)
        unit, count = (self.chunk_rows, chunks) if chunks >= self.partitions else (1, self.vocab_size)
        first, last = (i * count // self.partitions * unit for i in (number, number + 1))
        return first, min(last, self.vocab_size)

    def file(self, number: int) -> str:
        """The name of a partition."""
        return f"rows-{number:05d}-of-{self.partitions:05d}.safetensors"


class BuildState(BaseModel):
    """tol.build.json: exists while a build is unfinished; it carries a checksum of itself.

    spectra: of layers, until the layout is known. done: committed partitions by number; sums: for each of
    them and each layer the squared error and the squared norm of its numbers.
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
        """Partitions still to be made, ascending."""
        return [number for number in range(self.plan.partitions) if number not in self.done]

    def bytes(self, number: int) -> int:
        """Of a partition's file, once the layout is known."""
        assert self.layout is not None
        start, stop = self.plan.rows(number)
        return self.layout.shape.file_bytes(stop - start)

    def save(self, storage: Storage) -> None:
        """Commit: what it names is never made again."""
        tree = self.model_dump(mode="json", by_alias=True)
        storage.write(STATE, json_text(tree | {SEAL: seal_of(tree)}).encode())

    @classmethod
    def load(cls, storage: Storage) -> Self | None:
        """What `save` wrote, None where nothing did; UserError where it was changed since."""
        if (data := storage.read(STATE)) is None:
            return None
        try:
            tree = json_value(data)
            if not isinstance(tree, dict) or tree.pop(SEAL, None) != seal_of(tree):
                raise ValueError("its checksum differs")
            return cls.model_validate(tree)
        except (ValueError, UserError):
            raise UserError(f"{storage.at(STATE)} is damaged; remove {storage} and build again") from None


def begin(storage: Storage, plan: BuildPlan) -> BuildState:
    """The state to go on from, saved. Committed files are looked at again; damaged ones are dropped.

    Raises UserError for a place with other contents, and one with partitions of another plan.
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
    """The unfinished build there; None, and nothing of it left, when it never committed anything."""
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
                words = [f"no {name}" if one is None else f"{name}={one}" for one in (before, now)]
                raise UserError(
                    f"{storage} is an unfinished build with {words[0]}, not {words[1]}: "
                    "ask for the same again"
                )
    spectra = {layer: one for layer, one in state.spectra.items() if is_whole(storage, one)}
    # To read all rows back from a URL would take as long as building them.
    whole = {n: part for n, part in state.done.items() if is_whole(storage, part, by_size=storage.far)}
    if state.basis is not None and not is_whole(storage, state.basis):
        # Another basis may differ in its last bits: rows of the old one are of no use with it.
        return state.model_copy(update={"layout": None, "basis": None, "done": {}, "sums": {}})
    return state.model_copy(update={"spectra": spectra, "done": whole})


def spectrum_name(layer: int) -> str:
    """The file with a layer's spectrum."""
    return SPECTRA.format(f"{layer:05d}")


def remove_spectra(storage: Storage) -> None:
    """Those of layers whose ranks are chosen, or of another plan, are of no use any more."""
    remove_matching(storage, SPECTRA.format("*"))
