"""Small models with random weights as exports, and what is computed of them independently, in float64."""

from pathlib import Path

import numpy as np
import torch

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from tests.tol.conftest import random_model

FLEX = {"kind": "flex", "flex_beta": 2, "intermediate_size": 36, "vocab_size": 301, "num_hidden_layers": 2}


def export(folder: Path, **fields: object) -> tuple[Path, Transformer]:
    """An export of a random model, and the model."""
    model = random_model(**fields)
    write_folder(folder, model.config, named_pieces(model))
    return folder, model


def coefficients(weights: dict[str, torch.Tensor], layer: int, eps: float) -> np.ndarray:
    """c of all tokens in a layer from an export's tensors, float64 [vocabulary, keys]."""
    of = {name: tensor.double().numpy() for name, tensor in weights.items()}
    at = f"model.layers.{layer}."
    x0 = of["model.embed_tokens.weight"]
    q = x0 / np.sqrt((x0**2).mean(1, keepdims=True) + eps) * of[f"{at}memory_layernorm.weight"]
    gate = q @ of[f"{at}memory_mlp.gate_proj.weight"].T
    return q @ of[f"{at}memory_mlp.up_proj.weight"].T * gate / (1 + np.exp(-gate))
