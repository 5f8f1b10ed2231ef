"""Perplexity by tokens, words and bytes, as lm-evaluation-harness defines them."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlm_train.utils.units import perplexity


@dataclass(frozen=True)
class Score:
    """Natural log-likelihood of text, and the text's numbers of tokens, words and bytes.

    word_perplexity = exp(-logprob / words), byte_perplexity = exp(-logprob / bytes) and bits_per_byte =
    -logprob / (bytes ln 2): independent of the tokenizer.
    """

    logprob: float = 0.0
    tokens: int = 0
    words: int = 0
    bytes: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.logprob + other.logprob,
            self.tokens + other.tokens,
            self.words + other.words,
            self.bytes + other.bytes,
        )

    def figures(self) -> dict[str, float | int]:
        """By name; `loss` is the mean cross-entropy in nats per token. Where there is no text, inf."""
        loss, per_word, per_byte = (
            -self.logprob / count if count else math.inf for count in (self.tokens, self.words, self.bytes)
        )
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "word_perplexity": perplexity(per_word),
            "byte_perplexity": perplexity(per_byte),
            "bits_per_byte": per_byte / math.log(2),
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }


def total(scores: Iterable[Score]) -> Score:
    """All texts together: each token counts once."""
    return sum(scores, Score())


def words_in(text: str) -> int:
    """Pieces between runs of white space, counted as lm-evaluation-harness does; empty text has none."""
    return len(re.split(r"\s+", text)) if text else 0


def bytes_in(text: str) -> int:
    """Of its UTF-8."""
    return len(text.encode())
