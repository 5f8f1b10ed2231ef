"""Tasks of lm-evaluation-harness: finding them, and their results. Needs pip install 'mlm-train[lm-eval]'."""

import contextlib
import difflib
import importlib.util
import io
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlm_train.errors import UserError
from mlm_train.evaluate.report import finite

BOOTSTRAPS = 1000  # resamples for the standard error of what is no mean, such as a perplexity
SHOWN = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class TaskResults:
    """What the harness returns."""

    tree: Mapping[str, Any]

    def table(self) -> str:
        """The harness' own tables, in Markdown."""
        from lm_eval.utils import make_table

        tables = [make_table(self.tree)]
        if self.tree.get("groups"):
            tables.append(make_table(self.tree, "groups"))
        return "\n".join(tables)

    def as_json(self) -> str:
        """Results with versions, numbers of questions and of solved examples; one line."""
        return json.dumps(finite({key: self.tree[key] for key in SHOWN if self.tree.get(key)}), default=str)

    def scalars(self) -> dict[str, float]:
        """`tasks/METRIC/TASK`, for TensorBoard; a filter's name follows the metric's where it has one."""
        return {
            f"tasks/{metric.replace(',none', '').replace(',', '-')}/{task}": float(value)
            for task, metrics in self.tree["results"].items()
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, int | float)
        }


@dataclass(frozen=True)
class Tasks:
    """What the harness' task manager has loaded: tasks and groups of them."""

    loaded: Any

    def run(self, model: Any, limit: int | None = None, num_fewshot: int | None = None) -> TaskResults:
        """Score a model of the harness, as its simple_evaluate does, which also asks git and nvidia-smi.

        num_fewshot: instead of the tasks' own number, but for those that fix 0.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        for task in self.loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            task.set_config(
                key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot
            )
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with _quiet():
            found = evaluate(model, self.loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
        return TaskResults(found)


def check_harness() -> None:
    """Raise UserError where the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'mlm-train[lm-eval]'")


def load_tasks(given: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Find tasks, groups, tags and YAML files by name, and read their data.

    include_path: a folder of YAML files, before the harness' own. Raises UserError for a folder that is not
    there, a name that none has, with the nearest ones, and a task that cannot be loaded.
    """
    check_harness()
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            f"--include-path {include_path} is not a folder; give one with the YAML files of tasks"
        )
    wanted = [name.strip() for name in given if name.strip()]
    if not wanted:
        raise UserError("--tasks has no names; give some such as arc_easy,hellaswag")
    names = [name for name in wanted if not Path(name).is_file()]
    if missing := [name for name in names if name.endswith((".yaml", ".yml"))]:
        raise UserError(f"--tasks {missing[0]} does not exist; give the path of a task's YAML file")
    with _quiet():
        manager = _manager(names, include_path)
        for name in names:
            if name in manager.all_tasks:
                continue
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "give --include-path for tasks of your own"
            )
            raise UserError(f"--tasks {name}: there is no such task; {hint}")
        try:
            return Tasks(manager.load(wanted))
        except Exception as error:  # a task may run any code of its own, and read data from anywhere
            lines = str(error).strip().splitlines() or [""]
            raise UserError(
                f"--tasks {','.join(wanted)} cannot be loaded ({type(error).__name__}: {lines[0][:300]}); "
                "check the task's YAML file and its data"
            ) from None


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """One that knows the folder's tasks alone where that is enough: the harness' own take seconds to read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= {*own.all_subtasks, *own.all_tags}:
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness' notices from standard output, which is for results, and its warnings out of the way.

    It resamples in this process: a pool would fork one in which torch's threads run.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
