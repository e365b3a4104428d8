"""Workers that do whatever they may, in any order, lose connections and come again, against one coordinator.

The rules are what can happen; what must hold is checked after each of them. It is run by ``test_machine.py``, and for a
million events by ``make soak``.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_stale import events as e
from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.coordinator import Coordinator, OnLoss
from lightning_stale.coordinator.leases import Division, EpochLeases, Grant, Plan, merged
from lightning_stale.events import Event, Recorder
from lightning_stale.events.stale_sync import StaleSyncCounts
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay, Paradigm

PARADIGMS = [
    st.builds(BSP),
    st.builds(ASP),
    st.builds(SSP, st.integers(0, 3)),
    st.builds(DSSP, lower=st.integers(0, 2), upper=st.integers(2, 5)),
    st.builds(BoundedDelay, st.integers(1, 4) | st.none() | st.just("auto")),
]
ACTIONS = [
    *["ask", "push", "push"] * 4,
    "push_for_one_of_several_optimizers",
    "skip_a_step",
    "hold_one_more",
    "join",
    "join_anew",
    "withdraw",
    "arrive",
    "arrive_when_told",
    "set_thresholds",
    "finish",
    "lose",
    "abort",
    "fail",
    "speak_for_the_dead",
    "push_what_it_does_not_hold",
    "have_another_plan",
]
HERE = ("ready", "holding")
"""The states of who can push next."""

Choose = Callable[[Any], Any]
events = Counter[str]()
"""How many messages of each kind the coordinator has been told, over all runs of this process."""

reached = Counter[str]()
"""How often the runs of this process have come to what is rare."""


class Worker:
    """What one generation of a rank knows of itself."""

    def __init__(self, rank: int, generation: int) -> None:
        self.rank, self.generation = rank, generation
        self.state = "new"  # or: ready, holding, waiting (for its OK), wanting (its OK and a grant), asking, meeting
        self.leases: list[int] = []
        self.planned = False  # it has said what there is until the next meeting
        self.over = False  # it has been told that no batch is left

    @property
    def who(self) -> tuple[int, int]:
        return self.rank, self.generation


@st.composite
def epochs(draw: Any) -> tuple[int, list[Plan]]:
    """How many workers, and what they train: a few epochs with meetings in the midst."""
    workers, plans = draw(st.integers(1, 5)), []
    for epoch in range(draw(st.integers(1, 3))):
        each, steps = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        last = draw(st.integers(workers, each * workers))
        meetings = draw(st.sets(st.integers(1, steps), max_size=2)) | {steps}
        batches = (steps - 1) * each * workers + last
        prefetch = draw(st.sampled_from([0, 0, 1, 3]))
        plans += [Plan(epoch, batches, each, steps, until, prefetch) for until in sorted(meetings)]
    return workers, plans


class Machine(RuleBasedStateMachine):
    """One run."""

    @initialize(
        paradigm=st.one_of(PARADIGMS),
        run=epochs(),
        on_loss=st.sampled_from(["end", "go on"]),
        least=st.integers(1, 2),
        started=st.booleans(),
    )
    def begin(
        self, paradigm: Paradigm, run: tuple[int, list[Plan]], on_loss: OnLoss, least: int, started: bool
    ) -> None:
        self.least = least
        self.paradigm, (self.members, self.plans), self.on_loss = paradigm, run, on_loss
        self.leases = EpochLeases(self.members, self.allows)
        self.counts = StaleSyncCounts(self.members, paradigm.thresholds)
        self.recorded: list[Event] = []
        recorder = Recorder(self.counts, self)
        self.coordinator = Coordinator(
            self.members, paradigm, leases=self.leases, on_loss=on_loss, least=least, record=recorder.record
        )
        self.workers: dict[int, Worker] = {}
        self.former: list[Worker] = []
        self.never = set(range(self.members))
        self.failure: tuple[str, str] | None = None
        self.told: Counter[int] = Counter()
        self.places: dict[int, tuple[str, str]] = {}  # with the region
        self.prepared = False  # whether who joins anew can begin now
        self.lost = False  # somebody, since the last meeting
        self.newcomers: dict[int, int] = {}  # ticket -> rank, of who waits to take part
        self.tickets = 0
        self.now = 0.0
        self.at = 0  # which of the plans
        self.epoch: int | None = None  # whose batches are handed out
        self.opened = False  # whether anybody has said it
        self.crowded = False  # whether there are more workers than leases until the next meeting
        self.met = False  # whether there has been a meeting
        self.owed: set[int] = set()  # who was here then, and has not had a batch since, or come to the next meeting
        self.open: dict[int, Grant] = {}  # lease -> what is in it
        self.granted = 0
        self.trained: list[int] = []  # batches of the epoch, in the order of their commits
        self.commits = 0  # leases of the epoch
        self.round: list[tuple[int, int]] = []  # whose gradients wait for their mean
        self.expected: Counter[Event] = Counter()  # what is to have been recorded
        self.allowed: dict[int, int] = {}  # lease -> the oldest that was open when the paradigm allowed it
        if started:
            for rank in range(self.members):
                self.join_as(rank)
            for worker in self.some_of("new"):
                self.arrive_of(worker, "the start")

    def allows(self, lease: int, oldest: int) -> bool:
        if not self.paradigm.allows(lease, oldest):
            return False
        self.allowed[lease] = oldest
        return True

    def note(self, event: Event) -> None:
        self.recorded.append(event)

    @property
    def plan(self) -> Plan:
        return self.plans[self.at]

    @property
    def segment(self) -> int:
        """How many leases there are until the next meeting."""
        return Division(self.plan, self.members).end(self.plan.until)

    # --- what can happen --------------------------------------------------------------------------------------------

    def tell(self, message: m.Message) -> list[m.Reply]:
        events[type(message).__name__] += 1
        self.now += 1.0
        before = dict(self.paradigm.clocks)
        replies = self.coordinator.handle(message, self.now)
        given = [reply.grant for reply in replies if isinstance(reply, m.Granted | m.Released) and reply.grant]
        for grant in sorted((grant for grant in given if not grant.over), key=lambda grant: grant.lease):
            self.open_lease(grant)
        for reply in replies:
            self.hear(reply)
        stayed = [before[rank] for rank in self.paradigm.clocks if rank in before]
        held_up = any(clock < min(stayed, default=clock) for clock in self.paradigm.clocks.values())
        assert self.delays or not held_up, "who comes later holds up the rest"
        if any(isinstance(reply, m.Met) for reply in replies):
            self.go_on_from_meeting({reply.member for reply in replies if isinstance(reply, m.Met)})
        return replies

    def hear(self, reply: m.Reply) -> None:
        if isinstance(reply, m.Joined):
            assert all(former.generation < reply.generation for former in self.former if former.rank == reply.member)
            assert reply.member not in self.workers, "it is here twice"
            self.workers[reply.member] = Worker(reply.member, reply.generation)
            self.never.discard(reply.member)
            if reply.ticket:
                assert self.failure is None
                assert self.prepared, "it has nothing to begin with"
                assert self.newcomers.pop(reply.ticket) in (-1, reply.member)
                self.expected[e.Joined(self.now, reply.member)] += 1
                reached["joins"] += 1
            return
        if isinstance(reply, m.Fenced):
            return
        if isinstance(reply, m.RoundOver):
            self.hear_round_over()
            return
        worker = self.workers.get(reply.member)
        assert worker is not None, f"{reply} for who is not here"
        if isinstance(reply, m.Failed):
            self.told[reply.member] += 1
            assert self.failure in (None, (reply.kind, reply.text)), "there is one first failure"
            self.failure = (reply.kind, reply.text)
            return
        if isinstance(reply, m.Aborted | m.ThresholdsSet | m.Refused):
            return
        assert self.failure is None, f"{reply} after the run has failed"
        if isinstance(reply, m.Released):
            self.hear_ok(worker, reply)
        elif isinstance(reply, m.Met):
            assert worker.state == "meeting"
            members = tuple(sorted(other.who for other in self.workers.values()))
            assert reply.members == members, "it is said who goes on"
            worker.state, worker.planned, worker.over = "ready", False, False
            self.expected[e.Met(self.now, worker.rank)] += 1
        elif isinstance(reply, m.Granted):
            assert worker.state == "asking", "who pushes gets its grant with its OK"
            self.hear_grant(worker, reply.grant)
        else:
            raise AssertionError(reply)

    def hear_ok(self, worker: Worker, reply: m.Released) -> None:
        assert worker.state == ("waiting" if reply.grant is None else "wanting"), "a grant comes with who asked for it"
        assert reply.lead <= self.bound, "the lead is above the bound"
        assert reply.clock == self.paradigm.clocks[worker.rank]
        lead = self.paradigm.lead(worker.rank)
        assert reply.lead == lead or (self.delays and reply.lead > lead)  # who waits for a batch may leave after that
        assert worker.rank not in self.at_the_gate(), "the gate is not open"
        assert worker.who not in self.round, "the mean of its round is not due yet"
        self.expected[e.Released(self.now, worker.rank, reply.lead)] += 1
        if reply.grant is None:
            worker.state = "holding" if worker.leases else "ready"
        else:
            self.hear_grant(worker, reply.grant)

    def hear_grant(self, worker: Worker, grant: Grant) -> None:
        if grant.over:
            assert self.commits == self.segment, "batches are left"
            assert not self.open, "batches may come back"
            assert worker.rank not in self.owed or self.crowded, "it has had none"
            self.owed.discard(worker.rank)
            assert (grant.first, grant.last, grant.step) == (self.plan.batches, self.plan.batches, self.plan.until)
            worker.state, worker.over = "ready", True
            reached["over"] += 1
            return
        self.owed.discard(worker.rank)
        worker.leases.append(grant.lease)
        worker.state = "holding"
        self.expected[e.Granted(self.now, worker.rank, grant.lease, grant.first, grant.last)] += 1

    def open_lease(self, grant: Grant) -> None:
        mine = set(range(grant.first, grant.last))
        assert mine, "a lease of nothing"
        assert mine.isdisjoint(self.trained), "a batch is granted that is trained"
        for other in self.open.values():
            assert mine.isdisjoint(range(other.first, other.last)), "a batch is granted that another has"
        division = Division(self.plan, self.members)
        assert (grant.first, grant.last) in map(division.batches, range(self.segment)), "not of this segment"
        assert grant.lease == self.granted, "leases are numbered as they are granted"
        # it may have been asked a moment before those of who goes were taken back
        assert self.allowed[grant.lease] <= min(self.open, default=grant.lease), "the paradigm has not allowed it"
        self.granted += 1
        self.open[grant.lease] = grant

    def hear_round_over(self) -> None:
        assert self.paradigm.averages
        assert self.failure is None
        assert self.round, "a round of no gradients"
        assert not self.some_of(*HERE), "somebody has still to push"
        self.round.clear()
        reached["rounds"] += 1

    def go_on_from_meeting(self, ranks: set[int]) -> None:
        assert ranks == self.workers.keys(), "not all have met"
        if len({place for place, _ in self.places.values()}) > 1:
            assert self.lost, "they are at different places"
            assert {region for _, region in self.places.values()} == {"validation"}
            reached["interrupted regions"] += 1
        self.places.clear()
        self.prepared = self.lost = False
        self.met = True
        if self.at < len(self.plans) and self.opened and self.commits == self.segment:
            before, self.opened = self.plan, False
            self.at += 1
            if self.at == len(self.plans) or self.plan.epoch != before.epoch:
                assert sorted(self.trained) == list(range(before.batches)), "every batch is committed exactly once"
                self.trained, self.commits = [], 0
                reached["epochs"] += 1
        elif self.opened:
            reached["meetings amid a segment"] += 1

    def at_the_gate(self) -> set[int]:
        return set(self.paradigm.state_dict()["waiting"])

    @property
    def bound(self) -> float:
        if isinstance(self.paradigm, DSSP):
            return self.paradigm.upper
        return getattr(self.paradigm, "bound", float("inf"))

    @property
    def delays(self) -> bool:
        """Whether a batch may be left and not be granted."""
        return "delay" in self.paradigm.thresholds

    def some_of(self, *states: str) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.state in states]

    def some(self, choose: Choose, *states: str) -> Worker | None:
        able = self.some_of(*states)
        return choose(able) if able else None

    def join(self, choose: Choose) -> None:
        if self.never:
            self.join_as(choose(sorted(self.never)))

    def join_anew(self, choose: Choose) -> None:
        """Who was lost comes again, maybe before it is known to be lost; or a further one comes."""
        known = {former.rank for former in self.former} | self.workers.keys()
        if self.on_loss == "end" or not self.met or len(known) > 8 or choose(range(3)) != 0:
            return
        self.tickets += 1
        self.newcomers[self.tickets] = choose([-1, *sorted(known - {0})])
        self.tell(m.Join(self.newcomers[self.tickets], process=5_000, anew=True, ticket=self.tickets))

    def withdraw(self, choose: Choose) -> None:
        if self.newcomers and choose(range(5)) == 0:
            ticket = choose(sorted(self.newcomers))
            del self.newcomers[ticket]
            self.tell(m.Withdraw(ticket))

    def join_as(self, rank: int) -> None:
        self.tell(m.Join(rank, process=4_000 + rank))
        self.expected[e.Joined(self.now, rank)] += 1

    def ask(self, choose: Choose) -> None:
        worker = self.some(choose, *(("ready", "new") if self.met else ("ready",)))
        if worker is not None and self.failure is None and self.at < len(self.plans):
            self.request(worker)

    def request(self, worker: Worker, leases: tuple[int, ...] = ()) -> None:
        """Ask for a batch; ``leases`` are of skipped steps."""
        plan = None if worker.planned else self.plan
        if not self.opened:
            self.opened = True
            self.owed = {other.rank for other in self.workers.values() if other.state not in ("meeting", "new")}
            self.crowded = self.segment - self.commits < len(self.owed)
        if worker.rank == 0 and plan is not None and not leases:
            self.prepared = True
            self.tell(m.Prepared())
        self.commit(worker, leases)
        worker.state, worker.planned = "asking", True
        if plan is not None and plan.epoch != self.epoch:
            self.epoch = plan.epoch
            self.expected[e.Planned(self.now + 1.0, plan.epoch, plan.batches)] += 1
        self.tell(m.Request(*worker.who, leases, plan))

    def commit(self, worker: Worker, leases: tuple[int, ...]) -> None:
        for lease in leases:
            worker.leases.remove(lease)
            grant = self.open.pop(lease)
            self.trained += range(grant.first, grant.last)
            self.commits += 1
            self.expected[e.Committed(self.now + 1.0, worker.rank, lease)] += 1

    def take_back(self, worker: Worker) -> None:
        self.owed.discard(worker.rank)
        for lease in worker.leases:
            del self.open[lease]
            self.expected[e.TakenBack(self.now + 1.0, worker.rank, lease)] += 1
            reached["taken back"] += 1
        worker.leases.clear()

    def push(self, choose: Choose) -> None:
        worker = self.some(choose, *HERE)
        if worker is not None:
            self.push_of(worker, tuple(worker.leases), asks=worker.planned and choose([True, True, False]))

    def push_for_one_of_several_optimizers(self, choose: Choose) -> None:
        worker = self.some(choose, "holding")
        if worker is not None:
            self.push_of(worker, (), asks=False)

    def push_of(self, worker: Worker, leases: tuple[int, ...], asks: bool) -> None:
        worker.state = "wanting" if asks else "waiting"
        push = m.Push(*worker.who, leases, asks)
        assert self.failure is not None or not self.coordinator.refuses(push)
        if self.failure is None:
            self.commit(worker, leases)
            if self.paradigm.averages:
                self.round.append(worker.who)
        last = not any(other.rank in self.paradigm.clocks for other in self.some_of(*HERE))
        self.tell(push)
        assert not last or self.failure is not None or worker.who not in self.round, (
            "it waits for who waited for a batch"
        )

    def push_what_it_does_not_hold(self, choose: Choose) -> None:
        worker = self.some(choose, "new", *HERE)
        if worker is None or self.failure is not None:
            return
        lease = choose([-1, *self.open, *range(self.granted), 10**6])
        if lease in worker.leases:
            return
        leases = (*worker.leases, lease) if choose([True, False]) else (lease, *worker.leases)
        kind = choose([m.Push, m.Request])
        message = m.Push(*worker.who, leases, choose([True, False])) if kind is m.Push else kind(*worker.who, leases)
        assert kind is m.Request or self.coordinator.refuses(message)
        before, recorded = self.fingerprint(), len(self.recorded)
        assert self.tell(message) == [m.Refused(worker.rank, lease)]
        assert (self.fingerprint(), len(self.recorded)) == (before, recorded), "a refused push has changed something"

    def skip_a_step(self, choose: Choose) -> None:
        worker = self.some(choose, "holding")
        if worker is not None and self.failure is None:
            self.request(worker, tuple(worker.leases))

    def hold_one_more(self, choose: Choose) -> None:
        """Only where it is granted at once: who waits for its own batches waits for ever."""
        worker = self.some(choose, "holding")
        if worker is None or self.failure is not None or self.leases.left <= max(self.members, len(self.workers)):
            return
        if self.paradigm.allows(self.granted, min(self.open)):
            self.request(worker)
            assert worker.state == "holding"

    def have_another_plan(self, choose: Choose) -> None:
        worker = self.some(choose, "ready")
        if worker is None or self.failure is not None or choose(range(100)) != 0:
            return
        if self.at < len(self.plans) and self.opened and self.commits < self.segment:
            other = replace(self.plan, batches=self.plan.batches + 1)
            self.tell(m.Request(*worker.who, (), other))
            assert self.failure is not None
            assert f"rank {worker.rank} asks for a batch: a worker goes on with {other} amid" in self.failure[1]

    def arrive(self, choose: Choose) -> None:
        if choose(range(3)) == 0:
            place = choose(["validation"] * 99 + ["the end of fit"])
            region = "validation" if self.lost or choose(range(2)) == 0 else ""
            if self.lost and region and choose(range(2)) == 0:
                place = "a collective of it"
            self.arrive_of(self.some(choose, *HERE, "new"), place, region)

    def arrive_when_told(self, choose: Choose) -> None:
        told = [worker for worker in self.some_of("ready") if worker.over]
        if told:
            self.arrive_of(choose(told), "validation")

    def arrive_of(self, worker: Worker | None, place: str, region: str = "") -> None:
        if worker is None:
            return
        if self.failure is None:
            self.take_back(worker)  # what it has not begun is another's
            self.places[worker.rank] = (place, region)
        worker.state = "meeting"
        self.tell(m.Arrive(*worker.who, place, "step 1", region))

    def set_thresholds(self, choose: Choose) -> None:
        """Raise them; one that falls binds later releases only."""
        worker = self.some(choose, "ready")
        if worker is None or not self.paradigm.thresholds or max(self.paradigm.thresholds.values()) > 6:
            return
        more = choose([0, 1, 2])
        raised = {name: value + more for name, value in self.paradigm.thresholds.items()}
        replies = self.tell(m.SetThresholds(*worker.who, raised))
        assert replies[-1] == m.ThresholdsSet(worker.rank, None)
        assert self.paradigm.thresholds == raised
        assert e.ThresholdsSet(self.now, raised) in self.recorded

    def finish(self, choose: Choose) -> None:
        worker = self.some(choose, "new", "ready")
        if worker is not None and choose(range(20)) == 0:
            self.retire(worker)
            self.tell(m.Leave(*worker.who))

    def lose(self, choose: Choose) -> None:
        worker = self.some(choose, "new", "ready", "holding", "waiting", "wanting", "asking", "meeting")
        if worker is not None and choose(range(3 if self.on_loss == "go on" else 100)) == 0:
            self.retire(worker, lost=True)
            self.lost, before = True, self.coordinator.failure
            self.tell(m.Lose(*worker.who))
            failure = self.coordinator.failure
            if before is not None:
                assert failure == before
            elif self.on_loss == "end" or worker.rank == 0:
                assert failure is not None
            elif len(self.workers.keys() | self.never) < self.least:
                assert failure is not None
                assert f"fewer than min_workers={self.least}" in failure.text
            else:
                assert failure is None or "different places" in failure.text, "the run ends without a reason"

    def abort(self, choose: Choose) -> None:
        worker = self.some(choose, "new", "ready", "holding", "waiting", "wanting", "asking")
        if worker is not None and choose(range(100)) == 0:
            before = self.coordinator.failure
            *_, aborted = self.tell(m.Abort(*worker.who, "error", "raised ValueError"))
            assert aborted == m.Aborted(worker.rank, "" if before is None else before.text)

    def fail(self, choose: Choose) -> None:
        if choose(range(300)) == 0:
            before = self.coordinator.failure
            self.tell(m.Fail("rank 0 has ended"))
            assert self.coordinator.failure is not None
            assert before is None or self.coordinator.failure == before

    def speak_for_the_dead(self, choose: Choose) -> None:
        if not self.former:
            return
        who: Any = choose(self.former).who
        message = choose(
            [
                m.Push(*who, (0,)),
                m.Push(*who, (), asks=True),
                m.Request(*who),
                m.Request(*who, (0,), self.plans[0]),
                m.Arrive(*who, "validation"),
                m.SetThresholds(*who, {"threshold": 0}),
                m.Abort(*who, "error", "x"),
                m.Leave(*who),
                m.Lose(*who),
            ]
        )
        before, recorded = self.fingerprint(), len(self.recorded)
        assert self.tell(message) == [m.Fenced(*who)]
        assert self.fingerprint() == before, "a fenced worker has changed something"
        assert len(self.recorded) == recorded

    @rule(data=st.data(), names=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8))
    def happen(self, data: Any, names: list[str]) -> None:
        """A few things, each of which is found by itself where they break something."""
        for name in names:
            getattr(self, name)(lambda able: data.draw(st.sampled_from(able)))
            self.check()

    @rule(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 200))
    def happen_at_length(self, seed: int, length: int) -> None:
        """Many things, so that a run gets far; mostly work."""
        choice = random.Random(seed)
        for _ in range(length):
            getattr(self, choice.choice(ACTIONS))(choice.choice)
            self.check()

    def retire(self, worker: Worker, lost: bool = False) -> None:
        del self.workers[worker.rank]
        self.former.append(worker)
        self.places.pop(worker.rank, None)
        if self.failure is None:
            self.take_back(worker)
            self.expected[e.Left(self.now + 1.0, worker.rank, lost)] += 1

    def fingerprint(self) -> Any:
        kept = {name: value for name, value in vars(self.leases).items() if name != "_allows"}
        coordinator = {name: value for name, value in vars(self.coordinator).items() if isinstance(value, set)}
        return copy.deepcopy(
            (
                self.paradigm.state_dict(),
                dict(self.coordinator.membership.present),
                self.coordinator.failure,
                list(self.coordinator.meeting.waiting),
                coordinator,
                kept,
                self.counts.state_dict(),
            )
        )

    # --- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "workers"):
            return
        if self.coordinator.failure is None:
            self.every_batch_is_in_one_place()
            self.a_lease_is_held_by_who_is_here()
            self.everybody_will_have_a_batch()
            self.the_gate_waits_for_who_can_push()
            self.who_waits_for_a_batch_waits_for_a_reason()
            self.a_round_waits_for_somebody()
            self.somebody_can_go_on()
            self.who_can_join_has_joined()
            self.what_is_recorded_is_what_has_happened()
        self.all_hear_of_a_failure()

    def every_batch_is_in_one_place(self) -> None:
        assert len(set(self.trained)) == len(self.trained), "a batch is trained twice"
        if self.opened:
            assert self.leases.plan == self.plan
            assert self.leases.committed == self.commits
            assert self.leases.left + len(self.open) + self.commits == self.segment
            assert self.leases.state_dict()["committed"] == merged((b, b + 1) for b in sorted(self.trained))
            share = -(-self.commits // self.members)  # the step that has begun included
            assert self.leases.step == (
                self.plan.until if self.commits == self.segment else min(share, self.plan.until - 1)
            )

    def a_lease_is_held_by_who_is_here(self) -> None:
        theirs = {lease: worker.rank for worker in self.workers.values() for lease in worker.leases}
        assert {lease: rank for lease, (rank, _) in self.leases.held.items()} == theirs
        assert theirs.keys() == self.open.keys()
        for worker in self.workers.values():
            assert self.leases.of(worker.rank) == worker.leases
            assert (worker.state == "holding") <= bool(worker.leases)
            assert worker.state not in ("new", "ready", "meeting") or not worker.leases

    def everybody_will_have_a_batch(self) -> None:
        if self.opened:
            assert self.leases.left >= len(self.owed) or self.crowded, "somebody will go without"

    def the_gate_waits_for_who_can_push(self) -> None:
        waiting, clocks = self.at_the_gate(), self.paradigm.clocks
        asked = {worker.rank for worker in self.some_of("asking", "wanting")} - waiting
        assert {worker.rank for worker in self.some_of("waiting")} <= waiting
        assert waiting <= {worker.rank for worker in self.some_of("waiting", "wanting")}
        able = {worker.rank for worker in self.some_of(*HERE)}
        assert able <= clocks.keys(), "who may push has no clock"
        held_up = clocks.keys() - waiting - able
        assert held_up <= asked, "there is a clock of who pushes no more"
        assert not held_up or self.delays, "there is a clock of who waits for what others hold"
        if waiting:
            slowest = {rank for rank, clock in clocks.items() if clock == min(clocks.values())}
            assert slowest <= able, "the gate waits for who waits"

    def who_waits_for_a_batch_waits_for_a_reason(self) -> None:
        asked = {worker.rank for worker in self.some_of("asking", "wanting")} - self.at_the_gate()
        allowed = self.paradigm.allows(self.granted, min(self.open, default=self.granted))
        for rank in asked:
            if self.leases.left == 0:
                assert self.open, "there is nothing to wait for"
            elif allowed:
                assert self.leases.left <= len(self.owed - {rank}), "there is a batch for it"
        if asked and self.leases.left > 0 and allowed:
            assert {self.workers[rank].state for rank in self.owed} <= {"new", "ready", "waiting"}, "batches are kept"

    def a_round_waits_for_somebody(self) -> None:
        assert not self.round or self.some_of(*HERE), "the mean of a round is overdue"

    def somebody_can_go_on(self) -> None:
        if not self.workers or self.never:
            return
        able = self.some_of("new", *HERE)
        assert able, {worker.rank: worker.state for worker in self.workers.values()}

    def who_can_join_has_joined(self) -> None:
        if self.prepared:
            assert all(rank in self.workers for rank in self.newcomers.values()), "nobody waits without a reason"

    def all_hear_of_a_failure(self) -> None:
        if self.coordinator.failure is not None and self.workers:
            assert self.failure is not None
            assert all(self.told[rank] >= 1 for rank in self.workers)

    def what_is_recorded_is_what_has_happened(self) -> None:
        seen, self.recorded = self.recorded, []
        assert Counter(event for event in seen if not isinstance(event, e.ThresholdsSet)) == self.expected
        self.expected.clear()

    def teardown(self) -> None:
        """Whoever is left works on: every batch is trained once, and nobody waits for ever."""
        if not hasattr(self, "workers") or self.coordinator.failure is not None:
            return
        while self.never and self.on_loss == "go on":
            self.join_as(min(self.never))
        if self.never or not self.workers:
            return
        different = len({place for place, _ in self.places.values()}) > 1 or len(self.workers) < self.members
        leases = sum(Division(plan, self.members).leases for plan in self.plans)
        for _ in range(4 * (leases + len(self.plans) + self.members + 1)):
            if self.failure is not None or self.all_is_done():
                break
            self.work_on()
        if self.failure is not None:  # they were at different places
            assert different
            assert "different places" in self.failure[1]
            return
        assert self.at == len(self.plans), "they have not come to the end"
        reached["ends"] += 1

    def all_is_done(self) -> bool:
        return self.at == len(self.plans) and not self.places and not self.some_of("new")

    def work_on(self) -> None:
        place, region = next(iter(self.places.values()), ("validation", ""))
        for worker in list(self.workers.values()):
            if self.failure is not None or self.all_is_done():
                return
            if worker.state == "holding":
                self.push_of(worker, tuple(worker.leases), asks=True)
            elif worker.state == "new" or (worker.state == "ready" and (worker.over or self.at == len(self.plans))):
                self.arrive_of(worker, place, region)
            elif worker.state == "ready":
                self.request(worker)
            self.check()
