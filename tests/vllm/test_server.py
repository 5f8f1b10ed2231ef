"""`mlm-train serve`: a real server of vLLM, asked by the official client."""

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.commands import ROOT, free_port, listening
from tests.vllm.conftest import ENVIRONMENT, NEW_TOKENS

Expected = Callable[..., list[list[int]]]
IDS = {"ignore_eos": True, "return_token_ids": True}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


class Server:
    """`mlm-train serve` as a process, and a client of it."""

    def __init__(self, folder: Path, *words: object) -> None:
        folder.mkdir(exist_ok=True)
        self.log, self.port = folder / "log", free_port()
        self.temporary = Path(tempfile.mkdtemp(prefix="mlm-vllm-", dir="/tmp"))  # sockets need short paths
        command = [sys.executable, "-m", "mlm_train", "serve", *map(str, words)]
        at = command.index("--")
        command[at:at] = ["--port", str(self.port), "--name", "mine"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | ENVIRONMENT | {"TMPDIR": str(self.temporary)},
                stdout=log, stderr=log,
            )  # fmt: skip
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def started(self) -> "Server":
        """Wait until it answers."""
        end = time.monotonic() + 180
        while True:
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
                return self
            time.sleep(0.3)

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        values = [
            float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split()[:1] == [name]
        ]
        assert values, name
        return sum(values)

    def complete(self, prompt: str | list[int], new: int = NEW_TOKENS, **words: Any) -> Any:
        """A greedy completion."""
        given = {"temperature": 0.0, "extra_body": IDS} | words
        return self.client.completions.create(model="mine", prompt=prompt, max_tokens=new, **given)

    def ids(self, prompt: list[int], new: int = NEW_TOKENS) -> list[int]:
        """Its new tokens."""
        return self.complete(prompt, new).choices[0].token_ids

    def stop(self) -> int:
        """Ctrl-C; nothing of it may be left. Returns its exit code."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        assert not psutil.wait_procs(children, 20)[1], "processes are left"
        assert not list(self.temporary.glob("mlm-serve-*"))
        return code

    def end(self) -> None:
        """End it where a test has failed."""
        self.process.terminate()
        self.process.wait(60)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Kind memory in fp32 from a copied table on disk; long prompts are read in chunks."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(made / "memory-tol", folder / "tol")
    (folder / "template").write_text(TEMPLATE)
    tol = ("--tol", folder / "tol", "--tol-tier", "disk", "--tol-cache", "200KB")
    further = ("--dtype", "float32", "--max-num-batched-tokens", 64, "--max-num-seqs", 32)
    server = Server(folder, made / "memory", *tol, "--", *further, "--chat-template", folder / "template")
    try:
        yield server.started()
    finally:
        server.end()


def test_greedy_tokens_are_our_decoders(server: Server, prompts: list[list[int]], expected: Expected) -> None:
    """20 prompts of 256 tokens, the long ones read in chunks; one of them again, from the prefix cache."""
    wanted = expected("memory", "memory-tol")
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(server.ids, prompts)) == wanted
    before = server.metric("vllm:prefix_cache_hits_total")
    assert server.ids(prompts[-1]) == wanted[-1]
    assert server.metric("vllm:prefix_cache_hits_total") >= before + 128


def test_counters_of_the_table_are_among_the_metrics(server: Server, prompts: list[list[int]]) -> None:
    before = {name: server.metric(f"mlm_tol_{name}_total") for name in ("rows", "hits", "misses", "distinct")}
    bytes_before = server.metric("mlm_tol_bytes_total")
    server.ids([7, 300, 7, 411], 1)
    after = {name: server.metric(f"mlm_tol_{name}_total") for name in before}
    assert after["rows"] - before["rows"] == 4 and after["distinct"] - before["distinct"] == 3
    assert after["hits"] + after["misses"] == after["distinct"]
    missed = after["misses"] - before["misses"]
    assert server.metric("mlm_tol_bytes_total") - bytes_before == missed * 4 * 128 * 4
    assert server.metric("mlm_tol_wait_seconds_total") > 0
    assert server.metric("vllm:generation_tokens_total") > 0


def test_the_official_client(server: Server) -> None:
    """Models, completions, stop, usage, log-probabilities, streaming, chat."""
    assert [model.id for model in server.client.models.list()] == ["mine"]
    whole = server.complete("def test_", 24)
    text, usage = whole.choices[0].text, whole.usage
    assert usage.completion_tokens == 24 and usage.total_tokens == usage.prompt_tokens + 24
    assert whole.choices[0].finish_reason == "length"
    cut = server.complete("def test_", 24, stop=[text[3:6]]).choices[0]
    assert cut.text == text[: text.index(text[3:6])] and cut.finish_reason == "stop"
    logprobs = server.complete("def test_", 3, logprobs=2).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 3 and all(value <= 0 for value in logprobs.token_logprobs)
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)
    pieces = [piece.choices[0].text for piece in server.complete("def test_", 24, stream=True)]
    assert "".join(pieces) == text and len(pieces) > 5
    messages = [{"role": "user", "content": "def test_"}]
    chat: dict[str, Any] = {"model": "mine", "messages": messages, "temperature": 0.0, "max_tokens": 12}
    answer = server.client.chat.completions.create(**chat)
    assert answer.usage.completion_tokens == 12
    streamed = server.client.chat.completions.create(**chat, stream=True)
    assert (
        "".join(part.choices[0].delta.content or "" for part in streamed) == answer.choices[0].message.content
    )


def test_fifty_clients_and_one_that_leaves(
    server: Server, prompts: list[list[int]], expected: Expected
) -> None:
    wanted = [ids[:40] for ids in expected("memory", "memory-tol")]
    leaving = server.complete("def test_", 500, stream=True)
    next(iter(leaving))
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda number: server.ids(prompts[number % 20], 40), range(50)))
    assert found == [wanted[number % 20] for number in range(50)]
    leaving = server.complete("def test_", 500, stream=True)
    next(iter(leaving))
    leaving.close()
    end = time.monotonic() + 20
    while server.metric("vllm:num_requests_running"):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert server.ids(prompts[0], 40) == wanted[0]


def test_bad_requests_are_refused_alone(server: Server, prompts: list[list[int]]) -> None:
    """A token that is not in the vocabulary, a prompt that does not fit; what fits of a text is generated."""
    for prompt in ([5, 99_999], [5] * 700):
        with pytest.raises(openai.BadRequestError):
            server.complete(prompt, 4)
    assert len(server.ids([5] * 600, 100)) == 640 - 600
    assert len(server.ids(prompts[0], 4)) == 4


def test_a_table_that_is_deleted_while_it_is_served(
    server: Server, prompts: list[list[int]], expected: Expected
) -> None:
    """Open files stay readable. Then Ctrl-C ends all of it."""
    shutil.rmtree(server.log.parent / "tol")
    shifted = [[number % 512 for number in range(11, 411)], *prompts[3:5]]
    assert server.ids(shifted[1]) == expected("memory", "memory-tol")[3]
    assert len(server.ids(shifted[0], 8)) == 8
    assert listening(psutil.Process(server.process.pid)) == {"127.0.0.1"}
    assert server.stop() == 130
    assert "mlm-train: stopped by the user" in server.said()


def test_a_partition_that_is_truncated_ends_the_engine(made: Path, tmp_path: Path) -> None:
    """vLLM has no failure of one request alone: the server ends, with the reason in its log."""
    shutil.copytree(made / "flex-tol", tmp_path / "tol")
    tol = ("--tol", tmp_path / "tol", "--tol-tier", "disk")
    server = Server(tmp_path / "server", made / "flex", *tol, "--", "--dtype", "float32").started()
    try:
        assert len(server.ids([5, 6], 4)) == 4
        for file in (tmp_path / "tol").glob("*.safetensors"):
            os.truncate(file, 5000)
        with pytest.raises(openai.APIError):
            server.complete([400, 411], 4)
        assert server.process.wait(60) == 1
        assert "could not be read" in server.said() and "ends before byte" in server.said()
    finally:
        server.end()
