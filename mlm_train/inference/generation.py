"""One sequence: its prompt, what has been generated after it, and why it ended."""

from collections.abc import Collection
from typing import Literal

from mlm_train.errors import UserError
from mlm_train.inference.sampling import Choice, Logprob, Sampler, Sampling
from mlm_train.inference.text import Decodes, NewText


class Generation:
    """A prompt of token ids, and what the decoder adds to it.

    `ids`: the new tokens, without the one of `stop_ids` that ended them. `logprobs`: one per new token, None
    where sampling.logprobs is. `text`: None without a tokenizer. `finish_reason`: "stop" for an id or a text
    that ends it, "length" for `limit` new tokens; None while it goes on.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        limit: int,
        vocab_size: int,
        stop_ids: Collection[int] = (),
        tokenizer: Decodes | None = None,
    ) -> None:
        if sampling.stop and tokenizer is None:
            raise UserError(f"stop {sampling.stop!r}: needs a tokenizer; give stop_ids instead")
        self.prompt, self.limit, self.sampler = prompt, limit, Sampler(sampling, prompt, vocab_size)
        self.ids: list[int] = []
        self.logprobs: list[Logprob] | None = None if sampling.logprobs is None else []
        self.text = None if tokenizer is None else NewText(tokenizer, prompt, sampling.stop)
        self.finish_reason: Literal["stop", "length"] | None = None
        self._stop_ids = frozenset(stop_ids)

    def add(self, choice: Choice) -> None:
        """Add the next token, or end."""
        if choice.id in self._stop_ids:
            self.finish_reason = "stop"
        else:
            self._append(choice)
        if self.finish_reason and self.text is not None:
            self.text.end()

    def _append(self, choice: Choice) -> None:
        self.ids.append(choice.id)
        if self.logprobs is not None and choice.logprob is not None:
            self.logprobs.append(choice.logprob)
        if self.text is not None:
            self.text.add(choice.id)
        if self.text is not None and self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
