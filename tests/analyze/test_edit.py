"""Edits of keys: files, what they do to a model and to a table's rows, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mlm_train import load
from mlm_train.checkpoint.reading.edits import Edits
from mlm_train.checkpoint.reading.logical_folder import load_model, open_model
from mlm_train.memory import make_source
from mlm_train.parallel import runtime
from tests.analyze.models import export
from tests.commands import TINY, mlm_train, refused
from tests.partitions import write_table


@pytest.fixture
def edits(model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "edits.json"
    mlm_train("analyze", "edit", model, "--scale", "1:9=2.5", "0:3=-1", "--silence", "1:40", "--output", file)
    return file


def test_an_edited_model_is_the_one_with_scaled_coefficients(
    model: Path, edits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.arange(0, 600, 20)[None]
    plain, edited = load(model, skip_tokenizer=True), load(model, edits=[edits], skip_tokenizer=True)
    before = plain.logits(ids[0].tolist())
    true = load_model(model).double()
    factors = {0: torch.ones(44).double(), 1: torch.ones(44).double()}
    factors[1][9], factors[0][3], factors[1][40] = 2.5, -1, 0
    blocks, x0 = true.memory_blocks(), true.embed(ids)

    def read(layer: int) -> torch.Tensor:
        block = blocks[layer]
        return block.memory_mlp.down_proj(factors[layer] * block.coefficients(x0))

    expected = true.head(true.norm(true.run_layers(x0, read, ids)))[0]
    found = edited.logits(ids[0].tolist())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - before).abs().max() > 0.01 * before.abs().max()
    again = load(model, skip_tokenizer=True).logits(ids[0].tolist())
    assert torch.equal(again, before), "the model's files do not change"
    mlm_train("analyze", "edits", edits)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "layer 1 key 9: scaled by 2.5",
        "layer 0 key 3: scaled by -1",
        "layer 1 key 40: silenced",
    ]


def test_files_after_each_other_multiply(model: Path, edits: Path) -> None:
    twice = load(model, edits=[edits, edits], skip_tokenizer=True).decoder.model
    plain = load_model(model)
    ratio = (
        twice.memory_blocks()[1].memory_mlp.down_proj.weight[0]
        / (plain.memory_blocks()[1].memory_mlp.down_proj.weight[0])
    )
    assert ratio[[8, 9, 40]].tolist() == pytest.approx([1, 6.25, 0])


def test_rows_of_a_table_as_a_patch(model: Path, edits: Path, tmp_path: Path) -> None:
    """The served model equals the edited one where the prompt has only patched tokens; others stay."""
    table, patch = (
        write_table(tmp_path / "tol", load_model(model), model, [300]),
        tmp_path / "patch.safetensors",
    )
    words = ("--scale", "1:9=2.5", "0:3=-1", "--silence", "1:40", "--tol", table, "--tokens", "7", "9", "11")
    mlm_train("analyze", "edit", model, *words, "--output", patch)
    edited = load(model, edits=[edits], skip_tokenizer=True)
    served = load(model, table, patches=[patch], skip_tokenizer=True)
    ours, theirs = (one.logits([7, 11, 9, 7]) for one in (served, edited))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    plain = load(model, skip_tokenizer=True).logits([30, 31, 32])
    assert (served.logits([30, 31, 32]) - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_the_effect_on_perplexity_and_text(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "edits.json"
    words = (f"data.path={data}", f"train.output={run}", "train.steps=20", "memory.mode=unique")
    mlm_train("pretrain", "configs/micro.yaml", *TINY, *words)
    runtime.stop()
    mlm_train("analyze", "edit", run, "--scale", *(f"0:{key}=50" for key in range(64)), "--output", file)
    shared = ("--data", data, "--samples", 4, "--sequence-length", 32)
    capsys.readouterr()
    words = ("--edit", file, "--prompt", "def f(", "--max-new-tokens", 8)
    mlm_train("analyze", "effect", "--model", run, *words, *shared, "--json")
    found = json.loads(capsys.readouterr().out)
    for when, options in (("before", ()), ("after", ("--edit", file))):
        mlm_train("evaluate", "--model", run, *shared, *options, "--json")
        assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(
            found["perplexity"][when], rel=1e-6
        )
        words = ("--prompt", "def f(", "--max-new-tokens", 8, "--json")
        mlm_train("generate", "--model", run, *words, *options)
        assert json.loads(capsys.readouterr().out)["text"] == found["text"][when]
    assert found["perplexity"]["before"] != found["perplexity"]["after"]


def test_bad_edits(model: Path, edits: Path, tmp_path: Path) -> None:
    base, _ = export(tmp_path / "base", kind="base", num_hidden_layers=1)
    other, _ = export(tmp_path / "other", num_hidden_layers=2, rms_norm_eps=1e-6)
    new = ("--output", tmp_path / "new.json")
    for words, expected in (
        ((model, "--silence", "2:0", *new), "there is no layer 2; layers are 0 to 1"),
        ((model, "--scale", "1:44=2", *new), "there is no key 44; keys are 0 to 43"),
        ((model, "--scale", "1:4=2", "--silence", "1:4", *new), "layer 1 key 4 is given twice"),
        ((model, "--scale", "1:4", *new), "--scale '1:4': give LAYER:KEY=FACTOR"),
        ((model, "--scale", "1:4=nan", *new), "key '1:4=nan': give LAYER:KEY=FACTOR"),
        ((model, "--silence", "one", *new), "key 'one': give"),
        ((model, *new), "give keys to edit"),
        ((base, "--silence", "0:0", *new), "is a base model and has no FFN-M"),
        ((model, "--silence", "0:0", "--output", edits), "exists already"),
        ((model, "--silence", "0:0", "--tokens", "7", *new), "give --tol and --tokens together"),
    ):
        assert expected in refused("analyze", "edit", *words), words
    assert not (tmp_path / "new.json").exists()
    generate = ("generate", "--prompt-ids", "1,2", "--max-new-tokens", 1, "--edit", edits, "--model")
    assert "was made for another model" in refused(*generate, other)
    assert "a base model has no FFN-M" in refused(*generate, base)
    assert "make a patch of the table" in refused(
        *generate, model, "--tol", write_table(tmp_path / "tol", load_model(model), model, [300])
    )
    tree = json.loads(edits.read_text())
    for change, expected in (
        ({"scales": [{"layer": 7, "key": 0, "factor": 1}]}, "there is no layer 7"),
        ({"scales": [{"layer": 0, "key": 0, "factor": 1e9}]}, "less than 1000000"),
        ({"format": "other"}, "mlm-edits-1"),
    ):
        edits.write_text(json.dumps(tree | change))
        assert expected in refused(*generate, model), change
    assert "does not exist" in refused("analyze", "edits", tmp_path / "none.json")
    assert "give --data, --prompt" in refused("analyze", "effect", "--model", model, "--edit", edits)


def test_a_checkpoint_has_its_own_fingerprint(model: Path, edits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    with open_model(copy) as opened:
        assert Edits.read(edits).model == opened.fingerprint


def test_a_dropped_layer_reads_nothing(model: Path, edits: Path) -> None:
    """Scales of FFN-M and edits go together: the shared weights are edited."""
    edited = load(model, edits=[edits], dropped_layers=[1], skip_tokenizer=True)
    plain = load_model(model)
    weight = plain.memory_blocks()[0].memory_mlp.down_proj.weight
    weight[:, 3] *= -1
    source = make_source("per_token", plain.memory_blocks())
    expected = plain.scaled([1.0, 0.0])(torch.tensor([[5, 6, 7]]), source)[0]
    assert torch.allclose(edited.logits([5, 6, 7]), expected, atol=1e-5)
