"""Token ids of a table as text and back, if its model's folder has a tokenizer."""

from typing import Self

from mlm_train.checkpoint.reading.logical_folder import ModelFolder
from mlm_train.data.tokenizer import Tokenizer, tokenizer_file
from mlm_train.errors import UserError


class Vocabulary:
    """Token ids 0 to size - 1; a tokenizer may know fewer."""

    def __init__(self, size: int, tokenizer: Tokenizer | None) -> None:
        self.size, self._tokenizer = size, tokenizer
        self._before = [] if tokenizer is None else tokenizer.encode("a")

    @classmethod
    def of(cls, size: int, model: ModelFolder | None) -> Self:
        """A vocabulary with the model's tokenizer, if its folder has one."""
        if model is None or tokenizer_file(model.home) is None:
            return cls(size, None)
        return cls(size, model.tokenizer())

    def text(self, token: int) -> str | None:
        """A token's text with its leading space; None if no tokenizer knows it."""
        if self._tokenizer is None or token >= self._tokenizer.vocab_size:
            return None
        # After another token, since some tokenizers drop a leading space at the start of a text.
        whole = self._tokenizer.decode([*self._before, token])
        return whole[len(self._tokenizer.decode(self._before)) :]

    def find(self, name: str, option: str) -> int:
        """The token id that a number or a text names, given with an option. UserError for none or several."""
        token = int(name) if name.isdecimal() else self._of_text(name, option)
        if token >= self.size:
            raise UserError(f"{option} {name}: there is no such token; give 0 to {self.size - 1}")
        return token

    def _of_text(self, text: str, option: str) -> int:
        if self._tokenizer is None:
            raise UserError(f"{option} {text!r}: give ids, or a --model whose folder has a tokenizer")
        ids = self._tokenizer.encode(text)
        if len(ids) != 1:
            parts = ", ".join(f"{id_} {self.text(id_)!r}" for id_ in ids)
            raise UserError(f"{option} {text!r} is {len(ids)} tokens ({parts}); give one by its id")
        return ids[0]
