"""A tokenizer that somebody hands in is tried in a process of its own first.

Libraries in C++ and Rust read it. What a damaged or hostile file makes of them (an endless loop, all memory,
an abort) is then one line, and not the end of this process.
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
MEMORY = 16 * 2**30  # bytes of addresses
_TEXTS = (
    "def main(self):\n    return 'é' + \"\u2581\" + str(0.5)  # \U0001f600 \ufb01 \uff21 \u3000\n\n\n\t x",
    "a" * 20_000 + "!",
    " " * 20_000,
    "ab, 1" * 2_000 + "!",
    "".join(map(chr, range(1, 0x250))),
)
_AT_ONCE = 4096  # ids


def try_tokenizer(path: Path) -> None:
    """Load it, encode texts, decode every id. UserError, in words of the library, where one of them fails."""
    command = [sys.executable, "-m", "mlm_train.data.tokenizer_trial", str(path)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"tokenizer {path} is damaged: it keeps its library busy for more than {SECONDS:.0f} s"
        ) from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise UserError(f"tokenizer {path} is damaged: its library ended by {name}")
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip().splitlines()
        raise UserError(
            said[-1] if said else f"tokenizer {path} cannot be tried: exit code {done.returncode}"
        )


def _try(path: str) -> None:
    tokenizer = Tokenizer.load(path)
    tokenizer.encode_batch(_TEXTS)
    for first in range(0, tokenizer.vocab_size, _AT_ONCE):
        tokenizer.decode(range(first, min(first + _AT_ONCE, tokenizer.vocab_size)))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _try(sys.argv[1])
    except UserError as error:
        print(error)
        raise SystemExit(2) from None
