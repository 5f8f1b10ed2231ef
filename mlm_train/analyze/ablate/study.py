"""Scoring the points of an ablation, one after the other; what is scored is kept."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mlm_train.analyze.ablate.compressed import Compressed
from mlm_train.analyze.ablate.points import Point, changed
from mlm_train.errors import UserError
from mlm_train.evaluate.scorer import Scorer
from mlm_train.model.source import MemorySource
from mlm_train.utils.files import write_json, writing
from mlm_train.utils.records import Record, read_json, record_of

Number = Annotated[float, Field(allow_inf_nan=False)]
Score = Callable[[Any, MemorySource | None], dict[str, float]]  # of a model and its source
FIX = "name another file, or remove it"


class Row(Record):
    """A scored point. scores: loss, perplexity, and tasks/METRIC/TASK. bytes: of a table."""

    point: Point
    scores: dict[str, Number]
    bytes: int | None = None


class Ablation(Record):
    """The file of an ablation.

    model, data, table: fingerprints, the last None without a table. kind: of the model. windows, length: how
    much of the validation split was scored. tasks, limit: which of the harness', and questions of each.
    """

    format: Literal["mlm-ablation"] = "mlm-ablation"
    model: str
    kind: str
    data: str
    table: str | None
    windows: int
    length: int
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    rows: list[Row]

    @property
    def about(self) -> dict[str, Any]:
        """All but the rows."""
        return self.model_dump(exclude={"rows"})


def read_ablation(file: Path) -> Ablation:
    """Read a file of `analyze ablate`. Raises UserError where it is none."""
    return record_of(Ablation, read_json(file, FIX), file, FIX)


def is_ablation(file: Path) -> bool:
    """Whether a file is one of `analyze ablate`."""
    try:
        read_ablation(file)
    except (UserError, OSError):
        return False
    return True


def begun(file: Path, about: Ablation) -> Ablation:
    """What a file has of this ablation already; about itself where there is no file.

    Raises UserError for a file about another model, data, table or tasks.
    """
    if not file.exists():
        return about
    found = read_ablation(file)
    for name, value in about.about.items():
        if found.about[name] != value:
            raise UserError(f"{file} differs in its {name} ({found.about[name]}): {FIX}")
    return found


def run(
    file: Path,
    ablation: Ablation,
    points: Iterable[Point],
    scorer: Scorer,
    compressed: Compressed | None,
    score: Score,
) -> Ablation:
    """Score the points that the ablation does not have, and write the file after each one."""
    known = {row.point for row in ablation.rows}
    for point in points:
        if point in known:
            continue
        source, size = scorer.computed, None
        if point.dtype is not None:
            assert compressed is not None
            source, size = compressed.in_type(point.dtype)
        elif point.cut is not None and point.variant is not None:
            assert compressed is not None
            source, size = compressed.cut(point.cut, point.variant)
        with changed(scorer.model, point) as model:
            row = Row(point=point, scores=score(model, source), bytes=size)
        ablation = ablation.model_copy(update={"rows": [*ablation.rows, row]})
        with writing(file):
            write_json(file, ablation.model_dump(mode="json"))
    return ablation
