"""The one helper of distributed tests: run a function on several gloo processes, get what it returns.

A launch costs seconds of imports, so a function runs many cases and returns figures for all of them.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_on_ranks(target: str, world: int, timeout: float = 300, **arguments: Any) -> Any:
    """`target` is "module:function"; it gets the arguments, rank 0's result comes back (JSON).

    Any rank's failure fails the test with that rank's own traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call.json"
        call.write_text(json.dumps({"target": target, "arguments": arguments, "folder": folder}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "tests.ranks", str(call)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=timeout
        )
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure-*"))]
        if failures or done.returncode:
            raise AssertionError("\n".join(failures) or done.stderr[-4000:])
        return json.loads((Path(folder) / "result").read_text())


def _main(call: Path) -> None:
    order = json.loads(call.read_text())
    rank = int(os.environ["RANK"])
    try:
        module, _, name = order["target"].partition(":")
        result = getattr(importlib.import_module(module), name)(**order["arguments"])
        if rank == 0:
            (Path(order["folder"]) / "result").write_text(json.dumps(result))
    except BaseException:
        import traceback

        first = not list(Path(order["folder"]).glob("failure-*"))
        if first:  # the others then fail because this one did
            text = f"rank {rank} failed\n{traceback.format_exc()}"
            (Path(order["folder"]) / f"failure-{rank}").write_text(text)
        raise
    # Not through Python's finalisation: a thread of gloo that drops its last tensor then kills the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
