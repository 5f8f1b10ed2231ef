"""The `mlm-train` command: finds a command's module, runs it, turns errors into one clear line.

A command is a module with `HELP`, `add_arguments(parser)` and `run(args)`. Only the chosen one is
imported, so `mlm-train --help` answers at once.
"""

import argparse
import contextlib
import errno
import importlib
import io
import os
import resource
import signal
import sys
import traceback
from typing import Any, NamedTuple, NoReturn

from mlm_train import __version__
from mlm_train.errors import PeerFailure, SharedUserError, Terminated, UserError, escaped
from mlm_train.utils.extensions import added, load, package_of
from mlm_train.utils.files import FULL, told
from mlm_train.utils.library_noise import hush_libraries
from mlm_train.utils.signals import heard, stoppable


class Command(NamedTuple):
    """Where a command is, and what `mlm-train --help` says of it."""

    module: str
    summary: str


# Packages add commands by entry points of GROUP, which name such a module (docs/extending.md).
GROUP = "mlm_train.commands"
COMMANDS = {
    "data": Command("mlm_train.data.command", "collect text, tokenise it, look at it"),
    "pretrain": Command(
        "mlm_train.train.command", "train a model (on one process, or on every rank of a torchrun)"
    ),
    "launch": Command(
        "mlm_train.train.launch_command", "start pretrain on several processes, or submit it to Slurm"
    ),
    "checkpoint": Command("mlm_train.checkpoint.command", "list, verify and prune a run's checkpoints"),
    "export": Command("mlm_train.checkpoint.export", "write a Hugging Face folder from a checkpoint"),
    "import": Command(
        "mlm_train.checkpoint.import_command",
        "train on with the weights of a Hugging Face Llama, or of an export",
    ),
    "tol": Command("mlm_train.tol.commands.main", "build and verify token-wise lookups (ToL)"),
    "plan": Command("mlm_train.plan.command", "size of a ToL, time to build it, and whether it pays"),
    "generate": Command("mlm_train.inference.command", "continue a prompt, with FFN-M computed or looked up"),
    "evaluate": Command("mlm_train.evaluate.command", "perplexity of a model, or its logits"),
    "monitor": Command("mlm_train.monitor.command", "show a run in TensorBoard"),
    "bench": Command("mlm_train.bench.command", "measure this machine, with what is moved counted"),
    "doctor": Command("mlm_train.doctor", "say what this machine can run"),
}

STOPPED = {
    signal.SIGINT: "stopped by the user",
    signal.SIGTERM: "stopped by SIGTERM; run the same command again to go on",
}
_DISK = (*FULL, errno.EIO)  # a write's errors that are the user's to mend


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
    for name, command in _known(chosen).items():
        if name != chosen:
            commands.add_parser(name, help=command.summary)
            continue
        module = _module_of(name, command)
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show a traceback for errors")
        module.add_arguments(sub)
        sub.set_defaults(handler=module.run)
    return parser


def _known(chosen: str | None) -> dict[str, Command]:
    """Our commands; where the chosen one is none of them those of other packages too."""
    if chosen in COMMANDS:
        return COMMANDS
    points = added(GROUP, COMMANDS).items()
    return COMMANDS | {name: Command(point.value, f"added by {package_of(point)}") for name, point in points}


def _module_of(name: str, command: Command) -> Any:
    if name in COMMANDS:
        return importlib.import_module(command.module)
    module = load(added(GROUP, COMMANDS)[name])
    for part in ("HELP", "add_arguments", "run"):
        if not hasattr(module, part):
            raise UserError(f"{name}: {command.module} is no command: it has no {part} (docs/extending.md)")
    return module


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
    try:
        print(f"mlm-train: {escaped(line)}", file=sys.stderr, flush=True)
    except OSError:
        _give_up(2)


def _give_up(descriptor: int) -> None:
    """Let go what stdout or stderr did not take: tried again as Python ends, it would change the code."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _check_text(argv: list[str]) -> None:
    """Bytes that are not UTF-8 come as halves of surrogates, which no tokenizer, YAML or JSON can hold."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{word!r} on the command line is not UTF-8: write it, or rename the file"
            ) from None


def _run(argv: list[str]) -> int:
    """The chosen command's exit code."""
    hush_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is shown escaped
            stream.reconfigure(errors="backslashreplace")
    _check_text(argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = _parsed(build_parser(chosen), argv)
        return args.handler(args) or 0
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here an error can still be told


def main(argv: list[str] | None = None) -> None:
    """Run a command; exit with its code, or 2 for bad input, 1 for a fault of ours, 130 for Ctrl-C.

    A full or broken disk is bad input too, also under stdout, whose errors name no file. All other errors of
    the system that name none are faults of ours.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with stoppable():
            code = _run(argv)
    except (Exception, KeyboardInterrupt) as error:
        code = _code(error, "--debug" in argv)
    raise SystemExit(code)


def _code(error: BaseException, debug: bool) -> int:
    """Say what has ended the command; its exit code. A fault of ours is raised again."""
    stop = heard()
    if stop is None and isinstance(error, KeyboardInterrupt):
        stop = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    if stop is not None:  # what fails after a signal fails because of it
        if _speaks():
            _say(STOPPED[stop])
        return 128 + stop
    if isinstance(error, UserError | PeerFailure):
        return _said(error, debug)
    if os.strerror(errno.EMFILE) in str(error):  # libraries in C++ raise it as errors of their own
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        _say(f"{limit} open files at once are too few: raise the limit (ulimit -n 1024)")
        return 2
    if isinstance(error, BrokenPipeError):
        _give_up(1)  # the reader of a pipe went away: nothing to say
        return 1
    if not isinstance(error, OSError) or debug or (error.filename is None and error.errno not in _DISK):
        raise error
    if error.filename is None:
        _give_up(1)
        _say(f"the output cannot be written: {told(error)}")
    else:
        _say(f"{error.filename}: {told(error, 'check the path and its rights')}")
    return 2


def _said(error: UserError | PeerFailure, debug: bool) -> int:
    """One line, of one rank a machine where all raise it alike; the exit code."""
    if debug:
        traceback.print_exc()
    speaks = _speaks() and isinstance(error, UserError)
    if speaks or not isinstance(error, SharedUserError):
        _say(f"{'' if speaks else f'[rank {_rank()}] '}{error}")
    return 2 if isinstance(error, UserError) else 1


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _speaks() -> bool:
    """Whether this is the rank of its machine that says what all have to say."""
    return os.environ.get("LOCAL_RANK", _rank()) == "0"
