"""What an ablation changes: points, each of which is scored once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from mlm_train.analyze.ablate.compressed import Variant
from mlm_train.config import ModelConfig
from mlm_train.model.transformer import Transformer
from mlm_train.tol.format.schemes import Dtype
from mlm_train.utils.records import Record

Part = Literal["memory", "ffn", "compute"]  # FFN-M; a base model's FFN; FFN-C


class Point(Record):
    """One change of a model.

    study: of command.STUDIES, or "exact". part, alpha: whose output is scaled by how much, in `layer`, or in
    all layers for None. dtype, cut, variant: how a table would store FFN-M: its type, the share of
    directions that are cut off, and how those are chosen. All None: the model as it is.
    """

    study: str
    layer: int | None = None
    part: Part | None = None
    alpha: float | None = None
    dtype: Dtype | None = None
    cut: float | None = None
    variant: Variant | None = None

    @property
    def name(self) -> str:
        """In words, for tables."""
        if self.alpha is not None:
            where = "all layers" if self.layer is None else f"layer {self.layer}"
            return f"{self.part} x {self.alpha:g} in {where}"
        if self.cut is not None:
            return f"{self.cut:.0%} of the ranks cut, {self.variant}"
        return "as it is" if self.dtype is None else f"table in {self.dtype}"


TYPES: tuple[Dtype, ...] = ("bfloat16", "int8", "int4")


def points_of(
    config: ModelConfig, studies: Sequence[str], alphas: Sequence[float], cuts: Sequence[float]
) -> list[Point]:
    """The points of these studies, the unchanged model first."""
    part: Part = "memory" if config.has_memory else "ffn"
    layers = range(config.num_hidden_layers)
    points = [Point(study="exact")]
    if "alpha" in studies:
        points += [Point(study="alpha", part=part, alpha=alpha) for alpha in alphas]
    if "layer-alpha" in studies:
        points += [
            Point(study="layer-alpha", part=part, layer=layer, alpha=alpha)
            for layer in layers
            for alpha in alphas
        ]
    if "drop" in studies:
        parts: tuple[Part, ...] = (part, "compute") if config.kind == "flex" else (part,)
        points += [Point(study="drop", part=each, layer=layer, alpha=0) for each in parts for layer in layers]
    if "precision" in studies:
        points += [Point(study="precision", dtype=dtype) for dtype in TYPES]
    if "rank" in studies:
        variants: tuple[Variant, ...] = ("uniform", "weighted", "per layer")
        points += [Point(study="rank", cut=cut, variant=variant) for cut in cuts for variant in variants]
    return points


@contextmanager
def changed(model: Transformer, point: Point) -> Iterator[Transformer]:
    """The model with a point's outputs scaled; it shares the weights, which are as before afterwards."""
    if point.alpha is None or point.part is None:
        yield model
        return
    layers = range(model.config.num_hidden_layers)
    scales = {layer: point.alpha for layer in layers if point.layer in (None, layer)}
    if point.part == "memory":
        yield model.scaled([scales.get(layer, model.config.alpha(layer)) for layer in layers])
        return
    with _scaled_weights(model, scales, "mlp" if point.part == "ffn" else "compute_mlp"):
        yield model


@contextmanager
def _scaled_weights(model: Transformer, scales: Mapping[int, float], name: str) -> Iterator[None]:
    """Scale the outputs of some layers' FFN by its last matrix."""
    weights = {layer: model.block(layer).get_parameter(f"{name}.down_proj.weight") for layer in scales}
    before = {layer: weight.clone() for layer, weight in weights.items()}
    with torch.no_grad():
        try:
            for layer, weight in weights.items():
                weight.mul_(scales[layer])
            yield
        finally:
            for layer, weight in weights.items():
                weight.copy_(before[layer])
