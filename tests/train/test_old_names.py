"""A run written under former field names resumes; elsewhere a former name is an error with the current one.

old_run holds data and a run written by the version before the renaming: NEW with four steps on two processes,
under the former names. unbroken.json has the values by step of all steps in one run: weights of a seed were
other ones then.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlm_train.checkpoint.load import config_of, open_checkpoint
from mlm_train.config import Config, load_config
from mlm_train.config.load import parse_config, section_of
from mlm_train.config.renamed import RENAMED, VALUES, refuse_old_names, with_new_names
from mlm_train.errors import UserError
from mlm_train.parallel import runtime
from tests.commands import ROOT, finished, mlm_train, refused, scalars

OLD, CONFIG = Path(__file__).parent / "old_run", "configs/micro.yaml"
DATA, CHECKPOINT = OLD / "data", "checkpoints/step-00000004"
STEPS, DONE = 8, 4
NEW = [
    "model.vocab_size=320", "model.hidden_size=8", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.intermediate_size=16", "model.max_position_embeddings=64", "data.sequence_length=32",
    "memory.mode=unique", "schedule.warmup_steps=2", f"schedule.total_steps={STEPS}", "schedule.min_lr=1e-3",
    "optimizer.lr=1e-2", "optimizer.max_grad_norm=0.3", "train.precision=fp32", "train.global_batch_size=8",
    "train.micro_batch_size=2", "train.batch_size_warmup={start: 4, increment: 4, samples: 20}",
    "train.activation_checkpointing=[full, none]", "train.loss_chunk_size=48", "train.eval_interval=2",
    "train.eval_samples=6", "train.watchdog_timeout=60", "train.max_skipped_steps=4",
    "train.spike={sigmas: 7, max_rollbacks: 2}", "checkpoint.interval=2", "checkpoint.keep_latest_k=1",
    "checkpoint.keep_interval=4", "checkpoint.keep_best_k=1", "checkpoint.async_save=false",
    "monitor.log_interval=2", "monitor.straggler_interval=3", "monitor.peak_tflops=1", "parallel.pipeline=2",
    "parallel.pipeline_schedule=gpipe", "parallel.zero_stage=2",
]  # fmt: skip
WRITTEN = ["data.path=old_run/data", "train.output=old_run/run", f"train.steps={DONE}"]


def paths(run: Path) -> list[str]:
    return [f"data.path={DATA}", f"train.output={run}", f"train.steps={STEPS}"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old run, to resume."""
    return Path(shutil.copytree(OLD / "run", tmp_path / "old"))


def nested(name: str, value: Any) -> dict[str, Any]:
    """A config with one field."""
    tree = value
    for part in reversed(name.split(".")):
        tree = {part: tree}
    return tree


