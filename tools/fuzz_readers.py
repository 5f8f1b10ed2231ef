"""What tools/fuzz.py damages, and the real readers of it: each gives a digest of what it took for true."""

import contextlib
import gzip
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from mlm_train.checkpoint.hf_folder import write_folder
from mlm_train.checkpoint.hf_import import import_folder
from mlm_train.checkpoint.load import config_of, load_weights, open_checkpoint
from mlm_train.checkpoint.logical_folder import load_model, open_model
from mlm_train.cli import main
from mlm_train.config import ModelConfig, dump_config, load_config
from mlm_train.data.documents import find_sources
from mlm_train.data.prepared import PreparedData, fingerprint_of
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.evaluate.logits import _read_tokens
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.ownership import Attempt, _note, _noted
from mlm_train.records import SEAL, seal_of
from mlm_train.tol.codec import Scheme
from mlm_train.tol.format import INDEX, STATE, _digest
from mlm_train.tol.lease import OWNER, Owner, _read
from mlm_train.tol.options import read_allocation
from mlm_train.tol.place import Folder
from mlm_train.tol.sensitivities import Notes, Sums
from mlm_train.tol.state import Plan, State, Storage, begin
from mlm_train.tol.store import TolSource
from mlm_train.tol.table import Table
from mlm_train.train.preflight import find_checkpoint

TINY = (
    "model.vocab_size=384", "model.hidden_size=16", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.intermediate_size=24", "data.sequence_length=16", "model.max_position_embeddings=64",
    "train.global_batch=4", "train.micro_batch=2", "schedule.warmup_steps=0", "train.precision=fp32",
    "train.evaluate_samples=2", "train.steps=2", "checkpoint.every=1", "memory.mode=unique",
)  # fmt: skip
EXPORT_MANIFEST = "export.manifest.json"
WORDS = "def main(self):\n    return 'é' + \"\u2581\" + str(0.5)  # \U0001f600\n"
CHECKPOINT = "checkpoints/step-00000002"


class Refused(Exception):
    """A command ended with another exit code than 0."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"exit code {code}: {said}")
        self.code, self.said = code, said


@dataclass(frozen=True)
class Reader:
    """A reader, and what it reads.

    folder: of the artefacts. files: globs in it, of what is damaged. read: a folder -> a digest of the result,
    or None where another content is another result. sealed: whether a damaged file's other result is bad.
    share: of the cases.
    """

    folder: str
    files: Sequence[str]
    read: Callable[[Path], str | None]
    sealed: Callable[[Path, Path], bool] = lambda folder, file: False
    share: int = 1


def command(*words: object) -> str:
    """Run one of mlm-train's commands in this process; what it wrote. Raises Refused."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            if end.code:
                raise Refused(int(end.code), errors.getvalue()) from None
    return out.getvalue()


def digest(*parts: Any) -> str:
    """Of tensors, arrays and plain values."""
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
    assert load_config(folder / "dumped.yaml") == config, "the dumped config reads as another one"
    command("pretrain", folder / "config.yaml", "--dry-run")


def _overrides(folder: Path) -> None:
    overrides = (folder / "overrides").read_bytes().decode("utf-8", "surrogateescape").split("\0")
    command("pretrain", folder / "config.yaml", *overrides, "--dry-run")


def _data(folder: Path) -> str:
    command("data", "inspect", folder, "--verify", "--sequence-length", 16)
    data = PreparedData.open(folder)
    splits = [data.split(name) for name in ("train", "validation")]
    counts = data.manifest.model_dump(exclude={"fingerprint"})
    return digest(counts, *(part for split in splits for part in (split.tokens, split.document_offsets)))


def _trained_with(folder: Path) -> str:
    """The checks at a run's start alone: sizes, not contents."""
    data = PreparedData.open(folder)
    streams = [data.split(name) for name in ("train", "validation")]
    return digest(data.vocab_size, data.eod_id, *(part for one in streams for part in (len(one), one.tokens[-1])))


def _checkpoint(folder: Path) -> str:
    checkpoint = folder / CHECKPOINT
    command("checkpoint", "verify", checkpoint)
    manifest = open_checkpoint(checkpoint)
    model = Transformer(config_of(manifest).model)
    load_weights(checkpoint, model)
    with open_model(checkpoint) as opened:
        joined = opened.load()
    assert _of_model(joined) == _of_model(model), "two readers of a checkpoint disagree"
    return digest(_of_model(model), manifest.progress.model_dump(), manifest.data.model_dump())


def _resume(folder: Path) -> str:
    data = folder.parent / "data-of-run"
    words = (*TINY, f"data.path={data}", f"train.output={folder}", "checkpoint.fall_back=false", "train.steps=3")
    from mlm_train.data.blend import Blend

    config = load_config("configs/micro.yaml", words)
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
    table = Table.open_folder(folder)
    ids = torch.arange(table.index.vocab_size)
    values = [table.values(table.rows(ids), layer) for layer in table.index.layers]
    return digest(table.index.layers, *values)


