"""What each table and figure becomes, from the scores."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from mlm_train.config import load_config
from mlm_train.model.counts import count_parameters
from mlm_train.reproduce.finding import Cell, Claim, Spread, less
from mlm_train.reproduce.plan import FLEX, LIKE, METHODS, TASK_ALPHAS, TASK_MODEL, TASKS, Plan
from mlm_train.reproduce.scores import Scores

RECALL = "synthetic_facts"
GUESSED = 0.25  # questions have four choices


class Body(NamedTuple):
    """Columns, rows and claims of a finding."""

    columns: list[str]
    rows: list[list[Cell]]
    claims: list[Claim]


def table1(scores: Scores) -> Body:
    """Accuracy in tasks with less memory, beside perplexity."""
    rows: list[list[Cell]] = []
    for kind in scores.plan.scored_in_tasks:
        trained = "tasks alone" if kind == TASK_MODEL else "prose and tasks"
        for task in TASKS:
            found = [scores.seeds(partial(scores.accuracy, kind, alpha, task)) for alpha in TASK_ALPHAS]
            rows.append([_short(task), trained, *map(_in_3_digits, found)])
    exact = scores.perplexity("memory").mean
    texts = (exact * (1 + _growth(scores, alpha)) for alpha in TASK_ALPHAS)
    rows.append(["text, perplexity", "prose and tasks", *(f"{perplexity:,.2f}" for perplexity in texts)])
    last = scores.plan.scored_in_tasks[-1]
    lost = {task: scores.seeds(partial(_lost, scores, last, task)) for task in TASKS}
    learned = {task: scores.seeds(partial(scores.accuracy, last, 1.0, task)) for task in TASKS}
    claims = [
        Claim(claim=f"{_short(task)} is learned (accuracy above that of guessing, {GUESSED})",
              holds=found.mean > GUESSED, clear=found.least > GUESSED or found.most <= GUESSED,
              seen=_in_3_digits(found))
        for task, found in learned.items()
    ]  # fmt: skip
    claims += [
        less(f"less memory costs recall more than {_short(task)} (accuracy lost, alpha {TASK_ALPHAS[-1]:g})",
             [_short(task), _short(RECALL)], [lost[task], lost[RECALL]], _in_3_digits)
        for task in TASKS if task != RECALL
    ]  # fmt: skip
    return Body(["task", "trained on", *(f"alpha {alpha:g}" for alpha in TASK_ALPHAS)], rows, claims)


def _in_3_digits(value: Spread) -> str:
    return value.text(3)


def _short(task: str) -> str:
    return task.removeprefix("synthetic_")


def _lost(scores: Scores, kind: str, task: str, seed: int) -> float:
    """The accuracy that the least alpha costs."""
    full, least = (scores.accuracy(kind, alpha, task, seed) for alpha in (1.0, TASK_ALPHAS[-1]))
    return full - least


def _growth(scores: Scores, alpha: float) -> float:
    return 0.0 if alpha == 1 else scores.growth("ablate", "memory", study="alpha", alpha=alpha).mean


def table2(scores: Scores) -> Body:
    """Perplexity by size."""
    plan = scores.plan
    found = {kind: scores.perplexity(kind) for kind in plan.kinds}
    rows: list[list[Cell]] = []
    for kind, value in found.items():
        counts = count_parameters(load_config(plan.config(kind), list(plan.scale.overrides)).model)
        rows.append([kind, f"{counts.active:,}", f"{counts.total:,}", value.text()])
    claims = [less("MemoryLLM is worse than a Llama of the same total", ["base", "memory"],
                   [found["base"], found["memory"]])]  # fmt: skip
    if "base-small" in found:
        claims.append(less(
            "and better than a Llama of about its active size", ["memory", "base-small"],
            [found["memory"], found["base-small"]],
        ))  # fmt: skip
    return Body(["model", "active", "total", "perplexity"], rows, claims)


def table5(scores: Scores) -> Body:
    """By formula, at the paper's own shapes."""
    rows: list[list[Cell]] = []
    agree = True
    for size, paper in _PAPER_COUNTS.items():
        for kind, (active, total) in paper.items():
            config = load_config(scores.plan.config(kind).with_name(f"{kind}-{size}.yaml")).model
            counts = count_parameters(config)
            ours = round(counts.active / 1e6), round(counts.total / 1e6)
            agree &= abs(ours[0] - active) <= 1 and abs(ours[1] - total) <= 1
            rows.append([f"{kind} {size}", f"{ours[0]}M", f"{active}M", f"{ours[1]}M", f"{total}M"])
    claim = Claim(claim="active = layers (4 + beta) h^2, total = layers 12 h^2", holds=agree, clear=True,
                  seen="all within 1M" if agree else "not all within 1M")  # fmt: skip
    return Body(["model", "active", "paper", "total", "paper"], rows, [claim])


