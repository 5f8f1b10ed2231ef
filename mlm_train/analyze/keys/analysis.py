"""`analyze keys`: all layers of a model, one after another; a finished one is not done again."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mlm_train.analyze.keys.coefficients import CHUNK, LayerKeys
from mlm_train.analyze.keys.folder import DEFINITIONS, FORMAT, INDEX, Index, KeysFolder, Settings, Statistics
from mlm_train.analyze.keys.layer import analyse_layer, passes
from mlm_train.checkpoint.reading.logical_folder import OpenedModel, open_model
from mlm_train.errors import UserError
from mlm_train.tol.tools.vocabulary import Vocabulary
from mlm_train.utils.checks import Check
from mlm_train.utils.files import locked, refuse_used, writing


def analyse_keys(
    model: str | Path,
    out: str | Path,
    settings: Settings,
    layers: Sequence[int] | None = None,
    verify: Check = "full",
) -> Iterator[Statistics]:
    """Yield the statistics of these layers (default: all), those that are finished already first of all.

    Raises UserError for a base model, for settings that do not fit it, and for an output of something else.
    """
    out = Path(out)
    if not (out / INDEX).exists():
        refuse_used(out)
    with open_model(model, needs_ffn_m=True, verify=verify) as opened, writing(out):
        _check(settings, opened)
        index = Index(
            format=FORMAT,
            model=str(opened.path.absolute()),
            fingerprint=opened.fingerprint,
            vocab_size=opened.config.vocab_size,
            num_layers=opened.config.num_hidden_layers,
            keys=opened.config.intermediate_size,
            settings=settings,
            definitions=DEFINITIONS,
        )
        with locked(out, "being written"):
            folder = KeysFolder.begin(out, index)
            yield from _all(folder, opened, range(index.num_layers) if layers is None else layers)


def _check(settings: Settings, model: OpenedModel) -> None:
    vocabulary = model.config.vocab_size
    most = min(CHUNK, vocabulary)  # the first chunk has the first centres
    if not 2 <= settings.clusters <= most:
        raise UserError(f"--clusters {settings.clusters}: give 2 to {most}")
    if not 1 <= settings.top_k <= CHUNK:
        raise UserError(f"--top-k {settings.top_k}: give 1 to {CHUNK}")


def _all(folder: KeysFolder, model: OpenedModel, layers: Sequence[int]) -> Iterator[Statistics]:
    vocabulary = Vocabulary.of(model.config.vocab_size, model)
    finished = folder.layers
    left = [layer for layer in layers if layer not in finished]
    yield from (folder.statistics(layer) for layer in layers if layer in finished)
    texts = [vocabulary.text(token) for token in range(vocabulary.size)] if left else []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("analyze keys", total=len(left) * passes(vocabulary.size) * vocabulary.size)
        for layer in left:
            progress.update(bar, description=f"layer {layer}")
            keys = LayerKeys(model, layer)
            found = analyse_layer(folder, keys, layer, texts, lambda n: progress.advance(bar, n))
            if progress.disable:
                line = (
                    f"layer {layer}: {found.seconds:.0f} s, {len(left) - left.index(layer) - 1} layers left"
                )
                print(line, file=sys.stderr, flush=True)
            yield found
