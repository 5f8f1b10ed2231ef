"""Command-line words that say how a table's rows are stored; `tol build` and `tol compress` share them."""

import argparse
import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mlm_train.errors import UserError
from mlm_train.sizes import size
from mlm_train.tol.codec import GROUP, LEVELS, TORCH_DTYPE, Record, Scheme
from mlm_train.tol.state import Storage


class Allocation(Record):
    """A file of `tol allocate`: the layers to keep, and the scheme of each."""

    layers: list[int]
    schemes: list[Scheme]


def add_storage_arguments(parser: argparse.ArgumentParser, default: str | None) -> None:
    """--dtype and what goes with it."""
    parser.add_argument(
        "--dtype",
        choices=(*TORCH_DTYPE, *LEVELS),
        default=default,
        help="type of the stored numbers" + (f" (default {default})" if default else ""),
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help=f"int8, int4: numbers that share a scale (default {GROUP})",
    )
    parser.add_argument(
        "--asymmetric", action="store_true", help="int8, int4: a zero of its own for each group"
    )
    parser.add_argument("--drop", metavar="LAYERS", help="layers to leave out, such as 3,5-7; they read as 0")
    parser.add_argument("--rank", type=int, metavar="R", help="cut every layer to rank R")
    parser.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="bytes of the whole table, such as 3.2GB: each layer gets its own rank",
    )
    parser.add_argument(
        "--allocation", metavar="FILE", help="layers and schemes from `mlm-train tol allocate`"
    )


def storage_of(args: argparse.Namespace, layers: list[int], hidden: int) -> Storage:
    """What the words ask for, of a table with these layers. Raises UserError naming a wrong one."""
    if args.allocation:
        return _allocated(Path(args.allocation), layers, hidden)
    if args.dtype is None:
        raise UserError("give --dtype or --allocation: how the numbers are to be stored")
    if args.dtype not in LEVELS and (args.group_size is not None or args.asymmetric):
        raise UserError(f"--group-size and --asymmetric are of int8 and int4, not of {args.dtype}")
    for name, most in (("group_size", None), ("rank", hidden)):
        value = getattr(args, name)
        if value is not None and (value < 1 or (most is not None and value > most)):
            limit = f" to {most} (hidden_size)" if most else " or more"
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1{limit}")
    if args.rank is not None and args.budget is not None:
        raise UserError("give --rank or --budget, not both")
    kept = layers
    if args.drop:
        kept = [layer for layer in layers if layer not in _dropped(args.drop, layers)]
        if not kept:
            raise UserError(f"--drop {args.drop} leaves no layer")
    return Storage(
        dtype=args.dtype,
        group_size=(args.group_size or GROUP) if args.dtype in LEVELS else None,
        symmetric=not args.asymmetric,
        layers=kept,
        rank=args.rank,
        budget=args.budget,
    )


def _dropped(text: str, layers: list[int]) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"--drop {text}: give layers such as 3,5-7")
        found |= set(range(int(first), int(last or first) + 1))
    if unknown := sorted(found - set(layers)):
        raise UserError(f"--drop {text}: there is no layer {unknown[0]}; those there are: {layers}")
    return found


def _allocated(file: Path, layers: list[int], hidden: int) -> Storage:
    try:
        tree = json.loads(file.read_text())
        allocation = TypeAdapter(Allocation).validate_python(
            {key: tree[key] for key in ("layers", "schemes")}
        )
    except (OSError, ValueError, ValidationError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--allocation {file}: {reason}; write one with `mlm-train tol allocate`") from None
    fits = len(allocation.layers) == len(allocation.schemes) and set(allocation.layers) <= set(layers)
    if not allocation.layers or not fits or any((one.rank or 1) > hidden for one in allocation.schemes):
        raise UserError(f"--allocation {file} is of another model: it has layers {allocation.layers}")
    return Storage(layers=allocation.layers, schemes=allocation.schemes)
