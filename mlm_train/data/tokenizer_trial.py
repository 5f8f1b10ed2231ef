"""Try a user's tokenizer in a process of its own first.

Libraries in C++ and Rust read it. A damaged or hostile file that makes them loop, exhaust memory or abort
then gives one error line instead of ending this process.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError

SECONDS = 60.0  # the largest tokenizers take two
MEMORY = 16 * 2**30  # bytes of address space
_TEXTS = (
    "def main(self):\n    return 'é' + \"\u2581\" + str(0.5)  # \U0001f600 \ufb01 \uff21 \u3000\n\n\n\t x",
    "a" * 20_000 + "!",
    " " * 20_000,
    "ab, 1" * 2_000 + "!",
    "".join(map(chr, range(1, 0x250))),
)
_BATCH_IDS = 4096


def try_tokenizer(path: Path) -> None:
    """Load a tokenizer, encode texts, decode every id. UserError with the library's reason on failure."""
    command = [sys.executable, "-m", "mlm_train.data.tokenizer_trial", str(path)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"tokenizer {path} is damaged: its library did not finish within {SECONDS:.0f} s"
        ) from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise UserError(f"tokenizer {path} is damaged: its library was ended by {name}")
    if done.returncode:
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
        raise UserError(
            lines[-1] if lines else f"tokenizer {path} cannot be tried: exit code {done.returncode}"
        )


def _try(path: str) -> None:
    tokenizer = Tokenizer.load(path)
    tokenizer.encode_batch(_TEXTS)
    for first in range(0, tokenizer.vocab_size, _BATCH_IDS):
        tokenizer.decode(range(first, min(first + _BATCH_IDS, tokenizer.vocab_size)))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _try(sys.argv[1])
    except UserError as error:
        print(error)
        raise SystemExit(2) from None
