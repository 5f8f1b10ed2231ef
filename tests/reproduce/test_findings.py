"""Findings from scores that are written down here, so that every figure can be computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlm_train.analyze.ablate.points import Point
from mlm_train.analyze.keys.folder import FORMAT
from mlm_train.reproduce.command import FIGURES
from mlm_train.reproduce.finding import Spread, less
from mlm_train.reproduce.items import ITEMS, finding_of
from mlm_train.reproduce.page import in_cell, verdict, write_page
from mlm_train.reproduce.plan import SCALES, TASKS, Plan
from mlm_train.reproduce.scores import Scores
from mlm_train.reproduce.steps import Workspace
from tests.commands import mlm_train, refused

PLAN = Plan(SCALES["micro"], "/texts/novels")
PROSE = {
    "base-small": 60.0,
    "base": 40.0,
    "memory": 50.0,
    "flex-1h2": 46.0,
    "flex-2h2": 43.0,
    "flex-3h2": 40.2,
}
RANK = {"uniform": 0.06, "weighted": 0.03, "per layer": 0.08}


def write_keys(folder: Path, layer: int, coefficient: float, outliers: int) -> None:
    """What `analyze keys` writes of a layer, statistics alone."""
    part = folder / f"layer-{layer:03}"
    part.mkdir(parents=True)
    clusters = [{"cluster": n, "name": f"words {n}", "tokens": 10 * n + 1, "central": [1]} for n in range(3)]
    numbers = dict.fromkeys(("mean_abs", "mean_norm", "mean_effective_keys", "mean_share", "seconds"), 1.0)
    (part / "statistics.json").write_text(json.dumps({
        "layer": layer, "digest": "d", **numbers, "unused_keys": 0, "outlier_keys": list(range(outliers)),
        "explained": 0.5, "silhouette": None, "clustering_coefficient": coefficient, "sample": 10,
        "clusters": clusters,
    }))  # fmt: skip
    settings = {"top_k": 1, "clusters": 3, "map_tokens": 0, "seed": 0}
    about = {"format": FORMAT, "model": "m", "fingerprint": "f", "vocab_size": 31, "num_layers": 6, "keys": 8}
    (folder / "analysis.json").write_text(json.dumps({**about, "settings": settings, "definitions": {}}))


def ablation(rows: list[tuple[Point, float]], exact: float = 50.0) -> dict[str, Any]:
    points = [(Point(study="exact"), 0.0), *rows]
    return {
        "model": "m", "kind": "memory", "data": "d", "table": None, "windows": 1, "length": 1,
        "rows": [
            {"point": point.model_dump(), "scores": {"loss": 1.0, "perplexity": exact * (1 + growth)},
             "bytes": 4_000_000 if point.dtype else None}
            for point, growth in points
        ],
    }  # fmt: skip


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    """Of three seeds: perplexities 1 below, at and 1 above PROSE's."""
    folder = tmp_path / "results"
    folder.mkdir()

    def write(name: str, tree: Any) -> None:
        (folder / f"{name}.json").write_text(json.dumps(tree))

    for seed in range(3):
        for kind, value in PROSE.items():
            write(f"prose.{kind}.s{seed}", {"perplexity": value + seed - 1})
            part = "ffn" if kind == "base" else "memory"
            shares = {"attention": {"share": 0.6}, part.replace("memory", "ffn_m"): {"share": 0.4}}
            write(f"shares.{kind}.s{seed}", {"windows": 1, "layers": [shares] * 6})
            dropped = [
                (Point(study="drop", layer=layer, part=part, alpha=0), 0.3 if layer < 2 else 0.01 * seed)
                for layer in range(6)
            ]
            cost = 1.0 if part == "memory" else 3.0
            scaled = [
                (Point(study="alpha", part=part, alpha=alpha), cost * (1 - alpha)) for alpha in (0.8, 0.5)
            ]
            write(f"ablate.{kind}.s{seed}", ablation(dropped + scaled))
        for at, facts in (("", 0.9), (".alpha0.8", 0.8), (".alpha0.5", 0.3)):
            accuracy = {task: {"acc,none": 0.6 if at == "" else 0.5} for task in TASKS}
            learned = accuracy | {TASKS[0]: {"acc,none": facts}, TASKS[3]: {"acc,none": 0.25}}
            write(f"tasks{at}.memory-tasks.s{seed}", {"results": learned})
            write(f"tasks{at}.memory.s{seed}", {"results": {task: {"acc,none": 0.24} for task in TASKS}})
        types = [
            (Point(study="precision", dtype=t), g) for t, g in (("bfloat16", 0), ("int8", 0), ("int4", 0.004))
        ]
        ranks = [
            (Point(study="rank", cut=cut, variant=variant), growth * cut)
            for cut in (0.1, 0.2, 0.3, 0.4, 0.5)
            for variant, growth in RANK.items()
        ]
        write(f"table.memory.s{seed}", ablation(types + ranks))
        spectra = [{"singular_values": [4.0, 3.0, 3.0 - layer / 2, 0.0]} for layer in range(6)]
        write(f"inspect.memory.s{seed}", {"layers": spectra})
        for layer in range(6):
            write_keys(tmp_path / f"keys/memory.s{seed}", layer, 0.1 * layer + 0.01 * seed, layer + seed)
        for method, worse in (("magnitude", 500.0), ("wanda", 90.0), ("sparsegpt", 41.0)):
            for like in ("memory", "flex1", "flex2", "flex3"):
                write(f"prune.{method}.{like}.s{seed}", {"pruned_perplexity": worse + seed - 1})
    times = {"base": 100.0, "flex1": 55.0, "flex2": 60.0, "flex3": 70.0, "memory.bfloat16": 48.0}
    decode = [{"name": f"decode.batch1.{name}", "median": time} for name, time in times.items()]
    decode += [
        {"name": f"resident.{name.partition('.')[0]}", "median": time * 1e7} for name, time in times.items()
    ]
    write("decode", {"rows": decode})
    return Scores(Workspace(tmp_path), PLAN)


