"""vLLM's tests. They run where it is installed (`make test-vllm`), but for those of options and checks."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["test_engine.py", "test_server.py"]

MODELS = {
    "memory": ("kind=memory",),
    "flex": ("kind=flex", "compute_intermediate_size=96"),
    "linear": (
        "kind=flex", "compute_intermediate_size=64", "compute_form=linear", "compute_input=post_attention",
        "tie_word_embeddings=true", "memory_scale=[1.0,0.5,0.0,1.0]",
    ),
    "base": ("kind=base",),
}  # fmt: skip
TABLES = ("bfloat16", "float16", "int8", "int4", "rank", "mixed", "dropped")  # of flex, beside fp32
NEW_TOKENS = 256
# No binding to cores: tests run beside each other. HF_HUB_OFFLINE: nothing is asked of the hub.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that prepare.py fills: an export and a fp32 table of each of MODELS, and TABLES of flex."""
    folder = tmp_path_factory.mktemp("made")
    command = [ROOT / ".venv/bin/python", "-m", "tests.vllm.prepare", folder]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def prompts(made: Path) -> list[list[int]]:
    """Twenty beginnings of 5 to 290 ids of text that was not trained on."""
    import mlm_train

    encode = mlm_train.load(made / "memory").encode
    lines = (made / "text/validation.jsonl").read_text().splitlines()
    ids = [token for line in lines[:20] for token in encode(json.loads(line)["text"])]
    return [ids[100 * number :][: 5 + 15 * number] for number in range(20)]


@pytest.fixture(scope="session")
def expected(made: Path, prompts: list[list[int]]) -> Callable[..., list[list[int]]]:
    """Our decoder's greedy tokens after the prompts: expected(model, table=None, ...)."""
    import mlm_train

    def tokens(model: str, tol: str | None = None, new: int = NEW_TOKENS, **options: Any) -> list[list[int]]:
        loaded = mlm_train.load(made / model, None if tol is None else made / tol, **options)
        done = loaded.generate(prompts, len(prompts), max_new_tokens=new, ignore_eos=True)
        return [one.ids for one in done]

    return tokens


@pytest.fixture
def complete(
    made: Path, prompts: list[list[int]], tmp_path: Path
) -> Callable[..., tuple[list[list[list[int]]], str]]:
    """Run complete.py on the prompts: its result (empty if it fails), and what it wrote."""

    def run(
        model: str, tables: Sequence[dict[str, Any]] = (), new: int = NEW_TOKENS, **options: Any
    ) -> tuple[list[list[list[int]]], str]:
        order, result = tmp_path / "order.json", tmp_path / "result.json"
        options = {"dtype": "float32", "enforce_eager": True} | options
        tree = {"model": str(made / model), "options": options, "prompts": prompts, "new_tokens": new}
        order.write_text(json.dumps(tree | {"tables": list(tables)}))
        one = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tables else {}  # its table is replaced
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.complete", order, result],
            cwd=ROOT, env=os.environ | ENVIRONMENT | one, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        said = done.stdout + done.stderr
        return (json.loads(result.read_text()) if result.exists() else []), said

    return run
