"""Seconds and memory of a training step on the device, by `mlm-train bench train`."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mlm_train.bench.profile import ZIPF
from mlm_train.bench.train_presets import HF, PRESETS, Preset, Variant
from mlm_train.data.manifest import DataManifest, SplitRecord, TokenizerRecord, fingerprint_of
from mlm_train.data.prepared import write_manifest
from mlm_train.data.token_stream import DTYPE_CODES, INDEX_HEADER
from mlm_train.utils.files import sha256_of
from mlm_train.utils.records import FileRecord
from tests.gpu.checks import Figures, NotPossible
from tests.ranks import ROOT

TIMEOUT = 7000  # seconds
UNMEASURED = "not measured: "  # begins a note of the report
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def bench(device: str) -> Figures:
    """Tokens per second and peak GiB of each variant, and ratios; on a GPU ours compiled too."""
    preset, words = PRESETS["1b"], ["--compile"]
    if device == "cpu":
        preset, words = PRESETS["tiny"], ["--runs", "1", "--passes", "1", "--variants", "base", HF[0]]
    with tempfile.TemporaryDirectory() as name:
        data, file = Path(name) / "data", Path(name) / "report.json"
        write_zipf(data, preset)
        options = {"device": device, "preset": preset.name, "data": data, "json": file}
        words += [f"--{option}={value}" for option, value in options.items()]
        done = subprocess.run(
            [sys.executable, "-m", "mlm_train", "bench", "train", *words],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key not in LAUNCH},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode and (reason := reason_of(done.stderr)):
            raise NotPossible(reason)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}"
        figures = figures_of(json.loads(file.read_text(encoding="utf-8")), preset)
    if device == "cpu":
        figures[HF[1]] = "compiling takes minutes on a CPU"
    return figures


def reason_of(errors: str) -> str | None:
    """What of the command's errors is no fault: too little memory, or a package that is not there."""
    found = re.search(r"--preset \w+: .* GiB, but .* are free|ModuleNotFoundError: .*", errors)
    return found[0] if found else None


def figures_of(report: dict[str, Any], preset: Preset) -> Figures:
    """The main figures of a report, and why others are missing. AssertionError for a missing one of ours."""
    rows = {row["name"].removeprefix(f"{preset.name}."): row["median"] for row in report["rows"]}
    figures: Figures = {}
    for name in (name.removesuffix(".speed") for name in rows if name.endswith(".speed")):
        figures[f"{name} tokens/s"] = rows[f"{name}.speed"]
        figures[f"{name} GiB"] = rows[f"{name}.memory.peak"] / 2**30
    figures |= {name.removeprefix(f"{preset.name}."): ratio for name, ratio in report["ratios"].items()}
    for note in report.get("notes", ()):
        if note.startswith(UNMEASURED):
            variant, _, reason = note.removeprefix(UNMEASURED).partition(": ")
            assert Variant.named(variant).family == "hf", f"{variant}: {reason}"
            figures[variant] = reason
    return figures


def write_zipf(folder: Path, preset: Preset) -> None:
    """Prepared data of one document whose ids have about the frequencies of text; the tokenizer is a stub."""
    folder.mkdir()
    count = max([preset.tokens, *preset.steps_of]) + 1
    odds = np.arange(1, preset.vocabulary + 1, dtype=np.float64) ** -ZIPF
    ids = np.random.default_rng(5).choice(preset.vocabulary, count, p=odds / odds.sum()).astype("<i4")
    ids.tofile(folder / "train.bin")
    header = np.array([(b"MMIDIDX", 1, DTYPE_CODES["int32"], 1, 2)], dtype=INDEX_HEADER)
    lengths, pointers = np.array([count], "<i4"), np.array([0, 0, 1], "<i8")
    (folder / "train.idx").write_bytes(b"".join(part.tobytes() for part in (header, lengths, pointers)))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    binary, index = (
        FileRecord(file=file.name, bytes=file.stat().st_size, sha256=sha256_of(file))
        for file in (folder / "train.bin", folder / "train.idx")
    )
    tokenizer = TokenizerRecord(
        file="tokenizer.json", sha256=hashlib.sha256(b"{}").hexdigest(), kind="huggingface"
    )
    split = SplitRecord(documents=1, tokens=count, characters=count, text_bytes=count, bin=binary, idx=index)
    manifest = DataManifest(
        vocab_size=preset.vocabulary,
        eod_id=0,
        dtype="int32",
        tokenizer=tokenizer,
        splits={"train": split},
        fingerprint=fingerprint_of(tokenizer, 0, {"train": split}),
    )
    write_manifest(folder, manifest)
