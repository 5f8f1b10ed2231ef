"""The import graph of mlm_train's modules, and the order of layers that it must keep.

    python tools/import_graph.py            # each layer, with the number of imports from each lower one
    python tools/import_graph.py --modules  # each module and its imports

Lazy imports inside functions and those under TYPE_CHECKING count like any other.
"""

import argparse
import ast
from collections import Counter
from pathlib import Path

PACKAGE = "mlm_train"

# From bottom to top. A module belongs to the layer with the longest matching prefix, and imports modules of
# its own layer and of those before it in this list, never of a later one. ARCHITECTURE.md has the same table.
LAYERS = (
    ("errors", "errors shown to the user, and exit codes"),
    ("utils", "files, records, units, locks, signals, terminals; independent of models"),
    ("config", "the YAML config of a run, typed and checked"),
    ("kernels", "kernels for one kind of device"),
    ("model", "plain torch: the Transformer, independent of parallelism"),
    ("memory", "FFN-M on one rank: per token, once per distinct token, as a table"),
    ("data", "text, tokenizers, prepared data, the order of samples"),
    ("parallel.mesh", "the layout of ranks and their process groups"),
    ("parallel.health", "hangs and failures: which rank is stuck, where, since when"),
    ("parallel.launch", "starting the processes of a run, on one machine or many"),
    ("parallel.runtime", "a rank's view of the others, and the loop's few collectives"),
    ("parallel.tensor", "tensor parallelism"),
    ("parallel.ffn_m", "FFN-M and the embedding over the ranks of a stage"),
    ("parallel.pipeline", "pipeline parallelism, and how x0 reaches every stage"),
    ("parallel.engine", "data parallelism and the optimizer"),
    ("parallel.build", "building a rank's model shard and its executor"),
    ("monitor", "log lines, metrics, heartbeat, stragglers"),
    ("checkpoint", "checkpoints, exports, imports, reading a model from any of them"),
    ("tol.storage", "storage of tables: folders, object stores, node-local folders"),
    ("tol.format", "a table's files: index, partitions, codec"),
    ("tol.serve", "reading rows"),
    ("tol.lowrank", "spectra, ranks, and the knapsack that chooses ranks"),
    ("tol.build", "building tables with Ray"),
    ("evaluate", "loss and perplexity of a model on prepared data and on text, and tasks"),
    ("tol.allocate", "choosing each layer's scheme by its cost in perplexity"),
    ("tol.tools", "verifying, copying and inspecting tables"),
    ("inference", "decoding"),
    ("evaluate.harness", "models in lm-evaluation-harness"),
    ("analyze", "what FFN-M does: its keys, edits of them, its share of a layer; ablations, pruning"),
    ("reproduce", "the paper's tables and figures, step by step"),
    ("hf", "memory and flex as models of Hugging Face transformers"),
    ("vllm", "memory and flex as models of vLLM, a plugin"),
    ("plan", "estimates of a run's or a table's needs"),
    ("train", "a run: setup, loop, step, schedule, signals"),
    ("bench", "benchmarks"),
    ("cli", "the commands"),
)
# The commands, which may import anything; their folder is not their layer.
COMMANDS = (
    "__main__",
    "doctor",
    "analyze.command",
    "reproduce.command",
    "bench.command",
    "checkpoint.command",
    "checkpoint.export",
    "checkpoint.import_command",
    "data.command",
    "evaluate.command",
    "inference.command",
    "monitor.command",
    "plan.command",
    "tol.commands",
    "train.command",
    "train.launch_command",
    "vllm.command",
)


def modules(root: Path) -> dict[str, Path]:
    """The package's modules by dotted name without the package; "" is the package itself."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports anywhere in its text."""
    known = modules(root)
    return {
        name: {other for other in _imported(path, known) if other != name} for name, path in known.items()
    }


def _imported(path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _own(name) in known else str(node.module) for name in inside]
        else:
            continue
        found |= {own for name in names if (own := _own(name)) in known}
    return found


def _own(name: str) -> str | None:
    """A dotted name without the package; None for another package's."""
    return name.removeprefix(PACKAGE).lstrip(".") if name.split(".")[0] == PACKAGE else None


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles: strongly connected components of more than one module."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {
        frozenset([name, *(other for other in reached[name] if name in reached[other])]) for name in graph
    }
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set[str](), [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def layer_of(module: str) -> int | None:
    """Index of a module's layer in LAYERS; None where it belongs to none."""
    if module in ("", "parallel", "tol"):  # packages that only hold others
        return 0
    if _below(module, COMMANDS):
        return len(LAYERS) - 1
    names = [name for name, _ in LAYERS]
    return names.index(max(_below(module, names), key=len)) if _below(module, names) else None


def _below(module: str, prefixes: tuple[str, ...] | list[str]) -> list[str]:
    return [one for one in prefixes if module == one or module.startswith(f"{one}.")]


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a higher layer's modules."""
    pairs = ((name, other) for name, others in graph.items() for other in others)
    return sorted((a, b) for a, b in pairs if (layer_of(a) or 0) < (layer_of(b) or 0))


def main() -> None:
    """Print the graph."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modules", action="store_true", help="print modules instead of layers")
    args = parser.parse_args()
    graph = imports(Path(__file__).resolve().parents[1])
    if args.modules:
        for name, others in graph.items():
            print(f"{name or PACKAGE}: {', '.join(sorted(others))}")
    else:
        for number, (layer, purpose) in enumerate(LAYERS):
            members = [name for name in graph if layer_of(name) == number]
            counts = Counter(layer_of(other) for name in members for other in graph[name])
            below = [f"{LAYERS[n][0]} {counts[n]}" for n in sorted(counts, key=str) if n != number]
            print(f"{layer} ({len(members)} modules: {purpose}) -> {', '.join(below)}")
    for cycle in cycles(graph):
        print("cycle:", " ".join(cycle))
    for name, other in upward(graph):
        print(f"upward: {name} -> {other}")


if __name__ == "__main__":
    main()
