"""What the page holds of `analyze keys`: arrays of all tokens as base64 of little-endian numbers."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlm_train.analyze.keys.folder import KeysFolder, Statistics
from mlm_train.errors import UserError

KEYS = 3  # of each token and layer on the page: 128,256 tokens of 24 layers are 37 MB
# Field of Statistics -> heading; of a list its length.
COLUMNS = {
    "mean_abs": "mean |c|",
    "mean_effective_keys": "keys/token",
    "mean_share": "share",
    "unused_keys": "unused",
    "outlier_keys": "outliers",
    "explained": "explained",
    "silhouette": "silhouette",
    "clustering_coefficient": "coefficient",
}


def statistics_rows(statistics: Sequence[Statistics]) -> list[list[str]]:
    """The cells of the statistics table, a row per layer: layer, then COLUMNS."""
    return [[str(one.layer), *(_cell(getattr(one, name)) for name in COLUMNS)] for one in statistics]


def _cell(value: float | list[int] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return str(len(value))
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def layer_data(folder: KeysFolder, statistics: Statistics) -> dict[str, Any]:
    """A layer for the page's script.

    clusters: name, tokens and central ids of each. cluster: uint16 of each token. keys: uint16, or uint32
    where `wide`, [tokens, width]; values: their c, bfloat16. map: uint32 ids, places: fp32 [map, 2].
    outliers: ids of keys. UserError where the files do not fit together.
    """
    names = ("cluster", "token_keys", "token_values", "map_tokens", "map_places")
    labels, keys, values, tokens, places = folder.tensors(statistics.layer, *names)
    vocabulary, clusters = folder.index.vocab_size, len(statistics.clusters)
    fits = all(len(tensor) == vocabulary for tensor in (labels, keys, values)) and len(tokens) == len(places)
    if not fits or int(labels.max()) >= clusters or (len(tokens) and int(tokens.max()) >= vocabulary):
        raise UserError(
            f"{folder.layer_path(statistics.layer)} is not a layer of {vocabulary} tokens in {clusters} "
            "clusters; run `mlm-train analyze keys` again, into a new folder"
        )
    wide = folder.index.keys > 2**16
    return {
        "layer": statistics.layer,
        "clusters": [[one.name, one.tokens, one.central] for one in statistics.clusters],
        "outliers": statistics.outlier_keys,
        "width": min(KEYS, keys.shape[1]),
        "cluster": _packed(labels.numpy(), "<u2"),
        "wide": wide,
        "keys": _packed(keys[:, :KEYS].numpy(), "<u4" if wide else "<u2"),
        "values": _packed(values[:, :KEYS].bfloat16().contiguous().view(torch.int16).numpy(), "<i2"),
        "map": _packed(tokens.numpy(), "<u4"),
        "places": _packed(places.numpy(), "<f4"),
    }


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()
