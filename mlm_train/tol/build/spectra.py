"""The spectra and predicted errors of a build's layers, computed by its workers."""

from mlm_train.errors import UserError
from mlm_train.tol.build.state import BuildState, spectrum_name
from mlm_train.tol.build.weight_store import Weights
from mlm_train.tol.build.worker_pool import ATTEMPTS, WorkerDied, WorkerPool
from mlm_train.tol.format.index import file_of
from mlm_train.tol.lowrank.ranks import RankErrors
from mlm_train.tol.storage.base import Storage


def compute_spectra(pool: WorkerPool, state: BuildState, storage: Storage, weights: Weights) -> None:
    """Write the spectrum and predicted errors of each kept layer to a file; one task per layer."""
    layers = state.plan.layers
    waiting = [layer for layer in layers if layer not in state.spectra][::-1]
    running, attempts = 0, dict.fromkeys(waiting, 0)
    while waiting or running:
        for worker in list(pool.idle):
            if not waiting:
                break
            layer = waiting.pop()
            worker.group, running = (layer,), running + 1
            draft = storage.draft(spectrum_name(layer), 0)
            pool.submit(worker, (layer, draft), "spectrum", layer, weights((layer,)), draft)
        for (layer, draft), result in pool.finished():
            running -= 1
            if isinstance(result, WorkerDied):
                storage.remove(draft)
                attempts[layer] += 1
                if attempts[layer] == ATTEMPTS:
                    raise UserError(f"a worker died {ATTEMPTS} times ({result}); give it more memory")
                waiting.append(layer)
            elif isinstance(result, Exception):
                raise result
            else:
                storage.name_draft(draft, result.file, result.bytes)
                state.spectra[layer] = result
                state.save(storage)


def rank_errors_of(state: BuildState, storage: Storage, layer: int) -> RankErrors:
    """Read what `compute_spectra` wrote for a layer. UserError if the file was changed since."""
    file = state.spectra[layer]
    data = storage.read(file.file)
    if data is None or file_of(file.file, data) != file:
        raise UserError(f"{storage.at(file.file)} was changed while the build ran; run it again")
    try:
        return RankErrors.unpack(data)
    except KeyError:  # earlier versions wrote singular values alone
        raise UserError(
            f"{storage.at(file.file)} is of an earlier version of mlm-train: remove {storage} and build again"
        ) from None
