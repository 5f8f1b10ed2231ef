"""What the steps of a reproduction wrote."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlm_train.analyze.ablate.study import Row, read_ablation
from mlm_train.analyze.keys.folder import KeysFolder, Statistics
from mlm_train.config import load_config
from mlm_train.reproduce.finding import Spread
from mlm_train.reproduce.plan import KINDS, Plan, tasks_at
from mlm_train.reproduce.steps import Workspace


class Scores:
    """What the steps wrote, read when it is needed."""

    def __init__(self, workspace: Workspace, plan: Plan) -> None:
        self.workspace, self.plan = workspace, plan

    def seeds(self, of: Callable[[int], float]) -> Spread:
        """A figure over the seeds."""
        return Spread.of(of(seed) for seed in self.plan.seeds)

    def perplexity(self, kind: str) -> Spread:
        """On the validation text."""
        return self.seeds(lambda seed: self._json(f"prose.{kind}.s{seed}")["perplexity"])

    def accuracy(self, kind: str, alpha: float, task: str, seed: int) -> float:
        """The accuracy in a task."""
        return float(self._json(f"{tasks_at(alpha)}.{kind}.s{seed}")["results"][task]["acc,none"])

    def pruned(self, method: str, like: str) -> Spread:
        """The perplexity of the base model, pruned."""
        return self.seeds(lambda seed: self._json(f"prune.{method}.{like}.s{seed}")["pruned_perplexity"])

    def growth(self, name: str, kind: str, **point: Any) -> Spread:
        """How much perplexity grows at a point of an ablation, as a fraction."""

        def of(seed: int) -> float:
            rows = self.rows(name, kind, seed)
            exact = next(row for row in rows if row.point.study == "exact").scores["perplexity"]
            return self._at(rows, point).scores["perplexity"] / exact - 1

        return self.seeds(of)

    def bytes(self, name: str, kind: str, **point: Any) -> int:
        """Bytes of a table at a point, the same for all seeds of one layout."""
        return self._at(self.rows(name, kind, 0), point).bytes or 0

    def rows(self, name: str, kind: str, seed: int) -> list[Row]:
        """All rows of an ablation."""
        return read_ablation(self.workspace.path / f"results/{name}.{kind}.s{seed}.json").rows

    @staticmethod
    def _at(rows: Iterable[Row], point: Mapping[str, Any]) -> Row:
        return next(
            row for row in rows if all(getattr(row.point, name) == value for name, value in point.items())
        )

    def _json(self, name: str) -> Any:
        return self.workspace.result(f"results/{name}.json")

    def share(self, kind: str, layer: int, part: str, seed: int) -> float:
        """What `analyze shares` says a part adds of a layer's update; 0 for one that it does not have."""
        found = self._json(f"shares.{kind}.s{seed}")["layers"][layer].get(part)
        return 0.0 if found is None else float(found["share"])

    def half_rank_error(self, layer: int, seed: int) -> float:
        """The relative error of a layer of MemoryLLM's table without the lesser half of its directions."""
        values = self._json(f"inspect.memory.s{seed}")["layers"][layer]["singular_values"]
        squares = [value**2 for value in values]
        return float((sum(squares[len(squares) // 2 :]) / sum(squares)) ** 0.5)

    def decode(self) -> dict[str, tuple[float, float]]:
        """Median ms per token, and peak resident GB without imports and tables, of each kind at 1B."""
        rows = {row["name"]: row["median"] for row in self._json("decode")["rows"]}
        names = {kind: kind.removesuffix("h2").replace("-", "") for kind in KINDS if kind != "base-small"}
        return {
            kind: (
                rows["decode.batch1.memory.bfloat16" if kind == "memory" else f"decode.batch1.{name}"],
                rows[f"resident.{name}"] / 1e9,
            )
            for kind, name in names.items()
        }

    def keys(self, seed: int, layer: int) -> Statistics:
        """Of a layer of the MemoryLLM of a seed."""
        return KeysFolder(self.workspace.path / f"keys/memory.s{seed}").statistics(layer)

    def layers(self, kind: str) -> range:
        """Numbers of the layers."""
        return range(
            load_config(self.plan.config(kind), list(self.plan.scale.overrides)).model.num_hidden_layers
        )