# Millions, embedding and head excluded. The paper's Table 5 prints the Flex column in reverse; its Table 4
# and text do not.
_PAPER_COUNTS = {
    "250m": {"base": (265, 265), "memory": (88, 265), "flex-1h2": (110, 265), "flex-2h2": (132, 265),
             "flex-3h2": (154, 265)},
    "750m": {"base": (737, 737), "memory": (245, 737), "flex-1h2": (307, 737), "flex-2h2": (368, 737),
             "flex-3h2": (430, 737)},
    "1b": {"base": (1208, 1208), "memory": (402, 1208), "flex-1h2": (503, 1208), "flex-2h2": (604, 1208),
           "flex-3h2": (704, 1208)},
}  # fmt: skip


def table6(scores: Scores) -> Body:
    """Decoding, beside the paper's figures as fractions of base."""
    rows: list[list[Cell]] = []
    found = scores.decode()
    for kind, (gigabytes, milliseconds) in _PAPER_DECODE.items():
        time, resident = found[kind]
        over = f"{time / found['base'][0]:.2f}", f"{resident / found['base'][1]:.2f}"
        paper = f"{milliseconds / 21.50:.2f}", f"{gigabytes / 9.541:.2f}"
        rows.append([kind, f"{time:.1f}", over[0], paper[0], f"{resident:.2f}", over[1], paper[1]])
    faster = found["memory"][0] < found["flex-3h2"][0] < found["base"][0]
    seen = ", ".join(f"{kind} {found[kind][0]:.1f} ms" for kind in ("memory", "flex-3h2", "base"))
    claim = Claim(
        claim="MemoryLLM decodes fastest, and Flex-3h^2 faster than base", holds=faster, clear=True, seen=seen
    )
    return Body(["model", "ms/token", "of base", "paper", "GB", "of base", "paper"], rows, [claim])


# GB and ms per token on an A100, tables included.
_PAPER_DECODE = {
    "base": (9.541, 21.50),
    "flex-3h2": (7.825, 21.47),
    "flex-2h2": (7.409, 20.28),
    "flex-1h2": (7.025, 18.75),
    "memory": (6.041, 14.42),
}


def table7(scores: Scores) -> Body:
    """Growth of perplexity in fewer bits."""
    rows: list[list[Cell]] = []
    growth = {}
    for dtype, paper in (("bfloat16", 0.0), ("int8", 24.347 / 24.348 - 1), ("int4", 24.439 / 24.348 - 1)):
        growth[dtype] = scores.growth("table", "memory", study="precision", dtype=dtype)
        size = scores.bytes("table", "memory", study="precision", dtype=dtype) / 1e6
        rows.append([dtype, f"{size:.2f}", growth[dtype].percent(), f"{paper:+.2%}"])
    small = Claim(claim="4 bits cost less than 1 % of perplexity", holds=growth["int4"].mean < 0.01,
                  clear=growth["int4"].most < 0.01, seen=growth["int4"].percent())  # fmt: skip
    return Body(["table", "MB", "growth", "paper"], rows, [small])


