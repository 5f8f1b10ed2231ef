"""`bench store`: the report, and hit rates against a count of the text's ids."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mlm_train.data.prepared import PreparedData
from mlm_train.utils.files import is_png
from tests.commands import mlm_train, refused
from tests.partitions import random_table


def test_the_report(data: Path, tmp_path: Path) -> None:
    prepared = PreparedData.open(data)
    table, report = random_table(tmp_path / "tol", prepared.vocab_size), tmp_path / "store.json"
    words = ("bench", "store", "--tol", table, "--data", data, "--rows", 40, "--tokens", 300, "--runs", 1)
    mlm_train(*words, "--json", report, "--plot", tmp_path / "store.png")
    assert is_png(tmp_path / "store.png")
    value = {row["name"]: row["median"] for row in json.loads(report.read_text())["rows"]}
    room = int(0.1 * prepared.vocab_size)
    counts = Counter(prepared.split("train").tokens.tolist())
    kept = {number for number, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:room]}
    text = prepared.split("validation").tokens[:300].tolist()
    expected = sum(number in kept for number in text) / len(text)
    assert value["hits.frequent.0.1.rate"] == pytest.approx(expected)
    assert value["hits.lowest_ids.0.1.rate"] == pytest.approx(sum(n < room for n in text) / len(text))
    recent: list[int] = []
    hits = 0
    for number in text:
        hits += number in recent
        recent = [*(other for other in recent if other != number), number][-room:]
    assert value["hits.recent.0.1.rate"] == pytest.approx(hits / len(text))


def test_refused(data: Path, tmp_path: Path) -> None:
    table = random_table(tmp_path / "tol", 120)
    words = ("bench", "store", "--tol", table, "--data", data)
    assert "ids and" in refused(*words)
    assert "give at least 1" in refused(*words, "--runs", 0)
