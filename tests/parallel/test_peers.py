"""Peer check: the same `base` weights in megatron-core's layers and in transformers give the same loss."""

from tests.ranks import run_on_ranks

# Even sizes, since megatron-core's layers reject sizes that the ranks do not divide.
MODELS = {
    "untied": {"kind": "base"},
    "tied": {"kind": "base", "tie_word_embeddings": True},
    "untied gqa": {"kind": "base", "num_key_value_heads": 2},
    "tied gqa": {"kind": "base", "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def test_megatron_and_transformers_agree() -> None:
    """CE, z and all gradients: TP2 in our layers and megatron-core's, and a Llama on one process."""
    results = run_on_ranks("tests.parallel.peer_cases:run_cases", 2, cases=list(MODELS.values()))
    for name, error in zip(MODELS, results, strict=True):
        print(name, {key: f"{value:.1e}" for key, value in error.items()})
        assert len(error) == 6, name
        assert max(error.values()) <= 1e-5, (name, error)