def table8(scores: Scores) -> Body:
    """Growth of perplexity at lower rank, by how directions are chosen."""
    paper = {0.1: 18.923, 0.2: 18.958, 0.3: 19.015, 0.4: 19.126, 0.5: 19.586}
    variants = ("uniform", "weighted", "per layer")
    rows: list[list[Cell]] = []
    last = {}
    for cut, perplexity in paper.items():
        found = {
            variant: scores.growth("table", "memory", study="rank", cut=cut, variant=variant)
            for variant in variants
        }
        last = found
        rows.append([f"{cut:.0%}", *(map(Spread.percent, found.values())), f"{perplexity / 18.919 - 1:+.2%}"])
    claims = [
        less("weighing rows by token frequency costs less (half of the ranks)", ["weighted", "uniform"],
             [last["weighted"], last["uniform"]], Spread.percent),
        less("so does a rank per layer", ["per layer", "uniform"],
             [last["per layer"], last["uniform"]], Spread.percent),
    ]  # fmt: skip
    return Body(["ranks cut", *variants, "paper"], rows, claims)


def dropped(kinds: Callable[[Plan], list[str]], part: str) -> Callable[[Scores], Body]:
    """The growth of perplexity without each layer's FFN, by kind."""

    def measure(scores: Scores) -> Body:
        chosen = kinds(scores.plan)
        found = {
            kind: [
                scores.growth("ablate", kind, study="drop", layer=layer,
                              part="ffn" if kind == "base" else part)
                for layer in scores.layers(kind)
            ]
            for kind in chosen
        }  # fmt: skip
        rows: list[list[Cell]] = [
            [str(layer), *(found[kind][layer].percent() for kind in chosen)]
            for layer in scores.layers(chosen[0])
        ]
        claims = []
        for kind, growths in found.items():
            first = len(growths) // 3 or 1
            early, late = (Spread.of(g.mean for g in part) for part in (growths[:first], growths[first:]))
            seen = f"first {first}: {early.mean:+.1%} on average, others up to {late.most:+.1%}"
            claims.append(Claim(
                claim=f"{kind}: only the first layers matter much", holds=early.mean > late.most,
                clear=early.least > late.most, seen=seen,
            ))  # fmt: skip
        return Body(["layer", *chosen], rows, claims)

    return measure


def figure9(scores: Scores) -> Body:
    """Perplexity of flex models between memory and base."""
    kinds = ["memory", *(kind for kind in FLEX if kind in scores.plan.kinds), "base"]
    found = {kind: scores.perplexity(kind) for kind in kinds}
    rows: list[list[Cell]] = []
    for kind, value in found.items():
        counts = count_parameters(
            load_config(scores.plan.config(kind), list(scores.plan.scale.overrides)).model
        )
        rows.append([kind, f"{counts.active / counts.total:.0%}", value.text()])
    order = list(reversed(kinds[:-1]))
    near = found[order[0]].mean / found["base"].mean - 1
    claims = [
        less("each h^2 of FFN-C helps", order, [found[kind] for kind in order]),
        Claim(claim="Flex-3h^2 about equals the base model (within 1 %)", holds=abs(near) < 0.01,
              clear=True, seen=f"{near:+.2%}"),
    ]  # fmt: skip
    return Body(["model", "active of total", "perplexity"], rows, claims)


def figure11(scores: Scores) -> Body:
    """Perplexity beside base models pruned to the same active size."""
    rows: list[list[Cell]] = []
    claims = []
    for kind in scores.plan.with_memory:
        trained = scores.perplexity(kind)
        pruned = {method: scores.pruned(method, LIKE[kind]) for method in METHODS}
        rows.append([kind, trained.text(), *(value.text() for value in pruned.values())])
        best = min(pruned, key=lambda method: pruned[method].mean)
        claims.append(less(
            f"{kind} is better than a base model pruned to its active size", [kind, best],
            [trained, pruned[best]],
        ))  # fmt: skip
    return Body(["active size of", "trained so", *(f"base, {method}" for method in METHODS)], rows, claims)


