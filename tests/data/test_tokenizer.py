import json
import random
import shutil

import pytest

from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.data.train_tokenizer import train_sentencepiece
from mlm_train.errors import UserError

AWKWARD = [
    "def f(x):\n\tif x:\n\t\treturn  x   # two  spaces \r\n",
    "    leading, trailing    ",
    "\n\n\n",
    "emoji 😀👩‍👩‍👧 ünïcode 漢字 e\u0301 \u00a0\u2028\ufeff",
    "a\u2581b \u2581\u2581 \u2581",
    "nul \x00 and control \x1b\x7f",
    "</s> <unk> <0x41> <|endoftext|> <|other|>",
    "",
]


@pytest.mark.parametrize("kind", ["model", "tokenizer_json"])
def test_every_text_survives(kind, request, texts):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    letters = "ab \n\t\r\u2581é漢😀\x00"
    noise = ["".join(random.Random(i).choices(letters, k=40)) for i in range(200)]
    for text in AWKWARD + noise + texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod_id not in ids  # the text "</s>" ends no document
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


SCRIPTS = {  # what a tokenizer is trained on: most know no Latin letter, some no letter at all
    "Chinese": (0x4E00, 0x4E80),
    "Thai": (0x0E01, 0x0E3A),
    "Arabic": (0x0621, 0x064A),
    "Devanagari": (0x0905, 0x0939),
    "Cyrillic": (0x0410, 0x044F),
    "emoji": (0x1F600, 0x1F64F),
    "private use": (0xE000, 0xE040),
    "digits": (0x30, 0x39),
    "controls": (0x01, 0x1F),
    "blocks, U+2581 among them": (0x2580, 0x259F),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_character_survives_whatever_the_tokenizer_was_trained_on(script, tmp_path):
    first, last = SCRIPTS[script]
    letters = [*map(chr, range(first, last + 1)), " "]
    draw = random.Random(script)
    texts = ["".join(draw.choices(letters, k=60)) for _ in range(200)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(texts, 256 + 2 + 3 + len(letters) + 2, None))
    tokenizer = Tokenizer.load(path)
    # Every code point of the first planes, noncharacters and private use too; of the others some.
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 997), 0x10FFFE, 0x10FFFF]
    for start in range(0, len(points), 4096):
        text = "".join(map(chr, points[start : start + 4096]))
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"U+{points[start]:04X} and after"
    mixed = [*letters, *" \u2581\n\t\r\0a\u00a0\ufeff\ufffd\ufffe\u2585\u2047\ufdd0\U000f0000\U0001f600"]
    noise = ["".join(draw.choices(mixed, k=40)) for _ in range(300)]
    for text in [*texts, *noise, *AWKWARD, *mixed, *(f" {letter} " for letter in mixed)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text, ascii(text)
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
        assert tokenizer.eod_id not in tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["model", "tokenizer_json"])
def test_chunks_of_a_long_text_have_its_ids(kind, request, texts, monkeypatch):
    monkeypatch.setattr("mlm_train.data.tokenizer.CHUNK_CHARACTERS", 300)
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    text = "".join(texts[:5]) + "".join(AWKWARD) * 20
    chunks = tokenizer.chunks(text)
    assert len(chunks) > 10 and "".join(chunks) == text
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(text)


def test_no_chunks_where_a_space_is_put_before_every_text(texts, tmp_path, monkeypatch):
    from sentencepiece import SentencePieceTrainer

    monkeypatch.setattr("mlm_train.data.tokenizer.CHUNK_CHARACTERS", 300)
    (tmp_path / "corpus.txt").write_text("\n".join(texts[:5]), encoding="utf-8")
    prefix = str(tmp_path / "prefixed")
    SentencePieceTrainer.train(
        input=tmp_path / "corpus.txt",
        model_prefix=prefix,
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer.load(f"{prefix}.model")
    text = "a few words\n" * 100
    assert tokenizer.chunks(text) == [text]


def test_training_is_deterministic_and_has_the_size_asked_for(texts, model):
    assert train_sentencepiece(texts, 700, None) == model.read_bytes()
    tokenizer = Tokenizer.load(model)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod_id) == ("sentencepiece", 700, 1)


def test_training_samples_a_large_corpus_by_content(texts, monkeypatch):
    monkeypatch.setattr("mlm_train.data.train_tokenizer.MAX_TRAINING_BYTES", 200_000)
    total = sum(len(text.encode()) for text in texts)
    whole = train_sentencepiece(texts, 500, None)
    sample = train_sentencepiece(texts, 500, total)
    assert sample != whole
    assert sample == train_sentencepiece(texts, 500, total)


@pytest.mark.parametrize("size", [20, 50_000])
def test_training_refuses_an_impossible_size(texts, size):
    with pytest.raises(UserError, match=f"train:{size}.*use more text or another size"):
        train_sentencepiece(texts[:1], size, None)


def test_ids_that_only_a_model_has_are_no_text(tokenizer_json, model):
    for file in (tokenizer_json, model):
        tokenizer = Tokenizer.load(file)
        ids = tokenizer.encode("some text")
        assert tokenizer.decode([*ids, tokenizer.vocab_size, 2**31]) == "some text"


def test_end_token_may_be_chosen(tokenizer_json, model):
    assert Tokenizer.load(tokenizer_json).eod_id == 0
    assert Tokenizer.load(tokenizer_json, "<|other|>").eod_id == 1
    with pytest.raises(UserError, match=r"no token '<none>'.*--eod"):
        Tokenizer.load(tokenizer_json, "<none>")
    with pytest.raises(UserError, match="no token '<none>'"):
        Tokenizer.load(model, "<none>")


def test_without_a_usual_end_token(tokenizer_json, tmp_path):
    renamed = tokenizer_json.read_text(encoding="utf-8").replace("<|endoftext|>", "<stop>")
    (tmp_path / "tokenizer.json").write_text(renamed, encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
    with pytest.raises(UserError, match="--eod"):
        _ = tokenizer.eod_id
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert tokenizer_of(tmp_path).eod_id == 0


def test_tokenizer_of_a_folder(prepared: PreparedData, tmp_path):
    tokenizer = tokenizer_of(prepared.path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (prepared.vocab_size, prepared.eod_id)
    assert tokenizer.sha256 == prepared.manifest.tokenizer.sha256
    shutil.copy(tokenizer.path, tmp_path)
    (tmp_path / "config.json").write_text("not json")
    assert tokenizer_of(tmp_path).eod_id == tokenizer.eod_id


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("missing.model", None, "missing.model cannot be read"),
        ("broken.model", b"\xff\xfe nonsense", "broken.model is not a sentencepiece file"),
        ("broken.json", b"{}", "broken.json is not a huggingface file"),
        ("vocab.txt", b"a\nb", "unknown kind; give a SentencePiece .model"),
    ],
)
def test_bad_files(tmp_path, name, contents, message):
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer_of(tmp_path)
