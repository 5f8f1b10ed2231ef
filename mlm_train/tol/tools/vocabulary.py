"""Tokens of a table as text and back, where its model's folder holds a tokenizer."""

from typing import Self

from mlm_train.checkpoint.reading.logical_folder import ModelFolder
from mlm_train.data.tokenizer import Tokenizer, tokenizer_file
from mlm_train.errors import UserError


class Vocabulary:
    """Ids 0 to size - 1, of which a tokenizer may know fewer."""

    def __init__(self, size: int, tokenizer: Tokenizer | None) -> None:
        self.size, self._tokenizer = size, tokenizer
        self._before = [] if tokenizer is None else tokenizer.encode("a")

    @classmethod
    def of(cls, size: int, model: ModelFolder | None) -> Self:
        """With the model's tokenizer, if its folder holds one."""
        if model is None or tokenizer_file(model.home) is None:
            return cls(size, None)
        return cls(size, model.tokenizer())

    def text(self, token: int) -> str | None:
        """A token's text, a space before it included; None where there is no tokenizer that knows it."""
        if self._tokenizer is None or token >= self._tokenizer.vocab_size:
            return None
        # After another token: some tokenizers drop the space at the beginning of a text.
        whole = self._tokenizer.decode([*self._before, token])
        return whole[len(self._tokenizer.decode(self._before)) :]

    def find(self, word: str) -> int:
        """The token that a whole number or a text names. UserError where it is none, or several."""
        token = int(word) if word.isdecimal() else self._of_text(word)
        if token >= self.size:
            raise UserError(f"--neighbours {word}: there is no such token; give 0 to {self.size - 1}")
        return token

    def _of_text(self, word: str) -> int:
        if self._tokenizer is None:
            raise UserError(f"--neighbours {word!r}: give ids, or a --model whose folder holds a tokenizer")
        ids = self._tokenizer.encode(word)
        if len(ids) != 1:
            parts = ", ".join(f"{id_} {self.text(id_)!r}" for id_ in ids)
            raise UserError(f"--neighbours {word!r} is {len(ids)} tokens ({parts}); give one by its id")
        return ids[0]
