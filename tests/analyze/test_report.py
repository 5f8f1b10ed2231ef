"""The page of `analyze report`: what it refuses, what its data say, and the memory that it takes."""

import base64
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlm_train.analyze.ablate.points import Point
from mlm_train.analyze.ablate.study import Ablation, Row
from mlm_train.analyze.report.figures import ablation_figures, shares_figures
from mlm_train.analyze.report.inputs import LayerShares, Share, Shares
from mlm_train.analyze.report.page import script_json
from mlm_train.tol.serve.reader import TableReader
from tests.analyze.models import export
from tests.analyze.random_keys import random_keys
from tests.commands import ROOT, mlm_train, refused

HOSTILE = [
    "</script><b>",
    "a\u2028b",
    '"',
    "<!--",
    "&amp;",
    "\x1b[2J",
    "'",
    " x",
    "x",
    None,
    "]]>",
    "<img src=x>",
]


class Page(HTMLParser):
    """The elements of a page, and the texts of its <script> elements by id."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._script = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def data(self, name: str) -> Any:
        return json.loads(self.scripts[name])


def ablation(file: Path, **fields: Any) -> Path:
    rows = [
        Row(point=Point(study="exact"), scores={"loss": 1.0, "perplexity": math.e}),
        Row(point=Point(study="alpha", part="memory", alpha=0.5), scores={"loss": 2.0, "perplexity": 7.0}),
        Row(
            point=Point(study="drop", part="memory", layer=1, alpha=0),
            scores={"loss": 2.0, "perplexity": 8.0},
        ),
        Row(
            point=Point(study="precision", dtype="int8"),
            scores={"loss": 1.1, "perplexity": 3.0},
            bytes=2_000_000,
        ),
        Row(
            point=Point(study="rank", cut=0.5, variant="uniform"),
            scores={"loss": 1.2, "perplexity": 4.0},
            bytes=1_000_000,
        ),
    ]
    about = {
        "model": "m",
        "kind": "memory",
        "data": "d",
        "table": None,
        "windows": 4,
        "length": 8,
    }
    file.write_text(Ablation(**about | fields, rows=rows).model_dump_json())
    return file


def test_texts_of_a_page_are_never_its_code(tmp_path: Path) -> None:
    keys = random_keys(tmp_path / "<i>keys", HOSTILE)
    page, plain = tmp_path / "page.html", tmp_path / "plain.html"
    mlm_train("analyze", "report", "--keys", keys.path, "--output", page, "--title", "</title><b>&")
    random_keys(tmp_path / "keys", [str(number) for number in range(len(HOSTILE))])
    mlm_train("analyze", "report", "--keys", tmp_path / "keys", "--output", plain)
    found, expected = Page(page), Page(plain)
    assert found.tags == expected.tags
    assert found.data("texts") == HOSTILE
    assert found.data("analyses")[0]["path"] == str(keys.path)
    assert "\u2028" not in page.read_text(encoding="utf-8").split("</script>", 1)[1]
    assert not [value for name, value in found.attributes if name in ("src", "href")]
    assert script_json([math.nan, math.inf, 1.5, "<>&"]) == '[null,null,1.5,"\\u003c\\u003e\\u0026"]'


def test_the_arrays_are_those_of_the_folder(tmp_path: Path) -> None:
    texts = [f"t{number}" for number in range(301)]
    folder = random_keys(tmp_path / "keys", texts, mapped=50)
    mlm_train("analyze", "report", "--keys", folder.path, "--output", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    for layer in (0, 1):
        data = page.data(f"layer-0-{layer}")

        def array(name: str, kind: str, data: Any = data) -> np.ndarray:
            return np.frombuffer(base64.b64decode(data[name]), kind)

        names = ("cluster", "token_keys", "token_values", "map_tokens", "map_places")
        labels, keys, values, tokens, places = folder.tensors(layer, *names)
        assert array("cluster", "<u2").tolist() == labels.tolist()
        assert array("keys", "<u2").reshape(301, 3).tolist() == keys[:, :3].tolist()
        halves = (array("values", "<u2").astype("<u4") << 16).view("<f4").reshape(301, 3)
        assert halves == pytest.approx(values[:, :3].numpy(), rel=2**-8)
        assert array("map", "<u4").tolist() == tokens.tolist()
        assert np.array_equal(array("places", "<f4").reshape(-1, 2), places.numpy())
        assert [cluster[1] for cluster in data["clusters"]] == torch.bincount(labels, minlength=8).tolist()
    (analysis,) = page.data("analyses")
    cells = ["1", "1.1250", "10.5000", "0.7500", "3", "2", "0.2500", "-", "0.5000"]
    assert analysis["layers"] == [0, 1] and analysis["statistics"][1] == cells


def test_figures(tmp_path: Path) -> None:
    read = Ablation.model_validate_json(ablation(tmp_path / "a.json").read_text())
    figures = {figure["title"]: figure for figure in ablation_figures({"a.json": read})}
    assert list(figures) == [
        *(f"Ablation: {study}" for study in ("alpha", "drop", "precision", "rank")),
        "Perplexity by size of the table",
    ]
    points = {
        title: {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in figure["data"]}
        for title, figure in figures.items()
    }
    assert points["Ablation: alpha"]["a.json memory"] == [(0.5, 7.0)]
    assert points["Ablation: drop"]["a.json memory"] == [(1.0, 8.0)]
    assert points["Perplexity by size of the table"] == {
        "a.json precision": [(2.0, 3.0)],
        "a.json uniform": [(1.0, 4.0)],
        "a.json as it is": [(1.0, math.e), (2.0, math.e)],
    }
    half = Share(norm=1.0, ratio=0.5, share=0.5)
    layers = [LayerShares(layer=0, update=1.0, growth=1.0, attention=half, ffn_m=half)]
    (figure,) = shares_figures({"s": Shares(model="m", data="d", windows=1, length=8, layers=layers)})
    assert [(trace["name"], trace["y"]) for trace in figure["data"]] == [
        ("attention", [0.5]),
        ("FFN-M", [0.5]),
    ]


@pytest.fixture(scope="module")
def table(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "tol"
    mlm_train("tol", "build", model, "--output", folder)
    return folder


def test_models_and_singular_values(model: Path, keys: Path, table: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    mlm_train("analyze", "report", "--model", model, "--keys", keys, "--tol", table, "--output", page)
    (figure,) = Page(page).data("figures")
    reader = TableReader.open_folder(table)
    for layer, trace in enumerate(figure["data"]):
        values = reader.values(reader.range(0, 601), layer)
        assert values is not None
        true = torch.linalg.svdvals(values.double())
        assert trace["y"] == pytest.approx(true.tolist(), rel=1e-3)
    text = re.sub(r"<[^>]*>", " ", page.read_text(encoding="utf-8").split("<h1>", 1)[1])
    assert " memory " in text and str(model) in text


def test_without_plotly(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    line = refused("analyze", "report", "--keys", keys, "--output", tmp_path / "page.html")
    assert "analyze report needs plotly: pip install 'mlm-train[analyze]'" in line


def test_bad_input(model: Path, keys: Path, table: Path, tmp_path: Path) -> None:
    out, used = tmp_path / "page.html", tmp_path / "used.html"
    used.write_text("mine")
    texts = random_keys(tmp_path / "texts", [f"t{n}" for n in range(601)]).path
    others = random_keys(tmp_path / "others", [f"u{n}" for n in range(601)]).path
    smaller = random_keys(tmp_path / "smaller", ["a", "b"]).path
    other, _ = export(tmp_path / "other", num_hidden_layers=2, vocab_size=600)
    mixed = random_keys(tmp_path / "mixed", ["a", "b", "c"])
    name = "layer.safetensors"
    shutil.copy(smaller / "layer-001" / name, mixed.layer_path(1) / name)
    first, second = ablation(tmp_path / "a.json"), ablation(tmp_path / "b.json", data="e")
    shares, elsewhere, broken = (tmp_path / f"{name}.json" for name in ("shares", "elsewhere", "broken"))
    about = {"model": "m", "data": "d", "windows": 1, "length": 8}
    for path, data, layers in ((shares, "d", []), (elsewhere, "e", []), (broken, "d", [{"layer": 0}])):
        path.write_text(json.dumps(about | {"data": data, "layers": layers}))
    for words, expected in (
        ((), "nothing to report: give at least one of --model, --keys"),
        (("--keys", texts, smaller), "(2 tokens) and"),
        (("--keys", texts, others), "different tokenizers: token 0 is 'u0' and 't0'"),
        (("--keys", texts, "--model", other), "(600 tokens) and"),
        (("--keys", model), "analysis.json does not exist"),
        (("--keys", mixed.path), "layer-001 is not a layer of 3 tokens in 8 clusters"),
        (("--model", keys), "holds no model"),
        (("--ablation", shares), "shares.json: "),
        (("--ablation", first, second), "(data e) and"),
        (("--shares", first), "give what `mlm-train analyze shares --json` printed"),
        (("--shares", broken), "layers.0.update"),
        (("--shares", shares, elsewhere), "(data e) and"),
        (("--shares", shares, "--tol", table), "is of another model than --keys, --ablation and --shares"),
        (("--tol", model), "tol.index.json"),
        (("--tol", table, "--keys", texts), "is of another model than --keys, --ablation and --shares"),
    ):
        assert expected in refused("analyze", "report", "--output", out, *words), words
    assert "is not replaced; name another file" in refused(
        "analyze", "report", "--keys", keys, "--output", used
    )
    assert used.read_text() == "mine" and not out.exists()


MEASURED = """
import json, sys, time
from pathlib import Path
import plotly.offline
from mlm_train.analyze.report.inputs import Inputs
from mlm_train.analyze.report.page import write_report
from mlm_train.bench.memory_in_use import HostMemory
memory = HostMemory()
before = memory.now()
memory.reset_peak()
started, page = time.monotonic(), Path(sys.argv[2])
write_report(page, "title", Inputs.read([], [sys.argv[1]], [], [], []))
beyond = memory.peak() - before
print(json.dumps({"beyond": beyond, "page": page.stat().st_size, "seconds": time.monotonic() - started}))
"""


@pytest.mark.long
def test_the_1b_shape_stays_below_2_gb(tmp_path: Path) -> None:
    """128,256 tokens, 24 layers of 5,464 keys, and maps of 20,000 tokens."""
    texts = [f" token {number}" for number in range(128_256)]
    random_keys(tmp_path / "keys", texts, layers=24, keys=5464, clusters=64)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "keys", tmp_path / "page.html"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["beyond"] < 2e9 and found["page"] < 100e6, found