def _looked_up(folder: Path) -> None:
    """As `generate --tol` opens it: by sizes and headers."""
    config = load_config("configs/micro.yaml", TINY).model
    source = TolSource.open_folder(folder, config)
    source.open(torch.tensor([[0, 5, 383]]), torch.zeros(1, 3, 16))(1)


def _build(folder: Path) -> str:
    state = State.load(Folder(folder))
    if state is None:
        return "none"
    taken = digest(state.model_dump())
    begin(Folder(folder), state.plan)
    return taken


def _tokenizer(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokenizer = Tokenizer.load(folder / name)
        ids = tokenizer.encode(WORDS)
        tokenizer.decode([*ids, *range(min(tokenizer.vocab_size, 400))])
        with contextlib.suppress(RuntimeError):  # a vocabulary may have lost what it takes to spell a text
            tokenizer.pieces(WORDS * 10)

    return read


def _text(folder: Path) -> None:
    for source in find_sources([str(folder)], "text"):
        for document in source.read():
            document.text.encode()


def _small(folder: Path) -> str:
    """Notes that are as none where they are damaged."""
    notes = Notes(folder / "mix.json", ["about"])
    sums = notes.read()
    if sums is not None:
        sums.divergences.sum()
    owner = _read(Folder(folder))  # type: ignore[arg-type]
    found = _noted(folder / "run")
    if found is not None:
        found.follows(Attempt("1", 1))
    if owner is not None:
        Owner.here().follows(owner)
    return ""


def _allocation(folder: Path) -> None:
    found = read_allocation(folder / "allocation.json")
    assert all(isinstance(scheme, Scheme) for scheme in found.schemes)


def _allocated(folder: Path) -> None:
    table = folder.parent / "table-to-compress"
    words = ("tol", "compress", table, "--allocation", folder / "allocation.json", "--output", table)
    command(*words)  # which exists: refused after the allocation has been read


def _tokens(folder: Path) -> None:
    _read_tokens(folder / "tokens.safetensors")


def _report(folder: Path) -> None:
    from mlm_train.bench.report import check_writable

    check_writable(folder / "report.json")


def _always(folder: Path, file: Path) -> bool:
    return True


def _sealed_data(folder: Path, file: Path) -> bool:
    """A manifest of an older version has no seal: its numbers are under no checksum."""
    return file.name != "manifest.json" or SEAL in json.loads((folder / file).read_bytes())


def _sealed_table(folder: Path, file: Path) -> bool:
    return file.name != INDEX or "digest" in json.loads((folder / file).read_bytes())


def _sealed_export(folder: Path, file: Path) -> bool:
    return (folder / EXPORT_MANIFEST).exists() and file.name != EXPORT_MANIFEST


RUN_FILES = ("heartbeat.json", "checkpoints/latest", "config.yaml", "train.log", "tokenizer.model", "failures")
READERS = {
    "config": Reader("config", ("config.yaml",), _config, share=4),
    "overrides": Reader("config", ("overrides",), _overrides, share=4),
    "data, verified": Reader("data", ("*",), _data, _sealed_data, share=2),
    "data, at a run's start": Reader("data", ("manifest.json", "*.idx", "tokenizer.model"), _trained_with, share=2),
    "checkpoint": Reader("run", (f"{CHECKPOINT}/*",), _checkpoint, _always, share=2),
    "resume": Reader("run", (f"{CHECKPOINT}/*", *RUN_FILES), _resume, _always, share=2),
    "export": Reader("export", ("*",), _export, _sealed_export, share=2),
    "import": Reader("llama", ("*",), _import, share=2),
    "table": Reader("table", ("*",), _table, _sealed_table, share=2),
    "table, plain": Reader("plain-table", ("*",), _table, _sealed_table),
    "table, looked up": Reader("table", ("*",), _looked_up),
    "unfinished build": Reader("build", (STATE, "*"), _build, _always, share=2),
    "sentencepiece": Reader("tokenizers", ("tokenizer.model",), _tokenizer("tokenizer.model"), share=2),
    "tokenizer.json": Reader("tokenizers", ("tokenizer.json",), _tokenizer("tokenizer.json"), share=2),
    "text": Reader("text", ("*",), _text, share=2),
    "notes": Reader("small", (".run.attempt", ".mix.json.measured", OWNER), _small, share=2),
    "allocation": Reader("small", ("allocation.json",), _allocation),
    "allocation, by command": Reader("small", ("allocation.json",), _allocated),
    "tokens": Reader("small", ("tokens.safetensors",), _tokens),
    "report": Reader("small", ("report.json",), _report),
}


def reseal(file: Path) -> Callable[[Any], bytes] | None:
    """How a file's own checksum is made again; None where it has none."""

    def sealed(tree: Any) -> bytes:
        tree.pop(SEAL, None)
        return json.dumps(tree | {SEAL: seal_of(tree)}).encode()

    def index(tree: Any) -> bytes:
        data = json.dumps(tree | {"digest": "0" * 64}).encode()
        return data.replace(b"0" * 64, _digest(data, "0" * 64).encode())

    def data(tree: Any) -> bytes:
        from mlm_train.data.prepared import SplitRecord, TokenizerRecord

        splits = {name: SplitRecord.model_construct(**split) for name, split in tree["splits"].items()}
        for split in splits.values():
            for part in ("bin", "idx"):
                object.__setattr__(split, part, TokenizerRecord.model_construct(**getattr(split, part)))
        tokenizer = TokenizerRecord.model_construct(**tree["tokenizer"])
        tree["fingerprint"] = fingerprint_of(tokenizer, tree["eod_id"], splits)
        return sealed(tree) if SEAL in tree else json.dumps(tree).encode()

    if file.name == INDEX:
        return index
    if file.name == "manifest.json" and file.parent.name.startswith("data"):
        return data
    return sealed if file.name in ("manifest.json", STATE, EXPORT_MANIFEST) else None


def make_artefacts(root: Path) -> None:
    """Write one of each kind, whole, as the commands themselves do."""
    from mlm_train.tol.build import build_tol
    from mlm_train.tol.cluster import ray_cluster

    text = root / "collected"
    command("data", "collect", "--output", text, "--max-bytes", "40KB", "--validation-fraction", "0.2")
    command("data", "prepare", "--input", text, "--output", root / "data", "--tokenizer", "train:384")
    words = (*TINY, f"data.path={root / 'data'}", f"train.output={root / 'run'}")
    command("pretrain", "configs/micro.yaml", *words)
    (root / "run/failures").touch()
    command("export", root / "run", "--output", root / "export")
    _write_llama(root / "llama", root / "data/tokenizer.model")
    with ray_cluster(workers=1):
        build_tol(root / "export", root / "plain-table", "bfloat16", partitions=2)
        command_line = ("tol", "build", root / "export", "--output", root / "table", "--partitions", 2)
        command(*command_line, "--workers", 1, "--dtype", "int8", "--group-size", 8, "--rank", 8)
    _write_build(root / "plain-table", root / "build")
    _write_small(root)
    _write_text(root / "text", text / "validation.jsonl")
    (root / "config").mkdir()
    (root / "config/config.yaml").write_text(dump_config(load_config("configs/micro.yaml", TINY)))
    (root / "config/overrides").write_text("train.steps=3\0optimizer.lr=1e-3")


def _write_llama(folder: Path, tokenizer: Path) -> None:
    shape = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig.model_validate({"kind": "base", "intermediate_size": 24, **shape})
    write_folder(folder, config, named_pieces(Transformer(config)), [tokenizer], shard_bytes=20_000)


def _write_build(table: Path, folder: Path) -> None:
    from mlm_train.tol.format import read_index

    shutil.copytree(table, folder)
    (folder / INDEX).unlink()
    index = read_index(table)
    sizes = {name: getattr(index, name) for name in ("vocab_size", "num_layers", "hidden_size")}
    how = {"compute": "float32", "chunk_rows": index.source.chunk_rows or 2048, "threads": 1}
    storage = Storage(dtype="bfloat16")
    plan = Plan(checkpoint=index.source.checkpoint, storage=storage, partitions=3, **sizes, **how)
    State(plan=plan, done=dict(enumerate(index.partitions))).save(Folder(folder))


def _write_small(root: Path) -> None:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers, trainers

    small, tokenizers = root / "small", root / "tokenizers"
    small.mkdir()
    schemes = [Scheme(dtype="int8", group_size=8, rank=4), Scheme(dtype="bfloat16")]
    allocation = {"layers": [0, 1], "schemes": [scheme.model_dump() for scheme in schemes]}
    (small / "allocation.json").write_text(json.dumps(allocation))
    save_file({"tokens": torch.arange(12).view(2, 6)}, small / "tokens.safetensors")
    (small / "report.json").write_text(json.dumps({"machine": {}, "rows": [1, {"a": 2.5}], "ratios": {}}))
    _note(small / "run", Attempt("7", 2))
    Notes(small / "mix.json", ["about"]).write(Sums(np.ones((2, 3)), np.zeros((2, 3)), 4))
    (small / OWNER).write_text(json.dumps(Owner.here()._asdict()))
    tokenizers.mkdir()
    shutil.copy(root / "data/tokenizer.model", tokenizers)
    tokenizer: Any = HuggingFace(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.save(str(tokenizers / "tokenizer.json"))


def _write_text(folder: Path, lines: Path) -> None:
    folder.mkdir()
    data = lines.read_bytes()[:8000].rsplit(b"\n", 1)[0] + b"\n"
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "c.txt").write_text(WORDS)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts or [WORDS]}), folder / "d.parquet")
