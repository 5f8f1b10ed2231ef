"""Find the origin of a non-finite loss or gradient, on all ranks."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm_train.model.transformer import Transformer
from mlm_train.parallel.mesh.sharded import local
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.nonfinite import nonfinite


class Sighting(NamedTuple):
    """A non-finite value found by a rank. The lowest depth is nearest to the cause."""

    depth: int  # weights, then layers, then gradients
    what: str
    rank: int
    host: str

    @property
    def where(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.rank} ({self.host})"


def locate(
    model: Transformer, evaluate: Callable[[], object], gradients: Sequence[str], runtime: Runtime
) -> str:
    """Name the weight, layer or gradient, and the ranks, where non-finite values of a step started.

    Every rank calls it after the step. evaluate: repeats the step's forward pass. gradients: names of the
    parameters whose gradient on this rank was non-finite, in the model's order.
    """
    seen: list[tuple[int, str]] = [(0, f"weight {name}") for name in _bad_weights(model)[:1]]
    with _watching(model) as outputs:
        evaluate()
    if outputs:
        seen.append(min(outputs.items()))
    if gradients:  # the backward pass starts at the end of the model: the last one was first
        more = f" and {len(gradients) - 1} more" if len(gradients) > 1 else ""
        what = f"gradient of {gradients[-1]}{more} (the repeated forward pass is finite)"
        seen.append((_depth_of_gradient(gradients[-1], model.config.num_hidden_layers), what))
    rank, host = runtime.topology.rank, socket.gethostname()
    mine = [Sighting(depth, what, rank, host) for depth, what in seen]
    sightings = [sighting for of_rank in runtime.gather(lambda: mine) for sighting in of_rank]
    if not sightings:
        return "the same samples give finite values now: a transient fault, or a sum over ranks"
    first = min(sightings)
    where = [sighting.where for sighting in sightings if sighting[:2] == first[:2]]
    return f"{first.what} on {', '.join(where[:4])}" + (f" and {len(where) - 4} more" if where[4:] else "")


def _depth_of_gradient(name: str, layers: int) -> int:
    """Deeper than the whole forward pass; lower for parameters nearer to the model's end."""
    if name.startswith("embed_tokens"):
        return 2 * layers + 4
    return layers + 3 + (layers - int(name.split(".")[1]) if name.startswith("layers.") else 0)


def _bad_weights(model: Transformer) -> list[str]:
    """Names of the parameters whose shard on this rank holds infinity or NaN."""
    shards = {name: local(getattr(w, "ds_tensor", w)) for name, w in model.named_parameters()}
    return nonfinite({name: shard.detach() for name, shard in shards.items()})


@contextmanager
def _watching(model: Transformer) -> Iterator[dict[int, str]]:
    """Collect depth -> name of the modules with non-finite outputs in the body's forward passes."""
    seen: dict[int, str] = {}

    def look(depth: int, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            seen.setdefault(depth, name)

    with ExitStack() as hooks:
        for block in model.layers.values():
            layer = int(block.layer)  # type: ignore[arg-type]
            hook = block.register_forward_hook(
                lambda _, __, output, layer=layer: look(layer + 2, f"output of layer {layer}", output)
            )
            hooks.callback(hook.remove)
            if layer == 0:
                entry = block.register_forward_pre_hook(lambda _, inputs: look(1, "embedding", inputs[0]))
                hooks.callback(entry.remove)
        if model.norm is not None:
            last = model.config.num_hidden_layers + 2
            hook = model.norm.register_forward_hook(lambda _, __, out: look(last, "final norm", out))
            hooks.callback(hook.remove)
        yield seen
