"""Greedy tokens of an engine of vLLM, in a process of its own: python -m tests.vllm.complete ORDER RESULT.

The order: `model`, a folder; `options` of vLLM's LLM; `prompts`, ids; `new_tokens`; `tables`: options of
tables that its model looks FFN-M up in, one after another (an empty list: as `options` say).
"""

import json
import sys
from pathlib import Path
from typing import Any

from mlm_train.tol.serve.source import TolSource
from mlm_train.vllm.options import TolOptions


def main(order: dict[str, Any]) -> list[list[list[int]]]:
    """The new tokens of each prompt, for each table."""
    from vllm import LLM, SamplingParams

    llm = LLM(order["model"], **order["options"])
    sampling = SamplingParams(temperature=0.0, max_tokens=order["new_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    found = []
    for tol in order["tables"] or [None]:
        if tol is not None:
            options = TolOptions.of({"tol": tol})
            assert options is not None

            def look_up(model: Any, options: TolOptions = options) -> None:
                model.model.table = TolSource.of_export(
                    options.folder, order["model"], model.shape, options.store_options(), options.patches
                )

            llm.apply_model(look_up)
            llm.reset_prefix_cache()
        found.append([list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling)])
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
