"""The whole workflow on four CPU processes, TP2 x PP2: text, tokenizer, training with a kill, export, ToL.

usage: .venv/bin/python tools/quickstart.py [--folder runs/quickstart]

Every stage is one `mlm-train` command, printed before it runs; finished stages are skipped. Ends with a table
of measurements.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 4
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch_size=4")
PROMPT = "class TestCase(unittest.TestCase):\n    def test_"
NEW_TOKENS = 48

console = Console(highlight=False, soft_wrap=True)


class Quickstart:
    """The stages, each with its output folder."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()  # the commands run in ROOT
        self.folder = folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        self.text, self.data = folder / "text", folder / "data"
        self.run, self.export, self.tol = folder / "run", folder / "export", folder / "tol"
        self.results_file = folder / "results.json"
        self.results: dict[str, Any] = {}
        if self.results_file.is_file():
            self.results = json.loads(self.results_file.read_text(encoding="utf-8"))

    def command(self, *words: object) -> list[str]:
        """An `mlm-train` command line, shown to the user."""
        line = [str(word) for word in words]
        console.print(f"\n$ mlm-train {shlex.join(line)}", markup=False, style="bold")
        return [sys.executable, "-m", "mlm_train", *line]

    def do(self, *words: object) -> None:
        """Run a command. Exits where it fails."""
        code = subprocess.call(self.command(*words), cwd=ROOT)
        if code:
            raise SystemExit(f"quickstart: the command above failed with exit code {code}")

    def ask(self, *words: object) -> dict[str, Any]:
        """Run a command with --json and return its output."""
        done = subprocess.run(self.command(*words, "--json"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"quickstart: the command above failed with exit code {done.returncode}")
        return json.loads(done.stdout)

    def keep(self, **values: Any) -> None:
        """Save results for a restart."""
        self.results |= values
        self.results_file.write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def prepare(self) -> None:
        """Collect text of this Python installation, train a tokenizer on it, tokenize."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.text.exists():
            self.do("data", "collect", "--output", self.text, "--max-bytes", "24MB")
        if not self.data.exists():
            self.do(
                "data", "prepare", "--input", self.text, "--output", self.data, "--tokenizer", "train:2048"
            )
            self.do("data", "inspect", self.data, "--samples", 1)

    def train(self) -> None:
        """Train; kill a rank with SIGKILL once a checkpoint is on disk; restart and finish."""
        words = (
            "launch", "--nproc", PROCESSES, "configs/micro.yaml",
            f"data.path={self.data}", f"train.output={self.run}", *LAYOUT,
        )  # fmt: skip
        if "trained" in self.results:
            return
        started = time.perf_counter()
        if "killed" not in self.results:
            launch = subprocess.Popen(self.command(*words), cwd=ROOT)
            killed = self._kill_a_rank_after_a_checkpoint(launch)
            console.print(f"[bold]killed one rank (kill -9) {killed}; restarting[/bold]")
            self.keep(killed=killed)
        self.do(*words)
        self.keep(trained=True, train_seconds=time.perf_counter() - started)

    def _kill_a_rank_after_a_checkpoint(self, launch: "subprocess.Popen[bytes]") -> str:
        pointer = self.run / "checkpoints" / "latest"
        before = pointer.read_text() if pointer.is_file() else ""  # of an interrupted quickstart
        while not pointer.is_file() or pointer.read_text() == before:
            if launch.poll() == 0:
                return "(it had already finished)"
            if launch.poll() is not None:
                raise SystemExit("quickstart: training failed before it could be killed")
            time.sleep(0.2)
        time.sleep(2)  # some steps later, so that work is really lost
        step = pointer.read_text().strip()
        children = psutil.Process(launch.pid).children(recursive=True)
        living = [
            child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        ]
        ranks = [child for child in living if "pretrain" in child.cmdline()]
        os.kill(ranks[-1].pid, signal.SIGKILL)
        code = launch.wait()
        if code == 0:
            raise SystemExit("quickstart: training ended before a rank could be killed")
        return f"after {step}"

    def evaluate(self) -> None:
        """Export, and compare with count-based baselines on all validation windows."""
        if not self.export.exists():
            self.do("export", self.run, "--output", self.export)
        if "evaluation" not in self.results:
            evaluation = self.ask(
                "evaluate", "--model", self.export, "--data", self.data, "--sequence-length", 256,
                "--baselines", self.run,
            )  # fmt: skip
            self.keep(evaluation=evaluation)

    def look_up(self) -> None:
        """Build the ToL on Ray, verify every row against the weights, generate with and without it."""
        if not (self.tol / "tol.index.json").exists():
            started = time.perf_counter()
            self.do("tol", "build", self.export, "--output", self.tol, "--dtype", "bfloat16",
                    "--partitions", 4, "--workers", 2)  # fmt: skip
            self.keep(tol_seconds=time.perf_counter() - started)
        self.keep(verified=self.ask("tol", "verify", self.tol, "--model", self.export))
        generate = ("generate", "--model", self.export, "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS)
        self.keep(computed=self.ask(*generate), looked_up=self.ask(*generate, "--tol", self.tol))

    def show(self) -> None:
        """Print the table of measurements."""
        found, computed = self.results["evaluation"], self.results["computed"]
        looked_up, verified = self.results["looked_up"], self.results["verified"]
        tags = ("train/loss", "speed/tokens_per_second", "data/distinct_ratio_step")
        loss, speed, distinct = self.series(*tags)
        index = json.loads((self.tol / "tol.index.json").read_text(encoding="utf-8"))
        partitions = index["partitions"]
        size = sum(partition["bytes"] for partition in partitions)
        rows = {
            "training loss, first and last step": f"{loss[0]:.3f} -> {loss[-1]:.3f}",
            "killed (one rank, kill -9) and resumed": self.results["killed"],
            "validation perplexity, MemoryLLM": f"{found['perplexity']:.2f}",
            "validation perplexity, bigram": f"{found['bigram']:.2f}",
            "validation perplexity, unigram": f"{found['unigram']:.2f}",
            "training speed": f"{statistics.median(speed):,.0f} tokens/s on {PROCESSES} processes, TP2 x PP2",
            "distinct ids / tokens (a rank's step)": f"{statistics.median(distinct):.3f}",
            "ToL": f"{index['vocab_size']:,} rows, {size:,} bytes ({index['dtype']})",
            "ToL partitions, built on Ray": f"{len(partitions)} in {self.results['tol_seconds']:.0f} s",
            "largest error of a ToL number": f"{verified['max_abs_error']:.1e}",
            "both generations agree": "yes" if computed["ids"] == looked_up["ids"] else "no",
            "ms per token, FFN-M computed": f"{computed['decode_ms_per_token']:.2f}",
            "ms per token, FFN-M looked up": f"{looked_up['decode_ms_per_token']:.2f}",
            "watch it in TensorBoard": f".venv/bin/mlm-train monitor {self.run}",
        }
        table = Table(title="quickstart: measurements", title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(f"\n{PROMPT}{looked_up['text']}\n", markup=False, style="dim")
        console.print(table)
        if found["perplexity"] >= found["bigram"]:
            raise SystemExit("quickstart: the model did not beat the bigram baseline")

    def series(self, *tags: str) -> list[list[float]]:
        """Values of the run's TensorBoard tags, read with TensorBoard's own reader."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # It warns that the killed run's steps after its checkpoint are gone, which is expected.
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        events = EventAccumulator(str(self.run / "tensorboard"))
        events.Reload()
        return [[event.value for event in events.Scalars(tag)] for tag in tags]


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quickstart = Quickstart(parser.parse_args().folder)
    started = time.perf_counter()
    stages = (
        quickstart.prepare,
        quickstart.train,
        quickstart.evaluate,
        quickstart.look_up,
        quickstart.show,
    )
    for stage in stages:
        stage()
    console.print(f"took {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
