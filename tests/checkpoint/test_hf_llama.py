"""config.json of a Llama: import reads it like transformers, or rejects a field by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlm_train.checkpoint.hf.config import read_config
from mlm_train.checkpoint.reading.logical_folder import load_model
from tests.checkpoint.test_hf_folder import logits
from tests.checkpoint.test_hf_import import IDS, llama
from tests.commands import mlm_train, refused

ABSENT = "absent"
THETA = 5e5  # of the folder that is changed

TAKEN: list[dict[str, Any]] = [
    # rotary base: rope_scaling, rope_parameters, rope_theta, 10000, in this order
    {"rope_theta": 100.0},
    {"rope_theta": None},
    {"rope_parameters": ABSENT},
    {"rope_parameters": ABSENT, "rope_theta": 300.0},
    {"rope_parameters": None, "rope_theta": 300.0},
    {"rope_parameters": {}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_theta": 70.0}, "rope_theta": 300.0},
    {"rope_parameters": {"type": "default", "rope_theta": 70.0}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 300.0},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {}, "rope_theta": 300.0},
    {"rope_scaling": None, "rope_theta": 300.0},
    {"rope_parameters": {"rope_theta": 70.0, "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}, "rope_theta": 300.0},
    # what may be left out, or be null
    {"num_key_value_heads": None},
    {"num_key_value_heads": ABSENT, "head_dim": ABSENT},
    {"head_dim": None},
    {"rms_norm_eps": ABSENT, "max_position_embeddings": ABSENT, "tie_word_embeddings": ABSENT},
    {"attention_bias": ABSENT, "mlp_bias": ABSENT, "hidden_act": ABSENT, "initializer_range": ABSENT},
    {"architectures": ABSENT, "bos_token_id": ABSENT, "eos_token_id": ABSENT},
    # other names, and what has no effect on a Llama
    {"hidden_act": "swish"},
    {"pretraining_tp": 4, "use_cache": False, "attention_dropout": 0.5, "num_labels": 3},
    {"layer_types": ["full_attention"] * 4, "is_causal": True, "quantization_config": None},
    {"sliding_window": None, "logit_scale": 4.0, "is_decoder": False},
    {"dtype": ABSENT, "torch_dtype": "float16"},
    {"dtype": "float32", "torch_dtype": "nonsense"},
    {"eos_token_id": [3, 7, 3], "pad_token_id": 5},
]  # fmt: skip

REFUSED: list[dict[str, Any]] = [
    {"model_type": "mistral"},
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"architectures": ["LlamaModel"]},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {}},
    {"sliding_window": 4},
    {"attention_chunk_size": 4},
    {"layer_types": ["sliding_attention"] * 4},
    {"is_causal": False},
    {"per_layer_config": {"0": {"intermediate_size": 44}}},
    {"transformers_weights": "other.safetensors"},
    {"dtype": "nonsense"},
    {"dtype": "float8_e4m3fn"},
    {"torch_dtype": "int8", "dtype": ABSENT},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}},
    {"rope_parameters": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": None},
    {"rope_parameters": "default"},
    {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}, "layer_types": ["full_attention"] * 4},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rms_norm_eps": None},
    {"rms_norm_eps": "1e-6"},
    {"num_hidden_layers": "4"},
    {"num_hidden_layers": 4.0},
    {"tie_word_embeddings": None},
    {"initializer_range": 2.0},
    {"eos_token_id": "2"},
    {"eos_token_id": [2, None]},
    {"bos_token_id": True},
    {"head_dim": 7},
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers saves it."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    llama(folder)
    return folder


def changed(folder: Path, fields: dict[str, Any]) -> Path:
    """The same folder with another config.json."""
    file = folder / "config.json"
    tree = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in tree.items() if value != ABSENT}))
    return folder


def theirs(folder: Path) -> torch.Tensor:
    """Logits of IDS in transformers."""
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def name_of(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())


@pytest.mark.parametrize("fields", TAKEN, ids=name_of)
def test_what_is_taken_is_taken_as_transformers_takes_it(
    good: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = changed(Path(shutil.copytree(good, tmp_path / "llama")), fields)
    expected = theirs(folder)
    mlm_train("import", folder, "--output", tmp_path / "import")
    with torch.no_grad():
        ours = logits(load_model(tmp_path / "import"), IDS)
    assert expected.std() > 0.5 and (ours - expected).abs().max() <= 1e-5
    assert (theirs(tmp_path / "import") - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("fields", REFUSED, ids=name_of)
def test_what_is_not_is_refused_by_name(good: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = changed(Path(shutil.copytree(good, tmp_path / "llama")), fields)
    line = refused("import", folder, "--output", tmp_path / "import")
    assert str(folder / "config.json") in line and next(iter(fields)) in line
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config, expected = read_config(tmp_path), LlamaConfig()
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(expected, name), name
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.init_std == expected.initializer_range


def test_of_two_sets_of_weights_that_of_transformers_is_read(tmp_path: Path) -> None:
    """model.safetensors is used, even beside shards and their index."""
    folder = tmp_path / "llama"
    llama(folder, "30KB")
    llama(tmp_path / "one")
    file = "model.safetensors"
    tensors = load_file(tmp_path / "one" / file)
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    assert (logits(load_model(folder), IDS) - theirs(folder)).abs().max() <= 1e-5


def test_an_adapter_beside_the_weights_is_refused(good: Path, tmp_path: Path) -> None:
    """transformers would add an adapter to the model."""
    folder = Path(shutil.copytree(good, tmp_path / "llama"))
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refused("import", folder, "--output", tmp_path / "import")
