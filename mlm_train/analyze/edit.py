"""Making edits of FFN-M's keys, the same edits as a patch of a table, and what they do to a model."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train.analyze.keys.coefficients import LayerKeys
from mlm_train.checkpoint.reading.edits import Edits, Scale, read_edits
from mlm_train.checkpoint.reading.logical_folder import ModelFolder, open_model
from mlm_train.errors import UserError
from mlm_train.evaluate.perplexity import measure_perplexity
from mlm_train.evaluate.scorer import Scorer
from mlm_train.inference.language_model import LanguageModel, load
from mlm_train.tol.format.index import check_fits
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve.patch import Patch
from mlm_train.tol.tools.patch import PatchMaker
from mlm_train.tol.tools.vocabulary import Vocabulary

_SCALE = re.compile(r"([0-9]{1,18}):([0-9]{1,18})(?:=(.+))?")
_LARGEST = 1e6


def scale_of(text: str) -> Scale:
    """LAYER:KEY=FACTOR as a Scale; without =FACTOR one that silences the key. UserError for anything else."""
    match = _SCALE.fullmatch(text)
    try:
        factor = float("nan") if match is None else float(match[3] or 0)
    except ValueError:
        factor = float("nan")
    if match is None or not abs(factor) < _LARGEST:
        raise UserError(f"key {text!r}: give LAYER:KEY=FACTOR, such as 3:17=0.5, or LAYER:KEY with --silence")
    return Scale(layer=int(match[1]), key=int(match[2]), factor=factor)


def make_edits(model: str | Path, scales: Sequence[Scale]) -> tuple[Edits, ModelFolder]:
    """Edits of a model, and its folder. UserError for a base model, or keys that it does not have."""
    with open_model(model, needs_ffn_m=True) as opened:
        return Edits.of(scales, opened), opened


def as_patch(edits: Edits, model: ModelFolder, table: str | Path, tokens: Sequence[str]) -> Patch:
    """The rows of some tokens (ids or texts) with the edits, as a patch of the model's table.

    The layers that the edits change are computed from the weights; the others stay as the table has them.
    """
    index = read_index(table)
    check_fits(Path(table), index, model.config)
    layers = sorted({scale.layer for scale in edits.scales})
    if missing := [layer for layer in layers if layer not in index.layers]:
        raise UserError(
            f"{table} does not hold layer {missing[0]}: it was dropped there, and recalls nothing"
        )
    vocabulary = Vocabulary.of(model.config.vocab_size, model)
    ids = [vocabulary.find(token, "--tokens") for token in tokens]
    rows = torch.zeros(len(ids), len(index.layers), index.hidden_size)
    for layer in layers:
        rows[:, index.layers.index(layer)] = _edited_rows(edits, LayerKeys(model, layer), layer, ids)
    maker = PatchMaker(Path(table), vocabulary, layers)
    for number, row in zip(ids, rows, strict=True):
        maker.give(number, row, f"{len(edits.scales)} keys edited")
    return maker.made()


def _edited_rows(edits: Edits, keys: LayerKeys, layer: int, ids: Sequence[int]) -> Tensor:
    """FFN-M of tokens with the edits, fp32 [n, hidden]."""
    c = keys.of([range(number, number + 1) for number in ids])
    for scale in edits.scales:
        if scale.layer == layer:
            c[:, scale.key] *= scale.factor
    return c @ keys.values.T


def effect(
    model: str | Path,
    files: Sequence[str | Path],
    data: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """What edits change: the perplexity on data's validation split, and the greedy continuation of a prompt.

    {"perplexity": {"before", "after"}, "text": {"before", "after"}}, each where it was asked for.
    """
    language_model = load(model)
    edits = read_edits(files, language_model.folder)
    measures: dict[str, Callable[[], Any]] = {}
    if data is not None:
        windows = Scorer(
            language_model.folder.path, data, length=length, count=samples, verify="sizes"
        ).windows
        measures["perplexity"] = lambda: _perplexity(language_model, windows.batches(show=True))
    if prompt is not None:
        measures["text"] = lambda: language_model.generate(prompt, max_new_tokens=max_new_tokens)[0].text
    found: dict[str, Any] = {name: {"before": measure()} for name, measure in measures.items()}
    for edit in edits:
        edit.apply(language_model.decoder.model)
    for name, measure in measures.items():
        found[name]["after"] = measure()
    return found


def _perplexity(model: LanguageModel, batches: Any) -> float:
    return measure_perplexity(model.decoder.model, model.decoder.source, batches).perplexity
