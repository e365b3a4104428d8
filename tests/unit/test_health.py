"""Ranks hear of each other's failures and silence; here three of them over one store in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed import HashStore, Store

from lightning_stale import health
from lightning_stale.failures import RunFailedError
from lightning_stale.health import Health

Make = Callable[..., Health]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(health, "_BEAT_S", 0.01)
    monkeypatch.setattr(health, "_FAREWELL_S", 60.0)
    store, made = HashStore(), []

    def make(rank: int, world_size: int = 3, patience_s: float = 60.0, check: Callable[[], None] = int) -> Health:
        made.append(Health(store, "run", rank, world_size, patience_s, check))
        return made[-1]

    yield make
    monkeypatch.setattr(health, "_FAREWELL_S", 0.0)
    for one in made:
        stop(one)


def stop(one: Health) -> None:
    """Let a rank be silent from now on."""
    one._closing = True
    one._thread.join(timeout=10)
    assert not one._thread.is_alive()


class Counted:
    """A store that counts what it is asked."""

    def __init__(self, store: Store) -> None:
        self.store, self.requests = store, 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("world_size", [2, 50])
def test_a_beat_is_two_requests_whatever_the_number_of_ranks(world_size: int, make: Make) -> None:
    first, second = make(0, world_size), make(1, world_size)
    first.check(fresh=True)
    second.check(fresh=True)
    stop(first)
    stop(second)
    for rank in (first, second):
        counted = Counted(rank._store)
        rank._beat(counted)  # type: ignore[arg-type]
        assert counted.requests == 2
        counted.requests = 0
        rank._beat(counted)  # type: ignore[arg-type]
        assert counted.requests == 2


def test_all_hear_of_the_first_failure(make: Make) -> None:
    ranks = [make(rank) for rank in range(3)]
    for rank in ranks:
        rank.check()
        assert rank.failure is None
    ranks[2].fail("sigterm", "rank 2 received SIGTERM\nand more")
    ranks[1].fail("error", "rank 1 raised something else because of that")
    for rank in ranks:
        with pytest.raises(RunFailedError, match="rank 2 received SIGTERM\nand more") as caught:
            rank.check(fresh=True)
        assert caught.value.kind == "sigterm"
        with pytest.raises(RunFailedError, match="rank 2"):
            rank.blame()


def test_a_rank_that_is_not_heard_of_is_named_to_all(make: Make) -> None:
    first, second, third = make(0, patience_s=0.5), make(1), make(2)
    stop(third)
    with pytest.raises(RunFailedError, match="rank 2 has not been heard of"):
        first.blame()
    with pytest.raises(RunFailedError, match="rank 2 has not been heard of"):
        second.check(fresh=True)


def test_who_waits_for_one_rank_does_not_mind_the_silence_of_another(make: Make) -> None:
    first, _, third = make(0), make(1), make(2)
    stop(third)
    first.check(fresh=True)
    beats, _ = first._heard[2]
    first._heard[2] = (beats, float("-inf"))
    first.check([1])
    with pytest.raises(RunFailedError, match="rank 2 has not been heard of"):
        first.check([1, 2])


def test_a_question_is_answered_from_the_store(make: Make) -> None:
    first, second = make(0, world_size=2), make(1, world_size=2)
    first.ask(lambda store: store.set("key", "value"))
    assert second.ask(lambda store: store.get("key")) == b"value"


def test_who_waits_for_an_answer_hears_of_a_failure(make: Make) -> None:
    first, second = make(0, world_size=2), make(1, world_size=2)
    hangs = threading.Event()

    def question(_: Store) -> None:
        second.fail("error", "rank 1 raised ValueError")
        hangs.wait(timeout=30)

    class BreakOffError(Exception):
        pass

    def check() -> None:
        if second.failure is not None:
            raise BreakOffError

    first._check = check
    with pytest.raises(BreakOffError):
        first.ask(question)
    hangs.set()


def test_after_a_failure_rank_0_waits_for_the_farewells_of_all(make: Make) -> None:
    """The store ends with rank 0, and then holds nothing that another rank has not read."""
    ranks = [make(rank) for rank in range(3)]
    ranks[1].fail("error", "rank 1 raised ValueError")
    closing = threading.Thread(target=ranks[0].close, daemon=True)
    closing.start()
    ranks[1].close()
    assert closing.is_alive()
    assert ranks[0]._thread.is_alive()
    ranks[2].close()
    closing.join(timeout=10)
    assert not ranks[0]._thread.is_alive()
    assert all(rank.failure is not None for rank in ranks)


def test_without_a_failure_the_end_waits_for_nobody(make: Make) -> None:
    only = make(0)  # the others never come
    only.close()
    assert not only._thread.is_alive()


def test_a_lost_store_means_that_rank_0_is_gone(make: Make) -> None:
    rank = make(1)

    def broken(_: Store) -> None:
        raise RuntimeError("connection was reset")

    with pytest.raises(RunFailedError, match="rank 0, which all others meet at, is gone"):
        rank.ask(broken)
    with pytest.raises(RunFailedError, match="rank 0"):
        rank.check(fresh=True)
    rank.close()
