"""Create an environment and install the pinned packages, with the right build of torch.

usage: python3.11 tools/install.py requirements.txt [FOLDER]      (default: .venv)

A torch version has a CUDA build and a CPU build. Without an NVIDIA GPU, where the default index would give
the CUDA build (gigabytes of unused libraries), the CPU wheel index is used instead.
TORCH_INDEX=URL sets an index; TORCH_INDEX=default keeps the default one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(home: Path, *arguments: str, capture: bool = False, index: str = "") -> str:
    """Run the pip of the environment at `home`. Returns its output if captured.

    `index`: a URL that may hold a password, so it is not passed in the command, which is visible to others.
    """
    command = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    environment = os.environ | ({"PIP_INDEX_URL": index} if index else {})
    pipe = subprocess.PIPE if capture else None
    done = subprocess.run(command, check=True, text=True, stdout=pipe, env=environment)
    return done.stdout or ""


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU with a driver."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def default_is_cuda(home: Path, pin: str) -> bool:
    """Whether the default index gives a build of torch that requires CUDA libraries.

    pip reads only the wheel's metadata for this.
    """
    question = ("--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", pin)
    report = json.loads(pip(home, "install", *question, capture=True))
    needs = report["install"][0]["metadata"].get("requires_dist", [])
    return any(need.startswith(("nvidia-", "cuda-")) for need in needs)


def main(requirements: str, folder: str = ".venv") -> None:
    """Install everything into the environment `folder` of the repository."""
    home = ROOT / folder
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit(f"install.py: Python 3.11, 3.12 or 3.13 is needed, this is {sys.version.split()[0]}")
    if not (home / "bin" / "pip").exists():
        print(f"creating {home}", flush=True)
        venv.create(home, with_pip=True)
    lines = (ROOT / requirements).read_text(encoding="utf-8").splitlines()
    pin = next(line.strip() for line in lines if line.startswith("torch=="))
    index = os.environ.get("TORCH_INDEX", "")
    if not index and not has_gpu() and default_is_cuda(home, pin):
        index = CPU_INDEX
    index = "" if index == "default" else index
    shown = re.sub(r"//[^/]*@", "//", index) or "default index"
    print(f"installing {pin} ({shown}) and the rest of {requirements}", flush=True)
    try:
        pip(home, "install", "--quiet", pin, index=index)
    except subprocess.CalledProcessError:
        if index != CPU_INDEX:
            raise
        print(f"{CPU_INDEX} cannot be used; taking the default build of {pin}", flush=True)
        pip(home, "install", "--quiet", pin)
    pip(home, "install", "--quiet", "-r", str(ROOT / requirements))
    pip(home, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
