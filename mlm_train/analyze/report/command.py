"""`mlm-train analyze report`."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.utils.arguments import MODEL_KINDS, add_action

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Write one HTML page of analyses: it needs no network, and any browser opens it.

Of `analyze keys`: statistics, clusters and a map of tokens per layer, and a search for tokens. Of tables:
singular values per layer. Of `analyze ablate`: perplexity by change, and by size of the table. Of
`analyze shares --json`: what each part adds. Of models: sizes, and a run's losses. All must be of one
tokenizer, tables of an analysed model, ablations of the same text. Needs plotly
(pip install 'mlm-train[analyze]').

examples:
  mlm-train analyze report --keys keys/run1 --output report.html
  mlm-train analyze report --model runs/base runs/mine --keys keys/mine --ablation ablation.json \\
    --shares shares.json --tol tol/mine --title "Mine" --output report.html"""

SOURCES = ("model", "keys", "tol", "ablation", "shares")


def add_report(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "report", "write one HTML page of analyses", _HELP)
    parser.add_argument("--output", metavar="FILE", required=True, help="HTML file to write; must not exist")
    for name, metavar, text in (
        ("model", "MODEL", f"models to compare: {MODEL_KINDS}"),
        ("keys", "FOLDER", "folders written by `analyze keys`"),
        ("tol", "DIR", "tables, for their singular values; each is read once"),
        ("ablation", "FILE", "files written by `analyze ablate`"),
        ("shares", "FILE", "what `analyze shares --json` printed"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, nargs="+", default=[], help=text)
    parser.add_argument("--title", default="Feed-forward memory", help="of the page")


def run_report(args: argparse.Namespace) -> int:
    """Read, check, write. Returns exit code 0."""
    from mlm_train.analyze.extra import require

    require("plotly", "plotly", "analyze report")
    if not any(getattr(args, name) for name in SOURCES):
        options = ", ".join(f"--{name}" for name in SOURCES)
        raise UserError(f"there is nothing to report: give at least one of {options}")
    from mlm_train.analyze.report.inputs import Inputs
    from mlm_train.analyze.report.page import write_report
    from mlm_train.utils.files import check_output
    from mlm_train.utils.units import in_units

    file = check_output("--output", args.output, lambda _: False, "new file")
    inputs = Inputs.read(args.model, args.keys, args.tol, args.ablation, args.shares)
    write_report(file, args.title, inputs)
    print(f"wrote {file}, {in_units(file.stat().st_size)}")
    return 0
