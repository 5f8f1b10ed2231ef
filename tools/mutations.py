"""Random damage to a file: its bytes, its JSON or YAML, or a replacement by something else."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Reseal = Callable[[Any], bytes]  # a changed tree -> the file, with its own checksum recomputed
HUGE = 2**40  # bytes of a sparse file
WORDS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 4, 8, 16, 64, 1e-3, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64,
    10**30, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "text", "a" * 5000, "\0", "\n", "\ud800", "../../etc/passwd", "/dev/zero",
    "é\u2028",
    [], {}, [[]], {"": None}, [0] * 1000, ["x", 1, None], {"a": {"b": {"c": []}}},
)  # fmt: skip
YAML_TEXTS = (
    "2020-13-45", "2020-12-31", "!!bool x", '!!int ""', "!!python/object:os.system x", "&a [*a]", "*a",
    "&a x", "0220",
    "0x1F", "1:30:00", "1e-4", "1e400", "-.inf", ".nan", "yes", "~", "null", "9" * 5000, "[" * 2000,
    "{a: " * 300, "- - - x",
    "{a: 1, a: 2}", "'", '"', '"\\ud800"', '"\\U00110000"', '"a\\0"', "|", ">", "%YAML 9.9", "---", "...",
    "? ", "<<: *a",
    "\t", "\x07", "\x85", "\u2028", "\ufeff", "@x", "`x`", "[1, 2", "{", "}", "a: b: c",
    "# x", "x" * 70000, "true", "-1", "0",
    "9223372036854775808", "é", "\ud800", "- x\n- y", "[]", "{}", "[[1], {a: b}]",
    "\\", "=", "1_000", "0o9", "0b1",
)  # fmt: skip


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Change, insert or remove some bytes."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        # Headers are the most sensitive: half of all positions are at the start.
        end = max(1, min(len(out), chance.choice((64, 1024, len(out), len(out)))))
        at = chance.randrange(end)
        how = chance.randrange(8)
        if how == 0:
            out = out[:at]
        elif how == 1:
            out[at:at] = chance.randbytes(chance.choice((1, 4, 100)))
        elif how == 2:
            del out[at : at + chance.choice((1, 4, 100))]
        elif how == 3:
            out[at : at + 8] = chance.choice((b"\0" * 8, b"\xff" * 8, b"\x80" * 8, b"\0\0\0\0\0\0\0\x7f"))
        elif how == 4:
            out += out[at : at + 1000]
        elif out:
            out[min(at, len(out) - 1)] ^= 1 << chance.randrange(8)
    return bytes(out)


def damage_tree(tree: Any, chance: random.Random) -> Any:
    """Change, remove, add or swap some parts of a JSON value, in place where possible."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not isinstance(tree, dict | list) or not tree:
            return chance.choice(WORDS)
        inside, key = _position(tree, chance)
        how = chance.randrange(10)
        if how == 0:
            del inside[key]
        elif how == 1:
            _add(inside, chance.choice(("extra", "sha256", "", "format", "__proto__")), chance.choice(WORDS))
        elif how == 2:
            other, there = _position(tree, chance)
            inside[key], other[there] = other[there], inside[key]
        elif how == 3 and isinstance(inside[key], int | float):
            inside[key] = inside[key] * chance.choice((-1, 0, 2, 10, 2**40)) + chance.choice((-1, 0, 1))
        elif how == 4 and isinstance(inside[key], str):
            inside[key] = damage_text(inside[key], chance)
        elif how == 5:
            inside[key] = [inside[key]]
        elif how == 6:
            _add(inside, "extra", inside[key])
        else:
            inside[key] = json.loads(json.dumps(chance.choice(WORDS)))
        if how == 2 and _is_deep(tree):  # a part swapped into itself
            return WORDS[-1]
    return tree


