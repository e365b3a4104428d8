"""How a rank ends because of another one, and tells the others why it does; no processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_stale import DSPStrategy, HPSGDStrategy
from lightning_stale.failures import FailureKind, RunFailedError

BROKEN = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711"


class Control:
    """Knows why another rank has ended, and notes what it is told."""

    def __init__(self, failure: RunFailedError | None) -> None:
        self.failure = failure
        self.told: list[tuple[str, str]] = []
        self.others_come = True

    def blame(self) -> None:
        if self.failure is not None:
            raise self.failure

    def check(self, fresh: bool = False) -> None:
        self.blame()

    def fail(self, kind: str, text: str) -> RunFailedError | None:
        self.told.append((kind, text))
        return self.failure

    def meet(self, place: str, detail: str = "", region: str = "") -> None:
        if not self.others_come:
            self.blame()

    def close(self, finished: bool) -> None:
        self.closed = finished


def make(failure: RunFailedError | None, strategy_class: Any = HPSGDStrategy) -> tuple[Any, Control]:
    strategy: Any = strategy_class()
    control = Control(failure)
    strategy._others.join(control)
    trainer = SimpleNamespace(
        _signal_connector=SimpleNamespace(received_sigterm=False),
        received_sigterm=False,
        interrupted=False,
        global_step=4,
    )
    strategy._lightning_module = SimpleNamespace(trainer=trainer, _trainer=trainer)
    return strategy, control


def broken() -> None:
    raise RuntimeError(BROKEN)


@pytest.mark.parametrize(
    ("kind", "raised"),
    [("error", RunFailedError), ("sigterm", SIGTERMException), ("interrupt", KeyboardInterrupt)],
)
def test_a_broken_connection_raises_what_happened_on_the_other_rank(
    kind: FailureKind, raised: type[BaseException]
) -> None:
    failure = RunFailedError(kind, "rank 1 has ended")
    strategy, _ = make(failure)
    with pytest.raises(raised) as caught:
        strategy._others.guard(broken)
    assert failure in (caught.value, caught.value.__cause__)
    assert strategy.lightning_module.trainer._signal_connector.received_sigterm == (kind == "sigterm")


def test_a_broken_connection_that_nobody_is_to_blame_for_is_shown_as_it_is() -> None:
    strategy, _ = make(None)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        strategy._others.guard(broken)


def test_other_errors_pass_without_a_question() -> None:
    strategy, _ = make(RunFailedError("error", "rank 1 has ended"))

    def faulty() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        strategy._others.guard(faulty)


def test_a_collective_of_lightnings_that_breaks_is_reported_with_its_cause() -> None:
    failure = RunFailedError("error", "rank 1 has ended")
    strategy, control = make(failure)
    error = RuntimeError(BROKEN)
    strategy.report(error)
    assert error.__cause__ is failure
    assert control.told == []


def test_an_error_of_this_rank_is_told_to_the_others() -> None:
    strategy, control = make(None)
    strategy.report(ValueError("a fault"))
    ((kind, text),) = control.told
    assert kind == "error"
    assert text.startswith("raised ValueError")
    assert "a fault" in text


def test_who_has_received_a_signal_itself_does_not_name_another(caplog: pytest.LogCaptureFixture) -> None:
    """Of all that have received it, the first one has told the others."""
    for told in (False, True):
        failure = RunFailedError("sigterm", "rank 1 received SIGTERM")
        strategy, control = make(failure)
        exception: BaseException = SIGTERMException()
        if told:
            with pytest.raises(SIGTERMException) as caught:
                strategy._others.guard(control.blame)
            exception = caught.value
        caplog.clear()
        strategy.on_exception(exception)
        (record,) = caplog.records
        assert record.getMessage() == f"rank {int(told)} received SIGTERM: the run ends, on all ranks"
        assert control.told == []


@pytest.mark.parametrize(
    ("kind", "raised"), [("error", RunFailedError), ("sigterm", SIGTERMException), ("interrupt", KeyboardInterrupt)]
)
def test_a_collective_that_breaks_because_of_a_signal_ends_this_rank_as_the_signal_does(
    kind: FailureKind, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks had come to it, and the other one then saw that it is to end."""
    monkeypatch.setattr(DDPStrategy, "broadcast", lambda *_: broken())
    monkeypatch.setattr(DDPStrategy, "world_size", 2)
    for strategy_class in (HPSGDStrategy, DSPStrategy):
        strategy, control = make(RunFailedError(kind, "rank 1 has ended"), strategy_class)
        for collective, control.others_come in ((lambda: strategy.broadcast(1), True), (strategy.barrier, False)):  # noqa: B023
            with pytest.raises(raised) as caught:
                collective()
            assert type(caught.value) is raised
