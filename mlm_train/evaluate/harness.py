"""A model of ours in lm-evaluation-harness (0.4.13), under the name `memoryllm`.

    import mlm_train.evaluate.harness  # registers it
    lm_eval.simple_evaluate(model="memoryllm", model_args="pretrained=exports/mine,tol=tol/mine", tasks=[...])

Needs pip install 'mlm-train[lm-eval]'.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from mlm_train.errors import UserError
from mlm_train.evaluate.likelihood import Likelihood, Request, likelihoods
from mlm_train.inference.arguments import dropped_layers, memory_scale
from mlm_train.inference.language_model import LanguageModel, load
from mlm_train.inference.sampling import Sampling

BATCH_SIZE = 8
MAX_GEN_TOKS = 256  # as the harness' own models
SAMPLED = ("top_k", "top_p", "repetition_penalty")


@register_model("memoryllm")
class MemoryLM(TemplateLM):
    """An export, a run's newest checkpoint, or a checkpoint, with FFN-M computed or looked up.

    pretrained: its path, or a LanguageModel. tol: the folder of a table. alpha: the factor on FFN-M's output,
    one number or one per layer, such as 1:1:0.5. drop_layers: layers whose FFN-M adds nothing, such as 0:5-7.
    batch_size: questions per forward pass. max_length: most tokens read at once (default: the model's
    maximum). max_gen_toks: new tokens where a task does not say. add_bos, device, dtype: see
    mlm_train.load. Raises UserError for values that do not fit the model.
    """

    after_batch: Callable[[], object] = staticmethod(lambda: None)

    def __init__(
        self,
        pretrained: str | LanguageModel,
        tol: str | None = None,
        alpha: float | str | Sequence[float] | None = None,
        drop_layers: int | str | Sequence[int] | None = None,
        batch_size: int | str = BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos: bool | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LanguageModel):
            self.lm = pretrained
        else:
            self.lm = load(
                pretrained,
                tol,
                device=device,
                dtype=dtype,
                memory_scale=memory_scale(_joined(alpha), "alpha"),
                dropped_layers=dropped_layers(_joined(drop_layers), "drop_layers"),
                add_bos=add_bos,
            )
        self._device = self.lm.decoder.device
        self.batch_size = _batch_size(batch_size, max_batch_size)
        longest = self.lm.folder.config.max_position_embeddings
        self.max_length = longest if max_length is None else int(max_length)
        if not 1 <= self.max_length <= longest:
            raise UserError(
                f"max_length {max_length}: give 1 to {longest}, the model's max_position_embeddings"
            )
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.lm.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context: begin of text if the model was trained with it, else eot."""
        return self.lm.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness' caches."""
        return self.lm.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **other: Any) -> list[int]:
        """Ids of a text, after the begin-of-text token if the model was trained with it.

        add_special_tokens=False: without it.
        """
        return self.lm.tokenizer.encode(string) if add_special_tokens is False else self.lm.encode(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether greedy decoding gives it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm or not sys.stderr.isatty()
        )
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **other: Any,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids); too long a context loses its beginning."""
        scored = self._likelihoods(
            [self._request(context, continuation) for _, context, continuation in requests], disable_tqdm
        )
        answers = [(one.logprob, one.greedy) for one in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in the harness' windows, each token once."""
        windows: list[tuple[int, Request]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, Request(ids, labels)) for ids, labels in rolled]
        found = [0.0] * len(requests)
        scored = self._likelihoods([window for _, window in windows], disable_tqdm)
        for (number, _), one in zip(windows, scored, strict=True):
            found[number] += one.logprob
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each (context, generation_kwargs), up to a stop string; the longest contexts first.

        Raises UserError for an argument that has no counterpart here.
        """
        generations = []
        for number, request in enumerate(requests):
            context, arguments = request.args
            sampling = self._sampling(arguments, seed=number)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={sampling.max_new_tokens} leaves no room for a context in "
                    f"max_length={self.max_length}: set a smaller one in the task's generation_kwargs"
                )
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            generations.append(self.lm.begin(ids, sampling))
        order = sorted(range(len(requests)), key=lambda number: -len(generations[number].prompt))
        longest_first = [generations[number] for number in order]
        completions = self.lm.complete(longest_first, self.batch_size, self.after_batch)
        texts = [""] * len(requests)
        for number, completion in zip(order, completions, strict=True):
            texts[number] = completion.text or ""
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        if len(continuation) > self.max_length:
            raise UserError(
                f"an answer of {len(continuation)} tokens is longer than max_length={self.max_length}: "
                "give a model with a longer context"
            )
        return Request([*context, *continuation][-(self.max_length + 1) :][:-1], continuation)

    def _likelihoods(self, requests: Sequence[Request], disable_tqdm: bool) -> list[Likelihood]:
        decoder = self.lm.decoder
        return likelihoods(
            decoder.model, decoder.source, requests, self.batch_size, self.after_batch, show=not disable_tqdm
        )

    def _sampling(self, arguments: dict[str, Any], seed: int) -> Sampling:
        """Of the harness' generation_kwargs; each request has a seed of its own, as its place among them."""
        given: dict[str, Any] = {**normalize_gen_kwargs(arguments, self.max_gen_toks)}
        samples = given.pop("do_sample", False)
        temperature = float(given.pop("temperature", 1.0)) if samples else 0.0
        given.pop("temperature", None)
        stop = [text for text in given.pop("until") if text]
        most = given.pop("max_gen_toks")
        chosen = {name: given.pop(name) for name in SAMPLED if name in given}
        if given:
            known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *SAMPLED))
            raise UserError(f"generation_kwargs: {min(given)} is not known; known are {known}")
        return Sampling(temperature=temperature, seed=seed, max_new_tokens=most, stop=stop, **chosen)


def _joined(value: Any) -> str | None:
    """A model argument as an option has it: 1,2,3 for [1, 2, 3] and for 1:2:3 (commas end arguments)."""
    if value is None:
        return None
    return str(value).replace(":", ",") if isinstance(value, str | int | float) else ",".join(map(str, value))


def _batch_size(given: int | str, most: int | None) -> int:
    """A number; for the harness' `auto` the default, or max_batch_size."""
    if str(given).startswith("auto"):
        return BATCH_SIZE if most is None else int(most)
    if not str(given).isdecimal() or int(given) < 1:
        raise UserError(f"batch_size {given}: give a number, at least 1")
    return int(given)
