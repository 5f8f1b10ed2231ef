"""The `mlm-train` command: find a command's module, run it, turn errors into one clear line.

A command is a module with `HELP`, `add_arguments(parser)` and `run(args)`. Only the chosen one is
imported, so that `mlm-train --help` is fast.
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
from mlm_train.utils.files import FULL, with_fix
from mlm_train.utils.library_noise import hush_libraries
from mlm_train.utils.signals import heard, stoppable


class Command(NamedTuple):
    """Where a command is, and what `mlm-train --help` says of it."""

    module: str
    summary: str


# Packages add commands by entry points of GROUP, which name such a module (docs/extending.md).
GROUP = "mlm_train.commands"
COMMANDS = {
    "data": Command("mlm_train.data.command", "collect, tokenize and inspect text"),
    "pretrain": Command(
        "mlm_train.train.command", "train a model (in one process, or on every rank under torchrun)"
    ),
    "launch": Command(
        "mlm_train.train.launch_command", "start pretrain in several processes, or submit it to Slurm"
    ),
    "checkpoint": Command("mlm_train.checkpoint.command", "list, verify and prune a run's checkpoints"),
    "export": Command("mlm_train.checkpoint.export", "write a Hugging Face folder from a checkpoint"),
    "import": Command(
        "mlm_train.checkpoint.import_command",
        "start training from the weights of a Hugging Face Llama or of an export",
    ),
    "tol": Command("mlm_train.tol.commands.main", "build and verify token-wise lookups (ToL)"),
    "plan": Command("mlm_train.plan.command", "estimate a ToL's size, build time and benefit"),
    "generate": Command("mlm_train.inference.command", "continue a prompt, with FFN-M computed or looked up"),
    "serve": Command("mlm_train.vllm.command", "serve an export over HTTP with vLLM, FFN-M looked up"),
    "evaluate": Command("mlm_train.evaluate.command", "compute a model's perplexity or logits"),
    "analyze": Command("mlm_train.analyze.command", "show and test what feed-forward memory does"),
    "monitor": Command("mlm_train.monitor.command", "show a run in TensorBoard"),
    "bench": Command("mlm_train.bench.command", "measure speed and traffic on this machine"),
    "doctor": Command("mlm_train.doctor", "show what this machine can run"),
}

STOPPED = {
    signal.SIGINT: "stopped by the user",
    signal.SIGTERM: "stopped by SIGTERM; run the same command again to continue",
}
_DISK = (*FULL, errno.EIO)  # write errors that the user can fix


class Parser(argparse.ArgumentParser):
    """Reports wrong options in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        _say(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def build_parser(chosen: str | None) -> Parser:
    """The parser, with the arguments of the chosen command only."""
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
    """Parse arguments; config overrides may also follow options, where argparse leaves them over.

    A command that sets `passed_on` gets the words after `--` there, for the program that it starts.
    """
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "passed_on") and "--" in argv:
        end = argv.index("--")
        args, rest = parser.parse_known_args(argv[:end])
        args.passed_on = argv[end + 1 :]
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.prog += f" {args.command}"
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _say(line: str) -> None:
    """Print a line on standard error; where that is a file on a full disk, only the exit code reports."""
    try:
        print(f"mlm-train: {escaped(line)}", file=sys.stderr, flush=True)
    except OSError:
        _give_up(2)


def _give_up(descriptor: int) -> None:
    """Drop a stream's unwritten output: writing it again on exit would change the exit code."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _check_text(argv: list[str]) -> None:
    """Raise UserError for non-UTF-8 arguments, which Python decodes to half surrogate pairs."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{word!r} on the command line is not UTF-8: correct it, or rename the file"
            ) from None


def _run(argv: list[str]) -> int:
    """Run the chosen command. Returns its exit code."""
    hush_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    _check_text(argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = _parsed(build_parser(chosen), argv)
        return args.handler(args) or 0
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that an error can still be reported


def main(argv: list[str] | None = None) -> None:
    """Run a command; exit with its code, or 2 for bad input, 1 for a bug, 130 for Ctrl-C.

    A full or broken disk counts as bad input, also below stdout, whose errors name no file. All other
    OSErrors without a file name are bugs.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with stoppable():
            code = _run(argv)
    except (Exception, KeyboardInterrupt) as error:
        code = _code(error, "--debug" in argv)
    raise SystemExit(code)


def _code(error: BaseException, debug: bool) -> int:
    """Report what has ended the command. Returns its exit code; a bug is raised again."""
    stop = heard()
    if stop is None and isinstance(error, KeyboardInterrupt):
        stop = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    if stop is not None:  # a failure after a signal is its consequence
        if _reports():
            _say(STOPPED[stop])
        return 128 + stop
    if isinstance(error, UserError | PeerFailure):
        return _reported(error, debug)
    if os.strerror(errno.EMFILE) in str(error):  # C++ libraries raise it as exceptions of their own
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        _say(f"the limit of {limit} open files is too low: raise it (ulimit -n 1024)")
        return 2
    if isinstance(error, BrokenPipeError):
        _give_up(1)  # the reader of a pipe is gone: nothing to report
        return 1
    if not isinstance(error, OSError) or debug or (error.filename is None and error.errno not in _DISK):
        raise error
    if error.filename is None:
        _give_up(1)
        _say(f"the output cannot be written: {with_fix(error)}")
    else:
        _say(f"{error.filename}: {with_fix(error, 'check the path and its permissions')}")
    return 2


def _reported(error: UserError | PeerFailure, debug: bool) -> int:
    """Print an error in one line, on one rank per machine where all raise the same. Returns the exit code."""
    if debug:
        traceback.print_exc()
    reports = _reports() and isinstance(error, UserError)
    if reports or not isinstance(error, SharedUserError):
        _say(f"{'' if reports else f'[rank {_rank()}] '}{error}")
    return 2 if isinstance(error, UserError) else 1


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _reports() -> bool:
    """Whether this is the rank of its machine that reports what all ranks would."""
    return os.environ.get("LOCAL_RANK", _rank()) == "0"
