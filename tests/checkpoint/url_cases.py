"""What the ranks of test_url.py run: saves to a URL, and a resume from there."""

import os
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from mlm_train.checkpoint.fetch import fetch_newer
from mlm_train.checkpoint.load import load_training_state
from mlm_train.checkpoint.saver import Saver
from mlm_train.parallel import runtime as processes
from mlm_train.train.preflight import newest_of
from mlm_train.train.resume import intact_checkpoint
from mlm_train.utils import url_folder
from mlm_train.utils.url_folder import UrlFolder
from tests.checkpoint.save_cases import DATA, progress_at
from tests.checkpoint.share_cases import Layout, _config, _save, _tensors
from tests.parallel.parity_cases import make_trainer, my_batches


def save(
    folder: str, url: str, model: dict, layout: Layout, environment: dict, patience: float, steps: int
) -> dict[str, Any]:
    """Train and save. Returns the log's lines, and by rank the files that it has uploaded."""
    os.environ |= environment
    config = _config(model, layout, train={"output": folder}, checkpoint={"url": url, "keep_latest_k": 2})
    runtime = processes.start(config)
    said, files = list[str](), list[str]()
    write = UrlFolder.write_blocks

    def writing(self: UrlFolder, name: str, *more: Any) -> Generator[None, None, None]:
        yield from write(self, name, *more)
        files.append(f"{self}/{name}".removeprefix(f"{url}/"))

    with ExitStack() as stack:
        stack.enter_context(patch.object(url_folder, "PATIENCE", patience))
        stack.enter_context(patch.object(UrlFolder, "write_blocks", writing))
        trainer = make_trainer(config, runtime)
        saver = Saver(trainer.engine, runtime, config, DATA, lambda _: None, said.append)
        for step in range(1, steps + 1):
            trainer.step(my_batches(runtime, step, config), 1e-2)
            saver.save(progress_at(step))
            saver.finish()
        return {"said": said, "files": runtime.gather(lambda: files)}


def resume(folder: str, url: str, model: dict, layout: Layout, environment: dict) -> dict[str, Any]:
    """Resume in an empty folder, save again. Returns the lines, what differs, and the bytes read by rank."""
    os.environ |= environment
    config = _config(model, layout, train={"output": folder}, checkpoint={"url": url})
    runtime = processes.start(config)
    read, blocks = [0], UrlFolder.blocks

    def counting(self: UrlFolder, name: str) -> Any:
        for block in blocks(self, name):
            read[0] += len(block)
            yield block

    trainer = make_trainer(config, runtime)
    with patch.object(UrlFolder, "blocks", counting):
        lines = fetch_newer(config, runtime, lambda *_: None)
        found = intact_checkpoint(config, runtime, partial(newest_of, config))
        assert found is not None
        load_training_state(found.folder, found.manifest, trainer.engine, runtime)
    written = _save(f"{folder}/again", found.progress.step, trainer, config, runtime)
    differ = list[str]()
    if runtime.is_rank_0:
        one, other = _tensors(found.folder), _tensors(written)
        differ = [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]
    return {
        "lines": lines,
        "differ": differ,
        "read": runtime.gather(lambda: read[0]),
        "bytes": sum(entry.bytes for entry in found.manifest.every_file),
    }
