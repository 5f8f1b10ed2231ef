"""The tokenizer libraries behind one interface: SentencePiece, and Hugging Face's tokenizers."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from mlm_train.errors import UserError

Kind = Literal["sentencepiece", "huggingface"]
FILE_OF_KIND: dict[Kind, str] = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
_ESCAPED_SPACE = "\u2581"


class Backend(Protocol):
    """What a tokenizer library must offer. Special tokens spelled out in a text are encoded as plain text.

    `special`: special tokens and their ids. `declared_eos`, `declared_bos`: the ids that the file itself
    declares as end and beginning of a text. `prepended_id`: the id that the file has put before every text.
    """

    vocab_size: int

    @property
    def special(self) -> dict[str, int]: ...

    @property
    def declared_eos(self) -> int | None: ...

    @property
    def declared_bos(self) -> int | None: ...

    @property
    def prepended_id(self) -> int | None: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, token_id: int) -> str: ...


def kind_of(path: Path) -> Kind:
    """The kind of a tokenizer file, by its suffix. UserError for any other suffix."""
    kinds: dict[str, Kind] = {".model": "sentencepiece", ".json": "huggingface"}
    if path.suffix not in kinds:
        raise UserError(
            f"tokenizer {path}: unknown kind; give a SentencePiece .model, a Hugging Face "
            "tokenizer.json, or train:VOCAB such as train:8192"
        )
    return kinds[path.suffix]


def open_backend(kind: Kind, contents: bytes) -> Backend:
    """Read a tokenizer file's bytes; raises whatever its library raises over a damaged file."""
    return _SentencePiece(contents) if kind == "sentencepiece" else _HuggingFace(contents)


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
            self._encode_literal_marks(text) if self._escaped_space_ids and _ESCAPED_SPACE in text else ids
            for text, ids in zip(texts, self._processor.encode(texts, num_threads=1), strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def id_of(self, token: str) -> int | None:
        token_id = self._processor.piece_to_id(token)  # of <unk> for an unknown token
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def token_of(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    @cached_property
    def special(self) -> dict[str, int]:
        ids = (i for i in range(self.vocab_size) if self._processor.is_control(i))
        return {self.token_of(i): i for i in ids}

    @property
    def declared_eos(self) -> int | None:
        end = self._processor.eos_id()
        return end if end >= 0 else None

    @property
    def declared_bos(self) -> int | None:
        begin = self._processor.bos_id()
        return begin if begin >= 0 else None

    @property
    def prepended_id(self) -> None:
        """Always None: a SentencePiece model does not declare one."""
        return None

    @cached_property
    def _escaped_space_ids(self) -> list[int]:
        """Byte pieces of a literal U+2581, which SentencePiece itself would decode as a space.

        Empty for models without byte pieces, and for models that add or remove spaces at the ends of a text:
        encoding such a text in parts would change spaces in its middle.
        """
        if self._processor.normalize(" a ") != f"{_ESCAPED_SPACE}a{_ESCAPED_SPACE}":
            return []
        ids = [self.id_of(f"<0x{byte:02X}>") for byte in _ESCAPED_SPACE.encode()]
        return [i for i in ids if i is not None] if None not in ids else []

    def _encode_literal_marks(self, text: str) -> list[int]:
        first, *others = text.split(_ESCAPED_SPACE)
        ids = list(self._processor.encode(first))
        for part in others:
            ids += self._escaped_space_ids + self._processor.encode(part)
        return ids


class _HuggingFace:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, contents: bytes) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        self._tokenizer: Any = HuggingFaceTokenizer.from_str(contents.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text ends no document
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps: the number of tokens does not bound them.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))

    @cached_property
    def special(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in sorted(added.items()) if token.special}

    @property
    def declared_eos(self) -> None:
        """Always None: a tokenizer.json does not declare one."""
        return None

    @property
    def declared_bos(self) -> None:
        """Always None: a tokenizer.json does not declare one."""
        return None

    @property
    def prepended_id(self) -> int | None:
        added = self._tokenizer.encode("", add_special_tokens=True).ids
        return added[0] if added and added[0] in self.special.values() else None
