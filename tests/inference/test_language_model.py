"""The Python API: mlm_train.load, on exports with a tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mlm_train
from mlm_train.checkpoint.hf.files import SpecialTokens
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.errors import UserError
from mlm_train.inference.language_model import LanguageModel
from mlm_train.inference.sampling import Sampling
from mlm_train.model.logical import named_pieces
from tests.inference.test_decode import random_model
from tests.partitions import write_table

WORDS = [f"w{number}" for number in range(96)]


def export_with_words(folder: Path, eos: int = 96, **fields: Any) -> Path:
    """An export with a tokenizer of one id per word, `</s>` the last."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "</s>"])}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["</s>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = random_model(**{"kind": "memory", **fields})
    write_folder(
        folder / "export", model.config, named_pieces(model), beside=[folder / "tokenizer.json"],
        tokens=SpecialTokens(eos=(eos,)),
    )  # fmt: skip
    return folder / "export"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_with_words(tmp_path_factory.mktemp("words") / "memory")


@pytest.fixture(scope="module")
def model(export: Path) -> LanguageModel:
    return mlm_train.load(export)


def test_texts_and_ids(model: LanguageModel) -> None:
    (one,) = model.generate("w5 w80 w2", max_new_tokens=8, ignore_eos=True, logprobs=1)
    assert one.ids == model.generate([5, 80, 2], max_new_tokens=8, ignore_eos=True)[0].ids
    assert one.text == "".join(f" {model.tokenizer.decode([token])}" for token in one.ids)
    assert one.prompt_tokens == 3 and one.finish_reason == "length"
    assert one.logprobs is not None and [entry.id for entry in one.logprobs] == one.ids
    assert all(entry.top == [(entry.id, entry.logprob)] for entry in one.logprobs)  # greedy
    logits = model.logits([5, 80, 2])
    assert logits.shape == (3, 97) and int(logits[-1].argmax()) == one.ids[0]
    assert one.logprobs[0].logprob == pytest.approx(float(logits[-1].log_softmax(-1).max()), abs=1e-5)


def test_batches_give_what_each_gives_alone(model: LanguageModel) -> None:
    prompts = ["w1", [5, 80, 2], "w9 w9 w4 w30 w7", "w60 w61"]
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "top_k": 30}
    alone = [model.generate(prompt, seed=seed, **options)[0] for seed, prompt in enumerate(prompts)]
    for batch_size in (1, 3, 16):
        assert model.generate(prompts, batch_size, seed=range(4), **options) == alone
    assert model.generate([]) == []
    with pytest.raises(UserError, match="seed: 2 of them for 4 prompts"):
        model.generate(prompts, seed=[1, 2])
    with pytest.raises(UserError, match="batch_size 0"):
        model.generate(prompts, 0)


def test_stop_strings_and_streams(model: LanguageModel) -> None:
    whole = model.generate("w5", max_new_tokens=9, ignore_eos=True)[0]
    assert whole.text is not None
    assert "".join(model.stream("w5", max_new_tokens=9, ignore_eos=True)) == whole.text
    words = whole.text.split(" ")[1:]
    stop = f"{words[3]} {words[4]}"
    stopped = model.generate("w5", max_new_tokens=9, ignore_eos=True, stop=[stop, "nothing"])[0]
    assert (stopped.finish_reason, stopped.ids) == ("stop", whole.ids[: len(stopped.ids)])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    pieces = list(model.stream("w5", max_new_tokens=9, ignore_eos=True, stop=stop))
    assert "".join(pieces) == stopped.text and all(pieces)
    generation = model.begin("w5", Sampling(max_new_tokens=9, ignore_eos=True, stop=stop))
    assert sum(1 for _ in model.decoder.run([generation])) == len(stopped.ids)


def test_the_models_end_ids_end_it(model: LanguageModel, tmp_path: Path) -> None:
    whole = model.generate("w5", max_new_tokens=9, ignore_eos=True)[0]
    ending = mlm_train.load(export_with_words(tmp_path / "other", eos=whole.ids[4]))
    found = ending.generate("w5", max_new_tokens=9)[0]
    assert (found.ids, found.finish_reason) == (whole.ids[: whole.ids.index(whole.ids[4])], "stop")
    assert ending.generate("w5", max_new_tokens=9, ignore_eos=True)[0].ids == whole.ids
    other = ending.generate("w5", max_new_tokens=9, ignore_eos=True, stop_ids=[whole.ids[2]])[0]
    assert other.ids == whole.ids[: whole.ids.index(whole.ids[2])]


def test_tables_scales_and_types(export: Path, tmp_path: Path) -> None:
    source = random_model(kind="memory")
    table = write_table(tmp_path / "tol", source, export, [50])
    looked_up = mlm_train.load(export, table, verify="full")
    assert not any("memory_" in name for name, _ in looked_up.decoder.model.named_parameters())
    computed = mlm_train.load(export)
    assert looked_up.generate("w5", max_new_tokens=20) == computed.generate("w5", max_new_tokens=20)
    embedded = mlm_train.load(export, write_table(tmp_path / "embedded", source, export, [50], True))
    assert embedded.decoder.model.embed_tokens is None
    prompts = ["w5", "w80 w2 w7", [1] * 30]
    assert embedded.generate(prompts, 2) == looked_up.generate(prompts, 2)
    assert torch.equal(embedded.logits([5, 6, 7]), looked_up.logits([5, 6, 7]))
    for options in ({"memory_scale": 0.5}, {"dropped_layers": [0, 2]}):
        tols = (None, table, tmp_path / "embedded")
        changed = [mlm_train.load(export, tol, **options).logits([5, 6, 7]) for tol in tols]
        assert (changed[0] - changed[1]).abs().max() < 1e-5 and torch.equal(changed[1], changed[2])
        assert (changed[0] - computed.logits([5, 6, 7])).abs().max() > 1e-2
    half = mlm_train.load(export, dtype="bfloat16", verify="none")
    assert half.decoder.dtype == torch.bfloat16 and half.logits([1]).dtype == torch.float32
    assert half.generate(["w5", "w1 w2 w3"], max_new_tokens=3)[1].prompt_tokens == 3


def test_without_a_tokenizer(export: Path) -> None:
    model = mlm_train.load(export, skip_tokenizer=True)
    assert model.generate([5, 80])[0].text is None
    assert model.generate([5, 80], stop="w")[0].text == " "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8': give float32"),
        ({"dtype": "half a float"}, "dtype 'half a float': give float32"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"tol": "/nothing"}, "does not exist"),
        ({"dropped_layers": [3]}, "layers are 0 to 2"),
        ({"add_bos": True}, "no begin-of-text token"),
    ],
)
def test_bad_options(export: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mlm_train.load(export, **options).generate("w5")


def test_base_models_have_nothing_to_scale(tmp_path: Path) -> None:
    base = export_with_words(tmp_path / "base", kind="base")
    assert len(mlm_train.load(base).generate("w1", max_new_tokens=3, ignore_eos=True)[0].ids) == 3
    with pytest.raises(UserError, match="base model has no FFN-M"):
        mlm_train.load(base, memory_scale=0.5)


def test_other_attributes_are_missing() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        mlm_train.lod  # noqa: B018
