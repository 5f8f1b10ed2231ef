"""A folder of synthetic tasks: text for `data prepare`, and tasks of lm-evaluation-harness."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlm_train.data.synthetic import CHOICES, Sizes, Task, tasks
from mlm_train.utils.files import new_folder, write_json

VALIDATION = 0.05  # of the documents
PREFIX = "synthetic_"

# `perplexity` of the second is of the whole answer: exp of the mean of its negative log-likelihood.
_COMMON = """dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
_CHOICE = """task: {name}
tag: [synthetic, synthetic_{kind}]
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
_ANSWER = """task: {name}_answer
tag: [synthetic_answers, synthetic_{kind}_answers]
output_type: loglikelihood
doc_to_target: " {{{{choices[label]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def write_synthetic(output: Path, seed: int, sizes: Sizes) -> list[Task]:
    """Write train.jsonl and validation.jsonl, each task's questions and two YAML files, and synthetic.json.

    `synthetic_NAME` has accuracy over the choices, `synthetic_NAME_answer` the perplexity of the right one.
    The YAML files name the questions by absolute path, as the harness needs it: a folder that moved is to be
    written again. Raises UserError for an existing output.
    """
    made = tasks(seed, sizes)
    with new_folder(output) as partial:
        _write_text(partial, seed, made)
        for task in made:
            name = f"{PREFIX}{task.name}"
            file = f"{name}.questions.jsonl"
            _write_lines(partial / file, (question._asdict() for question in task.questions))
            fields = {"name": name, "kind": task.kind, "file": json.dumps(str(output.absolute() / file))}
            for suffix, template in (("", _CHOICE), ("_answer", _ANSWER)):
                text = (template + _COMMON).format(**fields)
                (partial / f"{name}{suffix}.yaml").write_text(text, encoding="utf-8")
        about = {"seed": seed, **asdict(sizes), "choices": CHOICES}
        write_json(partial / "synthetic.json", about)
    return made


def _write_text(folder: Path, seed: int, made: Iterable[Task]) -> None:
    """Documents of all tasks, shuffled; one of twenty is for validation."""
    documents = [{"text": text, "task": task.name} for task in made for text in task.documents]
    random.Random(f"{seed} documents").shuffle(documents)
    held_out = max(1, int(VALIDATION * len(documents)))
    _write_lines(folder / "validation.jsonl", documents[:held_out])
    _write_lines(folder / "train.jsonl", documents[held_out:])


def _write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
