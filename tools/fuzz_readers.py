"""The files that tools/fuzz.py damages, and their real readers: each returns a digest of its result."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlm_train.bench.report import check_writable
from mlm_train.checkpoint.hf.importing import import_folder
from mlm_train.checkpoint.load import config_of, load_weights, open_checkpoint
from mlm_train.checkpoint.reading.logical_folder import load_model, open_model
from mlm_train.cli import main
from mlm_train.config import dump_config, load_config
from mlm_train.data.blend import Blend
from mlm_train.data.documents import find_sources
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.evaluate.logits import _read_tokens
from mlm_train.model.logical import named_pieces, targets
from mlm_train.model.transformer import Transformer
from mlm_train.tol.allocate.mix_file import read_allocation
from mlm_train.tol.allocate.sensitivity import Notes
from mlm_train.tol.build.state import BuildState, start_or_resume
from mlm_train.tol.format.index import INDEX, STATE
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.storage.base import refuse_used
from mlm_train.tol.storage.lease import OWNER, Owner, _read
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.train.preflight import find_checkpoint
from mlm_train.utils.records import SEAL
from mlm_train.utils.run_lock import Attempt, _recorded

TINY = (
    "model.vocab_size=384", "model.hidden_size=16", "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=24", "data.sequence_length=16", "model.max_position_embeddings=64",
    "train.global_batch_size=4", "train.micro_batch_size=2", "schedule.warmup_steps=0",
    "train.precision=fp32", "train.eval_samples=2", "train.steps=2", "checkpoint.interval=1",
    "memory.mode=unique",
)  # fmt: skip
EXPORT_MANIFEST = "export.manifest.json"
WORDS = "def main(self):\n    return 'é' + \"\u2581\" + str(0.5)  # \U0001f600\n"
CHECKPOINT = "checkpoints/step-00000002"


class Refused(Exception):
    """A command ended with a nonzero exit code."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"exit code {code}: {said}")
        self.code, self.said = code, said


@dataclass(frozen=True)
class Reader:
    """A reader and its artefact.

    folder: the artefact. files: globs of files to damage. read: a folder -> a digest of the result, or None
    where results are not compared. sealed: whether another result for a damaged file is bad. share: relative
    number of cases.
    """

    folder: str
    files: Sequence[str]
    read: Callable[[Path], str | None]
    sealed: Callable[[Path, Path], bool] = lambda folder, file: False
    share: int = 1


def command(*words: object) -> str:
    """Run a mlm-train command in this process. Returns its output; raises Refused."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            if end.code:
                raise Refused(int(end.code), errors.getvalue()) from None
    return out.getvalue()


def digest(*parts: Any) -> str:
    """SHA-256 of tensors, arrays and plain values."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous().view(torch.uint8).numpy()
        total.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return total.hexdigest()


def _of_model(model: Transformer) -> str:
    return digest(model.config.model_dump(), *(tensor for _, tensor in named_pieces(model)))


