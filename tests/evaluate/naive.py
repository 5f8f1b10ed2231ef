"""Log-likelihoods computed plainly: in float64, each token by a forward of its own context."""

import math
from collections.abc import Sequence

import torch

from mlm_train.memory import make_source
from mlm_train.model.transformer import Transformer


class Naive:
    """`model` in float64; `longest`: most ids it reads."""

    def __init__(self, model: Transformer, longest: int) -> None:
        self.model, self.longest = model.double(), longest
        has_memory = model.config.has_memory
        self.source = make_source("per_token", model.memory_blocks()) if has_memory else None

    def next(self, context: Sequence[int]) -> list[float]:
        """Log-probabilities of all ids after a context."""
        with torch.no_grad():
            logits = self.model(torch.tensor([list(context)]), self.source)[0, -1].tolist()
        top = max(logits)
        norm = top + math.log(math.fsum(math.exp(value - top) for value in logits))
        return [value - norm for value in logits]

    def answer(self, context: Sequence[int], labels: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of labels after a context, which loses its beginning where both are too long."""
        ids = [*context, *labels][-(self.longest + 1) :]
        first, total, greedy = len(ids) - len(labels), 0.0, True
        for place in range(first, len(ids)):
            values = self.next(ids[:place])
            total += values[ids[place]]
            greedy = greedy and max(values) == values[ids[place]]
        return total, greedy

    def rolling(self, tokens: Sequence[int], prefix: int, stride: int) -> float:
        """Log-likelihood of tokens in windows that move on by `stride` after the first one."""
        text, total = [prefix, *tokens], 0.0
        for place in range(1, len(text)):
            if place <= self.longest:
                start = 0
            else:  # its window ends at the next multiple of the stride, or with the text
                steps = math.ceil((place - self.longest) / stride)
                start = min(self.longest + steps * stride, len(tokens)) - self.longest
            total += self.next(text[start:place])[text[place]]
        return total

    def generate(self, context: Sequence[int], most: int, ends: set[int]) -> list[int]:
        """The most likely tokens, one after another."""
        ids: list[int] = list(context)
        for _ in range(most):
            values = self.next(ids)
            token = values.index(max(values))
            if token in ends:
                break
            ids.append(token)
        return ids[len(context) :]
