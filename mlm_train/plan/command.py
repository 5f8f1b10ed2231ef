"""`mlm-train plan`: estimate the cost and benefit of a ToL before it is built."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.plan.assumptions import ASSUMPTIONS, positive
from mlm_train.utils.arguments import add_action
from mlm_train.utils.units import in_units

if TYPE_CHECKING:
    from mlm_train.config import ModelConfig
    from mlm_train.plan.tol import Serving, StoredAs, Tier

HELP = """Estimate cost and benefit of a ToL before it is built.
(For the needs of a training run: mlm-train pretrain CONFIG --dry-run)

example:
  mlm-train plan tol configs/paper/memory-1b.yaml"""

_TOL_HELP = """Estimate a ToL's size, its build time, and whether lookup of FFN-M is faster than computing it.

Nothing is built or loaded. The figures of memory tiers are assumptions: give those of your machine.

examples:
  mlm-train plan tol configs/paper/memory-1b.yaml
  mlm-train plan tol exports/run1 --batch 1 16 256 --vram-gb 8 --rank 256 512
  mlm-train plan tol runs/micro --build-tflops 40 --json"""

DTYPES = ("bfloat16", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `tol`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    tol = add_action(actions, "tol", "estimate a ToL's size, build time and benefit", _TOL_HELP)
    tol.add_argument("model", metavar="MODEL", help="a config (YAML), an export or a run's folder")
    tol.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="overrides of a config's fields"
    )
    tol.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="batch sizes (default 1 8 64)")
    tol.add_argument(
        "--rank",
        type=int,
        nargs="+",
        default=[],
        metavar="R",
        help="also estimate low-rank tables of these ranks",
    )
    tol.add_argument(
        "--weights-dtype",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="bfloat16",
        help="dtype of FFN-M's weights, which a ToL would replace, and of all others (default %(default)s)",
    )
    tol.add_argument(
        "--weights-in",
        choices=("vram", "ram", "nvme"),
        help="tier of FFN-M's weights (default: the fastest that holds them)",
    )
    tol.add_argument(
        "--build-tflops", type=float, help="speed of the build, TFLOP/s (default: measured here)"
    )
    for figure in ASSUMPTIONS:
        text = f"{figure.meaning} (default {figure.default:g})"
        tol.add_argument(f"--{figure.option}", type=float, default=figure.default, metavar="X", help=text)
    tol.add_argument("--json", action="store_true", help="write one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Compute the plan and print it."""
    from mlm_train.plan.tol_page import print_page

    plan = plan_tol(args)
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        print_page(plan)
    return 0


