"""An unfinished build: what was asked for, and what is committed. tol.build.json, next to the partitions."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from mlm_train.errors import UserError
from mlm_train.tol.format.index import BASIS, STATE, File, Partition
from mlm_train.tol.format.index_file import is_whole
from mlm_train.tol.format.layout import Layout, Storage
from mlm_train.tol.format.schemes import PlainDtype
from mlm_train.tol.storage.base import Place, refuse_used, remove_drafts, remove_matching
from mlm_train.utils.files import json_text
from mlm_train.utils.records import SEAL, Record, json_value, seal_of

SPECTRA = ".spectrum-{}.safetensors"  # of a layer, which an unfinished build keeps


class Plan(Record):
    """All that the partitions' bytes depend on; an unfinished folder is resumed only by an equal plan."""

    checkpoint: str
    table: str | None = None
    vocab_size: int
    num_layers: int
    hidden_size: int
    storage: Storage
    partitions: int
    compute: PlainDtype
    chunk_rows: int
    threads: int

    @property
    def layers(self) -> list[int]:
        """The layers that are kept."""
        kept = self.storage.layers
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


class State(BaseModel):
    """tol.build.json: exists while a build is unfinished; it carries a checksum of itself.

    spectra: of layers, until the layout is known. done: committed partitions by number; sums: for each of
    them and each layer the squared error and the squared norm of its numbers.
    """

    model_config = ConfigDict(extra="forbid")
    plan: Plan
    layout: Layout | None = None
    spectra: dict[int, File] = Field(default_factory=dict)
    basis: File | None = None
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

    def save(self, place: Place) -> None:
        """Commit: what it names is never made again."""
        tree = self.model_dump(mode="json")
        place.write(STATE, json_text(tree | {SEAL: seal_of(tree)}).encode())

    @classmethod
    def load(cls, place: Place) -> Self | None:
        """What `save` wrote, None where nothing did; UserError where it was changed since."""
        if (data := place.read(STATE)) is None:
            return None
        try:
            tree = json_value(data)
            if not isinstance(tree, dict) or tree.pop(SEAL, None) != seal_of(tree):
                raise ValueError("its checksum differs")
            return cls.model_validate(tree)
        except (ValueError, UserError):
            raise UserError(f"{place.at(STATE)} is damaged; remove {place} and build again") from None


def begin(place: Place, plan: Plan) -> State:
    """The state to go on from, saved. Committed files are looked at again; damaged ones are dropped.

    Raises UserError for a place with other contents, and one with partitions of another plan.
    """
    state = State.load(place)
    if state is not None:
        state = _resumed(place, plan, state)
    if state is None:
        refuse_used(place, STATE)
        state = State(plan=plan)
    state.save(place)
    return state


def _resumed(place: Place, plan: Plan, state: State) -> State | None:
    """The unfinished build there; None, and nothing of it left, when it never committed anything."""
    remove_drafts(place)
    if state.plan != plan and not state.done:
        remove_spectra(place)
        for name in (*map(state.plan.file, state.missing), BASIS):
            place.remove(name)
        place.remove(STATE)
        return None
    if state.plan.checkpoint != plan.checkpoint:
        raise UserError(f"{place} is an unfinished build of another model; give a new folder")
    if state.plan.table != plan.table:
        what = "build from a model" if state.plan.table is None else "compression of another table"
        raise UserError(f"{place} is an unfinished {what}; give a new folder")
    for old, new in ((state.plan.storage, plan.storage), (state.plan, plan)):
        for name in type(old).model_fields:
            before, now = getattr(old, name), getattr(new, name)
            if before != now:
                words = [f"no {name}" if one is None else f"{name}={one}" for one in (before, now)]
                raise UserError(
                    f"{place} is an unfinished build with {words[0]}, not {words[1]}: ask for the same again"
                )
    spectra = {layer: one for layer, one in state.spectra.items() if is_whole(place, one)}
    # To read all rows back from a URL would take as long as building them.
    whole = {n: part for n, part in state.done.items() if is_whole(place, part, by_size=place.far)}
    if state.basis is not None and not is_whole(place, state.basis):
        # Another basis may differ in its last bits: rows of the old one are of no use with it.
        return state.model_copy(update={"layout": None, "basis": None, "done": {}, "sums": {}})
    return state.model_copy(update={"spectra": spectra, "done": whole})


def spectrum_name(layer: int) -> str:
    """The file with a layer's spectrum."""
    return SPECTRA.format(f"{layer:05d}")


def remove_spectra(place: Place) -> None:
    """Those of layers whose ranks are chosen, or of another plan, are of no use any more."""
    remove_matching(place, SPECTRA.format("*"))
