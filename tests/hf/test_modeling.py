"""transformers' model equals ours: logits, gradients, greedy tokens, batches, saving."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import mlm_train.hf
from mlm_train.checkpoint.hf.config import read_config
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.errors import UserError
from mlm_train.hf import MemoryLLMConfig, MemoryLLMForCausalLM, MemoryLLMModel
from mlm_train.inference.decode import Decoder
from mlm_train.model.logical import named_pieces, pieces
from mlm_train.model.transformer import Transformer
from tests.commands import ROOT
from tests.hf.conftest import KINDS, export
from tests.inference.test_decode import PROMPT, random_model, source_of


def ours(model: Transformer, ids: Tensor) -> Tensor:
    return model(ids, source_of(model))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 3e-6 * b.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(model: Transformer, exported: Path, attention: str) -> None:
    theirs, said = AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation=attention, output_loading_info=True
    )
    assert not any(said.values())
    assert isinstance(theirs, MemoryLLMForCausalLM if model.config.has_memory else LlamaForCausalLM)
    ids = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True, output_attentions=attention == "eager")
        assert close(out.logits, ours(model, ids))
        assert torch.equal(theirs(ids, logits_to_keep=1).logits[:, 0], out.logits[:, -1])
        assert torch.equal(theirs(ids, return_dict=False)[0], out.logits)
        assert close(theirs(inputs_embeds=theirs.get_input_embeddings()(ids)).logits, out.logits)
    assert len(out.hidden_states) == 4 and out.hidden_states[0].shape == (2, 30, 32)
    if attention == "eager":
        assert out.attentions[2].shape == (2, 4, 30, 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = export(tmp_path / "export", random_model(**KINDS["flex"]), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == dtype
    ids = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        expected = ours(load_model(folder, dtype=dtype), ids)
        error = (theirs(ids).logits - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_loss_and_gradients_also_checkpointed(model: Transformer, exported: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(exported).train()
    ids = torch.randint(0, 97, (2, 30))
    for parameter in model.train().parameters():
        parameter.requires_grad_(True)
    logits = ours(model, ids)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for checkpointed in (False, True):
        if checkpointed:
            theirs.gradient_checkpointing_enable({"use_reentrant": True})
        theirs.zero_grad()
        out = theirs(ids, labels=ids, use_cache=False)
        out.loss.backward()
        assert close(out.loss, loss)
        found = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for (name, _), whole in zip(named_pieces(model), _pieces(model, gradients), strict=True):
            assert (found[name] - whole).abs().max() <= 1e-5 * whole.abs().max() + 1e-9, name


def _pieces(model: Transformer, gradients: dict[str, Any]) -> list[Tensor]:
    return [piece.of(gradients[piece.parameter]) for piece in pieces(model)]


def test_greedy_is_our_decoders_and_left_padding_changes_nothing(model: Transformer, exported: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    prompts = [PROMPT, [80, 2, 61], [33] * 12]
    expected = [
        list(Decoder(model, source_of(model)).generate(p, max_new_tokens=20, stop_ids=[96])) for p in prompts
    ]
    for prompt, tokens in zip(prompts, expected, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        new = out[0, len(prompt) :].tolist()
        assert new[: len(tokens)] == tokens and new[len(tokens) :] in ([], [96])
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **kwargs)
        for row, tokens in zip(out[:, longest:].tolist(), expected, strict=True):
            assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {96, 0}, kwargs


def test_saved_and_loaded_is_equal_to_the_bit_and_ours_too(
    model: Transformer, exported: Path, tmp_path: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    again, said = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(said.values())
    for (name, one), (other, two) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(one, two)
    assert again.generation_config.eos_token_id == 96
    ids = torch.randint(0, 97, (2, 30))
    assert torch.equal(theirs(ids).logits, again(ids).logits)
    assert read_config(tmp_path / "saved") == read_config(exported)
    assert torch.equal(ours(load_model(tmp_path / "saved"), ids), ours(model, ids))


def test_the_configs_fields_are_those_of_an_export(exported: Path) -> None:
    tree = json.loads((exported / "config.json").read_text())
    config = AutoConfig.from_pretrained(exported)
    for name in tree.keys() - {"rope_theta", "dtype", "torch_dtype"}:
        assert getattr(config, name) == tree[name], name
    assert config.rope_parameters["rope_theta"] == tree["rope_theta"]
    if config.model_type == "memoryllm":
        assert type(config) is MemoryLLMConfig
        fields = set(MemoryLLMConfig.__annotations__) - {"add_bos_token"}
        assert fields - {"compute_form", "compute_input"} <= tree.keys()
        assert config.model_config() == read_config(exported)


def test_a_model_of_its_own_config() -> None:
    shapes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MemoryLLMConfig(intermediate_size=44, initializer_range=0.5, **shapes)
    made = AutoModelForCausalLM.from_config(config)
    assert isinstance(made, MemoryLLMForCausalLM) and config.memory_scale == [1.0, 1.0]
    assert 0.4 < made.model.layers[0].memory_mlp.up_proj.weight.std() < 0.6
    assert torch.equal(made.model.layers[1].memory_layernorm.weight, torch.ones(32))
    assert isinstance(AutoModel.from_config(config), MemoryLLMModel)
    with pytest.raises(UserError, match="rope_type"):
        scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        MemoryLLMForCausalLM(MemoryLLMConfig(rope_parameters=scaled, intermediate_size=44, **shapes))
    with pytest.raises(ValueError, match="exactly one"):
        made.model()


def test_importing_registers_once_and_says_what_is_missing(tmp_path: Path) -> None:
    importlib.reload(mlm_train.hf)
    assert AutoConfig.for_model("memoryllm").model_type == "memoryllm"
    (tmp_path / "transformers.py").write_text("raise ImportError('no such package')\n")
    for text, said in (("raise ImportError('none')", "pip install"), ("__version__ = '4.57.1'", "4.57.1")):
        (tmp_path / "transformers.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", "import mlm_train.hf"],
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True,
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("ImportError: mlm_train.hf needs") and said in last
