"""An analysis of a random model by the command, as its user runs it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mlm_train.analyze.keys.folder import KeysFolder
from tests.analyze.models import coefficients, export
from tests.commands import mlm_train


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = export(tmp_path_factory.mktemp("analyze") / "model", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="package")
def keys(model: Path) -> Path:
    """analyze keys of both layers, with 200 of 601 tokens on the map."""
    out = model.parent / "keys"
    words = ("--top-k", 7, "--clusters", 5, "--map-tokens", 200)
    mlm_train("analyze", "keys", "--model", model, "--output", out, *words)
    return out


@pytest.fixture(scope="package")
def true(model: Path, keys: Path) -> list[np.ndarray]:
    """c of each layer, float64 [vocabulary, keys], computed apart."""
    weights = load_file(model / "model.safetensors")
    assert KeysFolder(keys).layers == [0, 1]
    return [coefficients(weights, layer, 1e-5) for layer in range(2)]
