"""The file that `tol allocate` writes: the kept layers and their schemes."""

from pathlib import Path

from pydantic import ValidationError

from mlm_train.tol.format.schemes import Scheme
from mlm_train.utils.files import LARGEST_RESULT
from mlm_train.utils.records import Record, first_problem, json_value, read_regular


class Allocation(Record):
    """The fields of such a file that a build reads: the layers to keep, and the scheme of each."""

    layers: list[int]
    schemes: list[Scheme]


def read_allocation(file: Path) -> Allocation:
    """Read a file of `tol allocate`. Raises ValueError with the reason if it is none, and OSError."""
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


def check_fits(allocation: Allocation, layers: list[int], hidden: int) -> None:
    """Raise a ValueError for an allocation that does not fit a table with these layers and hidden size."""
    count, schemes = len(allocation.layers), len(allocation.schemes)
    if count != schemes or not count:
        raise ValueError(f"it has {count} layers and {schemes} schemes: each layer needs one")
    if unknown := [layer for layer in allocation.layers if layer not in layers]:
        raise ValueError(f"of another model: it has layer {unknown[0]}; the layers are {layers}")
    if allocation.layers != sorted(set(allocation.layers)):
        raise ValueError(f"its layers are not in ascending order, each once: {allocation.layers}")
    for layer, scheme in zip(allocation.layers, allocation.schemes, strict=True):
        if scheme.rank is not None and scheme.rank > hidden:
            raise ValueError(f"of another model: layer {layer} has rank {scheme.rank} of {hidden}")
