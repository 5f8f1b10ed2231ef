"""`mlm-train import`: a Llama written by transformers is the same model here, and trains in any layout."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlm_train.checkpoint.hf.files import carried
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.data.tokenizer import tokenizer_of
from mlm_train.parallel import runtime
from tests.checkpoint.test_hf_folder import KINDS, change, logits, random_model, write
from tests.commands import mlm_train, refused, scalars
from tests.ranks import train_on_ranks

IDS = torch.arange(60).view(2, 30) * 31 % 512
SHAPES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A run in this process must not disturb the next."""
    yield
    runtime.stop()


def llama(
    folder: Path, shard: str = "1GB", dtype: torch.dtype = torch.float32, **fields: Any
) -> torch.Tensor:
    """Save a transformers Llama with random weights. Returns its fp32 logits of IDS, read from the folder."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES, **fields))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize(
    ("shard", "dtype", "fields"),
    [
        ("1GB", torch.float32, {}),
        ("30KB", torch.bfloat16, {"num_key_value_heads": 2, "eos_token_id": [7, 9]}),
        ("30KB", torch.float16, {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 12}),
    ],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, shard: str, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    expected = llama(tmp_path / "llama", shard, dtype, **fields)
    assert (shard == "30KB") == (len(list((tmp_path / "llama").glob("*.safetensors"))) > 1)
    mlm_train("import", tmp_path / "llama", "--output", tmp_path / "import")
    with torch.no_grad():
        found = logits(load_model(tmp_path / "import"), IDS)
    assert expected.std() > 0.5 and (found - expected).abs().max() <= 1e-5
    stored = load_file(tmp_path / "import" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    config = json.loads((tmp_path / "import" / "config.json").read_text())
    assert config["kind"] == "base" and config["eos_token_id"] == fields.get("eos_token_id", 2)


@pytest.mark.parametrize("kind", ["base tied gqa", "memory", "flex linear"])
def test_our_own_exports(tmp_path: Path, kind: str) -> None:
    export = write(tmp_path / "export", random_model(**KINDS[kind]))
    mlm_train("import", export, "--output", tmp_path / "import")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "import" / name).read_bytes() == (export / name).read_bytes()


def test_what_follows_from_the_rest_may_be_there_twice(tmp_path: Path) -> None:
    """Rotary frequencies and a tied head, as written by older programs."""
    folder = tmp_path / "llama"
    expected = llama(folder, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, file, metadata={"format": "pt"})
    mlm_train("import", folder, "--output", tmp_path / "import")
    assert (logits(load_model(tmp_path / "import"), IDS) - expected).abs().max() <= 1e-5
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused("import", folder, "--output", tmp_path / "other")
    assert "lm_head.weight is not model.embed_tokens.weight" in line and not (tmp_path / "other").exists()


def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path: Path) -> None:
    good, output = tmp_path / "llama", tmp_path / "import"
    llama(good, "30KB")

    def line_of(folder: Path) -> str:
        line = refused("import", folder, "--output", output)
        assert [path.name for path in tmp_path.iterdir() if "import" in path.name] == []
        return line

    assert "config.json does not exist" in line_of(tmp_path / "nowhere")
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    for fields, words in (
        ({"model_type": "mistral"}, "model_type='mistral' is not supported"),
        ({"rope_parameters": scaled}, "rope_parameters: rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: rope_type"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act="),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"intermediate_size": 45}, "mlp.gate_proj.weight has shape [44, 32], not [45, 32]"),
        ({"num_hidden_layers": 3}, "model.layers.3.input_layernorm.weight does not belong"),
        ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight is missing"),
    ):
        bad = Path(shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True))
        change(bad, **fields)
        assert words in line_of(bad)
    bad = Path(shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True))
    shard = sorted(bad.glob("model-*.safetensors"))[0]
    whole, tensors = shard.read_bytes(), load_file(shard)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, shard)
    assert f"tensor {name} has dtype I8, which is not supported" in line_of(bad)
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard.name} is damaged" in line_of(bad)
    shard.unlink()
    assert f"{shard.name} is listed in model.safetensors.index.json, but missing" in line_of(bad)
    for file in bad.glob("model*"):
        file.unlink()
    assert "has no model.safetensors; give" in line_of(bad)
    (bad / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pytorch_model.bin: a pickle may run code and is never loaded" in line_of(bad)
    output.mkdir()
    (output / "mine").write_text("mine")
    assert "nothing is overwritten" in refused("import", good, "--output", output)
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_a_run_starts_from_it_at_another_layout_with_the_same_loss(data: Path, tmp_path: Path) -> None:
    folder, imported = tmp_path / "llama", tmp_path / "import"
    llama(folder, "30KB", num_key_value_heads=2, tie_word_embeddings=True)
    shutil.copy(data / "tokenizer.model", folder)
    mlm_train("import", folder, "--output", imported)
    assert "tokenizer.model" in [file.name for file in carried(imported)]
    assert tokenizer_of(imported).eod_id == 2
    config = imported / "config.yaml"
    assert yaml.safe_load(config.read_text())["checkpoint"]["warm_start"] == str(imported)

    def words(run: str) -> list[object]:
        return [
            config, f"data.path={data}", f"train.output={tmp_path / run}", "train.precision=fp32",
            "train.steps=2", "train.global_batch_size=8", "train.eval_samples=4", "schedule.warmup_steps=0",
        ]  # fmt: skip

    assert "set model.vocab_size" in refused("pretrain", *words("no"), "model.vocab_size=100")
    for other, field in (("1e4", "rope_theta is 500000.0"), ("8", "num_key_value_heads")):
        name = field.split()[0]
        assert field in refused("pretrain", *words("no"), f"model.{name}={other}")
    assert not (tmp_path / "no").exists()
    mlm_train("pretrain", *words("one"))
    layout = ("parallel.tensor=2", "parallel.pipeline=2")
    train_on_ranks(4, *words("four"), *layout)
    one, four = (scalars(tmp_path / run, "train/loss") for run in ("one", "four"))
    assert len(one) == 2 and four == pytest.approx(one, rel=1e-6)
