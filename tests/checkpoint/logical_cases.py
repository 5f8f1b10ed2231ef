"""Functions run by the ranks of test_logical_folder.py."""

from tests.commands import mlm_train


def pretrain(words: list[str]) -> None:
    """A run of several ranks, as torchrun would start each."""
    mlm_train("pretrain", *words)
