"""The text of generated ids, piece by piece, and stop strings in it."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders make of a part of a character


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


class NewText:
    """The text after a prompt, up to the first of the stop strings.

    `text`: all of it so far, without incomplete characters. `stopped`: whether it ended at a stop string.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, stop
        # Ids whose text is known, and ids after them. Decoding the former too keeps the space in between.
        self._before, self._after = list(prompt), list[int]()
        self._before_text = tokenizer.decode(self._before)
        self._ended, self._taken = False, 0

    def add(self, token: int) -> None:
        """Take the next id."""
        self._after.append(token)
        decoded = self._tokenizer.decode([*self._before, *self._after])
        if not decoded.endswith(_INCOMPLETE):
            self._extend(decoded)

    def end(self) -> None:
        """No id follows: what is incomplete stays so."""
        if not self._ended and not self.stopped:
            self._extend(self._tokenizer.decode([*self._before, *self._after]))
        self._ended = True

    def take(self) -> str:
        """The text since the last call, but for what may be the beginning of a stop string."""
        until = len(self.text) - (0 if self._ended or self.stopped else self._held())
        piece = self.text[self._taken : until]
        self._taken = max(self._taken, until)
        return piece

    def _extend(self, decoded: str) -> None:
        known = self._before_text
        if not decoded.startswith(known):  # the prompt ended inside a character, which is now complete
            known = known.rstrip(_INCOMPLETE)
        piece = decoded[len(known) :]
        if not piece:
            return  # after ids without text, such as special tokens, alone, a space could get lost
        start = len(self.text)
        self.text += piece
        self._before, self._after = self._after, []
        self._before_text = self._tokenizer.decode(self._before)
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        if places := [place for place in found if place >= 0]:
            self.text, self.stopped = self.text[: min(places)], True

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self.text))
        ends = (self.text[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)
