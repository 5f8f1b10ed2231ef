"""Questions to the folder of an analysis, against float64; and TensorBoard's projector."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from safetensors.torch import load_file
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from mlm_train.analyze.keys.folder import KeysFolder
from mlm_train.parallel import runtime
from tests.analyze.models import export
from tests.commands import TINY, mlm_train, refused, scalars


def asked(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    capsys.readouterr()
    mlm_train("analyze", *words, "--json")
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def pairs(items: object, name: str) -> list[tuple[int, float]]:
    assert isinstance(items, list)
    return [(item["token"], pytest.approx(item[name], rel=1e-4, abs=1e-5)) for item in items]


def test_a_token(keys: Path, true: list[np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "token", keys, "#17", "--top", 4)
    assert found["token"] == 17 and found["text"] is None
    for layer, c in zip(found["layers"], true, strict=True):  # type: ignore[call-overload]
        best = np.argsort(-np.abs(c[17]))[:4]
        assert [key["key"] for key in layer["keys"]] == best.tolist()
        assert [key["c"] for key in layer["keys"]] == pytest.approx(c[17, best], rel=1e-4)
        cut = np.where(np.argsort(np.argsort(-np.abs(c), 1), 1) < 7, c, 0.0)  # the stored ones
        cosines = cut @ cut[17] / np.linalg.norm(cut, axis=1) / np.linalg.norm(cut[17])
        order = [token for token in np.argsort(-cosines) if token != 17][:4]
        assert pairs(layer["neighbours"], "cosine") == [(token, cosines[token]) for token in order]
        labels = load_file(keys / f"layer-{layer['layer']:03d}" / "layer.safetensors")["cluster"]
        assert layer["cluster"]["cluster"] == labels[17]


def test_a_key_and_what_it_promotes(
    model: Path, keys: Path, true: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    found = asked(capsys, "key", keys, 1, 9, "--top", 5)
    column = true[1][:, 9]
    order = np.argsort(-np.abs(column))[:5]
    assert pairs(found["tokens"], "c") == [(token, column[token]) for token in order]
    of = {name: tensor.double().numpy() for name, tensor in load_file(model / "model.safetensors").items()}
    value = of["model.layers.1.memory_mlp.down_proj.weight"][:, 9] * of["model.norm.weight"]
    logits = of["lm_head.weight"] @ value
    for name, order in (("promotes", np.argsort(-logits)[:5]), ("suppresses", np.argsort(logits)[:5])):
        assert pairs(found[name], "logit") == [(token, logits[token]) for token in order]


def test_similar_tokens(keys: Path, true: list[np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "similar", keys, "#40", "--layer", 0, "--top", 6)
    unit = true[0] / np.linalg.norm(true[0], axis=1, keepdims=True)
    cosines = unit @ unit[40]
    order = [token for token in np.argsort(-cosines) if token != 40][:6]
    assert pairs(found["similar"], "cosine") == [(token, cosines[token]) for token in order]


def test_bad_questions(model: Path, keys: Path, tmp_path: Path) -> None:
    other, _ = export(tmp_path / "other", num_hidden_layers=2, vocab_size=600)
    moved = shutil.copytree(model, tmp_path / "moved")
    (tmp_path / "model").mkdir()
    lost = shutil.copytree(keys, tmp_path / "lost")
    index = json.loads((lost / "analysis.json").read_text())
    (lost / "analysis.json").write_text(json.dumps(index | {"model": str(tmp_path / "gone")}))
    for words, expected in (
        (("token", keys, "#601"), "ids are #0 to #600"),
        (("token", keys, " Paris"), "no token has this text"),
        (("token", model, "#1"), "analysis.json does not exist"),
        (("token", keys, "#1", "--top", 0), "--top 0: give at least 1"),
        (("key", keys, 2, 0), "has no layer 2; it has [0, 1]"),
        (("key", keys, 1, 44), "there is no such key; keys are 0 to 43"),
        (("key", keys, 1, 4, "--model", other), "sizes differ"),
        (("similar", lost, "#1", "--layer", 1), "give it as --model"),
        (("similar", keys, "#1", "--layer", 5), "has no layer 5"),
        (("projector", keys, "--layer", 1, "--output", model), "exists already"),
    ):
        assert expected in refused("analyze", *words), words
    mlm_train("analyze", "similar", lost, "#1", "--layer", 1, "--model", moved)


def test_another_model_of_the_same_sizes_is_found_out(keys: Path, tmp_path: Path) -> None:
    other, changed = export(tmp_path / "first", num_hidden_layers=2)
    changed.memory_blocks()[1].memory_mlp.down_proj.weight[0, 0] += 1
    from mlm_train.checkpoint.hf.folder import write_folder
    from mlm_train.model.logical import named_pieces

    write_folder(tmp_path / "other", changed.config, named_pieces(changed))
    line = refused("analyze", "key", keys, 1, 4, "--model", tmp_path / "other")
    assert "is not the model of" in line and "layer 1 differs" in line
    mlm_train("analyze", "key", keys, 1, 4, "--model", other)


def test_tokens_by_text_the_projector_and_the_losses_of_a_report(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "keys"
    words = (f"data.path={data}", f"train.output={run}", "train.steps=1", "schedule.warmup_steps=0")
    mlm_train("pretrain", "configs/micro.yaml", *TINY, *words)
    runtime.stop()
    mlm_train("analyze", "keys", "--model", run, "--output", out, "--clusters", 4, "--map-tokens", 60)
    texts = KeysFolder(out).texts
    assert len(texts) == 512
    (token,) = (number for number, text in enumerate(texts) if text == " self")
    found = asked(capsys, "token", out, " self")
    assert (found["token"], found["text"]) == (token, " self")
    several = next(text for text in texts if text is not None and texts.count(text) > 1)
    assert "tokens have this text" in refused("analyze", "token", out, several)
    mlm_train("analyze", "projector", out, "--layer", 1, "--output", tmp_path / "projector")
    config = text_format.Parse(
        (tmp_path / "projector" / "projector_config.pbtxt").read_text(), ProjectorConfig()
    )
    tensors = load_file(out / "layer-001" / "layer.safetensors")
    for one, name in zip(config.embeddings, ("map_components", "map_places"), strict=True):
        rows = np.loadtxt(tmp_path / "projector" / one.tensor_path, delimiter="\t")
        assert rows == pytest.approx(tensors[name].numpy(), rel=1e-4, abs=1e-4)
    lines = (tmp_path / "projector" / one.metadata_path).read_text().splitlines()
    assert len(lines) == 61 and all(line.count("\t") == 3 for line in lines)
    assert [int(line.partition("\t")[0]) for line in lines[1:]] == tensors["map_tokens"].tolist()

    page = tmp_path / "page.html"
    mlm_train("analyze", "report", "--model", run, "--keys", out, "--output", page)
    text = page.read_text(encoding="utf-8")
    figures = re.search(r'id="figures">(.*)</script>', text)
    assert figures is not None
    losses = {trace["name"]: (trace["x"], trace["y"]) for trace in json.loads(figures[1])[0]["data"]}
    for tag in ("train/loss", "validation/loss"):
        assert losses[f"{run} {tag}"] == ([1], [scalars(run, tag)[1]])
    assert f"<td>{math.exp(scalars(run, 'validation/loss')[1]):.4f} at step 1</td>" in text
