"""All ranks wait for each other; here three of them over one store in one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from lightning_stale import health
from lightning_stale.failures import RunFailedError
from lightning_stale.health import Health
from lightning_stale.roll_call import RollCall

RANKS = 3
CALLS = 30


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Health]:
    monkeypatch.setattr(health, "_BEAT_S", 0.01)
    monkeypatch.setattr(health, "_FAREWELL_S", 0.0)
    store = HashStore()
    return [Health(store, "run", rank, RANKS, 60.0, int) for rank in range(RANKS)]


def close(ranks: list[Health]) -> None:
    for rank in ranks:
        rank.close()


def test_nobody_goes_on_before_all_have_come(ranks: list[Health]) -> None:
    came, lock = [0] * RANKS, threading.Lock()

    def call(rank: int) -> list[int]:
        roll_call, fewest = RollCall(ranks[rank], rank, RANKS), []
        for number in range(CALLS):
            with lock:
                came[rank] = number + 1
            roll_call.wait()
            with lock:
                fewest.append(min(came))
        return fewest

    with ThreadPoolExecutor(RANKS) as threads:
        for fewest in threads.map(call, range(RANKS)):
            assert all(count > number for number, count in enumerate(fewest))
    left = [number for number in range(CALLS + 1) if ranks[0]._store.check([f"roll-call/{number}"])]
    assert left == [CALLS - 1, CALLS]  # the store does not grow
    close(ranks)


def test_who_waits_hears_of_a_failure(ranks: list[Health]) -> None:
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(RollCall(ranks[0], 0, RANKS).wait)
        ranks[1].fail("error", "rank 1 raised ValueError")
        with pytest.raises(RunFailedError, match="rank 1 raised ValueError"):
            waiting.result(timeout=30)
    close(ranks)
