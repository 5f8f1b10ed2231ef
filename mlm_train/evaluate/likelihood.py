"""Log-likelihoods of tokens after a context, in batches: texts in rolling windows, and answers of tasks."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.model.loss import default_chunk
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.utils.progress import tracked


class Request(NamedTuple):
    """`ids`: what the model reads. `labels`: the tokens to score, one after each of the last of `ids`."""

    ids: Sequence[int]
    labels: Sequence[int]


class Likelihood(NamedTuple):
    """Natural log-likelihood of a request's labels; whether each of them is the most likely token."""

    logprob: float
    greedy: bool


def rolling_windows(tokens: Sequence[int], prefix: int, length: int, stride: int) -> Iterator[Request]:
    """Requests of at most `length` ids in which each token is a label once; the first follows `prefix`.

    The first window has `length` labels, each later one `stride` (1 to length), after as many ids as there is
    room for: a label has at least length - stride ids before the one that it follows, and the last window is
    full. With stride = length these are the windows of lm-evaluation-harness (get_rolling_token_windows).
    """
    done = min(length, len(tokens))
    if done:
        yield Request([prefix, *tokens[: done - 1]], tokens[:done])
    while done < len(tokens):
        stop = min(done + stride, len(tokens))
        yield Request(tokens[stop - length - 1 : stop - 1], tokens[done:stop])
        done = stop


@torch.inference_mode()
def likelihoods(
    model: Transformer,
    source: MemorySource | None,
    requests: Sequence[Request],
    batch_size: int,
    after_batch: Callable[[], object] = lambda: None,
    show: bool = False,
) -> list[Likelihood]:
    """Likelihoods of requests, in their order; each is what it would be alone, up to rounding.

    The longest come first. Requests that read the same ids are one row of a batch: the choices of one token
    of a question cost one forward. Logits exist at labels alone, some tokens at a time. show: a progress bar
    on a terminal.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        readers.setdefault(tuple(request.ids), []).append(number)
    found: dict[int, Likelihood] = {}
    rows = sorted(readers, key=len, reverse=True)
    starts = range(0, len(rows), batch_size)
    for start in tracked(starts, "evaluate", show):
        batch = rows[start : start + batch_size]
        asked = [(row, number) for row, ids in enumerate(batch) for number in readers[ids]]
        places = [
            (row, column)
            for row, number in asked
            for column in range(len(batch[row]) - len(requests[number].labels), len(batch[row]))
        ]
        labels = [label for _, number in asked for label in requests[number].labels]
        device = next(model.parameters()).device
        hidden = model.hidden(_padded(batch).to(device), source)
        at = torch.tensor(places, device=device).unbind(1)
        logprobs, greedy = _scored(model, hidden[at], torch.tensor(labels, device=device))
        sizes = [len(requests[number].labels) for _, number in asked]
        parts = zip(asked, logprobs.split(sizes), greedy.split(sizes), strict=True)
        for (_, number), values, matches in parts:
            found[number] = Likelihood(float(values.sum()), bool(matches.all()))
        after_batch()
    return [found[number] for number in range(len(requests))]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [rows, columns]; after its end a row repeats its first id: no memory is read that none needs."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *([row[0]] * (longest - len(row)))] for row in rows])


def _scored(model: Transformer, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of normed hidden [tokens, hidden]: labels' log-probabilities, fp64, and whether each is the argmax.

    Both [tokens], on the CPU.
    """
    chunk = default_chunk(model.head_weight.shape[0], hidden.device)
    logprobs, greedy = [], []
    for states, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = model.head(states).float()
        target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        logprobs.append((target - logits.logsumexp(-1)).double())
        greedy.append(logits.argmax(-1) == targets)
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
