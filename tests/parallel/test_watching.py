"""Who notices a rank that is stopped: ranks as threads, with the watchdogs, boards and store of real ones."""

import pytest
from torch.distributed import TCPStore

from mlm_train.bench.watch_world import simulate
from mlm_train.errors import HUNG


@pytest.mark.parametrize("stopped", [[0], [3], [4, 5, 6, 7], [0, 1]])
def test_a_stopped_rank_speaker_or_node_is_missed(stopped: list[int]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outcome = simulate(store.port, 8, 4, 2.0, stopped, moving=True)
    assert outcome["codes"] == [HUNG] and outcome["report"].count("no progress for 2 s") == 1, outcome
    for rank in range(8):
        silent = f"stuck:   rank {rank} (" in outcome["report"]
        assert silent == (rank in stopped), outcome["report"]
    assert outcome["report"].count("last heartbeat") == len(stopped), outcome["report"]
