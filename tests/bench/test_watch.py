"""`bench watch`: what watching asks of the store, by threads that run the ranks' own code."""

import json
from pathlib import Path

from tests.commands import mlm_train, refused

WORLD, PER_NODE, TIMEOUT = 64, 8, 4  # heartbeats are TIMEOUT / 8 apart


def test_the_store_serves_nodes_not_ranks(tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    report = tmp_path / "watch.json"
    options = ("--world", WORLD, "--per-node", PER_NODE, "--timeout", TIMEOUT)
    mlm_train("bench", "watch", *options, "--json", report)
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    nodes = WORLD // PER_NODE
    # A heartbeat, the next node's (2) and the event, in each interval. A second may have one interval more.
    assert rows["watch.steady"]["max"] <= 4 * nodes * (8 / TIMEOUT + 1)
    # A claim, a line of statuses, and few looks for the report per node; the reporter looks twice per second.
    assert rows["watch.hang.total"]["max"] <= 25 * nodes
    out = capfd.readouterr().out
    assert out.count("does not respond (stopped, or its node is gone); last heartbeat") == PER_NODE, out
    assert f"waiting: ranks 0-{WORLD - PER_NODE - 1} for" in out, out


def test_a_world_that_is_no_multiple_of_nodes() -> None:
    assert "--world 12: give a multiple of --per-node 8" in refused("bench", "watch", "--world", 12)
