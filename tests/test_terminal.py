"""No control characters of tokens or files reach a terminal, and an ASCII-only terminal works."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlm_train.checkpoint.hf.files import SpecialTokens
from mlm_train.cli import main
from tests.checkpoint.test_hf_folder import random_model, write
from tests.checkpoint.test_hf_import import llama
from tests.commands import mlm_train, on_a_terminal, refused
from tests.partitions import write_table

COMMANDS = [
    *map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
]  # fmt: skip
HARMLESS = ["é", "\u200d", "\u3000", "👍", "\n", "\t", " ", "a"]
BAD = frozenset(COMMANDS) - {"\n", "\t"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose tokens alternate between control characters and others."""
    folder = tmp_path_factory.mktemp("model")
    words = [f"{COMMANDS[i % len(COMMANDS)]}{HARMLESS[i % len(HARMLESS)]}{i}" for i in range(512)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "word").write_text(words[3])
    made = random_model(kind="memory", vocab_size=512)
    export = write(
        folder / "export", made, beside=[folder / "tokenizer.json"], tokens=SpecialTokens(eos=(0,))
    )
    write_table(folder / "tol", made, export, [200])
    return folder


def commands(model: Path, data: Path) -> Iterator[tuple[object, ...]]:
    """Commands that print tokens."""
    words = ("generate", "--model", model / "export", "--prompt", (model / "word").read_text())
    words = (*words, "--max-new-tokens", 55, "--temperature", 3)
    yield words
    yield (*words, "--json")
    words = ("tol", "inspect", model / "tol", "--model", model / "export", "--top", 200)
    yield words
    yield (*words, "--json")
    yield ("data", "inspect", data, "--samples", 3)


@pytest.fixture(scope="module")
def odd_data(model: Path) -> Path:
    """Prepared data whose texts contain control characters."""
    text = "".join(
        f"{command}{harmless} word {number}"
        for number, command in enumerate(COMMANDS)
        for harmless in HARMLESS
    )
    texts, folder = model / "texts.jsonl", model / "data"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(5)))
    words = ("--input", texts, "--validation", texts, "--output", folder, "--tokenizer", "train:512")
    mlm_train("data", "prepare", *words)
    return folder


def test_nothing_commands_a_terminal(model: Path, odd_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, words in enumerate(commands(model, odd_data)):
        seen = on_a_terminal(*words)
        capsys.readouterr()
        mlm_train(*words)
        piped = capsys.readouterr().out
        # Colours and boxes of tables are the program's own.
        own = "\x1b" if words[1] == "inspect" and words[-1] != "--json" else ""
        assert not (BAD & set(seen)) - set(own), (words, BAD & set(seen))
        if own:
            assert "\x1b[31m" not in seen and "\\x1b" in seen
        if number in (0, 4):
            assert BAD & set(piped), words  # as it is
        if number == 0:
            assert "\n" in seen and "\t" in seen and "\\x88" in seen and "\u3000" in seen
        if words[-1] == "--json":
            ours, theirs = json.loads(seen), json.loads(piped)
            for tree in (ours, theirs):
                for name in ("prefill_ms", "decode_ms_per_token"):
                    tree.pop(name, None)
            assert ours == theirs


def test_an_ascii_terminal_is_enough(model: Path, odd_data: Path, tmp_path: Path) -> None:
    """PYTHONIOENCODING=ascii: other characters are escaped, and JSON has the same value."""
    run = model / "é" / "run"
    others: list[tuple[object, ...]] = [
        ("import", model / "export", "--output", tmp_path / "é"),
        ("export", "verify", tmp_path / "é"),
        ("evaluate", "--model", tmp_path / "é", "--tokens", "no", "--dump-logits", "é"),
        ("checkpoint", "list", run),
        ("generate", "--model", run, "--prompt", "é"),
        ("tol", "verify", model / "tol"),
        ("plan", "é"),
        ("doctor",),
        ("monitor", run),
        ("data", "prepare", "--input", run, "--output", tmp_path / "data", "--tokenizer", "é.model"),
        ("data", "collect", "--source", run, "--output", tmp_path / "text"),
        ("pretrain", "é.yaml"),
        ("é",),
        *((name, "--help") for name in ("data", "pretrain", "tol", "generate", "bench", "launch")),
    ]
    for words in [*commands(model, odd_data), *others]:
        files = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
        with (
            contextlib.redirect_stdout(files[0]),
            contextlib.redirect_stderr(files[1]),
            pytest.raises(SystemExit) as end,
        ):
            main([str(word) for word in words])
        for file in files:
            file.flush()
        out, err = (file.buffer.getvalue().decode("ascii") for file in files)
        assert end.value.code in (0, 2, None), (words, err)
        assert out or (err and "Traceback" not in err), words
        if words[-1] == "--json":
            json.loads(out)


def test_words_that_are_no_text(model: Path, tmp_path: Path) -> None:
    """Bytes that are not UTF-8 reach Python as halves of surrogate pairs."""
    word = "caf\udce9"
    for words in (
        ("generate", "--model", model / "export", "--prompt", word),
        ("tol", "inspect", model / "tol", "--model", model / "export", "--neighbours", word),
        ("data", "prepare", "--input", word, "--output", tmp_path / "x", "--tokenizer", "train:300"),
        (
            "data",
            "prepare",
            "--input",
            tmp_path,
            "--output",
            tmp_path / "x",
            "--tokenizer",
            "t",
            "--eod",
            word,
        ),
        ("pretrain", "configs/micro.yaml", f"train.output={word}"),
        ("export", word, "--output", tmp_path / "x"),
        (word,),
    ):
        assert "caf\\udce9" in refused(*words)
    assert not (tmp_path / "x").exists()


def test_names_of_files_are_names(odd_data: Path, model: Path, tmp_path: Path) -> None:
    """Whatever the names contain: no control character, no markup, and one line each."""
    name = "a[red]\x1b[31m\u202e\nb"
    odd = Path(shutil.copytree(odd_data, tmp_path / name))
    (odd / f"{name}.csv").write_text("a,b\n")
    llama(tmp_path / "llama")
    (tmp_path / "llama" / name).write_text("")
    run = tmp_path / "runs" / name / "checkpoints" / "step-00000001"
    run.mkdir(parents=True)
    config = Path(shutil.copyfile("configs/micro.yaml", tmp_path / f"{name}.yaml"))
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copyfile(model / "texts.jsonl", texts / "train.jsonl")
    shutil.copyfile(model / "texts.jsonl", texts / "validation.jsonl")
    (texts / f"{name}.csv").write_text("a,b\n")
    for words in (
        ("data", "inspect", odd, "--samples", 0),
        ("data", "inspect", odd, "--samples", 0, "--verify"),
        ("data", "prepare", "--input", texts, "--output", tmp_path / "out", "--tokenizer", odd),
        ("import", tmp_path / "llama", "--output", tmp_path / "import"),
        ("checkpoint", "list", tmp_path / "runs" / name),
        ("plan", "tol", config, "--build-tflops", 1),
    ):
        seen = on_a_terminal(*words)
        assert not {"\u202e", "\x9b"} & set(seen) and "\x1b[31m\\u202e" not in seen, words
        plain = re.sub(r"\x1b\[[0-9;]*m|\s", "", seen)  # less our own colours and lines
        assert "a[red]\\x1b[31m\\u202e\\nb" in plain, (words, seen)
