"""Configs: presets against the paper, overrides, and a one-line error for every mistake."""

from pathlib import Path

import pytest
import yaml

from mlm_train.config import dump_config, load_config
from mlm_train.config.load import parse_config
from mlm_train.errors import UserError
from mlm_train.model.counts import count_parameters

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MILLION = 10**6

# Total and active parameters, millions rounded down (arXiv 2602.00398, tables 4 and 5).
PAPER = {
    "250m": (265, {"base": 265, "memory": 88, "flex-1h2": 110, "flex-2h2": 132, "flex-3h2": 154}),
    "750m": (737, {"base": 737, "memory": 245, "flex-1h2": 307, "flex-2h2": 368, "flex-3h2": 430}),
    "1b": (1208, {"base": 1208, "memory": 402, "flex-1h2": 503, "flex-2h2": 604, "flex-3h2": 704}),
}
# Not the paper's: attention's 2 h^2 + 2 h k (k: width of keys), two norms of h and FFN-M's 3 h f per layer.
LARGE = {"7b": (6476, {"memory": 2147}), "70b": (68452, {"memory": 12080})}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("size", [*PAPER, *LARGE])
def test_presets_have_their_parameters(size: str) -> None:
    total, active = (PAPER | LARGE)[size]
    for name, expected in active.items():
        counts = count_parameters(load_config(next(CONFIGS.rglob(f"{name}-{size}.yaml"))).model)
        assert counts.total // MILLION == total, name
        assert counts.active // MILLION == expected, name


def test_overrides_are_yaml_values() -> None:
    config = load_config(
        CONFIGS / "micro.yaml",
        [
            "optimizer.lr=5e-4",
            "train.steps=7",
            "train.precision=fp32",
            "schedule.warmup_steps=0",
            "train.batch_size_warmup={start: 8, increment: 8, samples: 64}",
            "optimizer.betas=[0.8, 0.9]",
        ],
    )
    assert config.optimizer.lr == 5e-4 and config.train.steps == 7
    assert config.train.batch_size_warmup is not None and config.train.batch_size_warmup.start == 8
    assert config.optimizer.betas == (0.8, 0.9)


def test_base_has_no_ffn_m_to_execute() -> None:
    with pytest.raises(UserError, match=r"memory\.mode='unique': has no effect with model\.kind=base"):
        load_config(CONFIGS / "micro.yaml", ["memory.mode=unique", "model.kind=base"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=3", "unknown config key model.hiden_size; did you mean model.hidden_size?"),
        ("train.lr=0.1", "did you mean optimizer.lr?"),
        ("trian.steps=1", "did you mean train?"),
        ("train.steps=0", "train.steps=0: input should be greater"),
        ("train.steps", "write section.field=value"),
        ("optimizer.lr=fast", "optimizer.lr='fast'"),
        ("model.kind=moe", "'base', 'memory' or 'flex'"),
        ("model.flex_beta=1", "only with model.kind=flex"),
        ("model.num_attention_heads=5", "must divide model.hidden_size"),
        ("model.num_key_value_heads=3", "must divide model.num_attention_heads=4"),
        ("model.head_dim=33", "must be even"),
        ("model.memory_scale=[1, 1]", "needs one number, or 4"),
        ("model.memory_scale=.inf", "finite"),
        ("memory.mode=lookup", "memory.mode='lookup'"),
        ("memory.placement=shared", "memory.placement='shared': has no effect with memory.mode=auto"),
        ("memory.gradient_rows=bf16", "memory.gradient_rows='bf16': has no effect with memory.mode=auto"),
        ("memory.table_layers=1", "has no effect with memory.mode=auto"),
        ("memory.kept_layers=1", "has no effect with memory.mode=auto"),
        ("data.sequence_length=100000", "longer than model.max_position_embeddings"),
        (
            "data.blend=[{path: a, weight: 1}]",
            "give either this or data.blend; data.path=null on the command line",
        ),
        ("data.blend=[{path: a, wieght: 1}]", "data.blend.0.wieght; did you mean data.blend.0.weight?"),
        ("data.blend=[{path: a, weight: 0}]", "data.blend.0.weight=0: input should be greater than 0"),
        ("data.blend=[]", "data.blend=[]: list should have at least 1 item"),
        (
            "data.path=null",
            "data.path is missing; set it in the YAML or as data.path=..., or give data.blend",
        ),
        ("train.watchdog_timeout=600", "must be below parallel.timeout=600.0"),
        ("train.micro_batch_size=5", "must be a multiple of train.micro_batch_size=5"),
        (
            "train.batch_size_warmup={start: 16, increment: 8, samples: 64}",
            "must be below train.global_batch_size",
        ),
        (
            "train.batch_size_warmup={start: 8, increment: 7, samples: 64}",
            "must divide global_batch_size - start",
        ),
        ("schedule.kind=wsd", "schedule.decay_steps"),
        ("schedule.decay_steps=4", "only with schedule.kind=wsd"),
        ("schedule.warmup_steps=100000", "longer than train.steps"),
        ("schedule.min_lr=1", "above optimizer.lr"),
        ("parallel.tensor=3", "parallel.tensor=3: must divide 4 attention and 4"),
        ("parallel.pipeline=5", "makes 5 stages of 4 layers; at most 4 fits"),
        ("parallel.pipeline_schedule=gpipe", "only with parallel.pipeline above 1"),
        ("parallel.x0_transport=relay", "only with parallel.pipeline above 1"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4: input should be 0, 1, 2 or 3"),
        (
            "parallel.context=2",
            "parallel.context=2: context parallelism is not part of mlm_train; use parall",
        ),
        ("parallel.context=0", "parallel.context=0: context parallelism"),
        ("parallel.sequence=true", "has an effect only with parallel.tensor above 1"),
        ("train.loss_chunk_size=0", "train.loss_chunk_size=0"),
        ("model=3", "model is a section"),
        ("optimizer.lr=.inf", "finite number"),
        ("train.z_loss=.nan", "finite number"),
        ("optimizer.betas=[1.5, 2]", "optimizer.betas.0=1.5"),
        ("train.compile=maybe", "train.compile='maybe': input should be a valid boolean"),
        ("train.seed=99999999999999999999", "train.seed=99999999999999999999"),
    ],
)
def test_mistakes_get_one_clear_line(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "micro.yaml", [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallel.pipeline_schedule=interleaved_1f1b"],
            "parallel.pipeline_schedule='interleaved_1f1b': needs parallel.virt",
        ),
        (["parallel.virtual_stages=2"], "parallel.virtual_stages=2: has an effect only with"),
        (["parallel.layers_per_stage=[1, 2]"], "needs 2 numbers that add up to"),
        (["parallel.layers_per_stage=[4, 0]"], "parallel.layers_per_stage.1=0"),
        (["parallel.zero_stage=3"], "parallel.zero_stage=3: is incompatible with parallel.pipeline=2"),
        (["parallel.zero_stage=3"], "set parallel.zero_stage=2, or parallel.pipeline=1"),
        (["parallel.pipeline_schedule=zbv", "parallel.x0_transport=broadcast"], "use relay"),
        (
            ["parallel.pipeline_schedule=dualpipe_v", "parallel.virtual_stages=3"],
            "parallel.pipeline_schedule=dualpipe_v has 2",
        ),
        (["parallel.pipeline_schedule=interleaved_zero_bubble"], "needs parallel.virtual_stages, 2 or more"),
        (
            ["parallel.pipeline_schedule=zbv", "train.activation_checkpointing=full"],
            "use selective, or parallel.pipeline_schedule=1f1b",
        ),
        (
            ["parallel.pipeline_schedule=zbv", "parallel.pipeline=3"],
            "makes 6 stages of 4 layers; at most 2 fits",
        ),
        (
            ["train.activation_checkpointing=[full, none, none]"],
            "needs one value for all stages, or a list of 2",
        ),
        (
            ["train.activation_checkpointing=some"],
            "train.activation_checkpointing='some': input should be 'none', 'selective' or 'full'",
        ),
        (
            ["parallel.pipeline_schedule=zbv", "model.num_hidden_layers=3"],
            "take a schedule with fewer stages per rank",
        ),
        (
            ["parallel.pipeline_schedule=zbv", "train.compile=true"],
            "train.compile=True: is incompatible with parallel",
        ),
        (["parallel.x0_transport=pigeon"], "parallel.x0_transport='pigeon'"),
    ],
)
def test_pipelines_that_cannot_be(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "micro.yaml", ["parallel.pipeline=2", *overrides])
    assert words in str(error.value)