def test_every_item(scores: Scores, tmp_path: Path) -> None:
    assert list(ITEMS) == list(FIGURES)
    found = {
        name: finding_of(name, scores, f"reproduce {name}", ["evaluate a", "evaluate b"]) for name in ITEMS
    }
    names = {step.name for step in PLAN.steps()}
    assert all(set(item.needs(PLAN)) <= names for item in ITEMS.values())
    rows = {name: finding.rows for name, finding in found.items()}
    claims = {
        name: [(claim.holds, claim.clear) for claim in finding.claims] for name, finding in found.items()
    }

    assert rows["table1"][0] == ["facts", "prose and tasks", "0.240", "0.240", "0.240"]
    assert rows["table1"][4] == ["facts", "tasks alone", "0.900", "0.800", "0.300"]
    assert rows["table1"][-1] == ["text, perplexity", "prose and tasks", "50.00", "60.00", "75.00"]
    assert claims["table1"] == [*[(True, True)] * 3, (False, True), *[(True, True)] * 3]
    assert rows["table2"][2] == ["memory", "886,080", "2,656,704", "50.00 (49.00 to 51.00)"]
    assert claims["table2"] == [(True, True), (True, True)]
    assert claims["table5"] == [(True, True)] and len(rows["table5"]) == 15
    assert rows["table6"][4] == ["memory", "48.0", "0.48", "0.67", "0.48", "0.48", "0.63"]
    assert claims["table6"] == [(True, True)]
    assert rows["table7"][2] == ["int4", "4.00", "+0.40%", "+0.37%"] and claims["table7"] == [(True, True)]
    assert rows["table8"][4] == ["50%", "+3.00%", "+1.50%", "+4.00%", "+3.53%"]
    assert claims["table8"] == [(True, True), (False, True)]
    assert rows["figure4"][0] == ["0", "+30.00%", "+30.00%"]
    assert rows["figure4"][5] == ["5", "+1.00% (+0.00% to +2.00%)", "+1.00% (+0.00% to +2.00%)"]
    assert claims["figure4"] == [(True, True)] * 2 and claims["figure12"] == [(True, True)] * 4
    assert rows["figure5"][2] == ["2", "0.210 (0.200 to 0.220)", "", "0.500", "words 2"]
    assert claims["figure5"] == [(False, True)]  # 0.01 in layer 0
    assert rows["figure6"][5] == ["5", "6.0 (5.0 to 7.0)"]
    # 0 to 3 and 4, 5 in seed 0: means of 1.5 and 4.5, each with a spread of 2.
    assert claims["figure6"] == [(True, True)]
    assert rows["figure7"][0] == ["base", "0", "0.600", "0.400", "0.000"]
    assert rows["figure7"][6] == ["memory", "0", "0.600", "0.000", "0.400"] and len(rows["figure7"]) == 30
    assert rows["figure10"][2] == ["2", "0.371"]  # 2 / sqrt(16 + 9 + 4)
    assert claims["figure10"] == [(True, True)]
    # 43 to 40.2 is beyond the spread of 1, 46 to 43 too; 40.2 is within 1 % of 40.
    assert claims["figure9"] == [(True, True), (True, True)]
    assert rows["figure11"][0][4] == "41.00 (40.00 to 42.00)"
    assert claims["figure11"] == [(False, True), (False, True), (False, False), (True, False)]
    assert rows["figure13"][0] == ["0.5", "+150.00%", *["+50.00%"] * 4]
    assert [row[0] for row in rows["figure13"]] == ["0.5", "0.8"] and claims["figure13"] == [(True, True)]
    for name, finding in found.items():
        file = tmp_path / "findings" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(finding.model_dump_json())
    mlm_train("reproduce", "page", "--output", tmp_path, "--page", tmp_path / "findings.md")
    page = (tmp_path / "findings.md").read_text()
    assert "| [table2](#table-2-perplexity-by-active-and-total-parameters) |" in page
    assert "| base-small | 915,376 | 915,376 | 60.00 (59.00 to 61.00) |" in page
    assert page.index("## Table 8") < page.index("## Figure 4") < page.index("## Figure 11")
    assert "novels and synthetic tasks (4 to 1), 1,638,400 tokens per model" in page
    assert "`mlm-train reproduce table8`, 2 steps ([file](findings/table8.json))" in page
    assert "Here, by formula, of the paper's configs:" in page
    write_page(tmp_path / "findings", tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == page


def test_verdicts() -> None:
    low, middle, high = (Spread.of((value - 1, value, value + 1)) for value in (5, 6.5, 9))
    assert verdict(less("", "ab", [low, high])) == "clearly"
    assert verdict(less("", "ab", [low, middle])) == "yes, within the spread of seeds"
    assert verdict(less("", "ab", [middle, low])) == "no, within the spread of seeds"
    assert verdict(less("", "abc", [low, high, middle])) == "no"
    assert in_cell("a|`\\x02") == "a\\|\\`\\\\x02"
    assert Spread.of([-0.5, 0.25]).percent() == "-12.50% (-50.00% to +25.00%)"
    assert low.text() == "5.00 (4.00 to 6.00)" and Spread.of([1234.5]).text() == "1,234.50"


def test_bad_input(tmp_path: Path) -> None:
    text = ("--text", tmp_path, "--output", tmp_path / "out")
    assert "all stands alone" in refused("reproduce", "all", "table2", *text)
    assert "--number belongs to train" in refused("reproduce", "train", *text)
    assert "give 0 to 20" in refused("reproduce", "train", "--number", 21, *text)
    assert "--page belongs to page" in refused("reproduce", "page", "--output", tmp_path)
    assert "--text is missing" in refused("reproduce", "all", "--output", tmp_path)
    assert "does not exist" in refused("reproduce", "all", "--text", tmp_path / "no", "--output", tmp_path)
