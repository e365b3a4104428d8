"""Ranks hear of each other's failures and silence; here three of them over one store in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore, Store

from lightning_stale import health
from lightning_stale.failures import RunFailedError
from lightning_stale.health import Health

Make = Callable[..., Health]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(health, "_BEAT_S", 0.01)
    monkeypatch.setattr(health, "_LINGER_S", 60.0)
    store, made = HashStore(), []

    def make(rank: int, world_size: int = 3, patience_s: float = 60.0) -> Health:
        made.append(Health(store, "run", rank, world_size, patience_s))
        return made[-1]

    yield make
    for one in made:
        one._stop.set()
        one._thread.join(timeout=10)


def test_all_hear_of_the_first_failure(make: Make) -> None:
    ranks = [make(rank) for rank in range(3)]
    for rank in ranks:
        rank.check()
        assert rank.failure() is None
    ranks[2].fail("sigterm", "rank 2 received SIGTERM\nand more")
    ranks[1].fail("error", "rank 1 raised something else because of that")
    for rank in ranks:
        with pytest.raises(RunFailedError, match="rank 2 received SIGTERM\nand more") as caught:
            rank.check()
        assert caught.value.kind == "sigterm"
        with pytest.raises(RunFailedError, match="rank 2"):
            rank.blame()


def test_a_rank_that_is_not_heard_of_is_named_to_all(make: Make) -> None:
    first, second, third = make(0, patience_s=0.5), make(1), make(2)
    third._stop.set()
    third._thread.join()
    with pytest.raises(RunFailedError, match="rank 2 has not been heard of"):
        first.blame()
    with pytest.raises(RunFailedError, match="rank 2 has not been heard of"):
        second.check()


def test_after_a_failure_the_end_waits_until_all_know(make: Make) -> None:
    """Each counts itself in its heartbeat; the store, which ends with rank 0, then holds nothing that one has not."""
    ranks = [make(rank) for rank in range(3)]
    ranks[1].fail("error", "rank 1 raised ValueError")
    ranks[0].close()
    assert int(ranks[0].store.add("know", 0)) == 3
    assert not ranks[0]._thread.is_alive()
    for rank in ranks[1:]:
        assert rank._failure is not None


def test_without_a_failure_the_end_waits_for_nobody(make: Make) -> None:
    only = make(0)  # the others never come
    only.close()
    assert not only._thread.is_alive()


def test_a_lost_store_means_that_rank_0_is_gone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make(1)

    def broken(_: Store) -> None:
        raise RuntimeError("connection was reset")

    monkeypatch.setattr(Health, "_read_failure", staticmethod(broken))
    with pytest.raises(RunFailedError, match="rank 0 is gone"):
        rank.check()
    rank.close()
