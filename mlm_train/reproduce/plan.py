"""What a reproduction runs: data, models of several seeds, tables, scores."""

from dataclasses import dataclass
from pathlib import Path

from mlm_train.analyze.prune.command import METHODS
from mlm_train.errors import UserError
from mlm_train.reproduce.steps import Step

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
FLEX = ("flex-1h2", "flex-2h2", "flex-3h2")
KINDS = ("base-small", "base", "memory", *FLEX)
TASKS = ("synthetic_facts", "synthetic_copy", "synthetic_induction", "synthetic_arithmetic")
LIKE = {"memory": "memory", "flex-1h2": "flex1", "flex-2h2": "flex2", "flex-3h2": "flex3"}
TASK_ALPHAS = (1.0, 0.8, 0.5)  # the paper's
TASK_MODEL = "memory-tasks"


def tasks_at(alpha: float) -> str:
    """What names of steps that score tasks with FFN-M times alpha begin with."""
    return "tasks" if alpha == 1 else f"tasks.alpha{alpha:g}"


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    configs: of the models, KIND-CONFIGS.yaml. seeds: of each model. vocab: of the tokenizer to be trained
    on the text. tokens: of each run, and speed: in tokens per second, for the prediction of times.
    overrides: of the configs. samples: windows of the validation text that are scored; None: all. people: of
    the synthetic tasks. clusters: of tokens, per layer. decode: the shape that decoding is timed
    with. task_steps: of a MemoryLLM trained on the synthetic tasks alone, of which so small a model learns
    none beside prose; 0: there is none.
    """

    name: str
    configs: str
    seeds: int
    vocab: int
    tokens: int
    speed: float
    overrides: tuple[str, ...] = ()
    samples: int | None = None
    people: int = 40
    clusters: int = 64
    decode: str = "1b"
    task_steps: int = 0

    @property
    def train_seconds(self) -> float:
        """Predicted seconds of one run."""
        return 15 + self.tokens / self.speed


SCALES = {
    # Minutes on two CPU cores, for tests of the road alone.
    "tiny": Scale("tiny", "micro", 1, 512, 4 * 64 * 60, 5_000, (
        "model.vocab_size=512", "model.num_hidden_layers=2", "data.sequence_length=64",
        "train.global_batch_size=4", "train.micro_batch_size=4", "train.steps=60", "train.eval_interval=30",
        "train.eval_samples=4", "checkpoint.interval=10", "schedule.warmup_steps=5",
    ), samples=8, people=6, clusters=8, decode="tiny", task_steps=30),
    "micro": Scale("micro", "micro", 3, 4096, 8 * 256 * 800, 3_000, samples=128, task_steps=1500),
    "250m": Scale("250m", "250m", 1, 128_256, 50_000_000_000, 1e6),
    "750m": Scale("750m", "750m", 1, 128_256, 50_000_000_000, 4e5),
    "1b": Scale("1b", "1b", 1, 128_256, 50_000_000_000, 2.5e5),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The steps of a scale.

    text: a file or folder of texts, tokenizer, validation_fraction: as `data prepare` takes them. tokenizer
    None: one is trained on the text.
    """

    scale: Scale
    text: str
    tokenizer: str | None = None
    validation_fraction: float | None = None

    @property
    def described(self) -> str:
        """What is trained on."""
        tokens = self.scale.tokens
        return f"{Path(self.text).name} and synthetic tasks (4 to 1), {tokens:,} tokens per model"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of models that have a config at this scale."""
        return tuple(kind for kind in KINDS if self.config(kind).exists())

    @property
    def full_size(self) -> list[str]:
        """Those of them that have the same total of parameters."""
        return [kind for kind in self.kinds if kind != "base-small"]

    @property
    def with_memory(self) -> list[str]:
        """Those of them with FFN-M."""
        return [kind for kind in self.kinds if not kind.startswith("base")]

    @property
    def scored_in_tasks(self) -> list[str]:
        """The MemoryLLMs whose tasks Table 1 has, that which has learned them last."""
        return ["memory", *([TASK_MODEL] if self.scale.task_steps else [])]

    @property
    def seeds(self) -> range:
        """Seeds of each model."""
        return range(self.scale.seeds)

    def config(self, kind: str) -> Path:
        """The config of a kind."""
        return CONFIGS / f"{kind}-{self.scale.configs}.yaml"

    def steps(self) -> list[Step]:
        """All steps, each after those that it needs."""
        if not self.kinds:
            raise UserError(
                f"{CONFIGS} has no configs: run `mlm-train reproduce` from a clone of the project"
            )
        return [
            *self.data(),
            *(self.train(kind, seed) for seed in self.seeds for kind in self.kinds),
            *(step for seed in self.seeds for step in self.of_tasks(seed)),
            *(step for seed in self.seeds for kind in self.kinds for step in self.scores(kind, seed)),
            *(step for seed in self.seeds for step in self.pruned(seed)),
            self.decode(),
        ]

    @property
    def _scored(self) -> tuple[str, ...]:
        """The text that models are scored on, as options."""
        some = () if self.scale.samples is None else ("--samples", str(self.scale.samples))
        return ("--data", "data/prose", *some)

    def data(self) -> list[Step]:
        """Prose with a tokenizer of its own, and the synthetic tasks' documents in its tokens."""
        prepare = ("data", "prepare", "--input")
        tokenizer = self.tokenizer or f"train:{self.scale.vocab}"
        share = self.validation_fraction
        held_out = () if share is None else ("--validation-fraction", f"{share:g}")
        return [
            Step("data", (*prepare, self.text, "--output", "data/prose", "--tokenizer", tokenizer, *held_out),
                 makes="data/prose", seconds=60),
            Step("synthetic", ("data", "synthetic", "--output", "synthetic",
                 "--people", str(self.scale.people)), makes="synthetic"),
            Step("synthetic-data", (*prepare, "synthetic", "--output", "data/synthetic",
                 "--tokenizer", "data/prose"), ("data", "synthetic"), makes="data/synthetic", seconds=30),
        ]  # fmt: skip

    def train(self, kind: str, seed: int) -> Step:
        """A run on prose and tasks: resumes by itself."""
        blend = "[{path: data/prose, weight: 0.8}, {path: data/synthetic, weight: 0.2}]"
        share = 0.4 if kind == "base-small" else 1.0
        return self._train(kind, kind, seed, share, "data.path=null", f"data.blend={blend}")

    def _train(self, kind: str, name: str, seed: int, share: float, *words: str) -> Step:
        """A run of a kind; share: of the predicted seconds of a base model's."""
        output = (f"train.output=runs/{name}-s{seed}", f"train.seed={seed}")
        words = ("pretrain", str(self.config(kind)), *self.scale.overrides, *words, *output)
        needs = ("data", "synthetic-data")
        return Step(f"train.{name}.s{seed}", words, needs, seconds=share * self.scale.train_seconds)

    def of_tasks(self, seed: int) -> list[Step]:
        """A MemoryLLM trained on the tasks alone, and its scores in them."""
        if not self.scale.task_steps:
            return []
        steps = f"train.steps={self.scale.task_steps}"
        name, run = f"{TASK_MODEL}.s{seed}", f"runs/{TASK_MODEL}-s{seed}"
        return [
            self._train("memory", TASK_MODEL, seed, 1.9, "data.path=data/synthetic", steps),
            *(self._tasks(name, run, alpha) for alpha in TASK_ALPHAS),
        ]

    def scores(self, kind: str, seed: int) -> list[Step]:
        """Perplexity and tasks, ablations, and for models with FFN-M its table."""
        name, run = f"{kind}.s{seed}", f"runs/{kind}-s{seed}"
        model = ("--model", run)
        data = self._scored
        trained = (f"train.{name}",)
        steps = [
            Step(f"prose.{name}", ("evaluate", *model, *data, "--json"), trained,
                 prints=f"results/prose.{name}.json", seconds=15),
            self._tasks(name, run, 1.0),
        ]  # fmt: skip
        if kind == "base-small":
            return steps
        steps.append(Step(
            f"ablate.{name}",
            ("analyze", "ablate", *model, *data, "--study", "alpha", "drop",
             "--output", f"results/ablate.{name}.json"),
            trained, seconds=70,
        ))  # fmt: skip
        shares = ("analyze", "shares", *model, *data, "--json")
        steps.append(
            Step(f"shares.{name}", shares, trained, prints=f"results/shares.{name}.json", seconds=15)
        )
        if kind == "base":
            return steps
        steps += [self._tasks(name, run, alpha) for alpha in TASK_ALPHAS if alpha != 1.0]
        if kind == "memory":
            steps.append(self._keys(name, run))
        table = f"tol/{kind}-s{seed}"
        steps += [
            Step(f"tol.{name}", ("tol", "build", run, "--output", table, "--dtype", "float32"), trained,
                 seconds=20),
            Step(f"inspect.{name}", ("tol", "inspect", table, "--json"), (f"tol.{name}",),
                 prints=f"results/inspect.{name}.json"),
            Step(f"table.{name}",
                 ("analyze", "ablate", *model, *data, "--tol", table, "--study", "precision", "rank",
                  "--output", f"results/table.{name}.json"),
                 (f"tol.{name}",), seconds=90),
        ]  # fmt: skip
        return steps

    def _keys(self, name: str, run: str) -> Step:
        clusters = ("--clusters", str(self.scale.clusters), "--map-tokens", "0")
        words = ("analyze", "keys", "--model", run, "--output", f"keys/{name}", *clusters)
        return Step(f"keys.{name}", words, (f"train.{name}",), seconds=90)

    def _tasks(self, name: str, run: str, alpha: float) -> Step:
        step = f"{tasks_at(alpha)}.{name}"
        scaled = () if alpha == 1 else ("--memory-scale", f"{alpha:g}")
        words = ("evaluate", "--model", run, "--tasks", ",".join(TASKS), "--include-path", "synthetic",
                 *scaled, "--json")  # fmt: skip
        needs = (f"train.{name}", "synthetic")
        return Step(step, words, needs, prints=f"results/{step}.json", seconds=20)

    def decode(self) -> Step:
        """The time of a token, with random weights in the paper's 1B shapes, on this machine."""
        words = (
            "bench", "decode", "--data", "data/prose", "--shape", self.scale.decode, "--batches", "1",
            "--prefills", "512", "--skip-hf", "--runs", "5", "--work", ".", "--json", "results/decode.json",
        )  # fmt: skip
        return Step("decode", words, ("data",), seconds=500, alone=True)

    def pruned(self, seed: int) -> list[Step]:
        """A base model pruned by each method to the active size of each other kind."""
        return [
            Step(
                f"prune.{method}.{like}.s{seed}",
                ("analyze", "prune", "--model", f"runs/base-s{seed}", *self._scored,
                 "--method", method, "--like", like, "--json"),
                (f"train.base.s{seed}",),
                prints=f"results/prune.{method}.{like}.s{seed}.json", seconds=30,
            )
            for method in METHODS
            for like in LIKE.values()
        ]  # fmt: skip
