"""A real Slurm of four nodes on this machine, shared by the tests of this folder."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT, TINY, mlm_train

HERE = Path(__file__).parent
STEPS = 150  # enough that a run can be disturbed in the middle
PATIENCE = 240.0  # seconds, for a job to come so far


def obstacle() -> str | None:
    """Why no Slurm can run here."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "needs Slurm, or apt-get to install it"
    namespaces = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True)
    return "needs network namespaces (CAP_SYS_ADMIN)" if namespaces.returncode else None


class Cluster:
    """Slurm's commands, and what the tests look at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "CLUSTER_DIR": str(folder),
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "MLM_ROOT": str(ROOT),
            "MLM_PYTHON": sys.executable,
            "MLM_NPROC": "1",
        }

    def do(self, *words: object, cwd: Path = ROOT, **environment: str) -> str:
        """Run a command with the cluster's environment; its output."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def namespace(self, node: str) -> str:
        """The name of its network namespace."""
        return f"mlm{(self.folder / 'run/number').read_text().strip()}-{node}"

    def lose(self, node: str) -> None:
        """The node is gone, with all that runs on it."""
        for pid in self.do("ip", "netns", "pids", self.namespace(node)).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut_off(self, node: str, connected: bool = False) -> None:
        """The node's network is gone, or back; what runs on it goes on."""
        number = (self.folder / "run/number").read_text().strip()
        link = f"mlmslurm{number}-{node.removeprefix('node')}"
        self.do("ip", "link", "set", link, "up" if connected else "down")

    def ranks(self, job: "SlurmJob", node: str) -> list[psutil.Process]:
        """The job's ranks on a node."""
        pids = map(int, self.do("ip", "netns", "pids", self.namespace(node)).split())
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.Error):  # one that has just ended
                process = psutil.Process(pid)
                own = process.environ().get("SLURM_JOB_ID") == job.number
                if own and "pretrain" in process.cmdline() and "RANK" in process.environ():
                    found.append(process)
        return found

    def restore(self, node: str) -> None:
        """It is back."""
        self.do(HERE / "cluster_up.sh", "--node", node)

    def submit(self, log: Path, *words: object, **environment: str) -> "SlurmJob":
        """sbatch with these words, the log there."""
        number = self.do("sbatch", "--parsable", f"--output={log}", *words, **environment).strip()
        return SlurmJob(self, number, log)


class SlurmJob:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self.log = cluster, number, log

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S*)", self.cluster.do("scontrol", "show", "job", self.number))
        assert found is not None, name
        return found[1]

    def other_nodes(self) -> list[str]:
        """Its nodes without the one that runs the script."""
        nodes = self.cluster.do("scontrol", "show", "hostnames", self.field("NodeList")).split()
        return [node for node in nodes if node != self.field("BatchHost")]

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text() if self.log.is_file() else ""

    def wait_for(self, text: str) -> None:
        """Until the log holds `text`."""
        end = time.monotonic() + PATIENCE
        while text not in self.text():
            state = self.field("JobState")
            assert state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), (state, self.text())
            assert time.monotonic() < end, (text, state, self.text())
            time.sleep(0.2)

    def end(self) -> str:
        """Wait for the last state."""
        end = time.monotonic() + PATIENCE
        while (state := self.field("JobState")) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < end, (state, self.text())
            time.sleep(0.5)
        return state


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(f"no Slurm on this machine: {reason}")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mlm-slurm-", dir="/tmp")))  # sockets want short paths
    try:
        up = subprocess.run([HERE / "cluster_up.sh"], env=cluster.environment, capture_output=True, text=True)
        if up.returncode and shutil.which("slurmctld") is None:
            pytest.skip("no Slurm on this machine: its packages could not be installed")
        assert up.returncode == 0, up.stderr
        yield cluster
    finally:
        subprocess.run([HERE / "cluster_down.sh"], env=cluster.environment, check=False)


def words(data: Path, run: Path, *more: str) -> list[str]:
    """Config and overrides of a tiny run."""
    return [
        "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", f"train.steps={STEPS}",
        "checkpoint.interval=5", "memory.mode=unique", "monitor.peak_tflops=1", "train.device=cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, without Slurm."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    mlm_train("pretrain", *words(data, run))
    return run
