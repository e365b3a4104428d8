"""Real runs and their simulations, compared in what does not hang on how busy the machine is.

Nothing here is a prediction with a tolerance: what a run is compared with is computed from that very run's own times.

- **Workers.** The paradigm of the run notes when the server has handled each push, and whom it let go. The time from an
  OK to the next push is measured, whatever it consisted of (computing, an exchange, a process that did not get a core).
  Given these, who is let go when is arithmetic, and the simulator must do the same arithmetic: the same pushes in the
  same order, released by the same pushes, at the same times but for rounding.
- **Stages.** Between two messages a stage does what it does for as long as it did. A simulation in which messages take
  no time where nobody was seen to wait for one cannot be slower than the run, and one in which each is on its way until
  it was taken cannot be faster: a later message makes nothing earlier. So the run lies between them, whatever the load;
  it would not if the simulator let a stage wait for something else than it does, or for less.

How far a *prediction* is off is measured by ``benchmarks/simulation.py``.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.stage_clock import Message, SleepingStage, messages
from lightning_stale import DSPStrategy, StaleSyncStrategy
from lightning_stale.events import Event, Granted, Met, Pushed, Released, Spent
from lightning_stale.paradigms import Paradigm
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.simulation import Setting, run, step_times_of
from lightning_stale.simulation.pipeline.engine import Work, run_stages
from tests.integration.harness import run_workers, signal_test, wait_for_file
from tests.integration.models import Ledger, numbered, trainer

WORKERS, STEPS, STEP_S = 4, 8, 0.01
SETTINGS = ["bsp", "dssp:1:4", "bounded-delay:5"]


# --- workers ----------------------------------------------------------------------------------------------------------


class Noted(Paradigm):
    """A paradigm that writes down what it is asked, where the server runs, and what it answers."""

    def __init__(self, inner: Paradigm, path: Path) -> None:
        self.inner, self.path = inner, path
        self.averages = inner.averages  # type: ignore[misc]

    def note(self, *events: Event) -> None:
        with self.path.open("ab") as file:
            for event in events:
                pickle.dump(event, file)

    @property
    def clocks(self) -> Mapping[int, int]:
        return self.inner.clocks

    @property
    def thresholds(self) -> dict[str, int]:
        return self.inner.thresholds

    def join(self, worker: int, now: float) -> None:
        self.note(Met(now, worker))
        self.inner.join(worker, now)

    def push(self, worker: int, now: float) -> list[int]:
        released = self.inner.push(worker, now)
        self.note(Spent(now, worker, 0.0, 1.0), Pushed(now, worker, 0), *(Released(now, each, 0) for each in released))
        return released

    def leave(self, worker: int, now: float) -> list[int]:
        released = self.inner.leave(worker, now)
        self.note(*(Released(now, each, 0) for each in released))
        return released

    def allows(self, lease: int, oldest: int) -> bool:
        return self.inner.allows(lease, oldest)

    def note_grant(self, worker: int, now: float) -> None:
        self.note(Granted(now, worker, 0, 0, 1))
        self.inner.note_grant(worker, now)

    def note_commit(self, worker: int, now: float) -> None:
        self.inner.note_commit(worker, now)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


class Sleeping(Ledger):
    """Rank 0 takes three times as long; all have begun before anybody goes on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(STEPS * WORKERS)
        self.folder, self.begun = folder, False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.begun:
            self.begun = True
            signal_test(self.folder, f"begun-{self.global_rank}")
            for rank in range(WORKERS):
                wait_for_file(self.folder / f"begun-{rank}")
        time.sleep(STEP_S * (3 if self.global_rank == 0 else 1))
        return super().training_step(batch, batch_idx)


def train(rank: int, folder: Path) -> None:
    for name in SETTINGS:
        setting, here = Setting.parse(name), folder / name
        here.mkdir(exist_ok=True)
        strategy = StaleSyncStrategy(paradigm=Noted(setting.make(), here / "events"), data=setting.data)
        trainer(WORKERS, strategy, max_epochs=1).fit(Sleeping(here), numbered(range(STEPS * WORKERS), batch_size=1))


def recorded(path: Path) -> list[Event]:
    """The epoch: from when all have met before it, to the last push and whom it let go."""
    events = []
    with path.open("rb") as file:
        while file.peek(1):
            events.append(pickle.load(file))
    pushes = [place for place, event in enumerate(events) if isinstance(event, Pushed)]
    starts = [event for event in events[: pushes[0]] if isinstance(event, Met)][-WORKERS:]
    assert len({event.at for event in starts}) == 1
    rest = [event for event in events[events.index(starts[-1]) + 1 :] if not isinstance(event, Met)]
    end = max(place for place, event in enumerate(rest) if isinstance(event, Pushed))
    last = rest[end].at
    return [*starts, *(event for event in rest if event.at <= last)]


def decisions(events: list[Event], on_demand: bool) -> list[tuple[str, int, float]]:
    """Every push, and every leave to go on: of an OK, or of a batch; not those before the first push."""
    go_on = Granted if on_demand else Released
    start = next(event.at for event in events if isinstance(event, Met))
    found = [
        (type(event).__name__, event.worker, event.at - start)
        for event in events
        if isinstance(event, Pushed) or type(event) is go_on
    ]
    return found[next(place for place, (kind, _, _) in enumerate(found) if kind == "Pushed") :]


def without_ok(events: list[Event]) -> list[Event]:
    """On demand a worker goes on with its batch: leave out the OK that comes before it."""
    return [event for event in events if not isinstance(event, Released)]


