"""A table's counters among vLLM's metrics.

The tables are read in vLLM's workers, and its server answers /metrics: prometheus_client adds the numbers of
all processes that share a folder PROMETHEUS_MULTIPROC_DIR. Without one they stay in the workers.
"""

import functools

import prometheus_client

from mlm_train.tol.serve.store import Counters


class PublishedCounters:
    """Passes on what a table's counters have gained."""

    def __init__(self, counters: Counters) -> None:
        self._counters, self._passed_on = counters, dict.fromkeys(counters.totals, 0.0)
        self.publish()  # also what is still zero can be seen

    def publish(self) -> None:
        """Add what was counted since the last call."""
        totals = self._counters.totals
        for name, total in totals.items():
            _metrics()[name].inc(total - self._passed_on[name])
        self._passed_on = totals


@functools.cache
def _metrics() -> dict[str, prometheus_client.Counter]:
    """This process's metrics; prometheus_client takes each name once."""
    return {
        name: prometheus_client.Counter(name, "Of the token-wise lookup, all workers together.")
        for name in Counters().totals
    }