def _config(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    (folder / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(folder / "dumped.yaml") == config, "the dumped config differs when read again"
    command("pretrain", folder / "config.yaml", "--dry-run")


def _overrides(folder: Path) -> None:
    overrides = (folder / "overrides").read_bytes().decode("utf-8", "surrogateescape").split("\0")
    command("pretrain", folder / "config.yaml", *overrides, "--dry-run")


def _data(folder: Path) -> str:
    command("data", "inspect", folder, "--verify", "full", "--sequence-length", 16)
    data = PreparedData.open(folder)
    splits = [data.split(name) for name in ("train", "validation")]
    counts = data.manifest.model_dump(exclude={"fingerprint"})
    return digest(counts, *(part for split in splits for part in (split.tokens, split.document_offsets)))


def _trained_with(folder: Path) -> str:
    """Only the checks at a run's start: sizes, not contents."""
    data = PreparedData.open(folder)
    streams = [data.split(name) for name in ("train", "validation")]
    ends = (part for one in streams for part in (len(one), one.tokens[-1]))
    return digest(data.vocab_size, data.eod_id, *ends)


def _checkpoint(folder: Path) -> str:
    checkpoint = folder / CHECKPOINT
    command("checkpoint", "verify", checkpoint)
    manifest = open_checkpoint(checkpoint)
    model = Transformer(config_of(manifest).model)
    load_weights(checkpoint, manifest, targets(model))
    with open_model(checkpoint) as opened:
        joined = opened.load()
    assert _of_model(joined) == _of_model(model), "two readers of a checkpoint disagree"
    return digest(_of_model(model), manifest.progress.model_dump(), manifest.data.model_dump())


def _resume(folder: Path) -> str:
    data = folder.parent / "data-of-run"
    words = (*TINY, f"data.path={data}", f"train.output={folder}")
    config = load_config("configs/micro.yaml", (*words, "checkpoint.fall_back=false"))
    found = find_checkpoint(config, Blend.open(config.data))
    rows = json.loads(command("checkpoint", "list", folder, "--json"))
    assert found is not None and len(rows) == 2
    return digest(found.folder.name, found.manifest.progress.model_dump(), [row["step"] for row in rows])


def _export(folder: Path) -> str:
    if (folder / EXPORT_MANIFEST).exists():
        command("export", "verify", folder)
    tokenizer = tokenizer_of(folder)
    written = command("generate", "--model", folder, "--prompt", "def", "--max-new-tokens", 4, "--json")
    ids = json.loads(written)["ids"]
    return digest(_of_model(load_model(folder)), ids, tokenizer.encode(WORDS), tokenizer.eod_id)


def _import(folder: Path) -> None:
    import_folder(folder, folder.with_name(f"{folder.name}-imported"))


def _table(folder: Path) -> str:
    command("tol", "verify", folder)
    return _rows(folder)


def _rows(folder: Path) -> str:
    table = TableReader.open_folder(folder)
    ids = torch.arange(table.index.vocab_size)
    values = [table.values(table.rows(ids), layer) for layer in table.index.layers]
    return digest(table.index.layers, *values)


def _looked_up(folder: Path) -> None:
    """Open a table as `generate --tol` does: by sizes and headers."""
    config = load_config("configs/micro.yaml", TINY).model
    source = TolSource.open_folder(folder, config)
    source.open(torch.tensor([[0, 5, 383]]), torch.zeros(1, 3, 16))(1)


def _build(folder: Path) -> str:
    state = BuildState.load(LocalFolder(folder))
    if state is None:
        refuse_used(LocalFolder(folder), STATE)  # as `begin` does for partitions without a state
        return "none"
    taken = digest(state.model_dump())
    start_or_resume(LocalFolder(folder), state.plan)
    return taken


def _tokenizers(pattern: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for file in sorted(folder.glob(pattern)):
            tokenizer = Tokenizer.load(file)
            ids = tokenizer.encode(WORDS)
            tokenizer.decode([*ids, *range(min(tokenizer.vocab_size, 400))])
            tokenizer.encode_batch(["a" * 2000 + "!", " " * 2000, ""])

    return read


def _text(folder: Path) -> None:
    for source in find_sources([str(folder)], "text").sources:
        for document in source.read():
            document.text.encode()


def _small(folder: Path) -> str:
    """Read notes, which are ignored where they are damaged."""
    notes = Notes(folder / "mix.json", ["about"])
    sums = notes.read()
    if sums is not None:
        sums.divergences.sum()
    owner = _read(LocalFolder(folder))  # type: ignore[arg-type]
    attempt = _recorded(folder / "run")
    if attempt is not None:
        attempt.follows(Attempt(job="1", restart=1))
    if owner is not None:
        Owner.here().follows(owner)
    return ""


def _allocation(folder: Path) -> None:
    found = read_allocation(folder / "allocation.json")
    assert all(isinstance(scheme, Scheme) for scheme in found.schemes)


def _allocated(folder: Path) -> None:
    table = folder.parent / "table-to-compress"
    words = ("tol", "compress", table, "--allocation", folder / "allocation.json", "--output", table)
    command(*words)  # it exists: refused after the allocation was read


def _tokens(folder: Path) -> None:
    _read_tokens(folder / "tokens.safetensors")


def _report(folder: Path) -> None:
    check_writable(folder / "report.json")


def _always(folder: Path, file: Path) -> bool:
    return True


def _sealed_data(folder: Path, file: Path) -> bool:
    """Whether a checksum covers the file: a manifest of an older version has none."""
    return file.name != "manifest.json" or SEAL in json.loads((folder / file).read_bytes())


def _sealed_table(folder: Path, file: Path) -> bool:
    return file.name != INDEX or "digest" in json.loads((folder / file).read_bytes())


def _sealed_export(folder: Path, file: Path) -> bool:
    return (folder / EXPORT_MANIFEST).exists() and file.name != EXPORT_MANIFEST


RUN_FILES = ("heartbeat.json", "checkpoints/latest", "config.yaml", "train.log", "tokenizer.model")
READERS = {
    "config": Reader("config", ("config.yaml",), _config, share=4),
    "overrides": Reader("config", ("overrides",), _overrides, share=4),
    "data, verified": Reader("data", ("*",), _data, _sealed_data, share=2),
    "data, at a start": Reader("data", ("*.json", "*.idx", "*.model"), _trained_with, share=2),
    "checkpoint": Reader("run", (f"{CHECKPOINT}/*",), _checkpoint, _always, share=2),
    "resume": Reader("run", (f"{CHECKPOINT}/*", *RUN_FILES), _resume, _always, share=2),
    "export": Reader("export", ("*",), _export, _sealed_export, share=2),
    "import": Reader("llama", ("*",), _import, share=2),
    "table": Reader("table", ("*",), _table, _sealed_table, share=2),
    "table, plain": Reader("plain-table", ("*",), _table, _sealed_table),
    "table, looked up": Reader("table", ("*",), _looked_up),
    "unfinished build": Reader("build", (STATE, "*"), _build, _always, share=2),
    "sentencepiece": Reader("tokenizers", ("*.model",), _tokenizers("*.model"), share=2),
    "tokenizer.json": Reader("tokenizers", ("*.json",), _tokenizers("*.json"), share=2),
    "text": Reader("text", ("*",), _text, share=2),
    "notes": Reader("small", (".run.attempt", ".mix.json.measured", OWNER), _small, share=2),
    "allocation": Reader("small", ("allocation.json",), _allocation),
    "allocation, by command": Reader("small", ("allocation.json",), _allocated),
    "tokens": Reader("small", ("tokens.safetensors",), _tokens),
    "report": Reader("small", ("report.json",), _report),
}
