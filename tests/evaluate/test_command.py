"""`mlm-train evaluate` on raw text and on prepared folders, against sums over plain forwards in float64."""

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from mlm_train.checkpoint.hf.files import SpecialTokens
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.data.prepared import PreparedData
from mlm_train.model.logical import named_pieces
from tests.commands import mlm_train, refused, scalars
from tests.evaluate.naive import Naive
from tests.inference.test_decode import random_model
from tests.inference.test_language_model import export_with_words
from tests.partitions import write_table

EOD = 96  # `</s>`


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_with_words(tmp_path_factory.mktemp("evaluate") / "memory")


@pytest.fixture(scope="module")
def pages() -> dict[str, list[str]]:
    """Texts of words, some longer than the context of 40 tokens; é and white space of all kinds in one."""
    draw = random.Random(9)

    def page(count: int) -> str:
        return " ".join(f"w{draw.randrange(96)}" for _ in range(count))

    return {"letters": [page(95), page(3), f"{page(5)}\n\n\t w7  é {page(50)}"], "notes": [page(41)]}


@pytest.fixture(scope="module")
def texts(pages: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    lines = "".join(json.dumps({"text": page}) + "\n" for page in ["", *pages["letters"]])
    (folder / "letters.jsonl").write_text(lines)
    (folder / "notes").mkdir()
    (folder / "notes" / "one.txt").write_text(pages["notes"][0])
    return {"letters": folder / "letters.jsonl", "notes": folder / "notes"}


@pytest.fixture(scope="module")
def folders(texts: dict[str, Path]) -> dict[str, Path]:
    """The same texts as prepared data, in pieces of words: both splits of each hold all of it."""
    found = {}
    tokenizer: object = "train:275"
    for name, path in texts.items():
        found[name] = path.parent / "prepared" / name
        options = ("--validation", path, "--tokenizer", tokenizer)
        mlm_train("data", "prepare", "--input", path, "--output", found[name], *options)
        tokenizer = found[name]
    return found


@pytest.fixture(scope="module")
def pieces_export(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for their tokenizer."""
    data, folder = PreparedData.open(folders["letters"]), tmp_path_factory.mktemp("pieces") / "export"
    model = random_model(kind="memory", vocab_size=data.vocab_size)
    beside, ends = [data.path / data.manifest.tokenizer.file], SpecialTokens(eos=(data.eod_id,))
    write_folder(folder, model.config, named_pieces(model), beside=beside, tokens=ends)
    return folder


def ids(text: str) -> list[int]:
    return [int(word[1:]) if word.startswith("w") else 0 for word in text.split()]


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    mlm_train("evaluate", "--json", *words)
    return json.loads(capsys.readouterr().out)


def figures(logprob: float, tokens: int, pieces: list[str]) -> dict[str, float]:
    words = sum(len(re.split(r"\s+", piece)) for piece in pieces)
    size = sum(len(piece.encode()) for piece in pieces)
    return {
        "loss": -logprob / tokens,
        "perplexity": math.exp(-logprob / tokens),
        "word_perplexity": math.exp(-logprob / words),
        "byte_perplexity": math.exp(-logprob / size),
        "bits_per_byte": -logprob / size / math.log(2),
        "tokens": tokens,
        "words": words,
        "bytes": size,
    }


@pytest.mark.parametrize("stride", [40, 7])
def test_text_in_rolling_windows(
    stride: int, export: Path, pages: dict[str, list[str]], texts: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    naive = Naive(load_model(export), 40)
    sums = {name: sum(naive.rolling(ids(page), EOD, stride) for page in each) for name, each in pages.items()}
    counts = {name: sum(len(ids(page)) for page in each) for name, each in pages.items()}
    words = ("--model", export, "--text", *texts.values(), *(("--stride", 7) if stride == 7 else ()))
    every = [page for each in pages.values() for page in each]
    whole = figures(sum(sums.values()), sum(counts.values()), every)
    table = write_table(tmp_path / "tol", load_model(export), export, [50])
    for size, more in ((1, ()), (3, ()), (8, ("--tol", table))):
        found = answer(capsys, *words, "--batch-size", size, *more)
        sources = found.pop("sources")
        assert found == pytest.approx(whole, rel=1e-5)
        for name, path in texts.items():
            assert sources[str(path)] == pytest.approx(
                figures(sums[name], counts[name], pages[name]), rel=1e-5
            )
    mlm_train("evaluate", *words)
    assert f"{texts['notes']}" in capsys.readouterr().out


def test_scales_and_shorter_windows(
    export: Path, texts: dict[str, Path], pages: dict[str, list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scaled = Naive(load_model(export).scaled([0.5, 0.0, -1.0]), 9)
    expected = figures(scaled.rolling(ids(pages["notes"][0]), EOD, 4), 41, pages["notes"])
    words = ("--model", export, "--text", texts["notes"], "--sequence-length", 9, "--stride", 4)
    options = ("--alpha", "0.5,1,-1", "--drop-layers", 1)
    found = answer(capsys, *words, *options, "--tensorboard", tmp_path / "tensorboard")
    assert found == pytest.approx(expected, rel=1e-5)
    assert scalars(tmp_path, "evaluate/bits_per_byte") == pytest.approx(
        {0: expected["bits_per_byte"]}, rel=1e-5
    )
    assert found != answer(capsys, *words)


def stream(folder: Path) -> list[int]:
    return PreparedData.open(folder).split("validation").tokens[:].astype(int).tolist()


def window_sum(naive: Naive, tokens: list[int], starts: list[int], length: int) -> float:
    """Labels of windows, each after those before it in its own window."""
    return sum(
        naive.answer(tokens[start : start + 1], tokens[start + 1 : start + length + 1])[0] for start in starts
    )


def test_prepared_folders_each_and_together(
    pieces_export: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Words and bytes are those of the scored tokens, a document that a window ends in counts in part."""
    naive = Naive(load_model(pieces_export), 40)
    decoder = SentencePieceProcessor(model_file=str(folders["notes"] / "tokenizer.model"))
    found = answer(capsys, "--model", pieces_export, "--data", *folders.values(), "--sequence-length", 10)
    total, every, tokens = 0.0, list[str](), 0
    for name, folder in folders.items():
        text = stream(folder)
        windows = (len(text) - 1) // 10
        logprob = window_sum(naive, text, [10 * number for number in range(windows)], 10)
        end, scored = decoder.eos_id(), text[1 : windows * 10 + 1]
        cuts = [-1, *(place for place, token in enumerate(scored) if token == end), len(scored)]
        documents = [scored[start + 1 : stop] for start, stop in itertools.pairwise(cuts)]
        pieces = [decoder.decode(document) for document in documents if document]
        expected = figures(logprob, windows * 10, pieces)
        assert found["sources"][name] == pytest.approx(expected, rel=1e-5)
        total, every, tokens = total + logprob, every + pieces, tokens + windows * 10
    expected = figures(total, tokens, every)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["windows"] == tokens // 10


def test_a_spread_sample(
    pieces_export: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    naive, text = Naive(load_model(pieces_export), 40), stream(folders["letters"])
    windows = (len(text) - 1) // 10
    starts = [10 * (number * windows // 4) for number in range(4)]
    words = ("--model", pieces_export, "--data", folders["letters"], "--sequence-length", 10, "--samples", 4)
    logprob = window_sum(naive, text, starts, 10)
    found = [
        answer(capsys, *words, "--spread", *more) for more in ((), ("--alpha", 0), ("--drop-layers", "0-2"))
    ]
    assert found[0]["loss"] == pytest.approx(-logprob / 40, rel=1e-5) and found[0]["windows"] == 4
    assert found[1] == found[2] != found[0]
    assert answer(capsys, *words)["loss"] != found[0]["loss"]


def test_the_data_of_a_run(
    pieces_export: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    data = f"{{path: {folders['letters']}, validation: {{memos: {folders['notes']}}}, sequence_length: 8}}"
    shape = "vocab_size: 275, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2"
    batch = "steps: 1, global_batch_size: 1, micro_batch_size: 1"
    config.write_text(
        f"data: {data}\nmodel: {{kind: base, {shape}, intermediate_size: 8}}\n"
        f"schedule: {{warmup_steps: 0}}\ntrain: {{output: run, {batch}}}\n"
    )
    found = answer(capsys, "--model", pieces_export, "--data", config, "--sequence-length", 10)
    alone = answer(capsys, "--model", pieces_export, "--data", folders["notes"], "--sequence-length", 10)
    assert found["sources"].keys() == {"letters", "memos"}
    assert found["sources"]["memos"] == {name: alone[name] for name in found["sources"]["memos"]}


def test_bad_input(
    export: Path, pieces_export: Path, folders: dict[str, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    model, text = ("evaluate", "--model", export), ("--text", texts["notes"])
    data = ("--data", folders["notes"])
    assert refused(*model).endswith("give one of --data, --text and --tasks, or --tokens with --dump-logits")
    assert "give one of --data" in refused(*model, *data, *text)
    assert "--stride 41 would leave out tokens between windows of 40" in refused(
        *model, *text, "--stride", 41
    )
    assert "--stride 0: give at least 1" in refused(*model, *text, "--stride", 0)
    assert "--samples has no effect on --text, only with --data" in refused(*model, *text, "--samples", 3)
    assert "--spread has no effect on --text" in refused(*model, *text, "--spread")
    assert "is given twice" in refused(*model, *text, texts["notes"])
    assert "is given twice" in refused(*model, *data, folders["notes"])
    assert "no.txt does not exist" in refused(*model, "--text", tmp_path / "no.txt")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert "empty.jsonl has no text" in refused(*model, "--text", tmp_path / "empty.jsonl")
    assert "max_position_embeddings=40" in refused(*model, *text, "--sequence-length", 41)
    pieces = ("evaluate", "--model", pieces_export, *data)
    assert "the model's layers are 0 to 2" in refused(*pieces, "--drop-layers", 3)
    assert "is not the tokenizer of" in refused(*model, *data)
    assert "--baselines is counted on one folder's tokens" in refused(
        *model, "--data", *folders.values(), "--baselines", "run"
    )
    base = export_with_words(tmp_path / "base", kind="base")
    for option, value in (("--memory-scale", 0.5), ("--drop-layers", 1)):
        for subject in (data, text):
            assert "a base model has no FFN-M" in refused(
                "evaluate", "--model", base, *subject, option, value
            )
