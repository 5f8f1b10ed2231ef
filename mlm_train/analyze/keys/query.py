"""Questions to a folder of `analyze keys`: a token's keys, a key's tokens, similar tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train.analyze.keys.coefficients import CHUNK, LayerKeys
from mlm_train.analyze.keys.folder import KeysFolder
from mlm_train.checkpoint.reading.logical_folder import ModelFolder, find_model, open_model
from mlm_train.errors import UserError
from mlm_train.tol.build.row_source import EMBEDDING, chunks_of


def token_keys(folder: KeysFolder, token: str, top: int) -> dict[str, Any]:
    """What a token opens in each finished layer: its `top` keys, its cluster, and its neighbours.

    neighbours: tokens by the cosine of the stored top coefficients, all others taken as zero;
    `similar_tokens` has the exact ones. Reads the folder alone.
    """
    number = folder.find(token)
    layers = [_token_in(folder, layer, number, top) for layer in folder.layers]
    return {**_token(folder, number), "layers": layers}


def _token_in(folder: KeysFolder, layer: int, token: int, top: int) -> dict[str, Any]:
    statistics = folder.statistics(layer)
    names = ("token_keys", "token_values", "norm", "effective_keys", "share", "cluster", "distance")
    keys, values, norm, effective, share, labels, distance = folder.tensors(layer, *names)
    own = torch.zeros(folder.index.keys)
    own[keys[token].long()] = values[token]
    cosines = (own[keys.long()] * values).sum(1) / (values.norm(dim=1) * own.norm())
    cosines = cosines.nan_to_num(0.0)  # a token with no coefficients has no direction
    cosines[token] = -torch.inf
    cluster = statistics.clusters[int(labels[token])]
    outliers = set(statistics.outlier_keys)
    return {
        "layer": layer,
        "norm": float(norm[token]),
        "effective_keys": float(effective[token]),
        "share": float(share[token]),
        "keys": [
            {"key": key, "c": c, "outlier": key in outliers}
            for key, c in zip(keys[token, :top].tolist(), values[token, :top].tolist(), strict=True)
        ],
        "cluster": {
            "cluster": cluster.cluster,
            "name": cluster.name,
            "tokens": cluster.tokens,
            "distance": float(distance[token]),
        },
        "neighbours": _largest(folder, cosines, min(top, len(cosines) - 1), "cosine"),
    }


def key_tokens(
    folder: KeysFolder, layer: int, key: int, top: int, model: str | Path | None = None
) -> dict[str, Any]:
    """A key: the tokens that open it widest, and those that its value promotes and suppresses in the output.

    The value's logits: head weight . (final norm's weight * W_down[:, k]). The final norm also divides by the
    root mean square of the whole residual stream: a positive factor, the same for all tokens. A negative c
    exchanges the two lists.
    """
    statistics = folder.statistics(layer)
    _check_key(folder, key)
    names = ("key_tokens", "key_values", "mean_abs", "usage", "value_norm")
    tokens, values, mean_abs, usage, value_norm = folder.tensors(layer, *names)
    logits = value_logits(_keys_of(folder, layer, model), _model_of(folder, model), key)
    count = min(top, len(logits))
    return {
        "layer": layer,
        "key": key,
        "mean_abs": float(mean_abs[key]),
        "usage": int(usage[key]),
        "value_norm": float(value_norm[key]),
        "outlier": key in statistics.outlier_keys,
        "tokens": _scored(folder, values[key, :top], tokens[key, :top], "c"),
        "promotes": _largest(folder, logits, count, "logit"),
        "suppresses": _largest(folder, logits, count, "logit", largest=False),
    }


def value_logits(keys: LayerKeys, model: ModelFolder, key: int) -> Tensor:
    """What one unit of a key adds to the logits before the final norm's division, fp32 [vocabulary]."""
    with open_model(model) as opened:
        direction = opened.tensor("model.norm.weight").float() * keys.values[:, key]
        head = EMBEDDING if model.config.tie_word_embeddings else "lm_head.weight"
        ranges = chunks_of(0, model.config.vocab_size, CHUNK)
        return torch.cat([opened.rows(head, *bounds).float() @ direction for bounds in ranges])


def similar_tokens(
    folder: KeysFolder,
    layer: int,
    token: str,
    top: int,
    model: str | Path | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Tokens by the cosine of all coefficients with a token's, computed anew for the whole vocabulary."""
    number = folder.find(token)
    keys = _keys_of(folder, layer, model)
    own = keys.of([range(number, number + 1)])[0]
    cosines = torch.empty(keys.vocab_size)
    for ids, c in keys.chunks():
        cosines[ids] = torch.cosine_similarity(c, own, dim=1)
        advance(len(ids))
    cosines[number] = -torch.inf
    found = _largest(folder, cosines, min(top, len(cosines) - 1), "cosine")
    return {**_token(folder, number), "layer": layer, "similar": found}


def _keys_of(folder: KeysFolder, layer: int, model: str | Path | None) -> LayerKeys:
    """A layer of the analysed model. UserError where its FFN-M is another one now."""
    statistics = folder.statistics(layer)
    found = _model_of(folder, model)
    keys = LayerKeys(found, layer)
    if keys.digest() != statistics.digest:
        raise UserError(
            f"{found.path} is not the model of {folder.path}: layer {layer} differs; give its --model"
        )
    return keys


def _model_of(folder: KeysFolder, model: str | Path | None) -> ModelFolder:
    try:
        found = find_model(folder.index.model if model is None else model, needs_ffn_m=True)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(f"{error}; if the analysed model has moved, give it as --model") from None
    config, index = found.config, folder.index
    if (config.vocab_size, config.num_hidden_layers, config.intermediate_size) != (
        index.vocab_size,
        index.num_layers,
        index.keys,
    ):
        raise UserError(f"{found.path} is not the model of {folder.path}: sizes differ; give its --model")
    return found


def _check_key(folder: KeysFolder, key: int) -> None:
    if not 0 <= key < folder.index.keys:
        raise UserError(f"key {key}: there is no such key; keys are 0 to {folder.index.keys - 1}")


def _token(folder: KeysFolder, number: int) -> dict[str, Any]:
    return {"token": number, "text": folder.texts[number]}


def _largest(
    folder: KeysFolder, values: Tensor, count: int, name: str, largest: bool = True
) -> list[dict[str, Any]]:
    """The tokens with the largest (or smallest) of values [vocabulary]."""
    found = values.topk(count, largest=largest)
    return _scored(folder, found.values, found.indices, name)


def _scored(folder: KeysFolder, values: Tensor, tokens: Tensor, name: str) -> list[dict[str, Any]]:
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [{**_token(folder, token), name: value} for token, value in pairs if value > -torch.inf]
