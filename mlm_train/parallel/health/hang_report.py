"""What a user reads when a run hangs: who is stuck, who waits for it. Text alone, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite


@dataclass(frozen=True)
class RankStatus:
    """What one rank says, or, of a rank that does not answer, what it last said."""

    rank: int
    host: str
    stage: int | None  # of the pipeline
    mark: str  # "step 3, forward of micro-batch 2"
    seconds: float  # since the mark; of a silent rank, since it was last heard, inf where it never was
    answers: bool = True
    operation: str | None = None  # the communication the main thread is in
    pending: Sequence[str] = field(default_factory=tuple)  # communication begun and not complete
    innermost: str = ""  # frames: file:line function
    ours: str = ""

    @property
    def waits(self) -> bool:
        """Whether the rank depends on others to go on."""
        return self.answers and (self.operation is not None or bool(self.pending))

    def moves(self, limit: float) -> bool:
        """Whether the rank is at work: in no communication, and got where it is not long ago."""
        return self.answers and not self.waits and self.seconds < limit / 2

    @property
    def _where(self) -> str:
        operation = self.operation or (f"pending {', '.join(self.pending[:3])}" if self.pending else None)
        if operation is not None:
            return f"in {operation} at {self.ours}"
        called = "" if self.innermost == self.ours else f", called from {self.ours}"
        return f"at {self.innermost}{called}"

    def line(self) -> str:
        """One line on this rank."""
        stage = "" if self.stage is None else f", stage {self.stage}"
        name = f"rank {self.rank} ({self.host}{stage})"
        if not self.answers:
            ago = f"heard {self.seconds:.0f} s ago: {self.mark}"
            heard = ago if isfinite(self.seconds) else "never heard"
            return f"{name}: does not answer (stopped, or its machine is gone); {heard}"
        return f"{name}: {self.mark}, for {self.seconds:.0f} s, {self._where}"

    def shared_line(self) -> str:
        """The same without name and time: alike for ranks that wait at one place."""
        stage = "" if self.stage is None else f"stage {self.stage}: "
        return f"{stage}{self.mark}, {self._where}"


def hang_report(statements: Sequence[RankStatus], limit: float, ending: str) -> str:
    """Suspects first, one line each; then those who wait, grouped by place; then `ending`.

    Suspects do not answer, or are in no communication for long. Where every rank waits (collectives that
    do not match), nobody is named: the groups show who waits where.
    """
    moving = [statement for statement in statements if statement.moves(limit)]
    suspects = [statement for statement in statements if not statement.waits and statement not in moving]
    waiting: dict[str, list[RankStatus]] = {}
    for statement in statements:
        if statement.waits:
            waiting.setdefault(statement.shared_line(), []).append(statement)
    lines = [f"mlm-train: watchdog: no progress for {limit:.0f} s"]
    lines += [f"  stuck:   {statement.line()}" for statement in suspects]
    if not suspects and not moving:
        lines.append("  every rank waits for another: collectives that do not match, or a lost message")
    for place, group in waiting.items():
        longest = max(statement.seconds for statement in group)
        lines.append(f"  waiting: {_ranks([t.rank for t in group])} for {longest:.0f} s, {place}")
    lines += [f"  moving:  {statement.line()}" for statement in moving]
    return "\n".join([*lines, f"  {ending}"])


def _ranks(numbers: Sequence[int]) -> str:
    """rank 3; ranks 0, 2-5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
