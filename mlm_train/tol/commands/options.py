"""Command-line options for how a table's rows are stored, of `tol build` and `tol compress`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.tol.allocate.mix_file import check_fits, read_allocation
from mlm_train.tol.format.schemes import GROUP, GROUPS, LEVELS, PLAIN_BYTES
from mlm_train.utils.arguments import layers_in
from mlm_train.utils.units import size

if TYPE_CHECKING:
    from mlm_train.tol.format.layout import TableSpec

_OPTIONS = ("dtype", "group_size", "asymmetric", "drop", "rank", "budget")  # in args


def add_storage_arguments(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add --dtype and the options that go with it; `default`: of --dtype, for the help."""
    parser.add_argument(  # table_spec_of sets its default, so that a given one can be told from it
        "--dtype",
        choices=(*PLAIN_BYTES, *LEVELS),
        help="type of the stored values ("
        + (f"default {default}; " if default else "")
        + "with --budget: the best for each layer)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="int8, int4: values that share a scale "
        f"(default {GROUP}; with --budget: the best for each layer)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="int8, int4: also a zero point per group")
    parser.add_argument("--drop", metavar="LAYERS", help="layers to leave out, such as 3,5-7; they read as 0")
    parser.add_argument("--rank", type=int, metavar="R", help="cut every layer to rank R")
    parser.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="most bytes of the table's files without its index, such as 3.2GB. Minimises the sum over "
        "layers of squared relative errors, over what --dtype and --group-size leave open: "
        f"{', '.join((*PLAIN_BYTES, *LEVELS))}; groups of {', '.join(map(str, GROUPS))}; every rank; the "
        "uncut layer; dropping it, with a warning. Errors are predicted (docs/tol.md)",
    )
    parser.add_argument(
        "--allocation", metavar="FILE", help="layers and schemes from `mlm-train tol allocate`"
    )


def given(args: argparse.Namespace, names: Sequence[str] = (*_OPTIONS, "allocation")) -> str:
    """The options among `names` that were given, for a message; "" for none."""
    used = (name for name in names if getattr(args, name) is not None and getattr(args, name) is not False)
    return ", ".join(f"--{name.replace('_', '-')}" for name in used)


def table_spec_of(
    args: argparse.Namespace, layers: list[int], hidden: int, default: str | None = None
) -> "TableSpec":
    """The TableSpec that the options ask for, of a table with these layers; `default`: type if none is given.

    Raises UserError naming a wrong option.
    """
    from mlm_train.tol.format.layout import TableSpec

    if args.allocation is not None:
        if more := given(args, _OPTIONS):
            raise UserError(f"--allocation sets how every layer is stored: leave {more} out")
        return _allocated(Path(args.allocation), layers, hidden)
    dtype = default if args.dtype is None and args.budget is None else args.dtype
    if dtype is None and args.budget is None:
        raise UserError("give --dtype, --budget or --allocation: how the values are to be stored")
    if dtype in PLAIN_BYTES and (args.group_size is not None or args.asymmetric):
        raise UserError(f"--group-size and --asymmetric are for int8 and int4, not for {dtype}")
    # No group is wider than a row, but the default may be wider than a narrow model's row.
    for name, most in (("group_size", max(hidden, GROUP)), ("rank", hidden)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            what = " (hidden_size)" if most == hidden else ""
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 to {most}{what}")
    if args.rank is not None and args.budget is not None:
        raise UserError("give --rank or --budget, not both")
    kept = layers
    if args.drop is not None:
        dropped = layers_in("--drop", args.drop, layers)
        kept = [layer for layer in layers if layer not in dropped]
        if not kept:
            raise UserError(f"--drop {args.drop} leaves no layer")
    return TableSpec(
        dtype=dtype,
        group_size=GROUP if dtype in LEVELS and args.budget is None is args.group_size else args.group_size,
        symmetric=not args.asymmetric,
        layers=kept,
        rank=args.rank,
        budget=args.budget,
    )


def _allocated(file: Path, layers: list[int], hidden: int) -> "TableSpec":
    from mlm_train.tol.format.layout import TableSpec

    try:
        allocation = read_allocation(file)
        check_fits(allocation, layers, hidden)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        reason = str(error)
    else:
        return TableSpec(layers=allocation.layers, schemes=allocation.schemes)
    raise UserError(f"--allocation {file}: {reason}; write one with `mlm-train tol allocate`")
