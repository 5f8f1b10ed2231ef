"""One Tokenizer over SentencePiece models and Hugging Face tokenizer.json files."""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from mlm_train.errors import UserError
from mlm_train.utils.records import read_json, read_regular

Kind = Literal["sentencepiece", "huggingface"]
FILE_OF_KIND: dict[Kind, str] = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
USUAL_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
USUAL_BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
DECLARED_IN = ("tokenizer_config.json", "special_tokens_map.json")  # beside a tokenizer.json
NAMED = 5  # special tokens that an error names
PIECE_CHARACTERS = 1 << 20
MOST_IDS = 2**31  # of which prepared data hold int32
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Backend(Protocol):
    """What a tokenizer library must offer. Special tokens inside a text are read as plain text.

    `special`: the tokens that are no text by their kind, and their ids. `declared_end`, `declared_begin`:
    those of them that the file itself says end and begin a document. `put_first`: what it puts before texts.
    """

    vocab_size: int

    @property
    def special(self) -> dict[str, int]: ...

    @property
    def declared_end(self) -> int | None: ...

    @property
    def declared_begin(self) -> int | None: ...

    @property
    def put_first(self) -> int | None: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def name_of(self, number: int) -> str: ...


class Tokenizer:
    """Text to token ids and back.

    Attributes: `path`, `kind`, `vocab_size` (every id is below it), `sha256` (of the file).
    """

    def __init__(self, path: Path, kind: Kind, backend: Backend, sha256: str, end: int | None) -> None:
        self.path = path
        self.kind = kind
        self.sha256 = sha256
        self.vocab_size = backend.vocab_size
        self._backend = backend
        self._end = end

    @classmethod
    def load(cls, path: str | Path, eod: str | int | None = None) -> "Tokenizer":
        """Read a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

        eod: the token that ends a document, as text or id; default: the one that the file declares, or
        Hugging Face's files beside it, or a special token of a usual name that no text can produce.
        Raises UserError for a missing or unreadable file, an unknown kind, an unknown eod.
        """
        path = Path(path)
        kind = _kind_of(path)
        try:
            contents = read_regular(path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"tokenizer {path} cannot be read ({reason}); check the path") from None
        backend: Backend
        with _asked(path, f"is not a {kind} file"):
            backend = _SentencePiece(contents) if kind == "sentencepiece" else _HuggingFace(contents)
            if backend.vocab_size > MOST_IDS:
                raise UserError(f"tokenizer {path} has ids up to {backend.vocab_size - 1}: use another")
            end = _end_id(backend, eod, path)
        return cls(path, kind, backend, hashlib.sha256(contents).hexdigest(), end)

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token. UserError if none is known."""
        if self._end is None:
            raise UserError(
                f"tokenizer {self.path} has no usual end-of-document token that no text can produce; "
                f"{self._alternatives()}"
            )
        return self._end

    @cached_property
    def declared_bos_id(self) -> int | None:
        """Id of the token that begins a text, as the tokenizer or a file beside it says."""
        if self._backend.declared_begin is not None:
            return self._backend.declared_begin
        name = _declared_beside(self.path, "bos_token")
        with _asked(self.path, "cannot encode a text"):
            return self._backend.put_first if name is None else self._backend.id_of(name)

    @property
    def bos_id(self) -> int | None:
        """declared_bos_id, or that of a special token of a usual name; None where there is neither."""
        named = (self._backend.special.get(name) for name in USUAL_BEGIN_TOKENS)
        return next((begin for begin in (self.declared_bos_id, *named) if begin is not None), None)

    @property
    def puts_bos_first(self) -> bool:
        """Whether the file itself says that texts begin with bos_id, as transformers then has it."""
        with _asked(self.path, "cannot encode a text"):
            return self.bos_id is not None and self.bos_id == self._backend.put_first

    def begin_of_documents(self) -> int:
        """bos_id; UserError where there is none, or it is the end-of-document id."""
        if self.bos_id is None:
            raise UserError(f"--add-bos: tokenizer {self.path} has no token that begins a text; leave it out")
        if self.bos_id == self._end:
            name = self._backend.name_of(self.bos_id)
            raise UserError(
                f"--add-bos: in tokenizer {self.path} {name!r} begins texts and ends documents; leave it "
                "out, or name another end with --eod"
            )
        return self.bos_id

    def check_end(self) -> None:
        """UserError where a text can hold the end-of-document id: it would be cut into several documents."""
        end = self.eod_id
        names = [name for name, number in self._backend.special.items() if number == end]
        with _asked(self.path, "cannot encode a text"):
            if not names or _text_can_produce(self._backend, end, names[0]):
                name = names[0] if names else self._backend.name_of(end)
                raise UserError(
                    f"tokenizer {self.path}: a text can produce {name!r} (id {end}), which is to end "
                    f"documents; {self._alternatives()}"
                )

    def _alternatives(self) -> str:
        """What to do instead, with the special tokens that may end a document."""
        special = self._backend.special.items()
        safe = [name for name, number in special if not _text_can_produce(self._backend, number, name)]
        if not safe:
            return "it has none such: use another tokenizer"
        more = f" and {len(safe) - NAMED} more" if len(safe) > NAMED else ""
        return f"name another with --eod: {', '.join(map(repr, safe[:NAMED]))}{more}"

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no begin or end token is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        with _asked(self.path, "cannot encode a text"):
            return self._backend.encode_batch(list(texts))

    def pieces(self, text: str) -> list[str]:
        """A long text cut into parts of about PIECE_CHARACTERS whose ids, joined, are the text's.

        SentencePiece needs some 60 bytes a character, so a text of gigabytes must not be encoded at
        once. Cuts are after a single line end between visible characters, where the usual splitting
        patterns cut too (in runs of white space they look ahead). Tokenizers that encode "a\\nb"
        unlike "a\\n" and "b" (a space is put before every text) get one piece.
        """
        if len(text) <= PIECE_CHARACTERS or not self._may_cut:
            return [text]
        cuts = [0]
        while match := _CUT.search(text, cuts[-1] + PIECE_CHARACTERS):
            cuts.append(match.end())
        return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]

    @cached_property
    def _may_cut(self) -> bool:
        return all(
            self.encode(f"{before}\n{after}") == self.encode(f"{before}\n") + self.encode(after)
            for before, after in itertools.product(("a", "1", ".", "é"), ("b", "B", "1", "(", "é"))
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; those that only the model has, whose vocabulary may be rounded up, are none."""
        with _asked(self.path, "cannot decode ids"):
            return self._backend.decode([int(i) for i in ids if i < self.vocab_size])


