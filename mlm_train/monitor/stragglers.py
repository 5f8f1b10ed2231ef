"""Find slow ranks, by the time that each spends on its own work rather than waiting for others."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from mlm_train.monitor.callback import Callback, Context
from mlm_train.monitor.report import StepReport


class Pace(NamedTuple):
    """A rank's seconds per step, and their ratio to the median of its stage."""

    rank: int
    host: str
    stage: int
    forward: float  # seconds per step in forward passes
    waited: float  # seconds per step waiting for data
    ratio: float  # of their sum to the median

    def __str__(self) -> str:
        data = f", data {self.waited:.3g} s" if self.waited > 0.1 * self.forward else ""
        return (
            f"rank {self.rank} ({self.host}, stage {self.stage}) {self.ratio:.2f} x its stage's median: "
            f"forward {self.forward:.3g} s{data} per step"
        )


class Stragglers(Callback):
    """Compares ranks every monitor.straggler_interval steps and logs the slow ones."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.topology, self.hosts = context.runtime.topology, context.hosts
        self._reset()

    def _reset(self) -> None:
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
        """Add a step's seconds by rank."""
        self.steps += 1
        self.forward = [sum(pair) for pair in zip(self.forward, forward, strict=True)]
        self.waited = [sum(pair) for pair in zip(self.waited, waited, strict=True)]

    def take(self) -> list[Pace]:
        """Paces since the last call, slowest rank first; empty if each stage has one rank."""
        steps, world, stages = max(self.steps, 1), self.topology.world, self.topology.pipeline
        width = world // stages  # ranks of one stage are adjacent (parallel/mesh/topology.py)
        paces = []
        for first in range(0, world, width) if width > 1 else ():
            ranks = range(first, first + width)
            own = [self.forward[rank] + self.waited[rank] for rank in ranks]
            median = max(statistics.median_low(own), 1e-9)
            paces += [
                Pace(
                    rank,
                    self.hosts[rank],
                    rank // width,
                    self.forward[rank] / steps,
                    self.waited[rank] / steps,
                    seconds / median,
                )
                for rank, seconds in zip(ranks, own, strict=True)
            ]
        self._reset()
        return sorted(paces, key=lambda pace: -pace.ratio)