def figure5(scores: Scores) -> Body:
    """Clustering of tokens, by layer."""
    rows: list[list[Cell]] = []
    coefficients = []
    for layer in scores.layers("memory"):
        found = scores.seeds(partial(_coefficient, scores, layer))
        first = scores.keys(0, layer)
        largest = max(first.clusters, key=lambda cluster: cluster.tokens)
        silhouette = "" if first.silhouette is None else f"{first.silhouette:.3f}"
        rows.append([str(layer), found.text(3), silhouette, f"{first.explained:.3f}", largest.name])
        coefficients.append(found)
    claim = Claim(
        claim="tokens cluster by the keys they open, in every layer (coefficient above 0.1)",
        holds=all(found.mean > 0.1 for found in coefficients),
        clear=all(found.least > 0.1 for found in coefficients)
        or any(found.most < 0.1 for found in coefficients),
        seen=", ".join(found.text(3) for found in coefficients),
    )
    return Body(
        ["layer", "coefficient", "silhouette", "explained", "largest cluster (seed 0)"], rows, [claim]
    )


def _coefficient(scores: Scores, layer: int, seed: int) -> float:
    return scores.keys(seed, layer).clustering_coefficient


def figure6(scores: Scores) -> Body:
    """Numbers of outlier keys, by layer."""
    layers = scores.layers("memory")
    last = max(1, len(layers) // 3)

    def outliers(among: range, seed: int) -> float:
        return statistics.fmean(len(scores.keys(seed, layer).outlier_keys) for layer in among)

    found = [scores.seeds(partial(outliers, range(layer, layer + 1))) for layer in layers]
    rows: list[list[Cell]] = [[str(layer), value.text(1)] for layer, value in enumerate(found)]
    parts = [scores.seeds(partial(outliers, part)) for part in (layers[:-last], layers[-last:])]
    claim = less("the last layers have more outlier keys", ["others", f"last {last}"], parts)
    return Body(["layer", "outlier keys"], rows, [claim])


def figure7(scores: Scores) -> Body:
    """Shares of a layer's update, by part."""
    kinds = scores.plan.full_size
    parts = {"attention": "attention", "ffn": "FFN or FFN-C", "ffn_m": "FFN-M"}
    rows: list[list[Cell]] = []
    for kind in kinds:
        for layer in scores.layers(kind):
            shares = [scores.seeds(partial(scores.share, kind, layer, part)).text(3) for part in parts]
            rows.append([kind, str(layer), *shares])
    return Body(["model", "layer", *parts.values()], rows, [])


def figure10(scores: Scores) -> Body:
    """Relative error at half of the ranks, by layer."""
    layers = scores.layers("memory")
    third = max(1, len(layers) // 3)
    found = [scores.seeds(partial(scores.half_rank_error, layer)) for layer in layers]
    rows: list[list[Cell]] = [[str(layer), value.text(3)] for layer, value in enumerate(found)]

    def mean(among: range, seed: int) -> float:
        return statistics.fmean(scores.half_rank_error(layer, seed) for layer in among)

    ends = [scores.seeds(partial(mean, part)) for part in (layers[-third:], layers[:third])]
    claim = less("later layers compress better", [f"last {third}", f"first {third}"], ends, _in_3_digits)
    return Body(["layer", "relative error at half of the ranks"], rows, [claim])


def figure13(scores: Scores) -> Body:
    """Growth of perplexity with FFN-M, or the base model's FFN, scaled."""
    kinds = scores.plan.full_size
    part = {kind: "ffn" if kind == "base" else "memory" for kind in kinds}

    def grown(kind: str, alpha: float | None) -> Spread:
        return scores.growth("ablate", kind, study="alpha", part=part[kind], alpha=alpha)

    points = (row.point for row in scores.rows("ablate", "memory", 0))
    alphas = sorted({point.alpha for point in points if point.study == "alpha" and point.alpha is not None})
    rows: list[list[Cell]] = [
        [f"{alpha:g}", *(grown(kind, alpha).percent() for kind in kinds)] for alpha in alphas
    ]
    claim = less("halving FFN-M costs less than halving a base model's FFN", ["memory", "base"],
                 [grown("memory", 0.5), grown("base", 0.5)], Spread.percent)  # fmt: skip
    return Body(["alpha", *kinds], rows, [claim])
