"""Exports: equal to transformers, exact round trips, clear errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_train.checkpoint.hf import folder as hf_folder
from mlm_train.checkpoint.hf.files import SpecialTokens
from mlm_train.checkpoint.hf.folder import open_tensors, read_config, write_folder
from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.memory import make_source
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer

SHAPES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
}
KINDS = {
    "base": {"kind": "base"},
    "base tied gqa": {"kind": "base", "tie_word_embeddings": True, "num_key_value_heads": 2},
    "base head_dim": {"kind": "base", "head_dim": 12, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    "memory": {"kind": "memory", "memory_scale": [1.0, 0.5, 0.0]},
    "memory tied": {"kind": "memory", "tie_word_embeddings": True},
    "flex": {"kind": "flex", "flex_beta": 3},
    "flex linear": {"kind": "flex", "flex_beta": 1, "compute_form": "linear"},
    "flex post": {"kind": "flex", "compute_intermediate_size": 11, "compute_input": "post_attention"},
}


def random_model(**fields: Any) -> Transformer:
    """Weights whose logits are of order one, norms away from one."""
    torch.manual_seed(7)
    model = Transformer(ModelConfig(**{**SHAPES, **fields})).requires_grad_(False).eval()
    for name, weight in named_pieces(model):
        norm = name.endswith("norm.weight")
        weight.normal_(1.0 if norm else 0.0, 0.2)
    return model


def write(path: Path, model: Transformer, **options: Any) -> Path:
    write_folder(path, model.config, named_pieces(model), **options)
    return path


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, make_source("unique", model.memory_blocks()) if model.config.has_memory else None)


IDS = torch.arange(60).view(2, 30) * 31 % 97


@pytest.mark.parametrize("case", [name for name in KINDS if name.startswith("base")])
def test_base_is_a_llama(tmp_path: Path, case: str) -> None:
    from transformers import LlamaForCausalLM

    model = random_model(**KINDS[case])
    folder = write(tmp_path / "export", model, tokens=SpecialTokens(eos=(3,)))
    theirs, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = logits(load_model(folder), IDS)
    assert ours.std() > 0.5
    assert (theirs(IDS).logits - ours).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert torch.equal(logits(again, IDS), ours)


@pytest.mark.parametrize("case", KINDS)
def test_round_trip(tmp_path: Path, case: str) -> None:
    model = random_model(**KINDS[case])
    write(tmp_path / "one", model)
    write(tmp_path / "many", model, shard_bytes=9000)
    assert (tmp_path / "many" / hf_folder.INDEX).exists()
    for name in ("one", "many"):
        again = load_model(tmp_path / name)
        assert again.config.model_copy(update={"flex_beta": model.config.flex_beta}) == model.config
        assert not again.training
        assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert hf_folder.fingerprint(tmp_path / "one") != hf_folder.fingerprint(tmp_path / "many")


def test_same_weights_same_bytes(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    for name in ("a", "b"):
        write(tmp_path / name, random_model(), beside=[tokenizer], dtype=torch.bfloat16)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["config.json", MANIFEST, "model.safetensors", "tokenizer.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert hf_folder.fingerprint(tmp_path / "a") == hf_folder.fingerprint(tmp_path / "b")
    assert load_model(tmp_path / "a").embed_tokens.weight.dtype == torch.float32


def test_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "export", random_model(**KINDS["flex"]))
    read: list[str] = []
    whole = hf_folder.FolderTensors.tensor

    def spy(self: hf_folder.FolderTensors, name: str) -> torch.Tensor:
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(hf_folder.FolderTensors, "tensor", spy)
    model = load_model(folder, with_memory=False)
    assert read and not any("memory_" in name for name in read)
    assert not any("memory_" in name for name, _ in model.named_parameters())


def test_lazy_rows(tmp_path: Path) -> None:
    model = random_model()
    folder = write(tmp_path / "export", model, shard_bytes=9000)
    with open_tensors(folder) as tensors:
        assert tensors.shape("model.embed_tokens.weight") == (97, 32)
        rows = tensors.rows("model.embed_tokens.weight", 5, 9)
        assert torch.equal(rows, model.embed_tokens.weight[5:9])
        with pytest.raises(UserError, match=r"model\.nothing"):
            tensors.tensor("model.nothing")


def change(folder: Path, **fields: Any) -> None:
    """Replace config.json, as if the folder had been written with it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    tree = json.loads((folder / "config.json").read_text())
    tree.update(fields)
    file = folder / "config.json"
    file.write_text(json.dumps({key: value for key, value in tree.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"memory_scale": "absent"}, "memory_scale is missing"),
        ({"memory_scale": [1.0]}, "memory_scale"),
        ({"kind": "base"}, "kind='base'"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 98}, r"model\.embed_tokens\.weight has shape \[97, 32\], not \[98, 32\]"),
        ({"num_hidden_layers": 2, "memory_scale": [1, 1]}, r"model\.layers\.2\..* does not belong"),
        (
            {"num_hidden_layers": 4, "memory_scale": [1, 1, 1, 1]},
            r"model\.layers\.3\.input_layernorm\.weight is missing",
        ),
    ],
)
def test_bad_config(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "export", random_model())
    change(folder, **fields)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path / "nothing")
    folder = write(tmp_path / "export", random_model(), shard_bytes=9000)
    (folder / MANIFEST).unlink()
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    for damaged in (whole[:-5], whole[:4], b"\xff" * len(whole)):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{shard.name} is damaged") as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is listed in"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_config(folder)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = random_model()
    folder = write(tmp_path / "export", model)
    with pytest.raises(UserError, match="nothing is overwritten"):
        write(folder, model)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", model)
    for bad, message in (
        (dict(list(named_pieces(model))[:-1]), r"lm_head\.weight is missing"),
        ({"model.other": torch.zeros(1)}, r"model\.other does not belong"),
        ({"model.embed_tokens.weight": torch.zeros(1)}, r"shape \[1\], not"),
    ):
        with pytest.raises(UserError, match=message):
            write_folder(tmp_path / "bad", model.config, bad)
    with pytest.raises(UserError, match=r"no\.model"):
        write(tmp_path / "bad", model, beside=[tmp_path / "no.model"])
    assert not [file.name for file in tmp_path.iterdir() if "bad" in file.name]
