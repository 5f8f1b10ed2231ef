"""Where a loss or a gradient that is not finite comes from: a second look, by all ranks together."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm_train.model.transformer import Transformer
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.nonfinite import nonfinite


class Sighting(NamedTuple):
    """What a rank has seen. Nearest to the cause is the lowest `depth`: weights, layers, gradients."""

    depth: int
    what: str
    rank: int
    host: str

    @property
    def where(self) -> str:
        """The rank in words."""
        return f"rank {self.rank} ({self.host})"


def locate(
    model: Transformer, evaluate: Callable[[], object], gradients: Sequence[str], runtime: Runtime
) -> str:
    """Names layer or weight and rank; every rank calls it, after a step that was not finite.

    evaluate: runs the step's forward pass again. gradients: parameters whose gradient on this rank was not
    finite in the step, in the model's order.
    """
    seen: list[tuple[int, str]] = [(0, f"weight {name}") for name in _bad_weights(model)[:1]]
    with _watching(model) as outputs:
        evaluate()
    if outputs:
        seen.append(min(outputs.items()))
    if gradients:  # a backward pass comes from the end, so the last one was the first
        more = f" and {len(gradients) - 1} more" if len(gradients) > 1 else ""
        what = f"gradient of {gradients[-1]}{more} (the forward pass again is finite)"
        seen.append((_depth_of_gradient(gradients[-1], model.config.num_hidden_layers), what))
    rank, host = runtime.topology.rank, socket.gethostname()
    mine = [Sighting(depth, what, rank, host) for depth, what in seen]
    found = [sighting for rank in runtime.gather(lambda: mine) for sighting in rank]
    if not found:
        return "the same samples again are finite everywhere: a passing fault, or a sum over ranks"
    first = min(found)
    alike = [sighting.where for sighting in found if sighting[:2] == first[:2]]
    return f"{first.what} on {', '.join(alike[:4])}" + (f" and {len(alike) - 4} more" if alike[4:] else "")


def _depth_of_gradient(name: str, layers: int) -> int:
    """Beyond all of the forward pass, the nearer to the model's end the nearer to the cause."""
    if name.startswith("embed_tokens"):
        return 2 * layers + 4
    return layers + 3 + (layers - int(name.split(".")[1]) if name.startswith("layers.") else 0)


def _bad_weights(model: Transformer) -> list[str]:
    """Parameters that hold infinity or NaN in what this rank has of them."""
    return nonfinite({name: getattr(w, "ds_tensor", w).detach() for name, w in model.named_parameters()})


@contextmanager
def _watching(model: Transformer) -> Iterator[dict[int, str]]:
    """Depth -> name of what gives a value that is not finite in the body's forward passes."""
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
