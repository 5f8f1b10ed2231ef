"""The report of a hang: which ranks are stuck and which wait for them. Text only, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite


@dataclass(frozen=True)
class RankStatus:
    """What a rank reports about itself; of a rank that does not respond, its last heartbeat."""

    rank: int
    host: str
    stage: int | None  # of the pipeline
    mark: str  # "step 3, forward of micro-batch 2"
    seconds: float  # since the mark; of an unresponsive rank since its last heartbeat, inf without one
    responds: bool = True
    operation: str | None = None  # the communication the main thread is in
    pending: Sequence[str] = field(default_factory=tuple)  # communication started and not complete
    innermost: str = ""  # frames: file:line function
    ours: str = ""

    @property
    def waits(self) -> bool:
        """Whether the rank is in communication, so that it depends on other ranks."""
        return self.responds and (self.operation is not None or bool(self.pending))

    def runs(self, limit: float) -> bool:
        """Whether the rank is in no communication and made progress within half of `limit` seconds."""
        return self.responds and not self.waits and self.seconds < limit / 2

    @property
    def _location(self) -> str:
        operation = self.operation or (f"pending {', '.join(self.pending[:3])}" if self.pending else None)
        if operation is not None:
            return f"in {operation} at {self.ours}"
        caller = "" if self.innermost == self.ours else f", called from {self.ours}"
        return f"at {self.innermost}{caller}"

    def line(self) -> str:
        """One line about this rank."""
        stage = "" if self.stage is None else f", stage {self.stage}"
        name = f"rank {self.rank} ({self.host}{stage})"
        if not self.responds:
            last = f"last heartbeat {self.seconds:.0f} s ago: {self.mark}"
            heartbeat = last if isfinite(self.seconds) else "no heartbeat received"
            return f"{name}: does not respond (stopped, or its node is gone); {heartbeat}"
        return f"{name}: {self.mark}, for {self.seconds:.0f} s, {self._location}"

    def shared_line(self) -> str:
        """The line without rank, host and time: equal for ranks that wait at the same place."""
        stage = "" if self.stage is None else f"stage {self.stage}: "
        return f"{stage}{self.mark}, {self._location}"


def hang_report(statuses: Sequence[RankStatus], limit: float, ending: str) -> str:
    """The report: stuck ranks first, one line each; then the waiting ones, grouped by place; then `ending`.

    Stuck ranks do not respond, or made no progress and are in no communication. Where every rank waits
    (mismatched collectives), none is named: the groups show who waits where.
    """
    running = [status for status in statuses if status.runs(limit)]
    stuck = [status for status in statuses if not status.waits and status not in running]
    waiting: dict[str, list[RankStatus]] = {}
    for status in statuses:
        if status.waits:
            waiting.setdefault(status.shared_line(), []).append(status)
    lines = [f"mlm-train: watchdog: no progress for {limit:.0f} s"]
    lines += [f"  stuck:   {status.line()}" for status in stuck]
    if not stuck and not running:
        lines.append("  every rank waits for another: mismatched collectives, or a lost message")
    for place, group in waiting.items():
        longest = max(status.seconds for status in group)
        lines.append(f"  waiting: {_ranks([status.rank for status in group])} for {longest:.0f} s, {place}")
    lines += [f"  running: {status.line()}" for status in running]
    return "\n".join([*lines, f"  {ending}"])


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0, 2-5`."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    text = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in ranges)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