def value_of(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


def continues(run: Path) -> None:
    """Loss, norm and validation after the old checkpoint equal those of the unbroken run."""
    for tag, expected in json.loads((OLD / "unbroken.json").read_text()).items():
        values = scalars(run, tag)
        assert values.keys() == {6, 8} and expected.keys() == {"2", "4", "6", "8"}, tag
        for step, value in values.items():
            assert value == pytest.approx(expected[str(step)], rel=1e-5), (tag, step)


def test_the_old_run_says_what_the_new_names_say() -> None:
    """In a run's file and a checkpoint's manifest; both have every renamed field at a non-default value."""
    config = load_config(CONFIG, [*NEW, *WRITTEN])
    assert load_config(OLD / "run" / "config.yaml") == config
    manifest = open_checkpoint(OLD / "run" / CHECKPOINT)
    assert config_of(manifest) == config
    for tree in (yaml.safe_load((OLD / "run" / "config.yaml").read_text()), manifest.config):
        for name, new in RENAMED.items():
            before = value_of(tree, name)
            assert before is not None, name
            with pytest.raises(KeyError):
                value_of(tree, new)
    plain = load_config(
        CONFIG, ["train.batch_size_warmup={start: 8, increment: 8, samples: 1}", "train.spike={}"]
    )
    for name, new in RENAMED.items():
        assert name in VALUES or value_of(config, new) != value_of(plain, new), new


def test_an_old_checkpoint_is_gone_on_with(old: Path) -> None:
    output = finished("launch", "--nproc", 2, CONFIG, *NEW, *paths(old))
    assert "resumed from" in output and f"at step {DONE}" in output
    changed = set(re.findall(r"changed since that checkpoint: (\S+)", output))
    assert changed == {"data.path", "train.output", "train.steps"}
    continues(old)


def test_an_old_runs_own_config_starts_it(old: Path) -> None:
    """In another layout too; the run's config then has the current names."""
    alone = ("parallel.pipeline=1", "parallel.pipeline_schedule=null", "train.activation_checkpointing=none")
    mlm_train("pretrain", old / "config.yaml", *paths(old), *alone)
    runtime.stop()
    continues(old)
    written = yaml.safe_load((old / "config.yaml").read_text())
    refuse_old_names(written, "config.yaml")
    assert parse_config(written) == load_config(CONFIG, [*NEW, *paths(old), *alone])
    mlm_train("pretrain", old / "config.yaml", "--dry-run")


def test_an_old_checkpoint_is_exported_evaluated_and_started_from(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = tmp_path / "export"
    mlm_train("export", old, "--output", export)
    found = []
    for model in (old, export):
        capsys.readouterr()
        mlm_train("evaluate", "--model", model, "--data", DATA, "--sequence-length", 32, "--json")
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == pytest.approx(found[1]) and found[0]["perplexity"] < 310
    mlm_train("checkpoint", "list", old, "--json")
    assert "PP2 ZeRO-2" in json.loads(capsys.readouterr().out)[0]["layout"]
    mlm_train("checkpoint", "prune", old, "--dry-run")
    mlm_train(
        "evaluate", "--model", export, "--data", DATA, "--sequence-length", 32, "--baselines", old, "--json"
    )
    one = [word for word in NEW if not word.startswith(("parallel.", "train.activation"))]
    warm = (f"checkpoint.warm_start={old / CHECKPOINT}", "train.steps=1", "schedule.total_steps=null")
    mlm_train("pretrain", CONFIG, *one, *paths(tmp_path / "warm"), *warm, "schedule.warmup_steps=0")
    runtime.stop()


@pytest.mark.parametrize("name", RENAMED)
def test_a_former_name_is_answered_with_the_new_one(name: str, tmp_path: Path) -> None:
    """As an override, in a file, and beside the current name; also a run's file with both names."""
    new, file, run = RENAMED[name], tmp_path / "config.yaml", tmp_path / "run"
    answer = f"{name} was renamed: write {new}"
    assert name.rpartition(".")[0] == new.rpartition(".")[0], "a field stays in its section"
    assert (
        refused("pretrain", CONFIG, f"{name}=1", "--dry-run") == f"mlm-train: override '{name}=1': {answer}"
    )
    tree = yaml.safe_load((ROOT / CONFIG).read_text())
    section = tree
    for part in name.split(".")[:-1]:
        section = section.setdefault(part, {})
    section[name.rpartition(".")[2]] = 1
    file.write_text(yaml.safe_dump(tree))
    assert refused("pretrain", file, "--dry-run") == f"mlm-train: {file}: {answer}"
    section[new.rpartition(".")[2]] = 1
    file.write_text(yaml.safe_dump(tree))
    assert refused("pretrain", file, "--dry-run") == f"mlm-train: {file}: {answer}"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copyfile(file, run / "config.yaml")
    assert (
        refused("pretrain", run / "config.yaml", "--dry-run") == f"mlm-train: {run / 'config.yaml'}: {answer}"
    )


@pytest.mark.parametrize("name", RENAMED)
def test_a_written_config_is_read_by_its_former_names(name: str) -> None:
    """Null is a value too; the tree that was read is not modified."""
    for value in (7, None, {"start": 1}):
        tree = nested(name, value) | {"odd": 5}
        before = json.dumps(tree)
        read = VALUES[name](value) if name in VALUES else value
        assert with_new_names(tree, "x") == nested(RENAMED[name], read) | {"odd": 5}
        assert json.dumps(tree) == before
    with pytest.raises(UserError, match="was renamed"):
        section = nested(name, 1)
        value_of(section, name.rpartition(".")[0])[RENAMED[name].rpartition(".")[2]] = 1
        with_new_names(section, "manifest.json")


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("train={micro_batch: 4}", "train.micro_batch_size"),
        ("train.spike={limit: 2}", "train.spike.max_rollbacks"),
        ("train.ramp.start=4", "train.batch_size_warmup"),
    ],
)
def test_a_former_name_inside_an_overrides_value(override: str, new: str) -> None:
    assert refused("pretrain", CONFIG, override, "--dry-run").endswith(f"was renamed: write {new}")


@pytest.mark.parametrize("beside", ["train.log", "checkpoints", "export.manifest.json"])
def test_what_was_written_is_known_by_what_lies_beside_it(beside: str, tmp_path: Path) -> None:
    """A run, a copy of its config and checkpoints, an import; a lone copy of the config is a user's file."""
    file = Path(shutil.copyfile(OLD / "run" / "config.yaml", tmp_path / "config.yaml"))
    with pytest.raises(UserError, match="was renamed"):
        load_config(file)
    (tmp_path / beside).touch()
    assert load_config(file) == load_config(CONFIG, [*NEW, *WRITTEN])
    with pytest.raises(UserError, match="was renamed"):
        load_config(shutil.copyfile(file, tmp_path / "mine.yaml"))


def test_sections_of_another_kind_are_left_to_the_schema() -> None:
    for tree in ({"train": 5}, {"train": [{"ramp": 1}]}, {"train": {"spike": None}}, {"checkpoint": "keep"}):
        assert with_new_names(tree, "x") == tree
        refuse_old_names(tree, "x")


def test_a_renamed_field_may_map_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "monitor.loud", "monitor.voices")
    monkeypatch.setitem(VALUES, "monitor.loud", lambda loud: ["all"] if loud else [])
    for loud, voices in ((True, ["all"]), (False, [])):
        assert with_new_names({"monitor": {"loud": loud}}, "x") == {"monitor": {"voices": voices}}


def test_no_field_has_a_former_name_and_no_page_shows_one() -> None:
    for name, new in RENAMED.items():
        section: Any = Config
        for part in name.split(".")[:-1]:
            section = section_of(section.model_fields[part].annotation)
        assert name.rpartition(".")[2] not in section.model_fields, name
        assert new.rpartition(".")[2] in section.model_fields, new
    for file in (ROOT / "configs").rglob("*.yaml"):
        refuse_old_names(yaml.safe_load(file.read_text()), file.name)
    dotted = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, RENAMED))})(?!\w)")
    pages = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".json", ".svg")]
    for page in (ROOT / "README.md", *pages, *(ROOT / "slurm").iterdir()):
        assert not (found := dotted.search(page.read_text())), (page.name, found)
