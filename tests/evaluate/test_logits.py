"""Logits of given tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.errors import UserError
from mlm_train.evaluate.logits import dump_logits
from mlm_train.memory import make_source
from mlm_train.model.logical import named_pieces
from tests.inference.test_decode import random_model


@pytest.mark.parametrize("kind", ["base", "memory"])
def test_logits(tmp_path: Path, kind: str) -> None:
    model = random_model(kind=kind)
    write_folder(tmp_path / "export", model.config, named_pieces(model))
    tokens = torch.randint(0, 97, (3, 40))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    dump_logits(tmp_path / "export", tmp_path / "tokens.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == {"tokens", "logits"} and torch.equal(out["tokens"], tokens)
    true = model(tokens, make_source("per_token", model.memory_blocks()) if kind == "memory" else None)
    assert out["logits"].dtype == torch.float32
    assert (out["logits"] - true).abs().max() <= 2e-6 * true.abs().max()


def test_bad_input(tmp_path: Path) -> None:
    model = random_model(kind="memory")
    write_folder(tmp_path / "export", model.config, named_pieces(model))
    file, out = tmp_path / "tokens.safetensors", tmp_path / "out.safetensors"
    cases = [
        ({"ids": torch.zeros(1, 2, dtype=torch.int64)}, "no tensor 'tokens'"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, r"int64 \[batch, sequence\]"),
        ({"tokens": torch.zeros(1, 2)}, r"int64 \[batch, sequence\]"),
        ({"tokens": torch.tensor([[1, 97]])}, "id 97"),
        ({"tokens": torch.tensor([[1, -5]])}, "id -5"),
        ({"tokens": torch.zeros(1, 41, dtype=torch.int64)}, "max_position_embeddings=40"),
    ]
    for tensors, message in cases:
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            dump_logits(tmp_path / "export", file, out)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a valid safetensors file"):
        dump_logits(tmp_path / "export", file, out)
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        dump_logits(tmp_path / "export", file, out)
    out.touch()
    with pytest.raises(UserError, match="exists"):
        dump_logits(tmp_path / "export", file, out)
    for file in ("export/new.safetensors", "none/new.safetensors"):
        with pytest.raises(UserError, match=r"must hold no other files|folder that exists"):
            dump_logits(tmp_path / "export", tmp_path / "no", tmp_path / file)