def test_zero_chooses_deepspeed_which_owns_nothing() -> None:
    owned, zero = "memory={mode: table, placement: owned}", "parallel.zero_stage=1"
    assert load_config(CONFIGS / "micro.yaml", [owned]).parallel.engine == "fsdp"
    assert load_config(CONFIGS / "micro.yaml", [zero]).parallel.engine == "deepspeed"
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "micro.yaml", [owned, zero])
    assert "parallel.engine=deepspeed: set parallel.engine=fsdp" in str(error.value)


def test_compiled_layers_need_whole_weights() -> None:
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "micro.yaml", ["train.compile=true", "parallel.zero_stage=3"])
    assert "set parallel.zero_stage=2, or leave train.compile out" in str(error.value)


def test_context_of_one_says_nothing() -> None:
    config = load_config(CONFIGS / "micro.yaml", ["parallel.context=1", "parallel.zero_stage=3"])
    assert "context" not in dump_config(config) and "zero_stage: 3" in dump_config(config)


def test_sequences_that_the_ranks_cannot_share() -> None:
    words = ["parallel.tensor=4", "parallel.sequence=true"]
    load_config(CONFIGS / "micro.yaml", words)
    with pytest.raises(UserError, match=r"multiple of parallel\.tensor=4 .* the nearest is 100"):
        load_config(CONFIGS / "micro.yaml", [*words, "data.sequence_length=99"])


def test_zero_bubble_takes_relay_by_itself() -> None:
    words = ["parallel.pipeline=2", "parallel.pipeline_schedule=zbv", "train.micro_batch_size=1"]
    assert load_config(CONFIGS / "micro.yaml", words).transport == "relay"
    assert load_config(CONFIGS / "micro.yaml", words[:1]).transport == "broadcast"


def test_base_has_no_x0_to_send() -> None:
    words = ["parallel.pipeline=2", "parallel.x0_transport=relay"]
    with pytest.raises(UserError, match="has no effect with model"):
        load_config(CONFIGS / "paper" / "base-1b.yaml", words)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean .*micro\.yaml"):
        load_config(CONFIGS / "mikro.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [1,\n")
    with pytest.raises(UserError, match="is not YAML") as error:
        load_config(broken)
    assert "\n" not in str(error.value)
    broken.write_text("just text")
    with pytest.raises(UserError, match="sections"):
        load_config(broken)
    broken.write_text("model: {kind: base}")
    with pytest.raises(UserError, match="is missing"):
        load_config(broken)


def test_flex_sizes_follow_beta() -> None:
    linear = load_config(CONFIGS / "paper" / "flex-1h2-1b.yaml", ["model.compute_form=linear"]).model
    assert linear.compute_intermediate_size == 1024
    with pytest.raises(UserError, match="disagrees with"):
        load_config(CONFIGS / "paper" / "flex-1h2-1b.yaml", ["model.compute_intermediate_size=700"])
