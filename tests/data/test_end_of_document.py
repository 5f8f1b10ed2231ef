"""The end-of-document id of every kind of tokenizer: no text can produce it, or it is rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlm_train.data.prepare import prepare
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.errors import UserError
from tests.commands import refused

Build = Callable[..., Any]  # (special tokens) -> a tokenizer and its trainer


def byte_bpe(*special: str) -> Any:
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )


def word_bpe(*special: str) -> Any:
    tokenizer = Library(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *special], show_progress=False
    )


def word_piece(*special: str) -> Any:
    tokenizer = Library(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", *special], show_progress=False
    )


def word_level(*special: str) -> Any:
    tokenizer = Library(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(
        vocab_size=400, special_tokens=["[UNK]", *special], show_progress=False
    )


def unigram(*special: str) -> Any:
    tokenizer = Library(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )


@pytest.fixture(scope="module")
def marked(texts: list[str]) -> list[str]:
    """Texts that mention end tokens, like pages about tokenizers."""
    words = "page {} ends with </s> or <eos> or <|endoftext|> or </s>x<eos>, they say\n"
    return [words.format(number) * 3 + text[:2000] for number, text in enumerate(texts[:40])]


@pytest.fixture
def corpus_file(marked: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "marked.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in marked))
    return path


def trained(build: Build, texts: list[str], folder: Path, *special: str) -> Path:
    """A tokenizer.json of a kind, trained on the texts."""
    tokenizer, trainer = build(*special)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ends(folder: Path) -> tuple[int, int]:
    """Number of documents of prepared data, and of occurrences of the end-of-document id."""
    data = PreparedData.open(folder)
    streams = [data.split(name) for name in ("train", "validation")]
    found = sum(np.count_nonzero(stream.tokens == data.eod_id) for stream in streams)
    return sum(stream.record.documents for stream in streams), int(found)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(kind: str, marked: list[str], corpus_file: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    prefix = str(tmp_path / kind)
    SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(marked).split("\n")), model_prefix=prefix, model_type=kind,
        vocab_size=500, byte_fallback=True, user_defined_symbols=["</s>x"], control_symbols=["<doc>"],
        eos_piece="<eos>", minloglevel=2,
    )  # fmt: skip
    model = f"{prefix}.model"
    assert prepare([str(corpus_file)], tmp_path / "out", model).eod_id == Tokenizer.load(model).eod_id
    assert ends(tmp_path / "out") == (len(marked), len(marked))
    ordinary = SentencePieceProcessor(model_file=model).id_to_piece(499)
    for bad in ("</s>x", "<unk>", ordinary, "<0x41>"):
        with pytest.raises(UserError, match="--eod") as error:
            prepare([str(corpus_file)], tmp_path / "bad", model, eod=bad)
        assert bad in str(error.value) and "<doc>" in str(error.value)
    prepare([str(corpus_file)], tmp_path / "doc", model, eod="<doc>")
    assert ends(tmp_path / "doc") == (len(marked), len(marked))


@pytest.mark.parametrize("build", [byte_bpe, word_piece])
def test_special_tokens_come_before_ordinary_ones_of_the_same_name(
    build: Build, marked: list[str], corpus_file: Path, tmp_path: Path
) -> None:
    file = trained(build, marked, tmp_path / "tokenizer", "<eos>", "<other>")
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["</s>"] = number = len(tree["model"]["vocab"])
    tree["model"]["vocab"]["##>"] = number + 1  # what merges to "</s>" is of no matter: the name is there
    file.write_text(json.dumps(tree))
    manifest = prepare([str(corpus_file)], tmp_path / "out", str(file))
    assert manifest.eod_id == Library.from_file(str(file)).token_to_id("<eos>")
    assert ends(tmp_path / "out") == (len(marked), len(marked))
    line = refused(
        "data", "prepare", "--input", corpus_file, "--output", tmp_path / "bad", "--tokenizer", file,
        "--eod", "</s>", "--workers", 1,
    )  # fmt: skip
    assert "</s>" in line and "<eos>" in line and "<other>" in line
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("build", [word_bpe, word_level, unigram])
def test_a_special_token_that_text_can_spell_is_refused(
    build: Build, marked: list[str], corpus_file: Path, tmp_path: Path
) -> None:
    """These tokenizers match their special tokens' names in a text like any word."""
    file = trained(build, marked, tmp_path / "tokenizer", "<eos>", "two words")
    for eod in (None, "<eos>", "</s>"):
        with pytest.raises(UserError, match="--eod") as error:
            prepare([str(corpus_file)], tmp_path / "out", str(file), eod=eod)
        assert str(file) in str(error.value)
        assert build is unigram or "'two words'" in str(error.value)  # the only one that no text can spell
    if build is not unigram:
        prepare([str(corpus_file)], tmp_path / "out", str(file), eod="two words")
        assert ends(tmp_path / "out") == (len(marked), len(marked))


def test_a_normaliser_may_spell_it_too(marked: list[str], corpus_file: Path, tmp_path: Path) -> None:
    tokenizer, trainer = word_level("<eos>", "<other>")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.train_from_iterator([text.replace("<eos>", "") for text in marked], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    full_width = "".join(chr(ord(letter) + 0xFEE0) for letter in "<EOS>")
    assert tokenizer.token_to_id("<eos>") in tokenizer.encode(full_width).ids
    for eod in (None, "<eos>"):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            prepare([str(corpus_file)], tmp_path / "out", str(tmp_path / "tokenizer.json"), eod=eod)


def test_the_tokenizer_says_itself_what_ends_a_document(marked: list[str], tmp_path: Path) -> None:
    file = trained(byte_bpe, marked, tmp_path / "tokenizer", "<|endoftext|>", "</s>", "<mine>", "<theirs>")
    assert Tokenizer.load(file).eod_id == 0
    beside = {
        "special_tokens_map.json": {"eos_token": "<theirs>"},
        "tokenizer_config.json": {"eos_token": {"content": "<mine>", "special": True}},
        "config.json": {"eos_token_id": [1, 3]},
    }
    expected = {"special_tokens_map.json": 3, "tokenizer_config.json": 2, "config.json": 1}
    for name, tree in beside.items():
        (file.parent / name).write_text(json.dumps(tree))
        assert tokenizer_of(file.parent).eod_id == expected[name]
    assert Tokenizer.load(file).eod_id == 2  # a file alone: what tokenizer files beside it say
    (file.parent / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(UserError, match="<absent>"):
        Tokenizer.load(file)
    (file.parent / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(file)


def test_no_text_ends_a_document_whatever_the_tokenizer_does(
    marked: list[str], corpus_file: Path, tmp_path: Path
) -> None:
    """A vocabulary in which an unrelated text produces the token."""
    tokenizer, trainer = word_level("<eos>")
    hide = [normalizers.Replace("<", "("), normalizers.Replace("page", "<eos>")]
    tokenizer.normalizer = normalizers.Sequence(hide)
    tokenizer.train_from_iterator(marked, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="--eod"):
        prepare([str(corpus_file)], tmp_path / "out", str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "out").exists()