def _position(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """(container, key) of a random value, by a walk from the root, so that long lists are not preferred."""
    while True:
        key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        inner = tree[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            return tree, key
        tree = inner


def _is_deep(tree: Any) -> bool:
    try:
        json.dumps(tree)
    except (ValueError, RecursionError):
        return True
    return False


def _add(inside: Any, key: str, value: Any) -> None:
    if isinstance(inside, dict):
        inside[key] = value
    else:
        inside.append(value)


def damage_text(text: str, chance: random.Random) -> str:
    """Insert or replace characters in a string."""
    at = chance.randrange(len(text) + 1)
    what = chance.choice(("", "0", "x", "\n", "\0", "/", "..", "\u2028", "é", "\x1b[31m", "\ud800"))
    return text[:at] + what + text[at + chance.choice((0, 1)) :]


def json_bytes(tree: Any) -> bytes:
    """JSON as a hostile writer would produce it, with NaN and half surrogates."""
    return json.dumps(tree).encode("ascii")


def damage_json(data: bytes, chance: random.Random, reseal: Reseal | None) -> tuple[bytes, bool]:
    """Damage a file's JSON. Returns the file, and whether its checksum was recomputed."""
    how = chance.randrange(12)
    if how == 0:
        depth = chance.choice((70, 990, 100_000))
        return data[:1] + b'"x": ' + b"[" * depth + b"]" * depth + b", " + data[1:], False
    if how == 1:
        return b"[" * 100_000, False
    if how == 2:  # a key twice
        return data.replace(b"{", b'{"format": 1, "version": 7, ', 1), False
    if how == 3:
        return re.sub(rb"\d+", lambda found: b"9" * 5000 if chance.random() < 0.1 else found[0], data), False
    tree = damage_tree(json.loads(data), chance)
    if reseal is not None and chance.random() < 0.5:
        try:
            return reseal(tree), True
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            pass  # too damaged for a checksum
    return json_bytes(tree), False


def damage_safetensors(data: bytes, chance: random.Random) -> bytes:
    """Damage the header's JSON or its length."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.2:
        length = chance.choice((0, 1, 7, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    header = json_bytes(damage_tree(json.loads(data[8 : 8 + length]), chance))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_sentencepiece(data: bytes, chance: random.Random) -> bytes:
    """Change a model's pieces, scores, types or normalization, keeping it well-formed."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    for _ in range(chance.choice((1, 1, 3))):
        if not model.pieces:
            break
        piece = chance.choice(model.pieces)
        how = chance.randrange(9)
        if how == 0:
            piece.piece = chance.choice(
                ("", "a", "</s>", "\u2581", "x" * 10_000, "\0", chance.choice(model.pieces).piece)
            )
        elif how == 1:
            piece.score = chance.choice((float("nan"), float("inf"), -1e38, 0.0))
        elif how == 2:
            piece.type = chance.choice((1, 2, 3, 4, 5, 6))
        elif how == 3:
            del model.pieces[chance.randrange(len(model.pieces)) :]
        elif how == 4:
            model.pieces.append(piece)
        elif how == 5:
            spec = model.normalizer_spec
            spec.precompiled_charsmap = damage_bytes(
                spec.precompiled_charsmap or chance.randbytes(64), chance
            )
        elif how == 6:
            model.normalizer_spec.precompiled_charsmap = chance.randbytes(chance.choice((4, 400, 4000)))
        elif how == 7:
            spec = model.trainer_spec
            spec.model_type = chance.choice((1, 2, 3, 4))
            spec.byte_fallback = chance.random() < 0.5
        else:
            for name in ("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"):
                if chance.random() < 0.4:
                    setattr(model.trainer_spec, name, chance.choice((-1, 0, 3, 10**6, 2**31 - 1, -(2**31))))
    out: bytes = model.SerializeToString()
    return out


def damage_yaml(text: str, chance: random.Random) -> str:
    """Change, duplicate, remove or move lines; or damage the values and write them as JSON."""
    if chance.random() < 0.4:
        return json.dumps(damage_tree(yaml.safe_load(text), chance))
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(lines)) if lines else 0
        how = chance.randrange(6)
        if how == 0 and lines:
            del lines[at]
        elif how == 1 and lines:
            lines.insert(at, chance.choice(lines))
        elif how == 2 and lines:
            lines[at] = chance.choice((" ", "\t", "- ", "? ")) + lines[at]
        elif how == 3:
            lines.insert(at, chance.choice(YAML_TEXTS))
        elif lines:
            key, colon, _ = lines[at].partition(":")
            lines[at] = key + (colon or ":") + " " + chance.choice(YAML_TEXTS)
    return "\n".join(lines) + "\n"


def replace_file(path: Path, chance: random.Random) -> str:
    """Replace a file by something else. Returns a description."""
    data = path.read_bytes()
    path.unlink()
    kinds = ["fifo", "folder", "empty", "gone", "loop", "dangling", "device", "zero", "outside", "garbage"]
    if path.suffix not in (
        ".gz",
        ".xz",
        ".bz2",
        ".zst",
        ".txt",
        ".jsonl",
    ):  # a text may be as long as it likes
        kinds.append("sparse")
    how = chance.choice(kinds)
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "empty":
        path.touch()
    elif how == "sparse":
        path.write_bytes(data)
        os.truncate(path, HUGE)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "dangling":
        path.symlink_to("nothing-there")
    elif how in ("device", "zero"):
        path.symlink_to("/dev/null" if how == "device" else "/dev/zero")
    elif how == "outside":
        other = path.parent.parent / f"outside-{path.name}"
        other.write_bytes(damage_bytes(data, chance))
        path.symlink_to(other)
    elif how == "garbage":
        path.write_bytes(chance.randbytes(chance.choice((1, 100, 10_000))))
    return how
