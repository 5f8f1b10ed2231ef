"""A ToL in place of FFN-M, in transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mlm_train.hf  # registers the model
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


@pytest.mark.parametrize("kind", ["memory", "flex"])
def test_long_greedy_texts_are_those_without_a_table(kind: str, tmp_path: Path) -> None:
    """20 prompts of all lengths, 256 tokens each, in our decoder and in transformers."""
    model = random_model(**KINDS[kind] | {"max_position_embeddings": 300})
    exported = export(tmp_path / "export", model)
    tol = write_table(tmp_path / "tol", model, exported, [50])
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in range(3, 43, 2)]
    computed, looked_up = (
        mlm_train.load(exported, table, skip_tokenizer=True).generate(
            prompts, batch_size=20, max_new_tokens=256, ignore_eos=True
        )
        for table in (None, tol)
    )
    texts = [completion.ids for completion in computed]
    assert [completion.ids for completion in looked_up] == texts
    assert {len(text) for text in texts} == {256}
    rows = [[0] * (41 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (41 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    theirs = AutoModelForCausalLM.from_pretrained(exported, tol=tol)
    theirs.generation_config.eos_token_id = None
    found = theirs.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=256, do_sample=False
    )
    assert found[:, 41:].tolist() == texts


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


@pytest.mark.parametrize("model", ["flex"], indirect=True)
def test_a_table_with_embeddings(model: Transformer, exported: Path, tol: Path, tmp_path: Path) -> None:
    """The embedding is not loaded, or dropped; logits are to the bit those with its weights."""
    table = write_table(tmp_path / "embedded", model, exported, [50], with_embeddings=True)
    (exported / MANIFEST).unlink()  # the embedding need not be there
    weights = load_file(exported / "model.safetensors")
    looked_up = AutoModelForCausalLM.from_pretrained(exported, tol=tol)
    switched = AutoModelForCausalLM.from_pretrained(exported).use_tol(table)
    x0 = weights.pop("model.embed_tokens.weight")
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    loaded, said = AutoModelForCausalLM.from_pretrained(exported, tol=table, output_loading_info=True)
    assert not any(said.values())
    ids = torch.randint(0, 97, (2, 30))
    tokens = {"max_new_tokens": 20, "do_sample": False}
    for bare in (loaded, switched):
        with pytest.raises(UserError, match="has no embeddings, and the model has none either"):
            bare.use_tol(tol)
        assert not any("embed" in name for name, _ in bare.named_parameters())
        assert torch.equal(bare(ids).logits, looked_up(ids).logits)
        prompt = torch.tensor([PROMPT])
        assert torch.equal(bare.generate(prompt, **tokens), looked_up.generate(prompt, **tokens))
        assert torch.equal(bare.get_input_embeddings()(ids), x0[ids])
        with pytest.raises(ValueError, match="row per token"):
            bare(inputs_embeds=torch.zeros(1, 3, 32))
    assert torch.equal(loaded.bfloat16()(ids).logits, looked_up.bfloat16()(ids).logits)
    assert mlm_train.load(exported, table).logits(PROMPT).isfinite().all()
    with pytest.raises(UserError, match=r"tensor model.embed_tokens.weight is missing"):
        mlm_train.load(exported, tol)
