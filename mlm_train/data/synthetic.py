"""Synthetic tasks that small models can learn: recall of facts, and copying, induction and arithmetic.

Each task has training text and questions of four choices, disjoint by construction:

    facts        attributes of invented people. A question words a fact as the training text never words it,
                 though it words other people's facts so
    copy         a string of letters, repeated. A question has a string that the training text does not have
    induction    pairs of symbols, then the first of a pair again. A question has symbols that the training
                 text does not have
    arithmetic   sums of two numbers. A question has a pair of them that the training text does not have

Facts can only be known from training text; the other answers follow from the question and from a rule. All
of it follows from the seed, byte for byte.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mlm_train.errors import UserError

CHOICES = 4
LINES = 12  # of a document
SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
MOST_PEOPLE = 10_000
HELD_OUT = 0.2  # of all pairs of numbers, and of all symbols
NUMBERS = 50
PAIRS = 5  # of an induction line


class Attribute(NamedTuple):
    """Values, and wordings: those of training, and that of questions, which ends with the value."""

    values: Sequence[str]
    wordings: Sequence[str]
    asked: str


ATTRIBUTES = (
    Attribute(
        ("Arvant", "Belmora", "Cindral", "Dosk", "Elvar", "Fenwick", "Garos", "Hallin"),
        ("{name} lives in {value}.", "The home of {name} is {value}.", "In {value} you can meet {name}."),
        "{name} has a house in {value}.",
    ),
    Attribute(
        ("baker", "carver", "diver", "farmer", "hunter", "mason", "potter", "sailor"),
        ("{name} works as a {value}.", "The trade of {name} is {value}.", "There is a {value} named {name}."),
        "{name} earns money as a {value}.",
    ),
    Attribute(
        ("amber", "black", "blue", "brown", "green", "purple", "red", "white"),
        ("{name} wears {value}.", "The colour of {name} is {value}.", "Dressed in {value} comes {name}."),
        "{name} likes the colour {value}.",
    ),
)


class Question(NamedTuple):
    """A prompt, choices of what follows after a space, and the number of the right one."""

    prompt: str
    choices: list[str]
    label: int


class Task(NamedTuple):
    """A task's documents to train on, and its questions."""

    name: str
    kind: Literal["recall", "reasoning"]
    documents: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class Sizes:
    """How much of each task. Raises UserError for numbers that are too small or too large.

    people: whose facts the text states; every second one is asked for. repeats: statements of each fact.
    documents: of each other task. questions: at most this many of each task.
    """

    people: int = 40
    repeats: int = 60
    documents: int = 2000
    questions: int = 200

    def __post_init__(self) -> None:
        for name, least in (("people", 2), ("repeats", 1), ("documents", 1), ("questions", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give at least {least}")
        if self.people > MOST_PEOPLE:
            raise UserError(f"--people {self.people}: give at most {MOST_PEOPLE:,}")


def tasks(seed: int, sizes: Sizes) -> list[Task]:
    """All tasks. Each draws from a generator of its own: the size of one does not change another."""
    makers = {"facts": _facts, "copy": _copy, "induction": _induction, "arithmetic": _arithmetic}
    return [make(random.Random(f"{seed} {name}"), sizes) for name, make in makers.items()]


def _facts(draw: random.Random, sizes: Sizes) -> Task:
    names = [name.capitalize() for name in _words(draw, sizes.people, syllables=3)]
    lines: list[str] = []
    questions: list[Question] = []
    for number, (name, attribute) in enumerate(itertools.product(names, ATTRIBUTES)):
        value = draw.choice(attribute.values)
        asks = (number // len(ATTRIBUTES)) % 2 == 1
        wordings = attribute.wordings if asks else (*attribute.wordings, attribute.asked)
        lines += [wordings[i % len(wordings)].format(name=name, value=value) for i in range(sizes.repeats)]
        if asks:
            prompt = attribute.asked.partition(" {value}")[0].format(name=name)
            questions.append(_question(draw, prompt, value, [v for v in attribute.values if v != value]))
    draw.shuffle(lines)
    draw.shuffle(questions)
    return Task("facts", "recall", _documents(lines), questions[: sizes.questions])


def _copy(draw: random.Random, sizes: Sizes) -> Task:
    def string() -> str:
        return " ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 7)))

    lines = [f"{text} | {text}" for text in (string() for _ in range(sizes.documents * LINES))]
    seen, questions = {line.partition(" |")[0] for line in lines}, dict[str, Question]()
    while len(questions) < sizes.questions:
        text = string()
        if text not in seen:
            wrong = list({_altered(draw, text) for _ in range(40)})
            questions[text] = _question(draw, f"{text} |", text, sorted(wrong))
    return Task("copy", "reasoning", _documents(lines), list(questions.values()))


def _altered(draw: random.Random, text: str) -> str:
    """The same with another letter in one place."""
    letters = text.split()
    place = draw.randrange(len(letters))
    letters[place] = draw.choice(
        [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter != letters[place]]
    )
    return " ".join(letters)


def _induction(draw: random.Random, sizes: Sizes) -> Task:
    symbols = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
    draw.shuffle(symbols)
    cut = int(HELD_OUT * len(symbols))
    new, known = symbols[:cut], symbols[cut:]

    def pairs(among: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
        drawn = draw.sample(among, 2 * PAIRS)
        found = list(zip(drawn[::2], drawn[1::2], strict=True))
        return " , ".join(f"{first} {second}" for first, second in found), found

    lines = []
    for _ in range(sizes.documents * LINES):
        text, found = pairs(known)
        lines.append(f"{text} ; {' '.join(draw.choice(found))}")
    questions = []
    for _ in range(sizes.questions):
        text, found = pairs(new)
        asked = draw.randrange(PAIRS)
        wrong = [second for number, (_, second) in enumerate(found) if number != asked]
        questions.append(_question(draw, f"{text} ; {found[asked][0]}", found[asked][1], wrong))
    return Task("induction", "reasoning", _documents(lines), questions)


def _arithmetic(draw: random.Random, sizes: Sizes) -> Task:
    pairs = list(itertools.product(range(NUMBERS), repeat=2))
    draw.shuffle(pairs)
    cut = int(HELD_OUT * len(pairs))
    lines = [f"{a} + {b} = {a + b}" for a, b in draw.choices(pairs[cut:], k=sizes.documents * LINES)]
    questions = []
    for a, b in pairs[:cut][: sizes.questions]:
        # The right one may be any of four in a row: a model that knows only how frequent numbers are guesses.
        step = draw.choice((1, 2, 10))
        least = a + b - step * draw.randrange(min(CHOICES, (a + b) // step + 1))
        wrong = [str(least + step * i) for i in range(CHOICES) if least + step * i != a + b]
        questions.append(_question(draw, f"{a} + {b} =", str(a + b), wrong))
    return Task("arithmetic", "reasoning", _documents(lines), questions)


def _question(draw: random.Random, prompt: str, right: str, wrong: Sequence[str]) -> Question:
    """With CHOICES - 1 of the wrong answers, in a random order."""
    choices = [right, *draw.sample(wrong, CHOICES - 1)]
    draw.shuffle(choices)
    return Question(prompt, choices, choices.index(right))


def _words(draw: random.Random, count: int, syllables: int) -> list[str]:
    """Different words of that many syllables, in a random order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(SYLLABLES, k=syllables))] = None
    return list(found)


def _documents(lines: Sequence[str]) -> list[str]:
    return ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES)]
