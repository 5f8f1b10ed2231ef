"""The line about a start in the log."""

from mlm_train.train.start_times import StartTimes


def test_the_line_names_a_rank_that_the_others_waited_for() -> None:
    times = StartTimes(seconds={"imports": 3.0, "model": 1.0}, since=0.0)
    ranks = [{"imports": 3.0, "model": 1.0}, {"imports": 9.04, "model": 1.9}]
    assert times.line(ranks) == "start: 4.0 s: imports 3.0 s (rank 1: 9.0 s), model 1.0 s"
    times.done("weights")
    assert list(times.seconds) == ["imports", "model", "weights"]
