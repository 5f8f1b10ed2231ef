"""One Tokenizer over SentencePiece models and Hugging Face tokenizer.json files."""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from mlm_train.data.special_tokens import (
    alternatives,
    declared_token,
    find_bos_id,
    find_eod_id,
    recorded_eod_id,
    text_can_produce,
)
from mlm_train.data.tokenizer_backends import FILE_OF_KIND, Backend, Kind, kind_of, open_backend
from mlm_train.errors import UserError
from mlm_train.utils.records import read_regular

CHUNK_CHARACTERS = 1 << 20
MAX_VOCAB_SIZE = 2**31  # prepared data hold ids as int32
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer:
    """Text to token ids and back.

    Attributes: `path`, `kind`, `vocab_size` (every id is below it), `sha256` (of the file).
    """

    def __init__(self, path: Path, kind: Kind, backend: Backend, sha256: str, eod_id: int | None) -> None:
        self.path = path
        self.kind = kind
        self.sha256 = sha256
        self.vocab_size = backend.vocab_size
        self._backend = backend
        self._eod_id = eod_id

    @classmethod
    def load(cls, path: str | Path, eod: str | int | None = None) -> "Tokenizer":
        """Read a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

        eod: the token that ends a document, as text or id. Default: the one that the file or Hugging Face's
        files beside it declare, or a special token with a usual name that no text can produce.
        Raises UserError for a missing or unreadable file, an unknown kind, an unknown eod.
        """
        path = Path(path)
        kind = kind_of(path)
        try:
            contents = read_regular(path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"tokenizer {path} cannot be read ({reason}); check the path") from None
        with _library_errors(path, f"is not a {kind} file"):
            backend = open_backend(kind, contents)
            if backend.vocab_size > MAX_VOCAB_SIZE:
                raise UserError(f"tokenizer {path} has ids up to {backend.vocab_size - 1}: use another")
            eod_id = find_eod_id(backend, eod, path)
        return cls(path, kind, backend, hashlib.sha256(contents).hexdigest(), eod_id)

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token. UserError if none is known."""
        if self._eod_id is None:
            raise UserError(
                f"tokenizer {self.path} has no usual end-of-document token that no text can produce; "
                f"{alternatives(self._backend)}"
            )
        return self._eod_id

    @cached_property
    def declared_bos_id(self) -> int | None:
        """Id of the token that begins a text, as declared by the tokenizer or a file beside it."""
        if self._backend.declared_bos is not None:
            return self._backend.declared_bos
        token = declared_token(self.path, "bos_token")
        with _library_errors(self.path, "cannot encode a text"):
            return self._backend.prepended_id if token is None else self._backend.id_of(token)

    @property
    def bos_id(self) -> int | None:
        """declared_bos_id, or the id of a special token with a usual name; None where there is neither."""
        return find_bos_id(self._backend, self.declared_bos_id)

    @property
    def prepends_bos(self) -> bool:
        """Whether the file itself puts bos_id before every text, as transformers then does."""
        with _library_errors(self.path, "cannot encode a text"):
            return self.bos_id is not None and self.bos_id == self._backend.prepended_id

    def require_bos_id(self) -> int:
        """bos_id; UserError where there is none, or it is the end-of-document id."""
        if self.bos_id is None:
            raise UserError(f"--add-bos: tokenizer {self.path} has no begin-of-text token; leave it out")
        if self.bos_id == self._eod_id:
            token = self._backend.token_of(self.bos_id)
            raise UserError(
                f"--add-bos: in tokenizer {self.path} {token!r} begins texts and ends documents; leave it "
                "out, or name another end with --eod"
            )
        return self.bos_id

    def check_eod(self) -> None:
        """UserError where a text can produce the end-of-document id, which would split its document."""
        eod_id = self.eod_id
        names = [token for token, token_id in self._backend.special.items() if token_id == eod_id]
        with _library_errors(self.path, "cannot encode a text"):
            if not names or text_can_produce(self._backend, eod_id, names[0]):
                token = names[0] if names else self._backend.token_of(eod_id)
                raise UserError(
                    f"tokenizer {self.path}: a text can produce {token!r} (id {eod_id}), which is to end "
                    f"documents; {alternatives(self._backend)}"
                )

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no begin or end token is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        with _library_errors(self.path, "cannot encode a text"):
            return self._backend.encode_batch(list(texts))

    def token_of(self, token_id: int) -> str:
        """The token of an id below vocab_size, as the tokenizer spells it."""
        with _library_errors(self.path, f"cannot name id {token_id}"):
            return self._backend.token_of(token_id)

    def chunks(self, text: str) -> list[str]:
        """A long text cut into chunks of about CHUNK_CHARACTERS whose ids, concatenated, are the text's.

        SentencePiece needs about 60 bytes per character, so a text of gigabytes must not be encoded at
        once. Cuts are after a single line end between visible characters, where the usual pre-tokenizers
        split too (in runs of white space they look ahead). With a tokenizer that encodes "a\\nb" unlike
        "a\\n" and "b" (it puts a space before every text), the text stays one chunk.
        """
        if len(text) <= CHUNK_CHARACTERS or not self._may_cut:
            return [text]
        cuts = [0]
        while match := _CUT.search(text, cuts[-1] + CHUNK_CHARACTERS):
            cuts.append(match.end())
        return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]

    @cached_property
    def _may_cut(self) -> bool:
        return all(
            self.encode(f"{before}\n{after}") == self.encode(f"{before}\n") + self.encode(after)
            for before, after in itertools.product(("a", "1", ".", "é"), ("b", "B", "1", "(", "é"))
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids beyond vocab_size, of a model with a padded vocabulary, are left out."""
        with _library_errors(self.path, "cannot decode ids"):
            return self._backend.decode([int(i) for i in ids if i < self.vocab_size])


@contextlib.contextmanager
def _library_errors(path: Path, failed: str) -> Iterator[None]:
    """Turn what a tokenizer library raises over a damaged file into a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises Exception, and BaseException where Rust panics
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenizer {path} {failed} ({reason[:300]}); use another") from None


def tokenizer_of(folder: str | Path, eod: str | int | None = None) -> Tokenizer:
    """The tokenizer inside a folder of prepared data or of an exported model.

    eod: see Tokenizer.load. Default: the one recorded in the folder (eod_id of manifest.json, or
    eos_token_id of config.json). Raises UserError for a missing or unreadable tokenizer.
    """
    folder = Path(folder)
    file = tokenizer_file(folder)
    if file is None:
        names = " or ".join(FILE_OF_KIND.values())
        raise UserError(f"{folder} holds no tokenizer; copy the {names} of the training data into it")
    return Tokenizer.load(file, recorded_eod_id(folder) if eod is None else eod)


def tokenizer_file(folder: Path) -> Path | None:
    """A folder's tokenizer file; None where there is none."""
    files = (folder / name for name in FILE_OF_KIND.values())
    return next((file for file in files if file.is_file()), None)
