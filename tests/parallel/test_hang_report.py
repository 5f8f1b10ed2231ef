"""The report of a hang, from the statuses of ranks."""

import math
from dataclasses import replace

from mlm_train.parallel.health.hang_report import RankStatus, hang_report

STUCK = RankStatus(
    1, "b", 1, "step 9, forward of micro-batch 2", 62.0, innermost="x.py:3 f", ours="mlm_train/y.py:7 g"
)
WAITING = RankStatus(0, "a", 0, "step 9, loss", 61.0, operation="all_reduce", ours="mlm_train/z.py:1 h")


def test_names_the_stuck_rank_and_groups_those_who_wait() -> None:
    ranks = [WAITING, STUCK, *(replace(WAITING, rank=rank, seconds=60.0) for rank in (2, 3, 4, 7))]
    assert hang_report(ranks, 60.0, "the end").splitlines() == [
        "mlm-train: watchdog: no progress for 60 s",
        "  stuck:   rank 1 (b, stage 1): step 9, forward of micro-batch 2, for 62 s, at x.py:3 f, "
        "called from mlm_train/y.py:7 g",
        "  waiting: ranks 0, 2-4, 7 for 61 s, stage 0: step 9, loss, in all_reduce at mlm_train/z.py:1 h",
        "  the end",
    ]


def test_an_unresponsive_rank_is_stuck_and_a_busy_one_is_not() -> None:
    unresponsive, busy = replace(STUCK, responds=False, seconds=70.0), replace(STUCK, rank=2, seconds=1.0)
    report = hang_report([WAITING, unresponsive, busy], 60.0, "the end")
    assert "stuck:   rank 1 (b, stage 1): does not respond" in report and "last heartbeat 70 s ago" in report
    assert "running: rank 2" in report and report.count("stuck") == 1
    never = hang_report([WAITING, replace(unresponsive, seconds=math.inf)], 60.0, "the end")
    line = "rank 1 (b, stage 1): does not respond (stopped, or its node is gone); no heartbeat received\n"
    assert line in never


def test_collectives_that_do_not_match() -> None:
    other = replace(WAITING, rank=1, operation="barrier", mark="step 9, metrics")
    report = hang_report([WAITING, other], 60.0, "the end")
    assert "every rank waits for another" in report and "in barrier" in report and "in all_reduce" in report


def test_pending_operations_count_where_the_stack_shows_none() -> None:
    device = replace(WAITING, operation=None, pending=("nccl:recv 0<-1",))
    assert "waiting: rank 0 for 61 s, stage 0: step 9, loss, in pending nccl:recv 0<-1" in hang_report(
        [device, STUCK], 60.0, "the end"
    )
