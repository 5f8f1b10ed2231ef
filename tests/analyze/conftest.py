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
    """analyze keys of both layers, one with the default settings of samples: all 601 tokens."""
    out = model.parent / "keys"
    mlm_train("analyze", "keys", "--model", model, "--out", out, "--top-k", 7, "--clusters", 5)
    return out


@pytest.fixture(scope="package")
def true(model: Path, keys: Path) -> list[np.ndarray]:
    """c of each layer, float64 [vocabulary, keys], computed apart."""
    weights = load_file(model / "model.safetensors")
    assert KeysFolder(keys).layers == [0, 1]
    return [coefficients(weights, layer, 1e-5) for layer in range(2)]
