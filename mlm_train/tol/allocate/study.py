"""The study of `mlm-train tol allocate`: measures every option, and chooses by budget or tolerance."""

import argparse
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mlm_train.errors import UserError
from mlm_train.evaluate.scorer import Scorer
from mlm_train.tol.allocate.mixes import best_kept, best_mixes, choices, layer_options, room_of, size_of
from mlm_train.tol.allocate.sensitivity import Choice, Notes, Trial, measure, spectra_of
from mlm_train.tol.format.index import INDEX, check_fits
from mlm_train.tol.format.schemes import ALIGNMENT, GROUP, Scheme
from mlm_train.tol.lowrank.knapsack import Mix
from mlm_train.tol.serve.reader import TableReader
from mlm_train.utils.files import sha256_of


class Study:
    """The table, the model, and the measured cost of each option for each layer."""

    def __init__(self, args: argparse.Namespace, table: TableReader, console: Console) -> None:
        self.table, self.index = table, table.index
        shape = {"length": args.sequence_length, "micro_batch": args.micro_batch_size}
        self.scorer = Scorer(args.model, args.data, **shape, verify=args.verify)
        windows = self.scorer.windows_of("train", args.samples)
        check_fits(Path(args.table), self.index, self.scorer.config)
        self.trial = Trial(self.table, spectra_of(self.table))
        self.options = choices(self.index.hidden_size)

        def progress(steps: Iterable[int]) -> Iterable[int]:
            hidden = not console.is_terminal
            return track(steps, "sensitivities", console=console, disable=hidden, transient=True)

        batches = list(windows.batches())
        self.notes = self._notes(args)
        self.costs = measure(self.scorer.model, self.trial, batches, self.options, progress, self.notes)
        self.layers = layer_options(self.costs, self.index.vocab_size, self.index.hidden_size)
        self.front = [self._with_headers(mix) for mix in best_mixes(self.layers)]
        if not self.front:
            raise UserError(
                f"no layer of {args.table} changes the loss of {args.model} on {args.data}: "
                "there is nothing to choose from; give more --samples"
            )
        self.exact = self.perplexity({})

    def _notes(self, args: argparse.Namespace) -> Notes:
        """The notes about this table, model, text and these options."""
        table = sha256_of(Path(args.table) / INDEX)
        options = [None if option is None else option.model_dump(mode="json") for option in self.options]
        text = [self.scorer.data.fingerprint, args.samples, args.sequence_length, args.micro_batch_size]
        return Notes(Path(args.output), [table, self.scorer.fingerprint, text, options])

    def size(self, chosen: Mapping[int, Choice]) -> int:
        """Bytes of a table's files, without the index."""
        return size_of(self.index, chosen)

    def perplexity(self, chosen: dict[int, Choice]) -> float:
        """Measure the perplexity on the validation split."""
        self.trial.chosen = chosen
        try:
            return self.scorer.score(self.trial).perplexity
        finally:
            self.trial.chosen = {}

    def of(self, mix: Mix) -> dict[int, Choice]:
        """A mix's choice for each layer."""
        picks = (self.options[pick] for pick in mix.picks)
        return dict(zip(self.index.layers, picks, strict=True))

    def growth(self, perplexity: float) -> float:
        """The increase over the perplexity with exact lookups, as a fraction."""
        return perplexity / self.exact - 1

    def _with_headers(self, mix: Mix) -> Mix:
        return mix._replace(bytes=self.size(self.of(mix)))

    def within(self, budget: int) -> Mix | None:
        """The best mix for a table of at most `budget` bytes; None if no kept layer fits."""
        mix = best_kept(self.layers, room_of(self.index, budget))
        return None if mix is None else self._with_headers(mix)

    def smallest(self, tolerance: float) -> Mix:
        """The smallest of the best mixes whose measured perplexity growth is within `tolerance`.

        By bisection, accurate to the bytes of a layer's padding; the largest mix if none is within it.
        """
        best, measured = self.front[-1], dict[Mix, float]()
        low, high = 0, best.bytes
        while high - low > self.index.vocab_size * ALIGNMENT:
            middle = (low + high) // 2
            mix = self.within(middle)
            if mix is not None and mix not in measured:
                measured[mix] = self.growth(self.perplexity(self.of(mix)))
            if mix is not None and measured[mix] <= tolerance:
                best, high = mix, min(middle, mix.bytes)
            else:
                low = middle
        return best

    @property
    def least(self) -> int:
        """Bytes of the smallest table that costs less than dropping all layers."""
        useful = [layer.bytes[layer.costs < layer.costs[0]] for layer in self.layers]
        room = min(int(sizes.min()) for sizes in useful if len(sizes))
        return room - room_of(self.index, 0)

    def uniform(self, size: int) -> dict[str, dict[int, Choice]]:
        """Uniform choices: int8, int4, and the largest rank in bfloat16 that fits into `size` bytes."""
        layers, hidden = self.index.layers, self.index.hidden_size
        uniform: dict[str, Choice] = {
            f"{dtype}, groups of {group}": Scheme(dtype=dtype, group_size=group)
            for dtype, group in (("int8", GROUP), ("int4", GROUP), ("int4", GROUP // 2))
        }

        def cut(rank: int) -> Scheme:
            return Scheme(dtype="bfloat16", rank=rank)

        ranks = range(1, hidden)
        if rank := bisect_right(ranks, size, key=lambda rank: self.size(dict.fromkeys(layers, cut(rank)))):
            uniform[f"rank {rank}, bfloat16"] = cut(rank)
        return {name: dict.fromkeys(layers, choice) for name, choice in uniform.items()}
