"""The analysis of one layer: a few passes over the vocabulary, then what they have collected."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.analyze.keys.clusters import (
    SILHOUETTE,
    STEPS,
    Clusters,
    clustering_coefficient,
    name_of,
    silhouette,
)
from mlm_train.analyze.keys.coefficients import CHUNK, LayerKeys
from mlm_train.analyze.keys.folder import Cluster, KeysFolder, Settings, Statistics
from mlm_train.analyze.keys.token_map import token_map
from mlm_train.analyze.keys.totals import Totals, outliers

_CENTRAL = 10  # tokens stored of each cluster
_LEAST_MAP = 4  # tokens


def passes(vocab_size: int) -> int:
    """Passes over the vocabulary: the centres see at least STEPS chunks, then every token finds its own."""
    return math.ceil(STEPS / math.ceil(vocab_size / CHUNK)) + 1


class Sample(NamedTuple):
    """Tokens drawn at random, int64 [n], and their rows c, fp32 [n, keys]."""

    ids: Tensor
    rows: Tensor


def analyse_layer(
    folder: KeysFolder,
    keys: LayerKeys,
    layer: int,
    texts: Sequence[str | None],
    advance: Callable[[int], None],
) -> Statistics:
    """Analyse a layer and write its folder; advance(tokens) is called after each chunk of each pass.

    Memory: the layer's FFN-M, and a sample of max(map_tokens, 10,000) rows of c.
    """
    started, settings = time.monotonic(), folder.index.settings
    totals, clusters, sample = _passes(keys, settings, advance)
    rows = sample.rows[:SILHOUETTE].numpy()
    labels = clusters.labels[sample.ids[:SILHOUETTE]].numpy()
    score = silhouette(rows, labels)
    coefficient = clustering_coefficient(rows, settings.clusters, settings.seed)
    mapped = _map(sample, settings)  # last: it overwrites the sample
    found = [_cluster(clusters, number, texts) for number in range(settings.clusters)]
    statistics = Statistics(
        layer=layer,
        digest=keys.digest(),
        mean_abs=float(totals.mean_abs.mean()),
        mean_norm=float(totals.norm.double().mean()),
        mean_effective_keys=float(totals.effective.double().mean()),
        mean_share=float(totals.share.double().mean()),
        unused_keys=int((totals.usage == 0).sum()),
        outlier_keys=outliers(totals.mean_abs).tolist(),
        explained=1 - clusters.within / totals.variation if totals.variation > 0 else 0.0,
        silhouette=score,
        clustering_coefficient=coefficient,
        sample=len(rows),
        clusters=found,
        seconds=round(time.monotonic() - started, 1),
    )
    _write(folder, statistics, keys, totals, clusters, mapped, texts)
    return statistics


def _passes(
    keys: LayerKeys, settings: Settings, advance: Callable[[int], None]
) -> tuple[Totals, Clusters, Sample]:
    vocabulary = keys.vocab_size
    order = torch.Generator().manual_seed(settings.seed)
    totals = Totals(vocabulary, keys.keys, settings.top_k)
    clusters = Clusters(settings.clusters, vocabulary, settings.seed % 2**32)
    for number in range(passes(vocabulary) - 1):
        for ids, c in keys.chunks(order):
            if number == 0:
                totals.add(ids, c)
            clusters.fit(c)
            advance(len(ids))
    chosen = torch.randperm(vocabulary, generator=order)[: max(settings.map_tokens, SILHOUETTE)]
    sample = Sample(chosen, torch.empty(len(chosen), keys.keys))
    place = torch.full((vocabulary,), -1, dtype=torch.int64)
    place[chosen] = torch.arange(len(chosen))
    for ids, c in keys.chunks():
        clusters.assign(ids, c)
        sampled = place[ids] >= 0
        sample.rows[place[ids[sampled]]] = c[sampled]
        advance(len(ids))
    return totals, clusters, sample


def _cluster(clusters: Clusters, number: int, texts: Sequence[str | None]) -> Cluster:
    members = clusters.central(number)
    central = [texts[token] or f"#{token}" for token in members[:_CENTRAL]]
    name = name_of([text for token in members if (text := texts[token]) is not None], central)
    return Cluster(cluster=number, name=name, tokens=len(members), central=members[:_CENTRAL])


def _map(sample: Sample, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    count = min(settings.map_tokens, len(sample.ids))
    if count < _LEAST_MAP:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, 0), torch.empty(0, 2)
    components, places = token_map(sample.rows[:count].numpy(), settings.seed % 2**32)
    return sample.ids[:count].int(), torch.from_numpy(components), torch.from_numpy(places)


def _write(
    folder: KeysFolder,
    statistics: Statistics,
    keys: LayerKeys,
    totals: Totals,
    clusters: Clusters,
    mapped: tuple[Tensor, Tensor, Tensor],
    texts: Sequence[str | None],
) -> None:
    ids, components, places = mapped
    of_token = {
        "norm": totals.norm,
        "effective_keys": totals.effective,
        "share": totals.share,
        "cluster": clusters.labels,
        "distance": clusters.distance,
    }
    of_key = {
        "mean_abs": totals.mean_abs.float(),
        "usage": totals.usage,
        "value_norm": keys.values.norm(dim=0),
    }
    of_map = {"map_tokens": ids, "map_components": components, "map_places": places}
    top_keys = {"token_keys": totals.token_keys, "token_values": totals.token_values}
    top_tokens = {"key_tokens": totals.key_tokens, "key_values": totals.key_values}
    everywhere = torch.full((len(texts), 2), math.nan)
    everywhere[ids.long()] = places
    outlier = torch.zeros(keys.keys, dtype=torch.uint8)
    outlier[statistics.outlier_keys] = 1
    folder.write_layer(
        statistics,
        {**of_token, **top_keys, **of_key, **top_tokens, **of_map, "centres": clusters.centres},
        {
            "token": torch.arange(len(texts), dtype=torch.int32),
            "text": texts,
            **of_token,
            "x": everywhere[:, 0].contiguous(),
            "y": everywhere[:, 1].contiguous(),
            "keys": totals.token_keys,
            "values": totals.token_values,
        },
        {
            "key": torch.arange(keys.keys, dtype=torch.int32),
            **of_key,
            "outlier": outlier.bool().tolist(),
            "tokens": totals.key_tokens,
            "values": totals.key_values,
        },
    )
