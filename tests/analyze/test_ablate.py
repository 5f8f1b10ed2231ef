"""Ablations against models and tables that are changed by hand."""

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import tokenizer_file
from mlm_train.evaluate.harness import MemoryLM
from mlm_train.evaluate.tasks import load_tasks
from mlm_train.memory import make_source
from mlm_train.model.transformer import Transformer
from tests.commands import mlm_train, refused
from tests.tol.conftest import export, random_model

SHAPE = ("--samples", 6, "--sequence-length", 32, "--micro-batch-size", 4)


def model_of(kind: str) -> Transformer:
    more = {"compute_intermediate_size": 20} if kind == "flex" else {}
    return random_model(kind=kind, vocab_size=512, **more)


def loss_of(model: Transformer, data: Path, source: Any = None) -> float:
    """Of the first six windows of 32 tokens of the validation split, in float64."""
    tokens = torch.from_numpy(PreparedData.open(data).split("validation").tokens[:193].astype("int64"))
    if source is None and model.config.has_memory:
        source = make_source("per_token", model.memory_blocks())
    logits = model(tokens[:192].view(6, 32), source)
    return float(F.cross_entropy(logits.double().flatten(0, 1), tokens[1:]))


def ablated(model: Path, data: Path, file: Path, *more: object) -> dict[str, dict[str, Any]]:
    """Rows by the text of their points, without what is None."""
    mlm_train("analyze", "ablate", "--model", model, "--data", data, "--output", file, *SHAPE, *more)
    rows = json.loads(file.read_text())["rows"]
    return {" ".join(str(value) for value in row["point"].values() if value is not None): row for row in rows}


@pytest.mark.parametrize(("kind", "part", "names"), [
    ("base", "ffn", {"ffn": "mlp"}),
    ("memory", "memory", {"memory": "memory_mlp"}),
    ("flex", "memory", {"memory": "memory_mlp", "compute": "compute_mlp"}),
])  # fmt: skip
def test_scaled_and_dropped(kind: str, part: str, names: dict[str, str], data: Path, tmp_path: Path) -> None:
    model = model_of(kind)
    folder, file = export(tmp_path / "model", model), tmp_path / "ablation.json"
    studies = ("--study", "alpha", "layer-alpha", "drop", "--alphas", "0.5,1.2")
    rows = ablated(folder, data, file, *studies, "--plot", tmp_path / "plot.png")
    assert len(rows) == 1 + 2 + 2 * 3 + 3 * len(names)
    wanted = {"exact": (names[part], {})}
    wanted |= {f"alpha {part} {a}": (names[part], dict.fromkeys(range(3), a)) for a in (0.5, 1.2)}
    wanted |= {
        f"layer-alpha {layer} {part} {a}": (names[part], {layer: a}) for layer in range(3) for a in (0.5, 1.2)
    }
    wanted |= {
        f"drop {layer} {each} 0.0": (name, {layer: 0.0}) for each, name in names.items() for layer in range(3)
    }
    assert rows.keys() == wanted.keys()
    for name, (module, scales) in wanted.items():
        other = copy.deepcopy(model)
        for layer, scale in scales.items():
            other.block(layer).get_submodule(module).down_proj.weight.mul_(scale)
        scores = rows[name]["scores"]
        assert scores["loss"] == pytest.approx(loss_of(other, data), rel=1e-5), name
        assert scores["perplexity"] == pytest.approx(float(torch.tensor(scores["loss"]).exp()), rel=1e-5)
    assert (tmp_path / "plot.png").stat().st_size > 1000

    # What is scored already is not scored again, also where a kill left only a part.
    tree = json.loads(file.read_text())
    tree["rows"] = tree["rows"][:4]
    tree["rows"][2]["scores"]["loss"] = 1.0
    file.write_text(json.dumps(tree))
    again = ablated(folder, data, file, *studies)
    assert again.keys() == rows.keys()
    assert [again[name]["scores"]["loss"] == rows[name]["scores"]["loss"] for name in rows].count(False) == 1


TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/words.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""


@pytest.mark.parametrize("kind", ["base", "memory"])
def test_tasks(kind: str, data: Path, tmp_path: Path) -> None:
    """The score of the harness for a model whose weights are changed by hand, at each point."""
    model = model_of(kind)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    words = ["import", "return", "class", "self"]
    lines = [{"question": a, "answer": b} for a, b in itertools.permutations(words, 2)]
    (tasks / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tasks / "words.yaml").write_text(TASK.replace("FOLDER", str(tasks)))

    def with_tokenizer(model: Transformer, name: str) -> Path:
        folder, tokenizer = export(tmp_path / name, model), tokenizer_file(data)
        assert tokenizer is not None
        shutil.copy(tokenizer, folder)
        return folder

    folder = with_tokenizer(model, "model")
    asked = ("--tasks", "local_words", "--include-path", tasks)
    file = tmp_path / "ablation.json"
    rows = ablated(folder, data, file, "--study", "alpha", "--alphas", "0,5", *asked, "--limit", 10)
    name = "mlp" if kind == "base" else "memory_mlp"
    seen = set()
    for row, scale in zip(rows.values(), (1.0, 0.0, 5.0), strict=True):
        other = copy.deepcopy(model)
        for layer in range(3):
            other.block(layer).get_submodule(name).down_proj.weight.mul_(scale)
        changed = with_tokenizer(other, f"scaled-{scale:g}")
        found = load_tasks(["local_words"], tasks).run(MemoryLM(str(changed)), 10)
        for metric in ("perplexity", "acc"):
            true = found.tree["results"]["local_words"][f"{metric},none"]
            assert row["scores"][f"tasks/{metric}/local_words"] == pytest.approx(true, rel=1e-5)
        seen.add(row["scores"]["tasks/perplexity/local_words"])
    assert len(seen) == 3
    mine = ("analyze", "ablate", "--model", folder, "--data", data, "--output", file, *SHAPE)
    assert "differs in its tasks" in refused(*mine, "--study", "alpha")
    assert "have no effect without --tasks" in refused(*mine, "--study", "alpha", "--limit", 3)
    assert "there is no such task" in refused(*mine, "--study", "alpha", "--tasks", "nothing_such")


def test_bad_input(data: Path, tmp_path: Path) -> None:
    folder, other = (export(tmp_path / kind, model_of(kind)) for kind in ("memory", "base"))
    file = tmp_path / "ablation.json"

    def message(model: Path, *words: object) -> str:
        return refused(
            "analyze", "ablate", "--model", model, "--data", data, "--output", file, *SHAPE, *words
        )

    assert "needs the model's table: give --tol" in message(folder, "--study", "rank")
    assert "--tol has no effect" in message(folder, "--study", "drop", "--tol", tmp_path)
    assert "give numbers from 0 on" in message(folder, "--study", "alpha", "--alphas", "x")
    assert "--cuts 1: give shares below 1" in message(folder, "--study", "alpha", "--cuts", "0.5,1")
    ablated(folder, data, file, "--study", "drop")
    before = file.read_bytes()
    assert "differs in its model" in message(other, "--study", "drop")
    file.write_text("no")
    assert "exists and is not a file of `analyze ablate`" in message(folder, "--study", "drop")
    file.write_bytes(before)
