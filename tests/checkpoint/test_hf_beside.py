"""An export has what transformers needs beside the weights: AutoTokenizer encodes as our tokenizer."""

import io
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, pipeline

import mlm_train.hf
from mlm_train.checkpoint.hf.fast_tokenizer import tokenizer_json
from mlm_train.checkpoint.hf.files import SpecialTokens
from mlm_train.checkpoint.hf.files import carried as carried_files
from mlm_train.checkpoint.hf.folder import verify_folder, write_folder
from mlm_train.checkpoint.reading.logical_folder import find_model
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.model.logical import named_pieces
from mlm_train.parallel import runtime
from tests.commands import TINY, mlm_train
from tests.inference.test_decode import random_model

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TEXTS = [
    *(file.read_text(errors="replace")[:4000] for file in SOURCES[60:90]),
    "", " ", "  two  spaces \n\n\t", "漢字 é e\u0301 \U0001f600 \x00", "0123 45", "aaaaaaaaaaaaaa bbbbbbb",
]  # fmt: skip


def lines() -> list[str]:
    text = "\n".join(file.read_text(errors="replace") for file in SOURCES[:8])
    return [line for line in text.split("\n") if line]


def sentencepiece(**options: Any) -> bytes:
    """A SentencePiece model with the library's defaults but for `options`."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=model, vocab_size=400, minloglevel=2, **options
    )
    return model.getvalue()


def byte_level(file: Path, begins: bool) -> None:
    """A tokenizer.json as GPT-2's; `begins`: it puts a token before each text itself."""
    made = HuggingFaceTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(lines(), trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
        )
    made.save(str(file))


@pytest.mark.parametrize("kind", ["base", "flex"])
def test_a_trained_tokenizer_on_the_road(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    flex = ("model.flex_beta=2",) if kind == "flex" else ()
    mlm_train(
        "pretrain", "configs/micro.yaml", *TINY, f"model.kind={kind}", *flex, f"data.path={data}",
        f"train.output={run}", "train.steps=1", "schedule.warmup_steps=0",
    )  # fmt: skip
    runtime.stop()
    mlm_train("export", run, "--output", export)
    assert "no tokenizer.json" not in capsys.readouterr().out
    names = {"generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert names <= set(verify_folder(export, "full"))
    ours, theirs = tokenizer_of(export), AutoTokenizer.from_pretrained(export)
    assert ours.kind == "sentencepiece" and ours.sha256 == tokenizer_of(data).sha256
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eod_id and theirs.model_max_length == 64
    assert GenerationConfig.from_pretrained(export).eos_token_id == ours.eod_id
    assert find_model(export).ends == (ours.eod_id,)
    said = pipeline("text-generation", str(export))("def f(", max_new_tokens=8, do_sample=False)
    capsys.readouterr()
    mlm_train("generate", "--model", export, "--prompt", "def f(", "--max-new-tokens", 8, "--json")
    assert said[0]["generated_text"] == "def f(" + json.loads(capsys.readouterr().out)["text"]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("carried", [True, False])
def test_a_tokenizer_json(add_bos: bool | None, begins: bool, carried: bool, tmp_path: Path) -> None:
    file, export = tmp_path / "tokenizer.json", tmp_path / "export"
    byte_level(file, begins)
    beside = [file]
    if carried:
        beside.append(tmp_path / "tokenizer_config.json")
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>", "add_bos_token": begins}
        beside[-1].write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    model = random_model(kind="base")
    tokens = SpecialTokens(1, (0, 7), None, add_bos)
    write_folder(export, model.config, named_pieces(model), beside, tokens=tokens, complete=True)
    ours, theirs = tokenizer_of(export), AutoTokenizer.from_pretrained(export)
    assert ours.sha256 == Tokenizer.load(file).sha256
    bos = find_model(export).bos_id
    assert bos == (1 if (begins if add_bos is None else add_bos) else None)
    for text in TEXTS:
        assert theirs(text).input_ids == [*([] if bos is None else [bos]), *ours.encode(text)]
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|endoftext|>")
    loaded = LlamaForCausalLM.from_pretrained(export).generation_config
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, [0, 7])
    # For a run that begins texts otherwise, what the folder has is adjusted again.
    again = tmp_path / "again"
    other = tokens.begun_by(None if bos == 1 else 1)
    write_folder(again, model.config, named_pieces(model), carried_files(export), tokens=other, complete=True)
    found = AutoTokenizer.from_pretrained(again)("def").input_ids
    assert found == [*([1] if bos is None else []), *ours.encode("def")]


def test_an_end_token_that_the_tokenizer_lacks_stops_no_export(tmp_path: Path) -> None:
    byte_level(tmp_path / "tokenizer.json", begins=True)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    model, export = random_model(kind="memory"), tmp_path / "export"
    tokens = SpecialTokens(1, (0,), None, False)
    write_folder(
        export, model.config, named_pieces(model), carried_files(tmp_path), tokens=tokens, complete=True
    )
    assert AutoTokenizer.from_pretrained(export)("def").input_ids == tokenizer_of(export).encode("def")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "unigram", "byte_fallback": True, "pad_id": 3},
        {
            "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
    ],
    ids=["bpe", "unigram", "as Llama 2"],
)  # fmt: skip
def test_sentencepiece_models_of_others(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(**options))
    model, beside = random_model(kind="memory"), [tmp_path / "tokenizer.model"]
    for bos in (1, None):
        export = tmp_path / f"export {bos}"
        tokens = SpecialTokens(1, (2,)).begun_by(bos)
        write_folder(export, model.config, named_pieces(model), beside, tokens=tokens, complete=True)
        ours, theirs = tokenizer_of(export), AutoTokenizer.from_pretrained(export)
        assert (ours.kind, theirs.bos_token, theirs.eos_token) == ("sentencepiece", "<s>", "</s>")
        for sample in TEXTS:
            ids = ours.encode(sample)
            assert theirs(sample).input_ids == [*([] if bos is None else [bos]), *ids]
            if 0 not in ids:
                assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("options", [{"model_type": "char"}, {"user_defined_symbols": ["\n"]}])
def test_no_file_rather_than_one_that_encodes_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    if options.get("model_type") == "char":
        options = options | {"hard_vocab_limit": False}
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece(**options))
    assert tokenizer_json(file) is None
    model = random_model(kind="memory")
    tokens = SpecialTokens(eos=(2,))
    write_folder(tmp_path / "export", model.config, named_pieces(model), [file], tokens=tokens, complete=True)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert not names & {"tokenizer.json", "tokenizer_config.json"}
    assert tokenizer_of(tmp_path / "export").eod_id == 2
