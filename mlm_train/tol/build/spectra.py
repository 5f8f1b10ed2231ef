"""The spectra of a build's layers, made by its workers."""

from mlm_train.errors import UserError
from mlm_train.tol.build.state import State, spectrum_name
from mlm_train.tol.build.weight_store import Weights
from mlm_train.tol.build.worker_pool import ATTEMPTS, Crew, WorkerDied
from mlm_train.tol.format.index import file_of
from mlm_train.tol.lowrank.ranks import Study
from mlm_train.tol.storage.base import Place


def make_studies(crew: Crew, state: State, place: Place, weights: Weights) -> None:
    """The spectra of all kept layers, and what each way to store them loses, into files; a task a layer."""
    layers = state.plan.layers
    waiting = [layer for layer in layers if layer not in state.spectra][::-1]
    running, attempts = 0, dict.fromkeys(waiting, 0)
    while waiting or running:
        for member in list(crew.idle):
            if not waiting:
                break
            layer = waiting.pop()
            member.group, running = (layer,), running + 1
            draft = place.draft(spectrum_name(layer), 0)
            crew.do(member, (layer, draft), "spectrum", layer, weights((layer,)), draft)
        for (layer, draft), result in crew.finished():
            running -= 1
            if isinstance(result, WorkerDied):
                place.remove(draft)
                attempts[layer] += 1
                if attempts[layer] == ATTEMPTS:
                    raise UserError(f"a worker died {ATTEMPTS} times ({result}); give it memory")
                waiting.append(layer)
            elif isinstance(result, Exception):
                raise result
            else:
                place.name_draft(draft, result.file, result.bytes)
                state.spectra[layer] = result
                state.save(place)


def study_of(state: State, place: Place, layer: int) -> Study:
    """What `make_studies` wrote of a layer."""
    file = state.spectra[layer]
    data = place.read(file.file)
    if data is None or file_of(file.file, data) != file:
        raise UserError(f"{place.at(file.file)} was changed while the build ran; run it again")
    try:
        return Study.unpack(data)
    except KeyError:  # it held singular values alone
        raise UserError(
            f"{place.at(file.file)} is of an earlier version of mlm-train: remove {place} and build again"
        ) from None
