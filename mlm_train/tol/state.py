"""An unfinished build: its plan, and the partitions that are committed. tol.build.json, next to them."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mlm_train.errors import UserError
from mlm_train.files import draft_of, listed, refuse_used, sha256_of, write_text
from mlm_train.tol.format import TORCH_DTYPE, Partition, PlainDtype, draft_pattern, partition_bytes

STATE = "tol.build.json"


class Plan(BaseModel):
    """All that the partitions' bytes depend on; an unfinished folder is resumed only by an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    checkpoint: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    dtype: PlainDtype
    partitions: int
    chunk_rows: int

    def rows(self, number: int) -> tuple[int, int]:
        """The range of a partition; sizes differ by one row at most."""
        edges = [i * self.vocab_size // self.partitions for i in (number, number + 1)]
        return edges[0], edges[1]

    def file(self, number: int) -> str:
        """The name of a partition."""
        return f"rows-{number:05d}-of-{self.partitions:05d}.safetensors"

    def bytes(self, number: int) -> int:
        """The size of a partition's file."""
        start, stop = self.rows(number)
        return partition_bytes(stop - start, self.num_layers, self.hidden_size, TORCH_DTYPE[self.dtype])


class State(BaseModel):
    """tol.build.json: exists while a build is unfinished. `done`: committed partitions by number."""

    plan: Plan
    done: dict[int, Partition] = {}

    @property
    def missing(self) -> list[int]:
        """Partitions still to be made, ascending."""
        return [number for number in range(self.plan.partitions) if number not in self.done]

    def save(self, output: Path) -> None:
        """Commit: what `done` names is never made again."""
        write_text(output / STATE, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def begin(output: Path, plan: Plan) -> State:
    """The state to go on from, saved. Committed partitions are read again; damaged ones are dropped.

    Raises UserError for a folder with other contents, and one with partitions of another plan.
    """
    state = _resumed(output, plan) if (output / STATE).exists() else None
    if state is None:
        draft_of(output / STATE).unlink(missing_ok=True)  # of a build killed in its first moment
        refuse_used(output)
        state = State(plan=plan)
    state.save(output)
    return state


def _resumed(output: Path, plan: Plan) -> State | None:
    """The folder's unfinished build; None, and nothing of it left, when it never committed anything."""
    file = output / STATE
    try:
        state = State.model_validate_json(file.read_bytes())
    except ValidationError:
        raise UserError(f"{file} is damaged; remove {output} and build again") from None
    remove_drafts(output)
    if state.plan != plan and not state.done:
        for number in state.missing:
            (output / state.plan.file(number)).unlink(missing_ok=True)
        file.unlink()
        return None
    if state.plan.checkpoint != plan.checkpoint:
        raise UserError(f"{output} is an unfinished build of another model; give a new folder")
    for name in Plan.model_fields:
        old, new = getattr(state.plan, name), getattr(plan, name)
        if old != new:
            raise UserError(f"{output} is an unfinished build with {name}={old}, not {new}; give {old} again")
    for number, partition in list(state.done.items()):
        path = listed(output, partition.file, STATE)
        if not path.is_file() or sha256_of(path) != partition.sha256:
            del state.done[number]
    return state


def remove_drafts(output: Path) -> None:
    """Remove what killed workers left half written."""
    for draft in output.glob(draft_pattern("rows-*")):
        draft.unlink(missing_ok=True)
