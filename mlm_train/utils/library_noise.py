"""Hide messages of libraries that do not concern our users."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = (
    # megatron-core, imported for its dataset only
    (UserWarning, r"Transformer Engine and Apex are not installed"),
    # renamed in torch 2.13; DeepSpeed and we call the old name, which older torch has too
    (FutureWarning, r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"),
)


def hush_libraries() -> None:
    """Hide the warnings of NOISE; all others are shown."""
    for category, message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}", category=category)


@contextmanager
def silenced() -> Iterator[None]:
    """Capture stdout and stderr, also of child processes, and show them only after an error.

    DeepSpeed runs the compiler on every import and lets it print errors.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with tempfile.TemporaryFile() as kept:
        for descriptor in saved:
            os.dup2(kept.fileno(), descriptor)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(saved[2], kept.read())
            raise
        finally:
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)
