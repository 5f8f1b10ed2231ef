"""Text in pieces: characters are whole, stop strings never show, and the pieces are the whole text."""

import itertools
import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mlm_train.data.tokenizer_backends import Backend, open_backend
from mlm_train.data.train_tokenizer import train_sentencepiece
from mlm_train.inference.text import NewText

TEXTS = [
    "the cat sat on the mat",
    "  two  spaces\n\n\tand tabs ",
    "naïve 漢字 😀👩‍👩‍👧 e\u0301",
    "� is a character",
]


class Letters:
    """One id per character."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return "".join(map(chr, ids))


def backends() -> list[Backend]:
    """Byte-level, and SentencePiece with byte pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HuggingFaceTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = train_sentencepiece(["the cat sat on the mat and two spaces " * 9] * 20, 290, None)
    return [open_backend("huggingface", tokenizer.to_str().encode()), open_backend("sentencepiece", made)]


@pytest.mark.parametrize("backend", backends(), ids=["byte-level", "sentencepiece"])
def test_pieces_are_the_text(backend: Backend) -> None:
    for prompt, text in itertools.product(["", "one ", "漢"], TEXTS):
        before, after = backend.encode_batch([prompt, text])
        new = NewText(backend, before)
        pieces = []
        for token in after:
            new.add(token)
            pieces.append(new.take())
        new.end()
        pieces.append(new.take())
        expected = backend.decode([*before, *after])[len(backend.decode(before)) :]
        assert "".join(pieces) == new.text == expected
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize("backend", backends(), ids=["byte-level", "sentencepiece"])
def test_a_prompt_may_end_inside_a_character(backend: Backend) -> None:
    ids = backend.encode_batch(["a漢b"])[0]
    inside = next(count for count in range(len(ids)) if backend.decode(ids[:count]).endswith("\ufffd"))
    new = NewText(backend, ids[:inside])
    for token in ids[inside:]:
        new.add(token)
    assert new.text == "漢b"


def test_an_incomplete_end_is_shown_when_nothing_follows() -> None:
    backend = backends()[0]
    new = NewText(backend, [])
    for token in backend.encode_batch(["a漢"])[0][:-1]:
        new.add(token)
    assert (new.text, new.take()) == ("a", "a")
    new.end()
    assert new.take() == "\N{REPLACEMENT CHARACTER}" and new.take() == ""


def test_special_tokens_are_no_context() -> None:
    """SentencePiece drops the space before the first piece; a token without text does not make one first."""
    backend = backends()[1]
    eos = next(iter(backend.special.values()))
    the, cat = (backend.encode_batch([f"x {word}"])[0][1:] for word in ("the", "cat"))
    ids = [*the, eos, eos, *cat]
    new = NewText(backend, backend.encode_batch(["x"])[0])
    for token in ids:
        new.add(token)
    assert new.text == " the cat"


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["END"], "abENDcd", ["a", "b", "", "", ""]),
        (["END"], "EENEND", ["", "E", "", "EN", "", ""]),
        (["b", "ab"], "xabc", ["x", "", ""]),
        (["abab"], "ababab", ["", "", "", ""]),
        (["aab"], "aaab", ["", "", "a", ""]),
        (["\n\n", "\nQ:"], "a\nQ\nQ:b", ["a", "", "", "\nQ", "", ""]),
    ],
)
def test_stop_strings(stop: list[str], text: str, shown: list[str]) -> None:
    new = NewText(Letters(), [], stop)
    pieces = []
    for letter in text:
        new.add(ord(letter))
        pieces.append(new.take())
        if new.stopped:
            break
    assert new.stopped and pieces == shown and "".join(pieces) == new.text
    new.end()
    assert new.take() == ""


def test_what_was_held_back_is_shown_at_the_end() -> None:
    new = NewText(Letters(), [], ["stop"])
    for letter in "a sto":
        new.add(ord(letter))
    assert new.take() == "a "
    new.end()
    assert new.take() == "sto" and not new.stopped


def test_streaming_any_text_shows_what_precedes_the_first_stop() -> None:
    draw = random.Random(5)
    for _ in range(300):
        stop = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        text = "".join(draw.choices("abc", k=30))
        new, pieces = NewText(Letters(), [], stop), list[str]()
        for count, letter in enumerate(text, 1):
            new.add(ord(letter))
            pieces.append(new.take())
            assert new.stopped == any(word in text[:count] for word in stop)
            if new.stopped:
                break
        new.end()
        pieces.append(new.take())
        assert "".join(pieces) == new.text and not any(word in new.text for word in stop)
