"""Every number of `analyze keys`, against its definition in float64 on the whole matrix."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import silhouette_score

from mlm_train.analyze.keys import clusters
from mlm_train.analyze.keys.clusters import clustering_coefficient, name_of
from mlm_train.analyze.keys.coefficients import LayerKeys
from mlm_train.analyze.keys.folder import KeysFolder
from mlm_train.analyze.keys.totals import Totals, outliers
from mlm_train.checkpoint.reading.logical_folder import find_model
from mlm_train.parallel import runtime
from tests.analyze.models import FLEX, coefficients, export
from tests.commands import TINY, mlm_train, refused, start


def test_c_sums_to_ffn_m(model: Path, true: list[np.ndarray], tmp_path: Path) -> None:
    flex, random = export(tmp_path / "flex", **FLEX)
    weights = load_file(flex / "model.safetensors")
    eps = random.config.rms_norm_eps
    for folder, layer, c in ((model, 1, true[1]), (flex, 1, coefficients(weights, 1, eps))):
        keys = LayerKeys(find_model(folder), layer)
        found = torch.empty(c.shape)
        for ids, rows in keys.chunks(torch.Generator().manual_seed(2)):
            found[ids] = rows
        assert np.abs(found.numpy() - c).max() <= 2e-6 * np.abs(c).max()
    block = random.memory_blocks()[1]
    values = weights["model.layers.1.memory_mlp.down_proj.weight"].double()
    ffn_m = block.ffn_m(random.embed(torch.arange(301))).double()
    assert (torch.from_numpy(c) @ values.T - ffn_m).abs().max() <= 3e-6 * ffn_m.abs().max()


def test_a_training_checkpoint_is_read_like_its_export(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"data.path={data}", f"train.output={run}", "train.steps=3", "memory.mode=unique")
    mlm_train("pretrain", "configs/micro.yaml", *TINY, *words)
    runtime.stop()
    mlm_train("export", run, "--output", tmp_path / "export")
    folders = [tmp_path / "of-run", tmp_path / "of-export"]
    for source, out in zip((run, tmp_path / "export"), folders, strict=True):
        words = ("--layers", "1", "--clusters", "4", "--map-tokens", "0")
        mlm_train("analyze", "keys", "--model", source, "--output", out, *words)
    ours, theirs = (load_file(folder / "layer-001" / "layer.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    c = coefficients(load_file(tmp_path / "export" / "model.safetensors"), 1, 1e-5)
    assert ours["norm"].numpy() == pytest.approx(np.linalg.norm(c, axis=1), rel=1e-5)
    assert KeysFolder(folders[0]).layers == [1] and not len(ours["map_tokens"])


@pytest.mark.parametrize("layer", [0, 1])
def test_numbers_of_tokens_and_keys(keys: Path, true: list[np.ndarray], layer: int) -> None:
    c, folder = true[layer], KeysFolder(keys)
    found = load_file(keys / f"layer-{layer:03d}" / "layer.safetensors")
    order = np.argsort(-np.abs(c), axis=1)[:, :7]
    assert np.array_equal(found["token_keys"].numpy(), order)
    assert found["token_values"].numpy() == pytest.approx(np.take_along_axis(c, order, 1), rel=1e-4, abs=1e-6)
    of_keys = np.argsort(-np.abs(c), axis=0)[:7].T
    assert np.array_equal(found["key_tokens"].numpy(), of_keys)
    assert found["key_values"].numpy() == pytest.approx(np.take_along_axis(c.T, of_keys, 1), rel=1e-4)
    energy = c**2
    effective = energy.sum(1) ** 2 / (c**4).sum(1)
    share = np.take_along_axis(energy, order, 1).sum(1) / energy.sum(1)
    usage = np.bincount(order.flatten(), minlength=c.shape[1])
    assert found["norm"].numpy() == pytest.approx(np.linalg.norm(c, axis=1), rel=1e-5)
    assert found["effective_keys"].numpy() == pytest.approx(effective, rel=1e-4)
    assert found["share"].numpy() == pytest.approx(share, rel=1e-5)
    assert found["mean_abs"].numpy() == pytest.approx(np.abs(c).mean(0), rel=1e-5)
    assert np.array_equal(found["usage"].numpy(), usage)
    statistics = folder.statistics(layer)
    assert statistics.mean_abs == pytest.approx(np.abs(c).mean(), rel=1e-5)
    assert statistics.mean_effective_keys == pytest.approx(effective.mean(), rel=1e-5)
    assert statistics.mean_share == pytest.approx(share.mean(), rel=1e-5)
    assert statistics.unused_keys == (usage == 0).sum()


@pytest.mark.parametrize("layer", [0, 1])
def test_numbers_of_clusters(keys: Path, true: list[np.ndarray], layer: int) -> None:
    c, statistics = true[layer], KeysFolder(keys).statistics(layer)
    found = load_file(keys / f"layer-{layer:03d}" / "layer.safetensors")
    centres, labels = found["centres"].double().numpy(), found["cluster"].numpy()
    distances = np.linalg.norm(c[:, None] - centres, axis=2)
    assert np.array_equal(labels, distances.argmin(1)) and len(centres) == 5
    assert found["distance"].numpy() == pytest.approx(distances.min(1), rel=1e-4)
    within, total = (distances.min(1) ** 2).sum(), ((c - c.mean(0)) ** 2).sum()
    assert statistics.explained == pytest.approx(1 - within / total, rel=1e-4)
    assert statistics.silhouette == pytest.approx(silhouette_score(c, labels), rel=1e-3)
    assert statistics.sample == 601 and 0 < statistics.clustering_coefficient < statistics.explained
    for cluster in statistics.clusters:
        members = np.flatnonzero(labels == cluster.cluster)
        assert cluster.tokens == len(members)
        assert cluster.central == members[distances[members, cluster.cluster].argsort()][:10].tolist()
    assert sum(cluster.tokens for cluster in statistics.clusters) == 601


def test_the_map_and_the_parquets(keys: Path, true: list[np.ndarray]) -> None:
    found = load_file(keys / "layer-001" / "layer.safetensors")
    ids = found["map_tokens"].long()
    assert len(set(ids.tolist())) == 200 and found["map_places"].isfinite().all()
    c = true[1][ids] - true[1][ids].mean(0)
    spectrum = np.linalg.svd(c, compute_uv=False)
    assert found["map_components"].norm(dim=0).numpy() == pytest.approx(spectrum, rel=1e-3)
    tokens = parquet.read_table(keys / "layer-001" / "tokens.parquet")
    assert tokens["token"].to_pylist() == list(range(601)) and tokens["text"].null_count == 601
    assert tokens["keys"].to_pylist() == found["token_keys"].tolist()
    places = np.stack([tokens["x"].to_numpy(), tokens["y"].to_numpy()], 1)
    assert np.array_equal(places[ids], found["map_places"].numpy()) and np.isnan(places).sum() == 2 * 401
    table = parquet.read_table(keys / "layer-001" / "keys.parquet")
    assert table["tokens"].to_pylist() == found["key_tokens"].tolist()
    assert table["usage"].to_pylist() == found["usage"].tolist()
    weights = load_file(keys.parent / "model" / "model.safetensors")
    values = weights["model.layers.1.memory_mlp.down_proj.weight"].double().numpy()
    assert table["value_norm"].to_numpy() == pytest.approx(np.linalg.norm(values, axis=0), rel=1e-5)
    outlier = np.flatnonzero(table["outlier"].to_numpy())
    assert outlier.tolist() == KeysFolder(keys).statistics(1).outlier_keys


def test_outliers_are_those_of_the_definition() -> None:
    means = np.random.default_rng(0).gamma(4.0, size=500)
    means[[3, 77]] = 40.0, 25.0
    median = np.median(means)
    limit = median + 6 * 1.4826 * np.median(np.abs(means - median))
    found = outliers(torch.from_numpy(means)).tolist()
    assert found == np.flatnonzero(means > limit).tolist() and {3, 77} <= set(found)


def test_structure_is_told_from_none() -> None:
    """A mixture of distant groups has a coefficient near 1, independent columns near 0, also skewed ones."""
    random = np.random.default_rng(1)
    groups = random.normal(size=(6, 20))[random.integers(6, size=900)] * 9 + random.normal(size=(900, 20))
    skewed = random.standard_exponential((900, 20)) ** 3
    assert clustering_coefficient(groups.astype(np.float32), 6, 0) > 0.9
    assert abs(clustering_coefficient(skewed.astype(np.float32), 6, 0)) < 0.1
    rows = skewed.astype(np.float32)
    mixed = np.random.default_rng(0).permuted(rows, axis=0)
    left = []  # within / total, by hand from the labels
    for one in (rows, mixed):
        labels = MiniBatchKMeans(6, random_state=0, n_init=1, batch_size=1024).fit(one).labels_
        parts = [one[labels == label].astype(np.float64) for label in np.unique(labels)]
        within = sum(((part - part.mean(0)) ** 2).sum() for part in parts)
        left.append(within / ((one - one.mean(0, dtype=np.float64)) ** 2).sum())
    assert clustering_coefficient(rows, 6, 0) == pytest.approx(1 - left[0] / left[1], abs=0.01)
    equal = np.ones((30, 4), np.float32)
    assert clustering_coefficient(equal, 2, 0) == 0 and clusters.silhouette(equal, np.zeros(30)) is None


def test_tokens_without_coefficients_count_nothing() -> None:
    totals = Totals(4, 3, 2)
    totals.add(torch.tensor([2, 0]), torch.tensor([[0.0, 0, 0], [1, -2, 0]]))
    totals.add(torch.tensor([1, 3]), torch.tensor([[0.0, 0, 3], [1e-30, 0, 0]]))
    assert totals.effective.tolist() == pytest.approx([25 / 17, 1, 0, 0], abs=1e-6)
    assert totals.share.tolist() == [1, 1, 0, 0]
    assert totals.key_values[:, 0].tolist() == [1, -2, 3] and totals.key_tokens[:, 0].tolist() == [0, 0, 1]


def test_names_say_what_a_cluster_has_in_common() -> None:
    assert name_of([" Paris", " Rome", " Oslo"], [" Rome"]) == "leading space, capitalised: ␣Rome"
    assert name_of(["12", "7", "x", "4", "5"], ["7", "12"]) == "digits: 7 12"
    assert name_of(["да", "нет"], ["да"]) == "Cyrillic: да"
    assert name_of(["\n\n", " "], ["\n\n"]) == "white space: \\n\\n"
    assert name_of(["){", "->"], ["->"]) == "punctuation: ->" and name_of([], ["#3"]) == "#3"


def test_a_killed_analysis_goes_on_with_the_next_layer(model: Path, keys: Path, tmp_path: Path) -> None:
    out = tmp_path / "keys"
    words = ("--model", model, "--output", out, "--top-k", 7, "--clusters", 5, "--map-tokens", 0)
    process = start("analyze", "keys", *words)
    while not (out / "layer-000").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = {path.name: path.stat().st_mtime_ns for path in (out / "layer-000").iterdir()}
    mlm_train("analyze", "keys", *words)
    assert first == {path.name: path.stat().st_mtime_ns for path in (out / "layer-000").iterdir()}
    ours, theirs = (load_file(folder / "layer-001" / "layer.safetensors") for folder in (out, keys))
    assert all(torch.equal(ours[name], theirs[name]) for name in ("token_keys", "key_tokens", "norm"))
    assert {path.name for path in out.iterdir()} == {"analysis.json", "layer-000", "layer-001"}


def test_bad_input(model: Path, keys: Path, tmp_path: Path) -> None:
    base, _ = export(tmp_path / "base", kind="base", num_hidden_layers=1)
    other, _ = export(tmp_path / "other", num_hidden_layers=2, rms_norm_eps=1e-6)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    same = ("--top-k", 7, "--clusters", 5, "--map-tokens", 200)
    new = ("--output", tmp_path / "new")
    for words, expected in (
        (("--model", base, *new), "is a base model and has no FFN-M"),
        (("--model", model, *new, "--layers", "2"), "there is no layer 2"),
        (("--model", model, *new, "--clusters", 602), "--clusters 602: give 2 to 601"),
        (("--model", model, *new, "--top-k", 0), "--top-k 0: give at least 1"),
        (("--model", model, *new, "--map-tokens", 20001), "give 0 to 20000"),
        (("--model", model, "--output", full), "exists already"),
        (("--model", model, "--output", keys, "--clusters", 6), "was begun with --top-k 7"),
        (("--model", other, "--output", keys, *same), "is the analysis of another model"),
    ):
        assert expected in refused("analyze", "keys", *words), words
    assert not (tmp_path / "new").exists()
    damaged = shutil.copytree(keys, tmp_path / "damaged")
    (damaged / "layer-001" / "layer.safetensors").write_bytes(b"x")
    assert "is damaged" in refused("analyze", "token", damaged, "#3")
    (damaged / "analysis.json").write_text(json.dumps({"format": "other"}))
    assert "Field required" in refused("analyze", "token", damaged, "#3")


def test_without_scikit_learn(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused("analyze", "keys", "--model", model, "--output", tmp_path / "keys")
    assert line == "mlm-train: analyze keys needs scikit-learn: pip install 'mlm-train[analyze]'"
