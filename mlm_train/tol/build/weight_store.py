"""FFN-M's weights where all of a build's workers find them: one copy a node, in Ray's object store."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.tol.build.ray_cluster import check_ray
from mlm_train.tol.build.row_source import ffn_m_weights, to_numpy
from mlm_train.tol.build.state import BuildPlan

Weights = Callable[[Sequence[int]], list[Any]]  # references of these layers' weights


@contextmanager
def shared_weights(model: str | None, plan: BuildPlan, ahead: int) -> Iterator[Weights]:
    """Put layer after layer into the store; nothing without a model.

    `ahead` of them while the workers start, which needs the processors too; the others from the first asking
    on. Asking raises UserError, naming a tensor with a NaN, as soon as one was read, of whatever layer.
    """
    if model is None:
        yield lambda _: []
        return
    import ray

    with open_model(model, verify="sizes") as opened, ThreadPoolExecutor(1) as reader:
        # ray.put copies: new memory for every layer would have to be made, and zeroed, by the system.
        weights = ffn_m_weights(opened.tensors, opened.config, plan.layers, plan.compute, in_place=True)
        put: list[Future[Any]] = []

        def share() -> Any:
            layer = to_numpy(next(weights))
            check_ray()  # where its raylet is gone, ray.put ends this process without a word
            return ray.put(layer)

        def read(count: int) -> None:
            for _ in plan.layers[len(put) : count]:
                put.append(reader.submit(share))

        def references(layers: Sequence[int]) -> list[Any]:
            for one in put:
                if one.done():
                    one.result()
            read(len(plan.layers))
            return [put[plan.layers.index(layer)].result() for layer in layers]

        try:
            read(ahead)
            yield references
        finally:
            reader.shutdown(cancel_futures=True)