def plan_tol(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of the plan, as printed with --json."""
    from mlm_train.plan.tol import (
        StoredAs,
        compare,
        ffn_m_bytes,
        ffn_m_flops,
        other_bytes,
        read_bytes,
        weights_seconds,
    )

    model = _model(Path(args.model), args.overrides)
    _check(args, model)
    serving, figures = _serving(args)
    home = _home(args, model, serving)
    stored = [StoredAs(dtype, rank) for rank in (None, *args.rank) for dtype in DTYPES]
    speed, measured = _build_speed(args, model)
    return {
        "model": args.model,
        "batch": args.batch,
        "assumed": figures | {"weights-dtype": args.weights_dtype},
        "build_tflops": {"value": speed / 1e12, "measured": measured},
        "ffn_m": {
            "bytes": ffn_m_bytes(model, args.weights_dtype),
            "flops_a_token": ffn_m_flops(model),
            "tier": home.name,
            "seconds": weights_seconds(model, serving, home, args.batch).tolist(),
        },
        "other_weights": {
            "bytes": other_bytes(model, args.weights_dtype),
            "bytes_a_step": read_bytes(model, args.weights_dtype),
            "seconds": read_bytes(model, args.weights_dtype) / serving.tiers[0].bandwidth,
        },
        "tables": [_table(model, one, speed, figures["write-gbs"] * 1e9) for one in stored],
        "serving": [
            offer._asdict() | {"stored": str(offer.stored)}
            for offer in compare(model, serving, home, stored, args.batch)
        ],
    }


def _model(path: Path, overrides: list[str]) -> "ModelConfig":
    """The model config of a config file, or of a folder, without reading its weights."""
    from mlm_train.checkpoint.reading.logical_folder import read_model_config
    from mlm_train.config import load_config

    if not path.is_dir():
        return load_config(path, overrides).model
    if overrides:
        raise UserError(f"{overrides[0]}: {path} is not a config; overrides apply to a config (YAML) only")
    return read_model_config(path)


def _check(args: argparse.Namespace, model: "ModelConfig") -> None:
    """Raise UserError for a model without FFN-M, and for values out of range."""
    if not model.has_memory:
        raise UserError(f"{args.model} is a base model and has no FFN-M; give a memory or flex model")
    for batch in args.batch:
        if batch < 1:
            raise UserError(f"--batch {batch}: give at least 1")
    for rank in args.rank:
        if not 1 <= rank <= model.hidden_size:
            raise UserError(f"--rank {rank}: give 1 to {model.hidden_size} (model.hidden_size)")
    if args.distinct > 1:
        raise UserError(f"--distinct {args.distinct:g}: give at most 1")


def _serving(args: argparse.Namespace) -> "tuple[Serving, dict[str, float]]":
    """The decoding machine, and its figures by option."""
    from mlm_train.plan.tol import BLOCK, NVME, RAM, VRAM, Serving, Tier

    figures = {figure.option: figure.of(args) for figure in ASSUMPTIONS}
    giga = {option: 1e9 * value for option, value in figures.items()}
    tiers = (
        Tier(VRAM, giga["vram-gb"], giga["vram-gbs"]),
        Tier(RAM, giga["ram-gb"], giga["ram-gbs"]),
        Tier(
            NVME,
            giga["nvme-gb"],
            giga["nvme-gbs"],
            latency=figures["nvme-latency-us"] * 1e-6,
            in_flight=figures["nvme-reads"],
            block=BLOCK,
        ),
    )
    return Serving(tiers, figures["tflops"] * 1e12, figures["distinct"], args.weights_dtype), figures


def _home(args: argparse.Namespace, model: "ModelConfig", serving: "Serving") -> "Tier":
    """The tier of FFN-M's weights. UserError where they, or the other weights, do not fit."""
    from mlm_train.plan.tol import ffn_m_bytes, home_of_weights, other_bytes

    others, needed = other_bytes(model, serving.weights), ffn_m_bytes(model, serving.weights)
    if others > serving.tiers[0].capacity:
        raise UserError(
            f"--vram-gb {args.vram_gb:g}: the weights other than FFN-M take {in_units(others)}; "
            f"give at least {_giga(others)}"
        )
    if args.weights_in is None:
        home = home_of_weights(model, serving)
        if home is None:
            raise UserError(
                f"no tier has {in_units(needed)} for FFN-M's weights; give --nvme-gb {_giga(needed)} or more"
            )
        return home
    home = next(tier for tier in serving.tiers if tier.name.lower() == args.weights_in)
    if not serving.fits(model, home, needed):
        whole = needed + (others if home is serving.tiers[0] else 0)
        raise UserError(
            f"--weights-in {args.weights_in}: FFN-M's weights take {in_units(needed)}, more than is free "
            f"there; give --{args.weights_in}-gb {_giga(whole)} or more, or leave --weights-in out"
        )
    return home


def _giga(size: int) -> str:
    """Enough GB for `size` bytes, with three digits."""
    text = f"{size / 1e9:.3g}"
    return text if float(text) * 1e9 >= size else f"{size / 1e9 * 1.005:.3g}"


def _build_speed(args: argparse.Namespace, model: "ModelConfig") -> tuple[float, bool]:
    """FLOPs per second of the build, and whether they were measured."""
    if args.build_tflops is not None:
        return positive("build-tflops", args.build_tflops) * 1e12, False
    from mlm_train.plan.speeds import ffn_flops

    return ffn_flops(model.hidden_size, model.intermediate_size), True


def _table(model: "ModelConfig", stored: "StoredAs", speed: float, written: float) -> dict[str, Any]:
    from mlm_train.plan.tol import build_seconds, row_bytes, tol_bytes

    compute, write = build_seconds(model, stored, speed, written)
    return {
        "stored": str(stored),
        "row_bytes": row_bytes(model, stored),
        "bytes": tol_bytes(model, stored),
        "compute_seconds": compute,
        "write_seconds": write,
    }
