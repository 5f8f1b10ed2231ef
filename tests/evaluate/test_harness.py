"""Our models in lm-evaluation-harness: its own tasks over local data, against scores computed by hand."""

import importlib.metadata
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate

import mlm_train
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.errors import UserError
from mlm_train.evaluate import tasks as harness_tasks
from mlm_train.evaluate.harness import MemoryLM
from mlm_train.evaluate.tasks import load_tasks
from tests.commands import ROOT, refused, scalars
from tests.commands import mlm_train as command
from tests.evaluate.naive import Naive
from tests.inference.test_language_model import export_with_words
from tests.partitions import write_table

EOD = 96  # `</s>`
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
TEXT = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/generate.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match}
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_with_words(tmp_path_factory.mktemp("harness") / "memory")


@pytest.fixture(scope="module")
def naive(export: Path) -> Naive:
    return Naive(load_model(export), 40)


@pytest.fixture
def words() -> Callable[[int], str]:
    draw = random.Random(3)
    return lambda count: " ".join(f"w{draw.randrange(96)}" for _ in range(count))


def ids(text: str) -> list[int]:
    """As the tokenizer of words has it."""
    return [int(word[1:]) for word in text.split()]


@pytest.fixture
def local(
    tmp_path: Path, words: Callable[[int], str], naive: Naive
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder of three tasks, and their documents."""
    questions = []
    for length in (3, 50, 0, 9, 17, 2, 30):  # one longer than the context, one empty
        choices = [words(count) for count in (1, 3, 1, 2)]
        questions.append({"question": words(length), "choices": choices, "label": length % 4})
    pages = [{"page": words(length)} for length in (5, 40, 41, 93)]
    pages[1]["page"] += "\n\nw3  w4"
    prompts = []
    for length in (4, 1, 60, 12):
        context = words(length)
        new = naive.generate(ids(context)[-34:], 6, {EOD})
        prompts.append({"question": context, "answer": "".join(f" w{token}" for token in new)})
    prompts[1]["answer"] = " w0 w0 w0"  # wrong
    documents = {"choice": questions, "text": pages, "generate": prompts}
    for name, each in documents.items():
        lines = "".join(json.dumps(document) + "\n" for document in each)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        yaml = {"choice": CHOICE, "text": TEXT, "generate": GENERATE}[name]
        first_word = words(1)  # the word that a generation is to end before
        (tmp_path / f"{name}.yaml").write_text(
            yaml.replace("FOLDER", str(tmp_path)).replace("STOP", f"{first_word}zz")
        )
    return tmp_path, documents


def by_hand(naive: Naive, documents: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    right = right_norm = 0
    for question in documents["choice"]:
        context = ids(question["question"]) or [EOD]
        sums = [naive.answer(context, ids(choice))[0] for choice in question["choices"]]
        per_byte = [value / len(choice) for value, choice in zip(sums, question["choices"], strict=True)]
        right += sums.index(max(sums)) == question["label"]
        right_norm += per_byte.index(max(per_byte)) == question["label"]
    pages = [page["page"] for page in documents["text"]]
    total = sum(naive.rolling(ids(page), EOD, 40) for page in pages)
    count = sum(len(re.split(r"\s+", page)) for page in pages)
    size = sum(len(page) for page in pages)
    return {
        "acc": right / len(documents["choice"]),
        "acc_norm": right_norm / len(documents["choice"]),
        "word_perplexity": math.exp(-total / count),
        "byte_perplexity": math.exp(-total / size),
        "bits_per_byte": -total / size / math.log(2),
        "exact_match": 3 / 4,
    }


def metrics(results: dict[str, Any]) -> dict[str, float]:
    return {
        name.partition(",")[0]: value
        for task in results["results"].values()
        for name, value in task.items()
        if name.endswith(",none") and "_stderr" not in name
    }


def test_tasks_score_as_by_hand_in_every_batch_size(
    export: Path, naive: Naive, local: tuple[Path, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    folder, documents = local
    table = write_table(tmp_path / "tol", load_model(export), export, [50])
    loaded = load_tasks(["local_choice", "local_text", "local_generate"], folder)
    expected = by_hand(naive, documents)
    assert 0 < expected["acc"] < 1
    found = {
        1: simple_evaluate(
            model="memoryllm", model_args=f"pretrained={export}", tasks=list(loaded.loaded["tasks"].values()),
            batch_size=1, bootstrap_iters=0, log_samples=False,
        )
    }  # fmt: skip
    for size, model in ((3, MemoryLM(str(export), batch_size=3)), (8, MemoryLM(str(export), str(table)))):
        assert model.batch_size == size
        found[size] = loaded.run(model).tree
    for results in found.values():
        assert metrics(results) == pytest.approx(expected, rel=1e-4)
        assert metrics(results) == pytest.approx(metrics(found[1]), rel=1e-5)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def test_log_likelihoods_are_those_of_the_logits(
    export: Path, naive: Naive, words: Callable[[int], str]
) -> None:
    pairs = [
        (words(length), f" {words(count)}") for length, count in ((0, 3), (5, 1), (39, 2), (70, 4), (5, 40))
    ]
    asked = [request("loglikelihood", *pair) for pair in pairs]
    model = MemoryLM(str(export), batch_size="auto")
    answers = model.loglikelihood(asked, disable_tqdm=True)
    for (context, answer), (logprob, greedy) in zip(pairs, answers, strict=True):
        exact, best = naive.answer(ids(context) or [EOD], ids(answer))
        assert logprob == pytest.approx(exact, abs=1e-4) and greedy is best
    lm = mlm_train.load(export)
    context, answer = pairs[1]
    own = lm.logits(lm.encode(context))[-1].log_softmax(-1)[ids(answer)[0]]
    assert answers[1][0] == pytest.approx(float(own), abs=1e-4)
    short = MemoryLM(lm, max_length=9)
    assert short.loglikelihood(asked[2:3])[0][0] == pytest.approx(
        Naive(naive.model, 9).answer(ids(pairs[2][0]), ids(pairs[2][1]))[0], abs=1e-4
    )
    with pytest.raises(UserError, match="an answer of 40 tokens is longer than max_length=9"):
        short.loglikelihood(asked[4:])


def test_scales_are_arguments(export: Path, words: Callable[[int], str]) -> None:
    asked = [request("loglikelihood_rolling", words(30))]
    by_list = MemoryLM(str(export), alpha=[1, 0.5, 0.0], drop_layers=[0])
    by_text = MemoryLM.create_from_arg_string(f"pretrained={export},alpha=1:0.5:0.0,drop_layers=0")
    dropped = MemoryLM(mlm_train.load(export, memory_scale=[0, 0.5, 0]))
    scores = [model.loglikelihood_rolling(asked) for model in (by_list, by_text, dropped)]
    assert scores[0] == scores[1] == scores[2] != MemoryLM(str(export)).loglikelihood_rolling(asked)
    assert MemoryLM(str(export), alpha=1, drop_layers="0-2").lm.decoder.model.config.memory_scale == [0.0] * 3


def test_generation_stops_and_samples(export: Path, naive: Naive) -> None:
    model = MemoryLM(str(export), max_gen_toks=7)
    new = naive.generate([5, 80], 7, {EOD})
    text = " ".join(f"w{token}" for token in new)
    greedy = {"do_sample": False, "temperature": 0.0}
    asked = [
        request("generate_until", "w5 w80", {"until": ["never"], **greedy}),
        request("generate_until", "w5 w80", {"until": f" w{new[2]} w{new[3]}", "max_gen_toks": 7}),
        request("generate_until", "w5 w80", {"max_new_tokens": 2}),
    ]
    until = text[: text.index(f" w{new[2]} w{new[3]}")]
    assert [one.strip() for one in model.generate_until(asked)] == [text, until, " ".join(text.split()[:2])]
    sampled = {"do_sample": True, "temperature": 5.0, "top_k": 90, "top_p": 0.99}
    draws = model.generate_until([request("generate_until", "w5 w80", sampled)] * 3)
    assert len(set(draws)) == 3 and draws == model.generate_until(
        [request("generate_until", "w5 w80", sampled)] * 3
    )
    with pytest.raises(UserError, match="generation_kwargs: num_beams is not known; known are until"):
        model.generate_until([request("generate_until", "w5", {"num_beams": 4})])
    with pytest.raises(UserError, match="max_gen_toks=64 leaves no room for a context in max_length=40"):
        model.generate_until([request("generate_until", "w5", {"max_gen_toks": 64})])


def test_ids_before_texts(export: Path) -> None:
    model = MemoryLM(str(export))
    assert (model.eot_token_id, model.prefix_token_id) == (EOD, EOD)
    assert model.tok_encode("w5 w6") == [5, 6] == model.tok_encode("w5 w6", add_special_tokens=False)
    for value, message in (
        ({"batch_size": "many"}, "batch_size many: give a number"),
        ({"max_length": 41}, "max_length 41: give 1 to 40"),
        ({"drop_layers": 3}, "the model's layers are 0 to 2"),
        ({"alpha": "x"}, "alpha 'x': give numbers"),
    ):
        with pytest.raises(UserError, match=message):
            MemoryLM(str(export), **value)


def test_the_name_and_the_entry_point_lead_to_the_class() -> None:
    """lm-eval 0.4.13 does not read entry points; its main branch reads those of this group."""
    assert get_model("memoryllm") is MemoryLM
    (line,) = re.findall(r'"lm_eval.models": \["(.+)"\]', (ROOT / "setup.py").read_text())
    name, value = line.split(" = ")
    point = importlib.metadata.EntryPoint(name, value, "lm_eval.models")
    assert point.name == "memoryllm" and point.load() is MemoryLM


def test_the_command(
    export: Path, local: tuple[Path, dict[str, list[dict[str, Any]]]], naive: Naive, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, documents = local
    words = ("evaluate", "--model", export, "--tasks", "local_choice,local_text", "--include-path", folder)
    command(*words, "--json", "--tensorboard", tmp_path / "tensorboard")
    results = json.loads(capsys.readouterr().out)
    expected = by_hand(naive, documents)
    assert metrics(results) == pytest.approx({name: expected[name] for name in metrics(results)}, rel=1e-4)
    assert results["n-samples"]["local_choice"] == {"original": 7, "effective": 7}
    written = scalars(tmp_path, "tasks/word_perplexity/local_text")
    assert written == pytest.approx({0: expected["word_perplexity"]}, rel=1e-4)
    command(*words, "--limit", 2, "--num-fewshot", 1)
    table = capsys.readouterr().out
    assert "|local_choice|" in table.replace(" ", "") and "acc_norm" in table


def test_bad_input(
    export: Path, local: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("evaluate", "--model", export, "--include-path", local[0], "--tasks")
    assert "local_choise: there is no such task; did you mean local_choice" in refused(*words, "local_choise")
    assert "other.yaml does not exist; give the path" in refused(*words, tmp_path / "other.yaml")
    (tmp_path / "text.jsonl").unlink()
    assert "local_text cannot be loaded (FileNotFoundError" in refused(*words, "local_text")
    assert "no is not a folder" in refused(*words, "a", "--include-path", tmp_path / "no")
    assert "--limit 0: give at least 1" in refused(*words, "local_choice", "--limit", 0)
    assert "--stride has no effect on --tasks, only with --text" in refused(
        *words, "local_choice", "--stride", 4
    )
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda name: None)
    assert refused(*words, "local_choice").endswith("pip install 'mlm-train[lm-eval]'")
