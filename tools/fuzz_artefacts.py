"""The artefacts that tools/fuzz.py damages: small files of every kind, written by the commands themselves."""

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from fuzz_readers import EXPORT_MANIFEST, TINY, WORDS, command
from safetensors.torch import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFace

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.config import ModelConfig, dump_config, load_config
from mlm_train.data.manifest import SplitRecord, TokenizerRecord, fingerprint_of
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.tol.allocate.sensitivity import Notes, Sums
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.build.state import BuildPlan, BuildState
from mlm_train.tol.format.index import INDEX, STATE
from mlm_train.tol.format.index_file import _digest, read_index
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.storage.lease import OWNER, Owner
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.records import SEAL, seal_of
from mlm_train.utils.run_lock import Attempt, _record


def reseal(file: Path) -> Callable[[Any], bytes] | None:
    """A function that recomputes a file's own checksum; None where it has none."""

    def sealed(tree: Any) -> bytes:
        tree.pop(SEAL, None)
        return json.dumps(tree | {SEAL: seal_of(tree)}).encode()

    def index(tree: Any) -> bytes:
        data = json.dumps(tree | {"digest": "0" * 64}).encode()
        return data.replace(b"0" * 64, _digest(data, "0" * 64).encode())

    def data(tree: Any) -> bytes:
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
    """Write one artefact of each kind with the commands themselves."""
    text = root / "collected"
    command("data", "collect", "--output", text, "--max-bytes", "40KB", "--validation-fraction", "0.2")
    command("data", "prepare", "--input", text, "--output", root / "data", "--tokenizer", "train:384")
    words = (*TINY, f"data.path={root / 'data'}", f"train.output={root / 'run'}")
    command("pretrain", "configs/micro.yaml", *words)
    command("export", root / "run", "--output", root / "export")
    _write_llama(root / "llama", root / "data/tokenizer.model")
    with ray_cluster(workers=1):
        Build(root / "export", root / "plain-table", TableSpec(), partitions=2, compute="float32").run(2)
        command_line = ("tol", "build", root / "export", "--output", root / "table", "--partitions", 2)
        command(*command_line, "--workers", 1, "--dtype", "int8", "--group-size", 8, "--rank", 8)
    _write_build(root / "plain-table", root / "build")
    _write_small(root / "small")
    _write_tokenizers(root / "tokenizers", root / "data/tokenizer.model")
    _write_text(root / "text", text / "validation.jsonl")
    (root / "config").mkdir()
    (root / "config/config.yaml").write_text(dump_config(load_config("configs/micro.yaml", TINY)))
    (root / "config/overrides").write_text("train.steps=3\0optimizer.lr=1e-3")


def _write_llama(folder: Path, tokenizer: Path) -> None:
    shape = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig.model_validate({"kind": "base", "intermediate_size": 24, **shape})
    write_folder(folder, config, named_pieces(Transformer(config)), [tokenizer], shard_bytes=20_000)
    (folder / EXPORT_MANIFEST).unlink(missing_ok=True)  # as in a folder not written by mlm-train


def _write_build(table: Path, folder: Path) -> None:
    shutil.copytree(table, folder)
    (folder / INDEX).unlink()
    index = read_index(table)
    sizes = {name: getattr(index, name) for name in ("vocab_size", "num_layers", "hidden_size")}
    how = {"compute": "float32", "chunk_rows": index.source.chunk_rows or 2048, "threads": 1}
    spec = TableSpec(dtype="bfloat16")
    plan = BuildPlan(checkpoint=index.source.checkpoint, spec=spec, partitions=3, **sizes, **how)
    BuildState(plan=plan, done=dict(enumerate(index.partitions))).save(LocalFolder(folder))


def _write_small(small: Path) -> None:
    small.mkdir()
    schemes = [Scheme(dtype="int8", group_size=8, rank=4), Scheme(dtype="bfloat16")]
    allocation = {"layers": [0, 1], "schemes": [scheme.model_dump() for scheme in schemes]}
    (small / "allocation.json").write_text(json.dumps(allocation))
    save_file({"tokens": torch.arange(12).view(2, 6)}, small / "tokens.safetensors")
    (small / "report.json").write_text(json.dumps({"machine": {}, "rows": [1, {"a": 2.5}], "ratios": {}}))
    _record(small / "run", Attempt(job="7", restart=2))
    Notes(small / "mix.json", ["about"]).write(Sums(np.ones((2, 3)), np.zeros((2, 3)), 4))
    (small / OWNER).write_text(json.dumps(Owner.here().model_dump()))


def _write_tokenizers(folder: Path, sentencepiece: Path) -> None:
    """One of each family: byte-level BPE, Unigram, WordPiece, and BPE behind regular expressions."""
    folder.mkdir()
    shutil.copy(sentencepiece, folder)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    quiet = {"vocab_size": 300, "show_progress": False}
    bpe: Any = HuggingFace(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    unigram: Any = HuggingFace(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    scheduler: Any = HuggingFace(models.WordPiece(unk_token="<unk>"))
    scheduler.normalizer, scheduler.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    scheduler.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words: Any = HuggingFace(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+|."), "isolated")
    special = {"special_tokens": ["<unk>", "</s>"]}
    for name, tokenizer, trainer in (
        ("tokenizer", bpe, trainers.BpeTrainer(**quiet, **special, initial_alphabet=alphabet)),
        ("unigram", unigram, trainers.UnigramTrainer(**quiet, **special, unk_token="<unk>")),
        ("pieces", scheduler, trainers.WordPieceTrainer(**quiet, **special)),
        ("words", words, trainers.BpeTrainer(**quiet, **special)),
    ):
        tokenizer.train_from_iterator([WORDS] * 4, trainer)
        tokenizer.save(str(folder / f"{name}.json"))


def _write_text(folder: Path, lines: Path) -> None:
    folder.mkdir()
    data = lines.read_bytes()[:8000].rsplit(b"\n", 1)[0] + b"\n"
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "c.txt").write_text(WORDS)
    (folder / "e.json").write_text(json.dumps([{"text": text} for text in texts] or [WORDS]))
    (folder / "f.jsonl.xz").write_bytes(lzma.compress(data))
    (folder / "g.ndjson.bz2").write_bytes(bz2.compress(data))
    with pyarrow.CompressedOutputStream(str(folder / "h.jsonl.zst"), "zstd") as file:
        file.write(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts or [WORDS]}), folder / "d.parquet")
