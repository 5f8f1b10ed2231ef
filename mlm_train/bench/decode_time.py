"""`bench decode`, in a process of its own: tokens and prefills of all kinds, alternated."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mlm_train.bench import decode_models as models
from mlm_train.bench import report
from mlm_train.inference.cache import KVCache
from mlm_train.inference.decode import Decoder
from mlm_train.model.linear import linear
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.serve.store import StoreOptions

SHARED, RESIDENT = StoreOptions("shared"), StoreOptions("resident")
DISK = StoreOptions("disk", direct=True)
CACHES = {"cache1": 0.01, "cache10": 0.1}  # of the vocabulary
Step = Callable[[Tensor], Any]


def work(order_file: str) -> int:
    """Time what the order asks for, and write the rows. Returns exit code 0."""
    order = report.read_order(order_file)
    with torch.no_grad():
        report.write_result(order_file, {"rows": _Bench(order).rows()})
    return 0


class _Bench:
    """order: shape, tables {type: folder}, ids of a text, context, steps, runs, prefills, batches, hf."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.context, self.steps = order["context"], order["steps"]
        self.configs = models.configs(order["shape"], max(2 * max(order["prefills"]), 2 * self.context))
        self.models = models.random_models(self.configs)
        self.text = torch.tensor(order["ids"])
        self.sources = self._sources()

    def _sources(self) -> dict[str, MemorySource]:
        config, tables = self.configs["memory"], self.order["tables"]
        found: dict[str, MemorySource] = {
            name: _opened(folder, config, SHARED) for name, folder in tables.items()
        }
        first = next(iter(tables.values()))
        found["disk"] = _opened(first, config, DISK)
        row_bytes = sum(path.stat().st_size for path in Path(first).glob("*.safetensors")) / config.vocab_size
        for name, share in CACHES.items():
            size = int(share * config.vocab_size * row_bytes)
            found[f"disk_{name}"] = _opened(first, config, replace(DISK, cache_bytes=size))
        smallest = list(tables)[-1]  # 3.3 GB at 4 bits; at 16 it would be most of a small machine's memory
        found[f"{smallest}_resident"] = _opened(tables[smallest], config, RESIDENT)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the report."""
        found = []
        for batch in self.order["batches"]:
            found += self._decode(batch)
        for length in self.order["prefills"]:
            found += self._prefill(length)
        return found

    @property
    def _table(self) -> str:
        """The first table's name."""
        return next(iter(self.order["tables"]))

    def _variants(self, batch: int) -> dict[str, tuple[Transformer, MemorySource | None]]:
        """Name -> model and source; at larger batches, and for prompts, the few that bound the others."""
        kinds = ("base", "flex3", "flex2", "flex1") if batch == 1 else ("base", "flex3")
        sources = self.sources if batch == 1 else {name: self.sources[name] for name in (self._table, "disk")}
        found: dict[str, tuple[Transformer, MemorySource | None]] = {
            kind: (self.models[kind], None if kind == "base" else self.sources[self._table]) for kind in kinds
        }
        return found | {f"memory.{name}": (self.models["memory"], source) for name, source in sources.items()}

    def _decode(self, batch: int) -> list[dict[str, Any]]:
        """Milliseconds per step after `context` tokens, which fed the ids of a text."""
        room = self.steps + 1
        cache = models.filled_cache(self.configs["base"], batch, self.context, room)
        variants = self._variants(batch).items()
        steps: dict[str, Step] = {
            name: _stepping(Decoder(model, source), cache, self.context) for name, (model, source) in variants
        }
        reads: dict[str, list[Tensor]] = {}
        if batch == 1:
            reads = {kind: models.weights_read(model) for kind, model in self.models.items()}
            steps |= self._hf(room) if self.order["hf"] else {}
        seconds: dict[str, list[list[float]]] = {
            name: [] for name in (*steps, *(f"weights.{kind}" for kind in reads))
        }
        ids = self._ids(batch)
        for _ in _tracked(range(self.order["runs"] + 1), f"decode, batch {batch}"):
            for name, step in steps.items():
                seconds[name].append([_seconds(step, next(ids)) for _ in range(room)][1:])
            for kind, weights in reads.items():
                seconds[f"weights.{kind}"].append([_seconds(_multiply, weights)])
        return [_row(f"decode.batch{batch}.{name}", rounds[1:]) for name, rounds in seconds.items()]

    def _ids(self, batch: int) -> Iterator[Tensor]:
        """Ids [batch, 1] along a text: each row from its own place on."""
        starts = torch.arange(batch) * (len(self.text) // batch)
        for number in itertools.count():
            yield self.text[(starts + number) % len(self.text)].unsqueeze(1)

    def _hf(self, room: int) -> dict[str, Step]:
        from transformers import DynamicCache, StaticCache

        model = models.llama(self.models["base"])
        prompt = self.text[: self.context].unsqueeze(0)
        dynamic = DynamicCache(config=model.config)
        static = StaticCache(config=model.config, max_cache_len=self.context + room)
        for cache in (dynamic, static):
            model(prompt, past_key_values=cache, logits_to_keep=1)

        def grown(ids: Tensor) -> Tensor:
            if dynamic.get_seq_length() == self.context + room:
                dynamic.crop(-room)
            return model(ids, past_key_values=dynamic).logits.argmax(-1)

        found: dict[str, Step] = {"hf.sdpa.DynamicCache": grown}
        kinds = {"hf.sdpa.StaticCache": model}
        if self.order["compile"]:
            kinds["hf.sdpa.StaticCache.compiled"] = torch.compile(model, dynamic=False)
        for name, forward in kinds.items():

            def fixed(ids: Tensor, forward: Any = forward) -> Tensor:
                if static.get_seq_length() == self.context + room:
                    for layer in static.layers:
                        layer.cumulative_length.fill_(self.context)
                return forward(ids, past_key_values=static).logits.argmax(-1)

            found[name] = fixed
        return found

    def _prefill(self, length: int) -> list[dict[str, Any]]:
        """Milliseconds until the first new token after a prompt of distinct random ids."""
        variants, disk = self._variants(2), self.sources["disk"]
        generator = torch.Generator().manual_seed(models.SEED)
        seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in _tracked(range(self.order["runs"] + 1), f"prefill of {length}"):
            drawn = torch.randperm(self.configs["base"].vocab_size, generator=generator)[:length].tolist()
            for name, (model, source) in variants.items():
                if source not in (None, disk):  # its rows are in memory then, as those of the disk are not
                    prompt = torch.tensor([drawn])
                    source.open(prompt, model.embed(prompt))(0)
                seconds[name].append([_seconds(_first_token, (Decoder(model, source), drawn))])
        return [_row(f"prefill.{length}.{name}", rounds[1:]) for name, rounds in seconds.items()]


def _first_token(decoder_and_prompt: tuple[Decoder, list[int]]) -> None:
    decoder, prompt = decoder_and_prompt
    next(decoder.generate(prompt, max_new_tokens=1))


def _opened(folder: str, config: Any, options: StoreOptions) -> TolSource:
    return TolSource.open_folder(folder, config, options)


def _stepping(decoder: Decoder, cache: KVCache, context: int) -> Step:
    """A step of decoding that forgets its columns when the cache is full."""

    def step(ids: Tensor) -> Tensor:
        if cache.length == cache.capacity:
            cache.crop(context)
        return decoder.next_logits(ids, cache).max(-1).indices

    return step


def _multiply(weights: list[Tensor]) -> None:
    """The matrix-vector products of a token alone: no less time than to read the weights."""
    for weight in weights:
        linear(_ones(weight.shape[1]), weight)


@functools.cache
def _ones(size: int) -> Tensor:
    return torch.ones(1, size, dtype=models.DTYPE)


def _seconds(run: Callable[[Any], Any], argument: Any) -> float:
    started = time.perf_counter()
    run(argument)
    return time.perf_counter() - started


def _row(name: str, rounds: list[list[float]]) -> dict[str, Any]:
    """Milliseconds: the median of the rounds' medians, and the 95th percentile of all."""
    every = sorted(1e3 * second for seconds in rounds for second in seconds)
    row = report.row(name, [1e3 * statistics.median(seconds) for seconds in rounds], "ms")
    return row | {"p95": every[int(0.95 * (len(every) - 1))], "values": len(every)}


def _tracked(items: Any, what: str) -> Any:
    return track(items, what, console=Console(stderr=True), transient=True)
