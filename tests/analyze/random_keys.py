"""Folders of `analyze keys` with random content, of any size and with any texts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mlm_train.analyze.keys.folder import (
    DEFINITIONS,
    FORMAT,
    Cluster,
    Index,
    KeysFolder,
    Settings,
    Statistics,
)

TOP, CENTRAL = 32, 10


def random_keys(
    path: Path,
    texts: Sequence[str | None],
    layers: int = 2,
    keys: int = 64,
    clusters: int = 8,
    mapped: int = 20_000,
    fingerprint: str = "0" * 64,
) -> KeysFolder:
    """A folder with all layers, in which cluster k holds the tokens whose drawn label is k."""
    settings = Settings(top_k=TOP, clusters=clusters, map_tokens=mapped, seed=0)
    index = Index(
        format=FORMAT, model="model", fingerprint=fingerprint, vocab_size=len(texts), num_layers=layers,
        keys=keys, settings=settings, definitions=DEFINITIONS,
    )  # fmt: skip
    folder = KeysFolder.begin(path, index)
    for layer in range(layers):
        _write(folder, layer, texts, torch.Generator().manual_seed(layer))
    return folder


def _write(folder: KeysFolder, layer: int, texts: Sequence[str | None], draw: torch.Generator) -> None:
    count, keys, settings = len(texts), folder.index.keys, folder.index.settings
    labels = torch.randint(settings.clusters, (count,), generator=draw, dtype=torch.int32)
    chosen = torch.randperm(count, generator=draw)[: settings.map_tokens].int()
    tensors = {
        "cluster": labels,
        "token_keys": torch.randint(keys, (count, TOP), generator=draw, dtype=torch.int32),
        "token_values": torch.randn(count, TOP, generator=draw),
        "map_tokens": chosen,
        "map_places": torch.randn(len(chosen), 2, generator=draw),
    }
    members = [(labels == number).nonzero().flatten().tolist() for number in range(settings.clusters)]
    statistics = Statistics(
        layer=layer, digest="0" * 64, mean_abs=0.125 + layer, mean_norm=1.0, mean_effective_keys=10.5,
        mean_share=0.75, unused_keys=3, outlier_keys=[1, 2], explained=0.25, silhouette=None,
        clustering_coefficient=0.5, sample=count, seconds=1.0,
        clusters=[
            Cluster(cluster=number, name=f"name <b>{number}</b>", tokens=len(ids), central=ids[:CENTRAL])
            for number, ids in enumerate(members)
        ],
    )  # fmt: skip
    folder.write_layer(statistics, tensors, {"text": list(texts)}, {"key": torch.arange(keys)})
