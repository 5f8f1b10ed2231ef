"""What a table or figure of the paper became: rows, claims, and whether they hold."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlm_train.utils.records import Record, read_json, record_of

Cell = str | float | int | None


class Spread(Record):
    """A figure over seeds: mean, smallest and largest."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of one value per seed."""
        found = list(values)
        return cls(mean=statistics.fmean(found), least=min(found), most=max(found))

    def text(self, digits: int = 2) -> str:
        """The mean, and the range of several seeds."""
        return self._text(f",.{digits}f")

    def percent(self) -> str:
        """The same as a growth in per cent."""
        return self._text("+.2%")

    def _text(self, form: str) -> str:
        mean = format(self.mean, form)
        return mean if self.least == self.most else f"{mean} ({self.least:{form}} to {self.most:{form}})"


class Claim(Record):
    """What the paper claims. holds: here; clear: beyond the spread of the seeds; seen: the figures."""

    claim: str
    holds: bool
    clear: bool
    seen: str


class Finding(Record):
    """The file of a table or figure.

    item: such as table2. paper: what the paper reports, in our words. trained: whether it is of models that
    were trained at the scale, of so many seeds each. text: what they were trained on; else what it is of.
    command: that measures it. steps: the commands that it runs, in their order.
    """

    item: str
    title: str
    paper: str
    scale: str
    trained: bool
    text: str
    seeds: int
    columns: list[str]
    rows: list[list[Cell]]
    claims: list[Claim]
    command: str
    steps: list[str]


def read_finding(file: Path) -> Finding:
    """Read the file of a finding. UserError where it is none."""
    fix = "run `mlm-train reproduce` again"
    return record_of(Finding, read_json(file, fix), file, fix)


def less(
    claim: str, names: Sequence[str], values: Sequence[Spread], show: Callable[[Spread], str] = Spread.text
) -> Claim:
    """The claim that these figures ascend in this order. show: a figure in words."""
    pairs = list(itertools.pairwise(values))
    seen = ", ".join(f"{name} {show(value)}" for name, value in zip(names, values, strict=True))
    return Claim(
        claim=claim,
        holds=all(first.mean < second.mean for first, second in pairs),
        clear=all(first.most < second.least or second.most < first.least for first, second in pairs),
        seen=seen,
    )
