"""Starting several ranks: groups and sockets, and the number by which they meet."""

from tests.ranks import run_on_ranks

WORLD = 5  # no power of two


def test_few_sockets_and_groups_and_rounds_by_one_number() -> None:
    tied = {"kind": "base", "tie_word_embeddings": True}
    outcome = run_on_ranks("tests.parallel.start_cases:start", WORLD, model=tied)
    assert outcome["lazy"] == "1"
    # The store's, and listeners of the world's group and of four others; all-to-all they would be 25.
    assert max(outcome["opened"]) <= 10, outcome["opened"]
    assert outcome["unused"] == ["model", "embedding", "stage"] and not outcome["ahead"]
    assert outcome["values"] == [[WORLD - 1] * 7] * WORLD
    assert outcome["seen"] == [[0, 1, 2]] * WORLD
    assert outcome["errors"] == ["the second file is gone"] * WORLD
