"""The `mlm-train` command: finds a command's module, runs it, turns errors into one clear line.

A command is a module with `HELP`, `add_arguments(parser)` and `run(args)`. Only the chosen one is
imported, so `mlm-train --help` answers at once.
"""

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from typing import NoReturn

from mlm_train import __version__
from mlm_train.errors import PeerFailure, SharedUserError, UserError
from mlm_train.quiet import hush_libraries

COMMANDS = {
    "data": "mlm_train.data.command",
    "pretrain": "mlm_train.train.command",
    "launch": "mlm_train.train.launch_command",
    "checkpoint": "mlm_train.checkpoint.command",
    "export": "mlm_train.checkpoint.export_command",
    "import": "mlm_train.checkpoint.import_command",
    "tol": "mlm_train.tol.command",
    "plan": "mlm_train.plan.command",
    "generate": "mlm_train.inference.command",
    "evaluate": "mlm_train.evaluate.command",
    "monitor": "mlm_train.monitor.command",
    "bench": "mlm_train.bench.command",
    "doctor": "mlm_train.doctor",
}
SUMMARY = {
    "data": "collect text, tokenise it, look at it",
    "pretrain": "train a model (on one process, or on every rank of a torchrun)",
    "launch": "start pretrain on several processes, or submit it to Slurm",
    "checkpoint": "list, verify and prune a run's checkpoints",
    "export": "write a Hugging Face folder from a checkpoint",
    "import": "train on with the weights of a Hugging Face Llama, or of an export",
    "tol": "build and verify token-wise lookups (ToL)",
    "plan": "size of a ToL, time to build it, and whether it pays",
    "generate": "continue a prompt, with FFN-M computed or looked up",
    "evaluate": "perplexity of a model, or its logits",
    "monitor": "show a run in TensorBoard",
    "bench": "measure this machine, with what is moved counted",
    "doctor": "say what this machine can run",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with options in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        _say(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def build_parser(chosen: str | None) -> Parser:
    """The parser; only the chosen command's arguments are added."""
    parser = Parser(
        prog="mlm-train",
        description="Distributed pretraining of MemoryLLM: feed-forward memory that can be looked up.",
        epilog="example:\n  mlm-train pretrain configs/micro.yaml train.steps=20\n\n"
        "'mlm-train COMMAND --help' shows a command with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlm-train {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=SUMMARY[name])
            continue
        module = importlib.import_module(module_name)
        sub = commands.add_parser(
            name,
            help=SUMMARY[name],
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show a traceback for errors")
        module.add_arguments(sub)
        sub.set_defaults(handler=module.run)
    return parser


def _parsed(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The arguments; overrides of a config may stand after options too, where argparse leaves them."""
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.prog += f" {args.command}"
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _say(line: str) -> None:
    """On the terminal; where that is a file on a full disk, the exit code still tells."""
    with contextlib.suppress(OSError):
        print(f"mlm-train: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run a command; exit with its code, or 2 for bad input, 1 for a fault of ours, 130 for Ctrl-C."""
    hush_libraries()
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    args = _parsed(build_parser(chosen), argv)
    try:
        code = args.handler(args)
    except UserError as error:
        if args.debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        speaks = os.environ.get("LOCAL_RANK", rank) == "0"
        if speaks or not isinstance(error, SharedUserError):
            _say(f"{'' if speaks else f'[rank {rank}] '}{error}")
        raise SystemExit(2) from None
    except PeerFailure as failure:
        if args.debug:
            traceback.print_exc()
        _say(f"[rank {os.environ.get('RANK', '0')}] {failure}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say("stopped by the user")
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe went away: nothing to say
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None or args.debug:
            raise
        _say(f"{error.filename}: {error.strerror}; check the path and its rights")
        raise SystemExit(2) from None
    raise SystemExit(code or 0)
