"""FFN-M's weights for all workers of a build: one copy per node, in Ray's object store."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.tol.build.ray_cluster import check_ray
from mlm_train.tol.build.row_source import ffn_m_weights, to_numpy
from mlm_train.tol.build.state import BuildPlan

Weights = Callable[[Sequence[int]], list[Any]]  # Ray references to the weights of these layers


@contextmanager
def shared_weights(model: str | None, plan: BuildPlan, ahead: int) -> Iterator[Weights]:
    """Put the layers' weights into the object store, in a background thread; nothing without a model.

    The first `ahead` layers are read while the workers start, the others from the first request on. A request
    raises UserError, naming the tensor, as soon as any layer that was read has a NaN.
    """
    if model is None:
        yield lambda _: []
        return
    import ray

    with open_model(model, verify="sizes") as opened, ThreadPoolExecutor(1) as reader:
        # In place, since ray.put copies: new memory per layer would have to be allocated and zeroed.
        weights = ffn_m_weights(opened.tensors, opened.config, plan.layers, plan.compute, in_place=True)
        put: list[Future[Any]] = []

        def share() -> Any:
            layer = to_numpy(next(weights))
            check_ray()  # without a raylet ray.put silently ends this process
            return ray.put(layer)

        def read(count: int) -> None:
            for _ in plan.layers[len(put) : count]:
                put.append(reader.submit(share))

        def references(layers: Sequence[int]) -> list[Any]:
            for layer in put:
                if layer.done():
                    layer.result()  # raises
            read(len(plan.layers))
            return [put[plan.layers.index(layer)].result() for layer in layers]

        try:
            read(ahead)
            yield references
        finally:
            reader.shutdown(cancel_futures=True)
