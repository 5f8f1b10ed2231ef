"""Synthetic tasks: what a question asks for is true, and is not in the training text; all from the seed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_train.data.synthetic import ATTRIBUTES, CHOICES, Question, Sizes, Task, tasks
from tests.commands import mlm_train, refused

SIZES = Sizes(people=12, repeats=8, documents=200, questions=100)


@pytest.fixture(scope="module")
def made() -> dict[str, Task]:
    return {task.name: task for task in tasks(3, SIZES)}


def lines(task: Task) -> Iterator[str]:
    for document in task.documents:
        yield from document.split("\n")


def answers(task: Task) -> Iterator[tuple[Question, str]]:
    for question in task.questions:
        assert len(set(question.choices)) == CHOICES
        yield question, question.choices[question.label]


def test_labels_are_spread(made: dict[str, Task]) -> None:
    for task in made.values():
        counts = [sum(question.label == label for question in task.questions) for label in range(CHOICES)]
        assert min(counts) > len(task.questions) / CHOICES / 3, task.name
        prompts = [question.prompt for question in task.questions]
        assert len(set(prompts)) == len(prompts)


def test_facts_are_stated_but_not_as_they_are_asked(made: dict[str, Task]) -> None:
    text = list(lines(made["facts"]))
    assert len(text) == 12 * 3 * 8
    assert len(made["facts"].questions) == 6 * 3
    asked = [attribute.asked for attribute in ATTRIBUTES]
    for question, right in answers(made["facts"]):
        name, _, rest = question.prompt.partition(" ")
        (wording,) = (each for each in asked if each.startswith(f"{{name}} {rest}"))
        attribute = ATTRIBUTES[asked.index(wording)]
        stated = {each.format(name=name, value=right) for each in attribute.wordings}
        assert {
            line for line in text if re.search(rf"\b{name}\b.*\b{right}\b|\b{right}\b.*\b{name}\b", line)
        } == stated
        for value in set(attribute.values) - {right}:  # no other value is stated of that name
            assert not {each.format(name=name, value=value) for each in attribute.wordings} & set(text)
        assert not any(line.startswith(question.prompt) for line in text)
        assert any(line.partition(" ")[2].startswith(rest) for line in text)  # of other people


def test_copies_and_sums_are_right_and_new(made: dict[str, Task]) -> None:
    for name, mark in (("copy", " |"), ("arithmetic", " =")):
        seen = set()
        for line in lines(made[name]):
            left, right = line.split(f"{mark} ")
            assert right == (left if name == "copy" else str(sum(map(int, left.split(" + ")))))
            seen.add(left)
        assert len(made[name].questions) == 100
        for question, right in answers(made[name]):
            left = question.prompt.removesuffix(mark)
            assert left not in seen
            assert right == (left if name == "copy" else str(sum(map(int, left.split(" + ")))))


def test_the_right_sum_is_neither_between_nor_beside_the_others(made: dict[str, Task]) -> None:
    places = [
        sorted(map(int, question.choices)).index(int(right))
        for question, right in answers(made["arithmetic"])
    ]
    assert min(places.count(place) for place in range(CHOICES)) >= 15


def test_induction_asks_for_a_pair_of_new_symbols(made: dict[str, Task]) -> None:
    seen = set()
    for line in lines(made["induction"]):
        given, _, repeated = line.partition(" ; ")
        assert repeated in given.split(" , ")
        seen |= set(re.findall(r"\w+", line))
    for question, right in answers(made["induction"]):
        given, _, first = question.prompt.partition(" ; ")
        pairs = dict(pair.split(" ") for pair in given.split(" , "))
        assert pairs[first] == right and set(question.choices) <= set(pairs.values())
        assert not seen & {*pairs, *pairs.values()}


def test_all_follows_from_the_seed(made: dict[str, Task], tmp_path: Path) -> None:
    assert tasks(3, SIZES) == list(made.values())
    more = {task.name: task for task in tasks(3, Sizes(12, 8, 201, 100))}
    assert more["facts"] == made["facts"] != tasks(4, SIZES)[0] and more["copy"] != made["copy"]
    options = ("--people", 4, "--repeats", 4, "--documents", 10, "--questions", 5)
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        mlm_train("data", "synthetic", "--output", tmp_path / name, "--seed", seed, *options)
    names = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert len(names) == 3 + 4 * 3
    for name in names:
        one, two, other = ((tmp_path / folder / name).read_text() for folder in ("one", "two", "other"))
        assert one.replace(str(tmp_path / "one"), str(tmp_path / "two")) == two
        assert name.endswith(".yaml") or one != other
    documents = [
        json.loads(line) for split in ("train", "validation")
        for line in (tmp_path / "one" / f"{split}.jsonl").read_text().splitlines()
    ]  # fmt: skip
    expected = [text for task in tasks(7, Sizes(4, 4, 10, 5)) for text in task.documents]
    assert sorted(document["text"] for document in documents) == sorted(expected)


def test_bad_input(tmp_path: Path) -> None:
    words = ("data", "synthetic", "--output", tmp_path / "new")
    assert "--people 1: give at least 2" in refused(*words, "--people", 1)
    assert "--people 10001: give at most 10,000" in refused(*words, "--people", 10001)
    assert "--questions 0: give at least 1" in refused(*words, "--questions", 0)
    assert "whole number from 0" in refused(*words, "--seed", "-1")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    assert "new" in refused(*words)
