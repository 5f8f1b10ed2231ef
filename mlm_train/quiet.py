"""Warnings of libraries that say nothing to our users. Each is named; all others are shown."""

import warnings

NOISE = (
    # megatron-core, imported for process groups and its dataset only
    (UserWarning, r"Transformer Engine and Apex are not installed"),
    # torch.distributed.checkpoint, where an export reads on one process on purpose
    (UserWarning, r"torch\.distributed is disabled, unavailable or uninitialized"),
    # renamed in torch 2.13; DeepSpeed and we call the old name, which older torch has too
    (FutureWarning, r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"),
)


def hush_libraries() -> None:
    """Leave known noise out."""
    for category, message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}", category=category)
