"""What each token counts in the choice of low rank."""

import numpy as np

from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.tol.build.budget import has_ranks
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.serve.frequency import counts_of, row_weights


def row_weights_of(text: PreparedData, vocab: int, spec: TableSpec) -> np.ndarray:
    """What each row's squared error counts, fp32 [vocab]: see row_weights.

    Raises UserError where nothing is cut to low rank, or the text is of another tokenizer.
    """
    if not has_ranks(spec):
        raise UserError(
            "--weigh-by chooses among directions of low rank: give --rank or --budget, or leave it out"
        )
    if text.vocab_size > vocab:
        raise UserError(
            f"{text.path} has {text.vocab_size} ids, but the model {vocab}: give data of its tokenizer"
        )
    return row_weights(counts_of(text), vocab)
