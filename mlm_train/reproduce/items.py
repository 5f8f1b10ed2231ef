"""The paper's tables and figures: what each needs, and what it becomes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from mlm_train.reproduce.finding import Finding
from mlm_train.reproduce.measures import (
    Body,
    dropped,
    figure5,
    figure6,
    figure7,
    figure9,
    figure10,
    figure11,
    figure13,
    table1,
    table2,
    table5,
    table6,
    table7,
    table8,
)
from mlm_train.reproduce.plan import LIKE, METHODS, TASK_ALPHAS, Plan, tasks_at
from mlm_train.reproduce.scores import Scores


class Item(NamedTuple):
    """A table or figure.

    needs: names of its steps. measure: from what they wrote. untrained: what it is of, where not of models
    that were trained at the scale.
    """

    title: str
    paper: str
    needs: Callable[[Plan], list[str]]
    measure: Callable[[Scores], Body]
    untrained: str | None = None


def each(plan: Plan, prefix: str, kinds: Iterable[str]) -> list[str]:
    """Names of a step for these kinds and all seeds."""
    return [f"{prefix}.{kind}.s{seed}" for kind in kinds for seed in plan.seeds]


ITEMS: dict[str, Item] = {
    "table1": Item(
        "Tasks with less memory",
        "MemoryLLM-1B at alpha 1.0 / 0.8 / 0.5: LAMBADA .361 / .355 / .109, ARC-Easy .516 / .441 / .317, "
        "HellaSwag .372 / .375 / .330, PIQA .702 / .706 / .680: recall falls, reasoning hardly.",
        lambda plan: [
            *(name for alpha in TASK_ALPHAS for name in each(plan, tasks_at(alpha), plan.scored_in_tasks)),
            *each(plan, "ablate", ["memory"]),
            *each(plan, "prose", ["memory"]),
        ],
        table1,
    ),
    "table2": Item(
        "Perplexity by active and total parameters",
        "C4, 50B tokens: base 737M 19.73, MemoryLLM 402M of 1208M 20.93, MemoryLLM 245M of 737M 22.08, base "
        "265M 23.19.",
        lambda plan: each(plan, "prose", plan.kinds),
        table2,
    ),
    "table5": Item(
        "Parameters",
        "Active and total, embedding and head excluded.",
        lambda plan: [],
        table5,
        untrained="by formula, of the paper's configs",
    ),
    "table6": Item(
        "Time and memory of a decoded token, 1B",
        "One A100, bf16, tables included: base 9.541 GB and 21.50 ms, Flex-h^2 7.025 and 18.75, "
        "2h^2 7.409 and 20.28, 3h^2 7.825 and 21.47, MemoryLLM 6.041 and 14.42.",
        lambda plan: ["decode"],
        table6,
        untrained="random weights in the paper's shapes, bf16, on this CPU",
    ),
    "table7": Item(
        "Tables in fewer bits",
        "MemoryLLM-1B on WikiText-2: 24.348 in 16 bit, 24.347 in 8, 24.439 in 4.",
        lambda plan: each(plan, "table", ["memory"]),
        table7,
    ),
    "table8": Item(
        "Tables of lower rank",
        "The same rank in each layer, C4: 18.919 uncut, 18.923, 18.958, 19.015, 19.126, 19.586 at 50 %.",
        lambda plan: each(plan, "table", ["memory"]),
        table8,
    ),
    "figure4": Item(
        "One layer's FFN dropped",
        "A picture: the first few layers matter, the middle ones hardly.",
        lambda plan: each(plan, "ablate", ["base", "memory"]),
        dropped(lambda plan: ["base", "memory"], "memory"),
    ),
    "figure5": Item(
        "Clusters of tokens by the keys they open",
        "Pictures, and a clustering measure that is not named: high in every layer.",
        lambda plan: each(plan, "keys", ["memory"]),
        figure5,
    ),
    "figure6": Item(
        "Outlier keys",
        "A picture, with a threshold that is not given: more in the last layers.",
        lambda plan: each(plan, "keys", ["memory"]),
        figure6,
    ),
    "figure7": Item(
        "What each part adds to the residual stream",
        "A picture of FFN-M's and attention's part by layer.",
        lambda plan: each(plan, "shares", plan.full_size),
        figure7,
    ),
    "figure9": Item(
        "Flex-MemoryLLM between MemoryLLM and base",
        "A picture: perplexity falls with beta; Flex-3h^2 (704M active) about equals base-1B.",
        lambda plan: each(plan, "prose", plan.full_size),
        figure9,
    ),
    "figure10": Item(
        "How well each layer's table compresses",
        "A picture, with the text: later layers compress better.",
        lambda plan: each(plan, "inspect", ["memory"]),
        figure10,
    ),
    "figure11": Item(
        "Against pruned base models",
        "A picture: at equal active parameters MemoryLLM and Flex beat magnitude, Wanda and SparseGPT.",
        lambda plan: [
            *each(plan, "prose", plan.with_memory),
            *(f"prune.{m}.{like}.s{seed}" for m in METHODS for like in LIKE.values() for seed in plan.seeds),
        ],
        figure11,
    ),
    "figure12": Item(
        "One layer of the table dropped",
        "A picture, as for the FFN of the base model.",
        lambda plan: each(plan, "ablate", plan.with_memory),
        dropped(lambda plan: plan.with_memory, "memory"),
    ),
    "figure13": Item(
        "Memory scaled",
        "A picture. In the text, perplexity of MemoryLLM-1B on WikiText-2 is 24.35 at alpha 1, 25.52 at 0.8, "
        "53.71 at 0.5.",
        lambda plan: each(plan, "ablate", plan.full_size),
        figure13,
    ),
}


def finding_of(name: str, scores: Scores, command: str, steps: list[str]) -> Finding:
    """The finding of an item whose steps have ended."""
    item, plan = ITEMS[name], scores.plan
    columns, rows, claims = item.measure(scores)
    return Finding(
        item=name,
        title=item.title,
        paper=item.paper,
        scale=plan.scale.name,
        text=item.untrained or plan.described,
        trained=item.untrained is None,
        seeds=plan.scale.seeds,
        columns=columns,
        rows=rows,
        claims=claims,
        command=command,
        steps=steps,
    )
