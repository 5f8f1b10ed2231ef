"""Layers cut to low rank: their spectra, the ranks under a budget, and the bases."""

from collections.abc import Sequence

import torch

from mlm_train.errors import UserError
from mlm_train.sizes import in_units
from mlm_train.tol.codec import ALIGNMENT, TORCH_DTYPE, Scheme
from mlm_train.tol.crew import ATTEMPTS, Crew, WorkerDied
from mlm_train.tol.format import BASIS_ITEM, File, file_of
from mlm_train.tol.place import Place
from mlm_train.tol.ranks import break_even_rank, choose_ranks
from mlm_train.tol.shared import Weights
from mlm_train.tol.spectrum import Spectrum, scaled_basis
from mlm_train.tol.state import Layout, Plan, State, Storage, spectrum_name


def make_spectra(crew: Crew, state: State, place: Place, weights: Weights) -> list[Spectrum]:
    """The spectra of all kept layers, those that the state names already too; a task a layer."""
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
    return [_spectrum(place, state.spectra[layer]) for layer in layers]


def _spectrum(place: Place, file: File) -> Spectrum:
    data = place.read(file.file)
    if data is None or file_of(file.file, data) != file:
        raise UserError(f"{place.at(file.file)} was changed while the build ran; run it again")
    return Spectrum.unpack(data)


def lay_out(plan: Plan, spectra: Sequence[Spectrum]) -> Layout:
    """The schemes of the storage that was asked for, with a rank of its own for each layer where it has a
    budget. A layer whose rank would save nothing is stored whole, one of rank 0 is dropped.

    Raises UserError for a budget that holds nothing.
    """
    storage = plan.storage
    if storage.budget is None:
        return Layout.of(storage, plan.num_layers, plan.hidden_size)
    room = float(storage.budget)
    for _ in range(20):  # what alignment, headers and whole layers take beyond the estimate is given back
        layout = _within(plan, spectra, room)
        if layout is None:
            break
        excess = table_bytes(plan, layout) - storage.budget
        if excess <= 0:
            return layout
        room -= excess
    raise UserError(_too_small(plan))


def refuse_small_budget(plan: Plan) -> None:
    """UserError for a budget that holds nothing, whatever the weights."""
    if plan.storage.budget is not None and plan.storage.budget < _least_bytes(plan):
        raise UserError(_too_small(plan))


def _least_bytes(plan: Plan) -> int:
    return table_bytes(plan, _layout(plan, {plan.layers[0]: rank_step(plan.storage)}))


def _too_small(plan: Plan) -> str:
    storage = plan.storage
    assert storage.budget is not None
    return (
        f"a budget of {in_units(storage.budget)} holds no layer: {in_units(_least_bytes(plan))} is the least "
        f"in {storage.dtype} and {plan.partitions} partitions; give more"
    )


def _within(plan: Plan, spectra: Sequence[Spectrum], room: float) -> Layout | None:
    storage, hidden = plan.storage, plan.hidden_size
    number = bytes_of_a_number(storage)
    cost = plan.vocab_size * number + hidden * BASIS_ITEM
    ranks = choose_ranks(spectra, room, cost, step=rank_step(storage))
    kept = {layer: rank for layer, rank in zip(plan.layers, ranks, strict=True) if rank}
    return _layout(plan, kept) if kept else None


def _layout(plan: Plan, ranks: dict[int, int]) -> Layout:
    """Layers and their ranks; a rank that saves nothing is none."""
    number = bytes_of_a_number(plan.storage)
    whole = break_even_rank(plan.vocab_size, plan.hidden_size, number, number, BASIS_ITEM)
    cut = [rank if rank < min(whole, plan.hidden_size) else None for rank in ranks.values()]
    schemes = [plan.storage.scheme(rank) for rank in cut]
    return Layout(hidden_size=plan.hidden_size, layers=list(ranks), schemes=schemes)


def bytes_of_a_number(storage: Storage | Scheme) -> float:
    """With its share of a scale and a zero."""
    if storage.group_size is None:
        return TORCH_DTYPE[storage.dtype].itemsize
    shared = 2 if storage.symmetric else 3
    return (1.0 if storage.dtype == "int8" else 0.5) + shared / storage.group_size


def rank_step(storage: Storage) -> int:
    """Ranks that fill their groups, or the alignment of a layer."""
    if storage.group_size is not None:
        return storage.group_size
    return ALIGNMENT // TORCH_DTYPE[storage.dtype].itemsize


def table_bytes(plan: Plan, layout: Layout) -> int:
    """Of all files but the index; the basis' header is counted as 1 KiB and 128 bytes a layer."""
    ranges = map(plan.rows, range(plan.partitions))
    total = sum(layout.shape.file_bytes(stop - start) for start, stop in ranges)
    ranks = [scheme.rank for scheme in layout.schemes if scheme.rank is not None]
    if ranks:
        total += 1024 + sum(128 + rank * plan.hidden_size * BASIS_ITEM for rank in ranks)
    return total


def bases_of(plan: Plan, layout: Layout, spectra: Sequence[Spectrum]) -> dict[int, torch.Tensor]:
    """The bases of the layers that have a rank."""
    by_layer = dict(zip(plan.layers, spectra, strict=True))
    return {
        layer: scaled_basis(by_layer[layer], scheme.rank, plan.vocab_size)
        for layer, scheme in zip(layout.layers, layout.schemes, strict=True)
        if scheme.rank is not None
    }


def has_ranks(storage: Storage) -> bool:
    """Whether some layer is cut, so that spectra are needed."""
    ranks = [scheme.rank for scheme in storage.schemes or ()]
    return storage.rank is not None or storage.budget is not None or any(ranks)