@contextlib.contextmanager
def _asked(path: Path, failed: str) -> Iterator[None]:
    """Turn what a library raises over a damaged file into a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and where Rust panics none at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenizer {path} {failed} ({reason[:300]}); use another") from None


def tokenizer_of(folder: str | Path, eod: str | int | None = None) -> Tokenizer:
    """The tokenizer inside a folder of prepared data or of an exported model.

    eod: see Tokenizer.load; default: the one recorded there (eod_id of manifest.json, or
    eos_token_id of config.json). Raises UserError for a missing or unreadable tokenizer.
    """
    folder = Path(folder)
    file = tokenizer_file(folder)
    if file is None:
        names = " or ".join(FILE_OF_KIND.values())
        raise UserError(f"{folder} holds no tokenizer; copy the {names} of the training data into it")
    return Tokenizer.load(file, _recorded_end(folder) if eod is None else eod)


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer's file in a folder; None where there is none."""
    files = (folder / name for name in FILE_OF_KIND.values())
    return next((file for file in files if file.is_file()), None)


def _kind_of(path: Path) -> Kind:
    kinds: dict[str, Kind] = {".model": "sentencepiece", ".json": "huggingface"}
    if path.suffix not in kinds:
        raise UserError(
            f"tokenizer {path}: unknown kind; give a SentencePiece .model, a Hugging Face "
            "tokenizer.json, or train:VOCAB such as train:8192"
        )
    return kinds[path.suffix]


def _end_id(backend: Backend, eod: str | int | None, path: Path) -> int | None:
    if eod is None and backend.declared_end is None:
        eod = _declared_beside(path, "eos_token")
    if eod is None:
        return _usual_end(backend) if backend.declared_end is None else backend.declared_end
    end = backend.id_of(eod) if isinstance(eod, str) else eod
    if end is None or not 0 <= end < backend.vocab_size:
        raise UserError(f"tokenizer {path} has no token {eod!r}; name one of its tokens with --eod")
    return end


