"""The synthetic tasks as the harness asks them: a space before each answer, and their groups."""

import math
from pathlib import Path

import pytest

from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.data.synthetic import Sizes
from mlm_train.data.synthetic_folder import write_synthetic
from mlm_train.evaluate.harness import MemoryLM
from mlm_train.evaluate.tasks import load_tasks
from tests.evaluate.naive import Naive
from tests.inference.test_language_model import export_with_words


def test_questions_are_asked_as_the_text_states_them(tmp_path: Path) -> None:
    sizes = Sizes(people=4, repeats=2, documents=5, questions=3)
    made = {task.name: task for task in write_synthetic(tmp_path / "tasks", 1, sizes)}
    found = load_tasks(["synthetic", "synthetic_answers"], tmp_path / "tasks")
    assert len(found.loaded["tasks"]) == 2 * len(made) == 8
    for name, task in found.loaded["tasks"].items():
        base = name.removeprefix("synthetic_").removesuffix("_answer")
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
        asked = [request.args for request in task.instances]
        for number, question in enumerate(made[base].questions):
            answers = [question.choices[question.label]] if name.endswith("_answer") else question.choices
            here = asked[number * len(answers) : (number + 1) * len(answers)]
            assert here == [(question.prompt, f" {answer}") for answer in answers]


def test_a_model_is_scored_on_all_of_them(tmp_path: Path) -> None:
    """Its tokenizer knows none of these words: each is the unknown one's id, 0."""
    made = write_synthetic(tmp_path / "tasks", 1, Sizes(people=4, repeats=2, documents=5, questions=3))
    export = export_with_words(tmp_path / "words")
    tasks = load_tasks(["synthetic_recall", "synthetic_reasoning_answers"], tmp_path / "tasks")
    results = tasks.run(MemoryLM(str(export))).tree["results"]
    assert results.keys() == {"synthetic_facts", *(f"synthetic_{task.name}_answer" for task in made[1:])}
    naive = Naive(load_model(export), 40)
    for task in made[1:]:
        sums = [
            naive.answer([0] * len(prompt.split()), [0] * len(choices[label].split()))[0]
            for prompt, choices, label in task.questions
        ]
        perplexity = math.exp(-sum(sums) / len(sums))
        assert results[f"synthetic_{task.name}_answer"]["perplexity,none"] == pytest.approx(
            perplexity, rel=1e-4
        )
