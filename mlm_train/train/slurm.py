"""A run as a Slurm job: its sbatch command, tested before it is submitted."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
LOGS = Path("slurm-logs")


@dataclass(frozen=True)
class SlurmJob:
    """The requested job; None stands for the cluster's default."""

    config: str
    overrides: tuple[str, ...]
    nodes: tuple[int, int]  # the fewest and the most that run
    processes: int  # per node
    spares: int = 0  # nodes beside these, which replace lost ones
    restarts: int | None = None  # of the ranks within the job; None: one for each node that may be lost
    gpus: int | None = None  # per node
    partition: str | None = None
    account: str | None = None
    time: str | None = None

    @property
    def name(self) -> str:
        """The job's name in squeue and the log, after the config."""
        return f"mlm-{Path(self.config).stem}"

    def options(self) -> list[str]:
        """sbatch's options, beside those in `slurm/pretrain.sbatch`."""
        values = {
            "job-name": self.name,
            "nodes": self.nodes[1] + self.spares,
            "gpus-per-node": self.gpus,
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "chdir": Path.cwd(),  # the base of the config's relative paths
            "output": LOGS / "%x-%j.log",  # relative: a % in an absolute path would be read as a pattern
            "export": "ALL",
        }
        options = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return [*options, "--no-kill"] if self.may_lose_nodes else options

    @property
    def may_lose_nodes(self) -> bool:
        """Whether the job goes on without a lost node."""
        return self.spares > 0 or self.nodes[0] < self.nodes[1]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the script; --export would split values at commas."""
        given = {"MLM_ROOT": str(ROOT), "MLM_PYTHON": sys.executable, "MLM_NPROC": str(self.processes)}
        if self.may_lose_nodes:
            given["MLM_NODES"] = ":".join(map(str, self.nodes))
        if self.restarts is not None:
            given["MLM_RANK_RESTARTS"] = str(self.restarts)
        return given

    def command(self, *more: str) -> list[str]:
        """The sbatch command, to be run with `environment`."""
        return ["sbatch", *more, *self.options(), str(SCRIPT), self.config, *self.overrides]


def submit(job: SlurmJob, render: bool = False) -> int:
    """Test and submit the job, and print how to watch and stop it; `render`: only print the command.

    Returns the exit code. Raises UserError with sbatch's reason.
    """
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT} is missing: run mlm-train from a clone, which holds the job scripts")
    if render:
        given = [f"{name}={value}" for name, value in job.environment.items()]
        print(shlex.join(["env", *given, *job.command()]))
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on the PATH: run this on a login node of a Slurm cluster, or --render")
    LOGS.mkdir(exist_ok=True)
    _sbatch(job.command("--test-only"), job)
    number = _sbatch(job.command("--parsable"), job).strip().partition(";")[0]
    log = LOGS / f"{job.name}-{number}.log"
    fewest, most = job.nodes
    nodes = f"{most} nodes" if fewest == most else f"{fewest} to {most} nodes"
    spares = f" and {job.spares} spare" if job.spares else ""
    print(f"submitted job {number}: {nodes}{spares} x {job.processes} processes")
    print(f"watch: squeue -j {number}; tail -F {shlex.quote(str(log))}")
    print(f"stop:  scancel --signal=TERM {number}  (after a checkpoint), scancel {number}  (at once)")
    return 0


def _sbatch(command: Sequence[str], job: SlurmJob) -> str:
    """Run sbatch and return its output. Raises UserError with its reason and what to change."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | job.environment)
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    reason = re.sub(r"^(sbatch: error: |allocation failure: |sbatch: )+", "", lines[-1])
    raise UserError(f"sbatch rejected the job: {reason}; {_advice(' '.join(lines), job)}")


def _advice(reason: str, job: SlurmJob) -> str:
    """What to change, for Slurm's most frequent reasons."""
    lower = reason.lower()
    if "partition" in lower and "account" not in lower:
        return f"--partition {job.partition or 'NAME'}: `sinfo -s` lists the partitions"
    if "account" in lower:
        return f"--account {job.account or 'NAME'}: `sacctmgr show associations user=$USER` lists yours"
    if "time" in lower:
        return f"--time {job.time or 'HH:MM:SS'}: `sinfo -o '%P %l'` shows the limits"
    if "node" in lower or "gres" in lower:
        asked = f"--nodes {job.nodes[1]}"
        asked += f" --spares {job.spares}" if job.spares else ""
        asked += f" --gpus-per-node {job.gpus}" if job.gpus else ""
        return f"{asked}: `sinfo -o '%P %D %G'` shows nodes and GPUs of each partition"
    return "check `sinfo` and the command that --render prints"
