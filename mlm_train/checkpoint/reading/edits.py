"""Edits of FFN-M's keys, applied to a model when it is loaded; the weights on disk never change.

A factor on key k scales its coefficient for every token, which is the same as scaling the column W_down[:,
k].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field

from mlm_train.checkpoint.reading.logical_folder import ModelFolder, OpenedModel, open_model
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.transformer import Transformer
from mlm_train.utils.records import Count, Record, read_json, record_of

_FIX = "make one with `mlm-train analyze edit`"
Factor = Annotated[float, Field(gt=-1e6, lt=1e6)]


class Scale(Record):
    """A factor on a key of a layer; 0 silences it."""

    layer: Count
    key: Count
    factor: Factor

    def __str__(self) -> str:
        what = "silenced" if self.factor == 0 else f"scaled by {self.factor:g}"
        return f"layer {self.layer} key {self.key}: {what}"


class Edits(Record):
    """A file of edits. model: the fingerprint of the model that they are for; each key is there once."""

    format: Literal["mlm-edits-1"] = "mlm-edits-1"
    model: str
    scales: list[Scale]

    @classmethod
    def of(cls, scales: Sequence[Scale], model: OpenedModel) -> Self:
        """Edits of this model. UserError for a layer or key that it does not have, and for a key twice."""
        edits = cls(model=model.fingerprint, scales=list(scales))
        edits.check(model.config, str(model.path))
        return edits

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """Read a file. UserError for anything else than edits."""
        return record_of(cls, read_json(Path(file), _FIX), file, _FIX)

    def check(self, config: ModelConfig, where: str) -> None:
        """UserError naming `where` for a model without FFN-M, a layer or key out of range, or a key twice."""
        if not config.has_memory:
            raise UserError(f"{where}: a base model has no FFN-M whose keys could be edited")
        seen = set[tuple[int, int]]()
        for scale in self.scales:
            for name, value, count in (
                ("layer", scale.layer, config.num_hidden_layers),
                ("key", scale.key, config.intermediate_size),
            ):
                if value >= count:
                    raise UserError(f"{where}: there is no {name} {value}; {name}s are 0 to {count - 1}")
            if (scale.layer, scale.key) in seen:
                raise UserError(f"{where}: layer {scale.layer} key {scale.key} is given twice")
            seen.add((scale.layer, scale.key))

    def apply(self, model: Transformer) -> None:
        """Scale columns of W_down of a loaded model, in place."""
        with torch.no_grad():
            for scale in self.scales:
                model.memory_blocks()[scale.layer].memory_mlp.down_proj.weight[:, scale.key] *= scale.factor


def read_edits(files: Sequence[str | Path], model: ModelFolder, tol: str | Path | None = None) -> list[Edits]:
    """Read files of edits for a model, before it is loaded.

    UserError for one of another model, and where FFN-M is looked up in the table `tol`.
    """
    if files and tol is not None:
        raise UserError(
            f"--edit {files[0]} changes the weights of FFN-M, and --tol {tol} replaces them: make a "
            "patch of the table (`mlm-train analyze edit --tol`)"
        )
    found = [(file, Edits.read(file)) for file in files]
    if found:
        with open_model(model) as opened:
            for file, edits in found:
                edits.check(opened.config, str(file))
                if edits.model != opened.fingerprint:
                    raise UserError(f"{file} was made for another model than {opened.path}: make it anew")
    return [edits for _, edits in found]