def renumbered(events: list[Event]) -> list[Event]:
    """With the workers in the order in which they have got their first batch, as simulated ones do."""
    ranks = list(dict.fromkeys(event.worker for event in events if isinstance(event, Granted)))
    assert len(ranks) == WORKERS
    return [dataclasses.replace(event, worker=ranks.index(event.worker)) for event in events]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_workers(train, WORKERS, folder, folder, timeout=150.0)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_a_real_run_and_its_simulation_are_the_same(name: str, runs: Path) -> None:
    setting = Setting.parse(name)
    on_demand = setting.data == "on-demand"
    events = recorded(runs / name / "events")
    if on_demand:
        events = renumbered(without_ok(events))
    times = step_times_of(events).turnaround
    simulated: list[Event] = []
    outcome = run(setting, times, steps=STEPS, record=simulated.append)

    real, again = decisions(events, on_demand), decisions(simulated, on_demand)
    assert sum(kind == "Pushed" for kind, _, _ in real) == outcome.batches == STEPS * WORKERS
    assert [(kind, worker) for kind, worker, _ in again] == [(kind, worker) for kind, worker, _ in real]
    assert [at for _, _, at in again] == pytest.approx([at for _, _, at in real], abs=1e-6)
    seconds = real[-1][2]
    assert outcome.seconds == pytest.approx(seconds)
    assert outcome.computing == pytest.approx(sum(map(sum, times.of)) / seconds / WORKERS)


# --- stages -----------------------------------------------------------------------------------------------------------

STAGES, BATCHES = 4, 10
PIPELINES: list[dict[str, Any]] = [
    {"staleness": "minimal", "recompute": False},
    {"staleness": "dsp"},
    {"staleness": (5, 2, 2, 0), "queues": (0, 0, 2, 0), "recompute": False},
]


class Stages(LightningModule):
    """The second of four stages is slower."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(SleepingStage(4, 0.004 * (1 + (k == 1)), 0.008) for k in range(STAGES)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run_stages_for_real(rank: int) -> list[list[Message]]:
    runs = []
    for options in PIPELINES:
        data = DataLoader(TensorDataset(torch.ones(BATCHES, 4)), batch_size=1)
        with messages(rank) as found:
            trainer(STAGES, DSPStrategy(split=[1, 2, 3], **options), max_epochs=1).fit(Stages(), data)
        runs.append(found)
    return runs


class Seen:
    """What was seen of the messages between stages, the first one first."""

    def __init__(self, stages: list[list[Message]], staleness: Staleness) -> None:
        self.stages, self.staleness = stages, staleness
        self.start = min(one.began for mine in stages for one in mine)
        self.sent = {(k, what): self._of(k, what, True) for k in range(STAGES) for what in ("features", "gradients")}
        self.taken = {
            (k, what): self._of(k + (1 if what == "features" else -1), what, False)
            for k in range(STAGES)
            for what in ("features", "gradients")
        }
        for key, mine in self.sent.items():
            assert [one.batch for one in mine] == [one.batch for one in self.taken[key]]

    def _of(self, stage: int, what: str, sent: bool) -> list[Message]:
        return [one for one in self.stages[stage % STAGES] if one[:2] == (what, sent)]

    def length(self, sender: int, what: str) -> int:
        return self.staleness.p[sender] if what == "features" else self.staleness.q[sender]

    def until_taken(self, what: Any, sender: int, number: int) -> float:
        """How long a message was on its way if it arrived no earlier than it was taken."""
        taken, length = self.taken[sender, what], self.length(sender, what)
        room = taken[number - length].began if number >= length else -math.inf
        before = taken[number - 1].ended if number > 0 else -math.inf
        return taken[number].ended - max(self.sent[sender, what][number].began, room, before)

    def works(self, stage: int) -> list[Work]:
        """What a stage did between its messages; of sending, what is not explained by a queue that was full."""
        works: list[Work] = []
        opened: Literal["forward", "backward"] | None = None  # by what it has received
        now = self.start
        counts = {"features": 0, "gradients": 0}
        for one in self.stages[stage]:
            kind: Literal["forward", "backward"] = "forward" if one.what == "features" else "backward"
            if opened is not None and not (one.sent and opened == kind):
                works.append(Work(opened, 0.0))  # it passes nothing on: the first stage, or the last one
                opened = None
            if not one.sent:
                works.append(Work("update", one.began - now))
                opened = kind
            else:
                works.append(Work(kind, one.began - now))
                opened = None
                full = counts[one.what] - self.length(stage, one.what)
                freed = self.taken[stage, one.what][full].ended if full >= 0 else one.began
                works.append(Work("update", max(0.0, one.ended - max(one.began, freed))))
                counts[one.what] += 1
            now = one.ended
        return [*works, *([] if opened is None else [Work(opened, 0.0)])]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Message]]]:
    by_rank = run_workers(run_stages_for_real, STAGES, tmp_path_factory.mktemp("stages"))
    return [[runs[number] for runs in reversed(by_rank)] for number in range(len(PIPELINES))]


@pytest.mark.parametrize("number", range(len(PIPELINES)))
def test_a_real_pipeline_lies_between_two_simulations(number: int, pipelines: Any) -> None:
    options = PIPELINES[number]
    seen = Seen(pipelines[number], Staleness.of(options["staleness"], STAGES, options.get("queues")))
    p, q = seen.staleness.p, seen.staleness.q
    works = [seen.works(stage) for stage in range(STAGES)]
    fastest = run_stages(works, p, q, lambda what, sender, batch: 0.0)
    slowest = run_stages(works, p, q, seen.until_taken)
    for stage, least, most in zip(seen.stages, fastest, slowest, strict=True):
        ended = stage[-1].ended - seen.start
        assert least.ended <= ended + 1e-6
        assert most.ended >= ended - 1e-6