def _declared_beside(path: Path, key: str) -> str | None:
    """The token that Hugging Face's files in a tokenizer.json's folder declare under a key."""
    for name in DECLARED_IN:
        if path.suffix == ".json" and (path.parent / name).is_file():
            token = read_json(path.parent / name, "repair or remove it").get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def _usual_end(backend: Backend) -> int | None:
    found = ((backend.special.get(token), token) for token in USUAL_END_TOKENS)
    return next((i for i, token in found if i is not None and not _text_can_produce(backend, i, token)), None)


def _text_can_produce(backend: Backend, number: int, token: str) -> bool:
    """Whether a text that spells a token, as normalisers may read it too, becomes that token.

    Special tokens lie in many vocabularies as words do, and some models look them up as they do words.
    """
    spelled = {token, token.upper(), token.lower(), token.translate(_FULL_WIDTH)}
    around = ("", " ", "\n", "a", ".")
    texts = [before + name + after for name in spelled for before in around for after in around]
    return any(number in ids for ids in backend.encode_batch(texts))


_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def _recorded_end(folder: Path) -> int | None:
    for name, key in (("manifest.json", "eod_id"), ("config.json", "eos_token_id")):
        try:
            end = read_json(folder / name, "").get(key)
        except UserError:
            continue  # the folder's own reader complains about a broken file; here it only lacks a hint
        if isinstance(end, list):  # chat models have several; the first ends what they were pretrained on
            end = next(iter(end), None)
        if isinstance(end, int):
            return end
    return None


class _SentencePiece:
    """A SentencePiece model."""

    def __init__(self, contents: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        if not contents:
            raise ValueError("it is empty")
        self._processor = SentencePieceProcessor(model_proto=contents)
        self.vocab_size = int(self._processor.vocab_size())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [
            self._encode_with_marks(text) if self._mark_ids and _MARK in text else ids
            for text, ids in zip(texts, self._processor.encode(texts, num_threads=1), strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def id_of(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None

    def name_of(self, number: int) -> str:
        return self._processor.id_to_piece(number)

    @cached_property
    def special(self) -> dict[str, int]:
        ids = (i for i in range(self.vocab_size) if self._processor.is_control(i))
        return {self.name_of(i): i for i in ids}

    @property
    def declared_end(self) -> int | None:
        end = self._processor.eos_id()
        return end if end >= 0 else None

    @property
    def declared_begin(self) -> int | None:
        begin = self._processor.bos_id()
        return begin if begin >= 0 else None

    @property
    def put_first(self) -> None:
        """A model says nothing of it."""
        return None

    @cached_property
    def _mark_ids(self) -> list[int]:
        """Byte pieces of U+2581, which SentencePiece itself would turn into a space.

        Empty for models without byte pieces, and for those that add or remove spaces at the ends of a text:
        encoding it in parts would do so in the middle.
        """
        if self._processor.normalize(" a ") != f"{_MARK}a{_MARK}":  # whatever pieces there are
            return []
        ids = [self.id_of(f"<0x{byte:02X}>") for byte in _MARK.encode()]
        return [i for i in ids if i is not None] if None not in ids else []

    def _encode_with_marks(self, text: str) -> list[int]:
        first, *others = text.split(_MARK)
        ids = list(self._processor.encode(first))
        for part in others:
            ids += self._mark_ids + self._processor.encode(part)
        return ids


_MARK = "\u2581"


class _HuggingFace:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, contents: bytes) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        self._tokenizer: Any = HuggingFaceTokenizer.from_str(contents.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text ends no document
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps, so the count of tokens would not bound them.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def name_of(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(number))

    @cached_property
    def special(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    @property
    def declared_end(self) -> None:
        """A tokenizer.json says nothing of it."""
        return None

    @property
    def declared_begin(self) -> None:
        """Nor of this."""
        return None

    @property
    def put_first(self) -> int | None:
        added = self._tokenizer.encode("", add_special_tokens=True).ids
        return added[0] if added and added[0] in self.special.values() else None
