"""Which ranks are slow: by the time each spends on its own, since together all take the slowest one's."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from mlm_train.monitor.callback import Callback, Context
from mlm_train.monitor.report import StepReport


class Pace(NamedTuple):
    """A rank over some steps: seconds a step, and times those of its neighbours in the same stage."""

    rank: int
    host: str
    stage: int
    forward: float  # in its forward passes
    waited: float  # for its data
    ratio: float  # of both together

    def __str__(self) -> str:
        data = f", data {self.waited:.3g} s" if self.waited > 0.1 * self.forward else ""
        return (
            f"rank {self.rank} ({self.host}, stage {self.stage}) {self.ratio:.2f} x its stage's median: "
            f"forward {self.forward:.3g} s{data} a step"
        )


class Stragglers(Callback):
    """Compares ranks every monitor.straggler_interval steps, and names those that make the others wait."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.topology, self.hosts = context.runtime.topology, context.hosts
        self._begin()

    def _begin(self) -> None:
        self.steps, world = 0, self.topology.world
        self.forward, self.waited = [0.0] * world, [0.0] * world

    def after_step(self, report: StepReport) -> None:
        monitor, step = self.config.monitor, report.progress.step
        self.add(report.result.forward, report.result.waited)
        if self.steps < monitor.straggler_interval or not (paces := self.take()):
            return
        values = {"speed/slowest_rank": paces[0].rank, "speed/slowest_rank_ratio": paces[0].ratio}
        self.context.writers.scalars(values, step)
        for pace in paces[:4]:
            if pace.ratio >= monitor.straggler_ratio:
                self.context.say(f"slow over the last {monitor.straggler_interval} steps: {pace}")

    def add(self, forward: Sequence[float], waited: Sequence[float]) -> None:
        """A step's seconds by rank."""
        self.steps += 1
        self.forward = [sum(pair) for pair in zip(self.forward, forward, strict=True)]
        self.waited = [sum(pair) for pair in zip(self.waited, waited, strict=True)]

    def take(self) -> list[Pace]:
        """All ranks since the last call, the slowest first; empty where each is alone in its stage."""
        steps, world, stages = max(self.steps, 1), self.topology.world, self.topology.pipeline
        share = world // stages  # ranks of one stage are neighbours (parallel/mesh/topology.py)
        paces = []
        for first in range(0, world, share) if share > 1 else ():
            ranks = range(first, first + share)
            own = [self.forward[rank] + self.waited[rank] for rank in ranks]
            usual = max(statistics.median_low(own), 1e-9)
            paces += [
                Pace(
                    rank,
                    self.hosts[rank],
                    rank // share,
                    self.forward[rank] / steps,
                    self.waited[rank] / steps,
                    seconds / usual,
                )
                for rank, seconds in zip(ranks, own, strict=True)
            ]
        self._begin()
        return sorted(paces, key=lambda pace: -pace.ratio)
