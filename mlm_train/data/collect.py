"""A corpus without a download: the text files of Python's standard library, or of given folders.

The default is the standard library of the *base* installation without its site-packages, so the corpus
does not depend on what a virtual environment holds.
"""

import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_train.data.fraction import text_fraction
from mlm_train.errors import UserError
from mlm_train.utils.files import new_folder

SUFFIXES = (".py", ".md", ".rst", ".txt")
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, order=True)
class CollectedFile:
    """A usable file; sorted by the hash of its contents, so that any prefix is spread over the corpus."""

    digest: bytes
    path: str  # relative to its source folder, with forward slashes
    file: Path
    size: int


def standard_library() -> Path:
    """Folder of the base installation's standard library, also from inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))


def collect(
    output: Path, sources: Sequence[Path] = (), max_bytes: int = 40_000_000, validation_fraction: float = 0.02
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl ({"text", "path"} per line) and collection.json.

    Documents are files, without duplicates, at most max_bytes of text in total. Which of them are
    kept, their order and their split follow from their contents alone. Returns collection.json's contents.
    Raises UserError for a missing source, an empty corpus or an existing output.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction}: must lie between 0 and 1")
    folders = list(sources) or [standard_library()]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--source {folder} is not a folder; give one that exists")
    with new_folder(output) as partial:
        counts: Counter[str] = Counter()
        chosen = _choose(_candidates(folders, counts), max_bytes, counts)
        if not chosen:
            names = ", ".join(map(str, folders))
            raise UserError(
                f"no text ({' '.join(SUFFIXES)}) of at most {max_bytes} bytes in {names}; change --source"
            )
        splits, extensions = _write_splits(partial, chosen, validation_fraction)
        report = {
            "source": [str(s) for s in sources] or f"standard library of Python {platform.python_version()}",
            "documents": len(chosen),
            "bytes": sum(candidate.size for candidate in chosen),
            "splits": splits,
            "extensions": extensions,
            "duplicates": counts["duplicates"],
            "skipped": {name: counts[name] for name in ("not_utf8", "empty", "unreadable")},
            "beyond_max_bytes": counts["beyond_max_bytes"],
        }
        (partial / "collection.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _candidates(folders: Sequence[Path], counts: Counter[str]) -> Iterator[CollectedFile]:
    """Every readable, non-empty UTF-8 file; counts the skipped ones."""
    for folder in folders:
        for file in _text_files(folder):
            try:
                data = file.read_bytes()
                text = data.decode("utf-8")
            except OSError:
                counts["unreadable"] += 1
                continue
            except UnicodeDecodeError:
                counts["not_utf8"] += 1
                continue
            if not text.strip():
                counts["empty"] += 1
                continue
            path = file.relative_to(folder).as_posix()
            yield CollectedFile(hashlib.sha256(data).digest(), path, file, len(data))


def _text_files(folder: Path) -> Iterator[Path]:
    for parent, children, names in os.walk(folder):
        children[:] = [name for name in children if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES):
                yield Path(parent, name)


def _choose(candidates: Iterator[CollectedFile], max_bytes: int, counts: Counter[str]) -> list[CollectedFile]:
    """The candidates without duplicates (the first path stays), in hash order, as far as they fit."""
    chosen: list[CollectedFile] = []
    total = 0
    previous = b""
    for candidate in sorted(candidates):
        if candidate.digest == previous:
            counts["duplicates"] += 1
            continue
        previous = candidate.digest
        if total + candidate.size > max_bytes:
            counts["beyond_max_bytes"] += 1
            continue
        total += candidate.size
        chosen.append(candidate)
    return chosen


def _write_splits(
    folder: Path, chosen: Sequence[CollectedFile], validation_fraction: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the two files; returns documents and bytes per split and per extension."""
    splits = {name: {"documents": 0, "bytes": 0} for name in ("train", "validation")}
    extensions = {suffix: {"documents": 0, "bytes": 0} for suffix in SUFFIXES}
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for candidate in chosen:
            data = candidate.file.read_bytes()
            held_out = text_fraction(data, b"collect") < validation_fraction
            line = json.dumps({"text": data.decode("utf-8"), "path": candidate.path}, ensure_ascii=False)
            (validation if held_out else train).write(line + "\n")
            split = splits["validation" if held_out else "train"]
            for count in (split, extensions[candidate.file.suffix.lower()]):
                count["documents"] += 1
                count["bytes"] += candidate.size
    for name, count in splits.items():
        if not count["documents"]:
            raise UserError(
                f"none of the {len(chosen)} documents falls into the {name} split; "
                f"change --validation-fraction {validation_fraction} or add text"
            )
    return splits, extensions
