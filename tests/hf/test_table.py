"""A ToL in place of FFN-M, in transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mlm_train.hf  # noqa: F401 - registers the model
from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.errors import UserError
from mlm_train.model.transformer import Transformer
from tests.hf.conftest import KINDS, export
from tests.inference.test_decode import PROMPT, random_model
from tests.partitions import write_table


@pytest.fixture(params=["memory tied", "flex"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(**KINDS[request.param])


@pytest.fixture
def tol(model: Transformer, exported: Path, tmp_path: Path) -> Path:
    """Its ToL in fp32."""
    return write_table(tmp_path / "tol", model, exported, [50])


def test_looked_up_equals_computed(exported: Path, tol: Path) -> None:
    computed = AutoModelForCausalLM.from_pretrained(exported)
    loaded, said = AutoModelForCausalLM.from_pretrained(exported, tol=tol, output_loading_info=True)
    assert not any(said.values())
    switched = AutoModelForCausalLM.from_pretrained(exported).use_tol(str(tol))
    ids = torch.randint(0, 97, (2, 30))
    tokens = {"max_new_tokens": 20, "do_sample": False}
    expected, logits = computed.generate(torch.tensor([PROMPT]), **tokens), computed(ids).logits
    for looked_up in (loaded, switched):
        assert not any("memory" in name for name, _ in looked_up.named_parameters())
        assert (looked_up(ids).logits - logits).abs().max() <= 3e-6 * logits.abs().max()
        assert torch.equal(looked_up.generate(torch.tensor([PROMPT]), **tokens), expected)
        with pytest.raises(ValueError, match="row per token"):
            looked_up(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(UserError, match="in place of FFN-M"):
            looked_up.save_pretrained(tol.parent / "saved")
    half = AutoModelForCausalLM.from_pretrained(exported, tol=tol, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


def test_weights_of_ffn_m_need_not_be_there(exported: Path, tol: Path) -> None:
    (exported / MANIFEST).unlink()
    weights = load_file(exported / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".memory_" not in name}
    save_file(kept, exported / "model.safetensors", metadata={"format": "pt"})
    _, said = AutoModelForCausalLM.from_pretrained(exported, tol=tol, output_loading_info=True)
    assert not any(said.values())


def test_a_table_of_another_model_is_refused(
    model: Transformer, exported: Path, tol: Path, tmp_path: Path
) -> None:
    for name, fields in (("wide", {"vocab_size": 98}), ("same", {})):
        config = model.config.model_copy(update=fields)
        other = Transformer(config).requires_grad_(False)
        table = write_table(tmp_path / name, other, export(tmp_path / f"{name} export", other), [50])
        says = "vocab_size" if fields else "was built from another model"
        with pytest.raises(UserError, match=says):
            AutoModelForCausalLM.from_pretrained(exported, tol=table)
        loaded = AutoModelForCausalLM.from_pretrained(exported)
        with pytest.raises(UserError, match=says):
            loaded.use_tol(table)
        assert "memory_mlp" in str(loaded)  # as it was
    shutil.rmtree(tol)
    with pytest.raises(UserError, match="does not exist"):
        AutoModelForCausalLM.from_pretrained(exported, tol=tol)
