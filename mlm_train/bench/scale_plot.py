"""The plot of `bench scale`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm_train.utils.files import write_figure

Row = dict[str, Any]
BASELINES = (8, 6, 4)  # bytes per weight that replicated FFN-M would send
PARTS = {"compute": "tab:blue", "tensor": "tab:green", "network": "tab:orange", "latency": "tab:red"}


def plot(rows: Sequence[Row], ratios: dict[str, float], file: Path) -> None:
    """Write a PNG: bytes per rank for FFN-M against replicated weights, and predicted step times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    value = {row["name"]: row["median"] for row in rows}
    worlds = list(dict.fromkeys(name.split(".")[0] for name in value if ".owned.formula." in name))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 1.0 + 0.5 * len(worlds)), sharey=True)
    for at, world in enumerate(worlds):
        owned = sum(size for name, size in value.items() if name.startswith(f"{world}.owned.formula.")) / 1e9
        left.barh(at, owned, color="tab:blue", label=None if at else "owned, counted")
        for marker, per_weight in zip("|xo", BASELINES, strict=True):
            whole = owned / ratios[f"owned_over_replicated_bytes_{world}_at_{per_weight}_bytes"]
            label = None if at else f"replicated, {per_weight} B per weight"
            left.plot(whole, at, marker, color="black", label=label)
        runs = ("owned", "fsdp_alone")
        times = [[value[f"{world}.{run}.predicted.{part}"] for part in PARTS] for run in runs]
        for shift, run, seconds in zip((-0.2, 0.2), runs, times, strict=True):
            start, alone = 0.0, sum(times[1])
            for (part, color), length in zip(PARTS.items(), seconds, strict=True):
                label = None if at or shift > 0 else {"tensor": "tensor parallel"}.get(part, part)
                right.barh(at + shift, length / alone, 0.35, start, color=color, label=label)
                start += length / alone
            text = f" {run.replace('_', ' ')}, {sum(seconds):.2f} s"
            right.text(start, at + shift, text, va="center", fontsize=7)
    left.set_yticks(range(len(worlds)), worlds)
    left.invert_yaxis()
    left.set_xlabel("GB sent per rank and step for FFN-M and x0")
    right.set_xlim(0, 1.35)
    right.set_xlabel("predicted step time over FSDP alone's (arithmetic: nothing was run)")
    for axes in (left, right):
        axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
