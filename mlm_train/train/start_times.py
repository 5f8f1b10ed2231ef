"""Where the seconds of a start go."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

SLOW = 1.5  # a rank is named where it took so many times as long as rank 0,
SLOWER = 1.0  # and so many seconds more


@dataclass
class StartTimes:
    """Seconds by part, in order, from the start of this process."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=lambda: psutil.Process().create_time())  # as time.time()

    def done(self, part: str) -> None:
        """The time since the last part was spent on this one."""
        moment = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + max(0.0, moment - self.since)
        self.since = moment

    def line(self, ranks: Sequence[dict[str, float]]) -> str:
        """A log line of rank 0's seconds. ranks: the seconds of every rank, of parts that do not wait.

        The slowest rank of a part is named where the others waited for it.
        """
        parts = []
        for part, seconds in self.seconds.items():
            text = f"{part} {seconds:.1f} s"
            slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].get(part, 0.0), default=0)
            longest = ranks[slowest].get(part, 0.0) if ranks else 0.0
            if longest > SLOW * seconds and longest > seconds + SLOWER:
                text += f" (rank {slowest}: {longest:.1f} s)"
            parts.append(text)
        return f"start: {sum(self.seconds.values()):.1f} s: {', '.join(parts)}"
