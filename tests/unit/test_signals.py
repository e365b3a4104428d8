"""Which rank a signal is said to have come to, under a parameter server; no processes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_stale import StaleSyncStrategy
from lightning_stale.failures import FailureKind, RunFailedError
from lightning_stale.strategies.updates.server_control import ServerControl

BROKEN = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711"


class Client:
    """Of a run in which another rank was the first to tell why it ends."""

    def __init__(self, first: RunFailedError) -> None:
        self.failure: RunFailedError | None = None
        self._first = first

    def abort(self, kind: str, text: str) -> RunFailedError:
        return self._first

    def summary(self) -> dict[str, Any]:
        self.failure = self._first
        return {}


def make(kind: FailureKind, text: str) -> Any:
    strategy: Any = StaleSyncStrategy()
    strategy._others.join(ServerControl(Client(RunFailedError(kind, text)), lambda: None, lambda _: None))  # type: ignore[arg-type]
    trainer = SimpleNamespace(
        _signal_connector=SimpleNamespace(received_sigterm=False), received_sigterm=False, interrupted=True
    )
    strategy._lightning_module = SimpleNamespace(trainer=trainer, _trainer=trainer)
    return strategy


def test_rank_0_says_that_it_has_received_the_signal_also_if_one_it_was_passed_on_to_was_faster(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy, error = make("sigterm", "rank 1 received SIGTERM"), SIGTERMException()
    strategy.report(error)
    with caplog.at_level(logging.WARNING, "lightning_stale"):
        strategy.on_exception(error)
    assert [record.getMessage() for record in caplog.records] == ["rank 0 received SIGTERM: the run ends, on all ranks"]


def test_an_error_is_reported_with_what_happened_before() -> None:
    strategy, error = make("error", "rank 1 raised ValueError"), RuntimeError(BROKEN)
    strategy.report(error)
    assert str(error.__cause__) == "rank 1 raised ValueError"


@pytest.mark.parametrize(
    ("kind", "raised"), [("error", RunFailedError), ("sigterm", SIGTERMException), ("interrupt", KeyboardInterrupt)]
)
def test_a_collective_that_breaks_because_of_a_signal_ends_this_rank_as_the_signal_does(
    kind: FailureKind, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError(BROKEN)

    monkeypatch.setattr(DDPStrategy, "barrier", broken)
    with pytest.raises(raised) as caught:
        make(kind, "rank 1 has ended").barrier()
    assert type(caught.value) is raised
