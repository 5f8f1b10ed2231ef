"""A build computes FFN-M bit-identically to the model."""

from pathlib import Path

import pytest
import torch

from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build.row_source import EMBEDDING, ComputedRows, ffn_m_weights
from mlm_train.tol.format.codec import TORCH_DTYPE
from mlm_train.tol.format.schemes import PlainDtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_as_the_model_does(model: Transformer, exported: Path, dtype: PlainDtype) -> None:
    layers = range(model.config.num_hidden_layers)
    with open_model(exported) as opened:
        weights = ffn_m_weights(opened.tensors, opened.config, layers, dtype)
        source = ComputedRows(opened, dict(zip(layers, weights, strict=True)), dtype)
        found = torch.stack(list(source.values(5, 207)))
        x0 = opened.tensor(EMBEDDING)[5:207].float()
    with torch.autocast("cpu", TORCH_DTYPE[dtype], enabled=dtype != "float32"):
        true = torch.stack([block.ffn_m(x0) for block in model.layers.values()])
    assert found.dtype == true.dtype == TORCH_DTYPE[dtype] and true.abs().max() > 0.1
    assert found.equal(true)
    with torch.enable_grad(), torch.autocast("cpu", TORCH_DTYPE[dtype], enabled=dtype != "float32"):
        trained = torch.stack([block.ffn_m(x0.clone().requires_grad_()) for block in model.layers.values()])
    assert trained.requires_grad and trained.equal(true)  # as in training
