"""Choose documents by their content, so that the choice is the same on every machine."""

import hashlib


def text_fraction(text: bytes, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone."""
    digest = hashlib.sha256(purpose + b"\0" + text).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float, below 1
