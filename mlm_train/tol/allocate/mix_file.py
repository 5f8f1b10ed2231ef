"""The file that `tol allocate` writes: which layers are kept, and how."""

from pathlib import Path

from pydantic import ValidationError

from mlm_train.tol.format.schemes import Scheme
from mlm_train.utils.files import LARGEST_RESULT
from mlm_train.utils.records import Record, first_problem, json_value, read_regular


class Allocation(Record):
    """A file of `tol allocate`: the layers to keep, and the scheme of each."""

    layers: list[int]
    schemes: list[Scheme]


def read_allocation(file: Path) -> Allocation:
    """A file of `tol allocate`. Raises ValueError saying what is wrong with it, and OSError."""
    if file.stat().st_size >= LARGEST_RESULT:
        raise ValueError("too large for an allocation")
    try:
        tree = json_value(read_regular(file))
    except ValueError:
        raise ValueError("no JSON") from None
    missing = [name for name in Allocation.model_fields if not isinstance(tree, dict) or name not in tree]
    if missing:
        raise ValueError(f"no allocation: it has no {missing[0]}")
    try:
        return Allocation.model_validate({name: tree[name] for name in Allocation.model_fields})
    except ValidationError as error:
        where, what = first_problem(error)
        raise ValueError(f"{where}: {what[0].lower()}{what[1:]}") from None


def is_allocation(file: Path) -> bool:
    """Whether it is a file of `tol allocate`."""
    try:
        return bool(read_allocation(file).layers)
    except ValueError:
        return False


def _check_fits(found: Allocation, layers: list[int], hidden: int) -> None:
    """Raise ValueError for an allocation that no table with these layers can follow."""
    count, schemes = len(found.layers), len(found.schemes)
    if count != schemes or not count:
        raise ValueError(f"it has {count} layers and {schemes} schemes: each layer needs one")
    if unknown := [layer for layer in found.layers if layer not in layers]:
        raise ValueError(f"of another model: it has layer {unknown[0]}; those there are: {layers}")
    if found.layers != sorted(set(found.layers)):
        raise ValueError(f"its layers are not in order, each once: {found.layers}")
    for layer, scheme in zip(found.layers, found.schemes, strict=True):
        if scheme.rank is not None and scheme.rank > hidden:
            raise ValueError(f"of another model: layer {layer} has rank {scheme.rank} of {hidden}")
