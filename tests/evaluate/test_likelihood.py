"""Rolling windows and batched log-likelihoods, against each token by a forward of its own."""

import random
from typing import Any

import pytest
from lm_eval.utils import get_rolling_token_windows

from mlm_train.evaluate.likelihood import Request, likelihoods, rolling_windows
from tests.evaluate.naive import Naive
from tests.inference.test_decode import random_model, source_of


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20, 41])
def test_each_token_is_a_label_once_with_the_context_there_is_room_for(count: int) -> None:
    tokens = list(range(100, 100 + count))
    text = [7, *tokens]
    for stride in (1, 3, 8):
        windows = list(rolling_windows(tokens, 7, 8, stride))
        assert [label for window in windows for label in window.labels] == tokens
        for window in windows:
            assert len(window.ids) <= 8 and (len(window.ids) == 8 or len(windows) == 1)
            last = text.index(window.ids[-1])
            assert window.ids == text[last + 1 - len(window.ids) : last + 1]  # one piece of the text
            assert list(window.labels) == text[last + 2 - len(window.labels) : last + 2]
        theirs = get_rolling_token_windows(tokens, 7, 8, 8 - stride + 1)
        assert [(list(ids), list(labels)) for ids, labels in windows] == list(theirs)


@pytest.mark.parametrize("fields", [{"kind": "base"}, {"kind": "memory"}, {"kind": "flex", "flex_beta": 1}])
def test_batches_give_what_float64_gives_one_by_one(fields: dict[str, Any]) -> None:
    model, draw = random_model(**fields), random.Random(5)
    requests = []
    for length, labels in ((12, 3), (1, 1), (30, 30), (12, 12), (5, 1), (40, 7)):
        ids = draw.choices(range(97), k=length)
        requests.append(Request(ids, [*ids[length - labels + 1 :], draw.randrange(97)]))
    requests += [Request(requests[4].ids, [label]) for label in (3, 96)]  # choices of one token
    calls: list[int] = []
    found = {
        size: likelihoods(model, source_of(model), requests, size, lambda: calls.append(1))
        for size in (1, 3, 8)
    }
    assert len(calls) == 6 + 2 + 1  # requests with the same ids share a row
    naive = Naive(model, 40)
    for number, (ids, labels) in enumerate(requests):
        context = list(ids)[: len(ids) - len(labels) + 1]
        expected, greedy = naive.answer(context, labels)
        for scores in found.values():
            assert scores[number].logprob == pytest.approx(expected, abs=1e-4)
            assert scores[number].logprob == pytest.approx(found[1][number].logprob, rel=1e-5, abs=1e-5)
            assert scores[number].greedy is greedy


def test_a_greedy_answer_is_known_as_such() -> None:
    model = random_model(kind="memory")
    answer = Naive(random_model(kind="memory"), 40).generate([5, 80], 4, set())
    right = Request([5, 80, *answer[:-1]], answer)
    wrong = Request(right.ids, [*answer[:-1], (answer[-1] + 1) % 97])
    assert [one.greedy for one in likelihoods(model, source_of(model), [right, wrong], 2)] == [True, False]
