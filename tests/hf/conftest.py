"""Exports with random weights, one per kind of model, as transformers loads them."""

from pathlib import Path
from typing import Any

import pytest

from mlm_train.checkpoint.hf.files import SpecialTokens
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from tests.inference.test_decode import random_model

KINDS: dict[str, dict[str, Any]] = {
    "base": {"kind": "base", "num_key_value_heads": 2},
    "memory": {"kind": "memory", "num_key_value_heads": 1, "memory_scale": [1.0, 0.5, 0.0]},
    "memory tied": {"kind": "memory", "tie_word_embeddings": True, "head_dim": 12, "rope_theta": 500.0},
    "flex": {"kind": "flex", "flex_beta": 3, "num_key_value_heads": 2},
    "flex linear": {
        "kind": "flex", "flex_beta": 1, "compute_form": "linear", "compute_input": "post_attention",
    },
}  # fmt: skip


def export(folder: Path, model: Transformer, **options: Any) -> Path:
    """The model's export, with end tokens that greedy decoding does not meet."""
    tokens = SpecialTokens(None, (96,), 0)
    write_folder(folder, model.config, named_pieces(model), tokens=tokens, **options)
    return folder


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    """Our model."""
    return random_model(**KINDS[request.param])


@pytest.fixture
def exported(model: Transformer, tmp_path: Path) -> Path:
    """Its export."""
    return export(tmp_path / "export", model)
