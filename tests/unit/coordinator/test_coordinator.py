"""The coordinator's decisions, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from lightning_stale import events
from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.leases import NONE_LEFT, EpochLeases, Grant, Plan
from lightning_stale.paradigms import ASP, BSP, SSP, BoundedDelay, Paradigm


def started(coordinator: Coordinator, members: int) -> None:
    """Have all join and meet."""
    for rank in range(members):
        assert coordinator.handle(m.Join(rank, 100 + rank), 0.0) == [m.Joined(rank, 1)]
    for rank in range(members):
        replies = coordinator.handle(m.Arrive(rank, 1, "the start"), 0.0)
    thresholds = {} if coordinator.paradigm is None else coordinator.paradigm.thresholds
    assert replies == [met(rank, members, thresholds) for rank in range(members)]


def met(rank: int, members: int, thresholds: Mapping[str, int]) -> m.Met:
    """Return what a rank hears where all are there who have begun."""
    return m.Met(rank, thresholds, tuple((other, 1) for other in range(members)))


def test_an_ok_waits_for_the_gate() -> None:
    coordinator = Coordinator(2, SSP(0))
    started(coordinator, 2)
    assert coordinator.handle(m.Push(0, 1), 1.0) == []
    assert coordinator.handle(m.Push(1, 1), 2.0) == [m.Released(1, 1, 0), m.Released(0, 1, 0)]


def test_who_is_at_a_meeting_holds_nobody_up() -> None:
    coordinator = Coordinator(2, SSP(0))
    started(coordinator, 2)
    assert coordinator.handle(m.Push(0, 1), 1.0) == []
    assert coordinator.handle(m.Arrive(1, 1, "validation"), 2.0) == [m.Released(0, 1, 0)]


def test_different_places_end_the_run_for_all() -> None:
    coordinator = Coordinator(2)
    started(coordinator, 2)
    assert coordinator.handle(m.Arrive(0, 1, "validation", "step 4"), 1.0) == []
    replies = coordinator.handle(m.Arrive(1, 1, "the end of fit", "step 3"), 2.0)
    assert [(type(reply), reply.member) for reply in replies] == [(m.Failed, 0), (m.Failed, 1)]
    assert "rank 0 is at validation (step 4); rank 1 is at the end of fit (step 3)" in replies[0].text  # type: ignore[union-attr]


@pytest.mark.parametrize("leaves_first", [True, False])
def test_who_is_at_a_meeting_hears_that_another_has_finished(leaves_first: bool) -> None:
    coordinator = Coordinator(3)
    started(coordinator, 3)
    messages: list[m.Message] = [m.Arrive(0, 1, "a checkpoint", "step 9"), m.Leave(1, 1)]
    for message in reversed(messages) if leaves_first else messages:
        assert coordinator.handle(message, 1.0) == []
    replies = coordinator.handle(m.Arrive(2, 1, "a checkpoint", "step 9"), 2.0)
    assert [(type(reply), reply.member) for reply in replies] == [(m.Failed, 0), (m.Failed, 2)]
    assert "rank 2 is at a checkpoint (step 9); rank 1 has finished" in replies[0].text  # type: ignore[union-attr]


def test_of_several_failures_the_first_is_told() -> None:
    coordinator = Coordinator(3, ASP())
    started(coordinator, 3)
    text = "rank 1 (process 101) is gone: it was killed, has crashed or hangs"
    assert coordinator.handle(m.Lose(1, 1), 1.0) == [m.Failed(0, "error", text), m.Failed(2, "error", text)]
    assert coordinator.handle(m.Push(0, 1), 2.0) == [m.Failed(0, "error", text)]
    assert coordinator.handle(m.Abort(2, 1, "error", "raised ValueError"), 3.0) == [m.Aborted(2, text)]
    assert coordinator.handle(m.Arrive(0, 1, "validation"), 4.0) == [m.Failed(0, "error", text)]
    assert coordinator.handle(m.Leave(0, 1), 5.0) == coordinator.handle(m.Leave(2, 1), 5.0) == []
    assert coordinator.over


def test_a_run_that_goes_on_without_a_lost_member_lets_it_join_anew() -> None:
    coordinator = Coordinator(3, SSP(0), on_loss="go on")
    started(coordinator, 3)
    for rank in (0, 1):
        assert coordinator.handle(m.Push(rank, 1), 1.0) == []
    assert coordinator.handle(m.Lose(2, 1), 2.0) == [m.Released(0, 1, 0), m.Released(1, 1, 0)]
    assert coordinator.handle(m.Push(2, 1), 3.0) == [m.Fenced(2, 1)]
    assert coordinator.handle(m.Join(2, 202, anew=True, ticket=7), 4.0) == [], (
        "there is nothing that it could begin with"
    )
    assert coordinator.handle(m.Join(m.ANY, 300, anew=True, ticket=8), 4.0) == []
    assert coordinator.handle(m.Join(m.ANY, 300, anew=True, ticket=9), 4.0) == []
    assert coordinator.handle(m.Withdraw(8), 4.0) == []
    assert coordinator.handle(m.Prepared(), 5.0) == [m.Joined(2, 2, ticket=7), m.Joined(3, 1, ticket=9)]
    assert coordinator.handle(m.Join(1, 201, anew=True, ticket=10), 6.0) == [], "it is here, as far as is known"
    assert coordinator.handle(m.Lose(1, 1), 7.0) == [m.Joined(1, 2, ticket=10)]
    for rank, generation in ((0, 1), (1, 2), (2, 2)):
        assert coordinator.handle(m.Arrive(rank, generation, "validation"), 8.0) == []
    replies = coordinator.handle(m.Arrive(3, 1, "validation"), 8.0)
    assert replies == [m.Met(rank, {"threshold": 0}, ((0, 1), (1, 2), (2, 2), (3, 1))) for rank in range(4)]
    assert coordinator.handle(m.Lose(3, 1), 9.0) == []
    assert coordinator.handle(m.Join(3, 303, anew=True, ticket=11), 9.0) == [], "not before all have begun again"
    assert coordinator.failure is None


def test_only_a_run_that_goes_on_without_who_is_lost_can_be_joined() -> None:
    coordinator = Coordinator(2)
    started(coordinator, 2)
    with pytest.raises(ValueError, match="nobody joins this run while it goes on: it is not elastic"):
        coordinator.handle(m.Join(1, 201, anew=True), 1.0)
    with pytest.raises(ValueError, match="rank 2 is none of this run"):
        Coordinator(2, on_loss="go on").handle(m.Join(2, 201, anew=True), 1.0)


@pytest.mark.parametrize(("rank", "least"), [(0, 1), (1, 2)])
def test_a_run_ends_without_rank_0_and_with_too_few(rank: int, least: int) -> None:
    coordinator = Coordinator(2, on_loss="go on", least=least)
    started(coordinator, 2)
    [failed] = coordinator.handle(m.Lose(rank, 1), 1.0)
    few = "; 1 workers are left, fewer than min_workers=2" if rank else ""
    gone = f"rank {rank} (process 10{rank}) is gone: it was killed, has crashed or hangs{few}"
    assert failed == m.Failed(1 - rank, "error", gone)


@pytest.mark.parametrize(("lost", "region"), [(True, "validation"), (False, "validation"), (True, "")])
def test_who_has_noticed_a_loss_may_be_elsewhere_in_the_same_region(lost: bool, region: str) -> None:
    coordinator = Coordinator(3, on_loss="go on")
    started(coordinator, 3)
    if lost:
        assert coordinator.handle(m.Lose(2, 1), 1.0) == []
    else:
        assert coordinator.handle(m.Leave(2, 1), 1.0) == []
    assert coordinator.handle(m.Arrive(0, 1, "a collective", region=region), 2.0) == []
    replies = coordinator.handle(m.Arrive(1, 1, "the end of validation", region=region), 2.0)
    if lost and region:
        assert replies == [met(0, 2, {}), met(1, 2, {})]
        coordinator.handle(m.Arrive(0, 1, "a collective", region=region), 3.0)
        replies = coordinator.handle(m.Arrive(1, 1, "the end of validation", region=region), 3.0)
    assert [type(reply) for reply in replies] == [m.Failed, m.Failed], "nobody has been lost since then"


# --- data on demand -------------------------------------------------------------------------------------------------


def planned(batches: int, workers: int, until: int | None = None, epoch: int = 0) -> Plan:
    """Return the plan of an epoch with one batch per step."""
    return Plan(epoch, batches, each=1, steps=batches // workers, until=until or batches // workers)


def handing_out(
    paradigm: Paradigm, members: int, record: Callable[[events.Event], None] = lambda event: None
) -> Coordinator:
    """Return the coordinator of a run that has begun, goes on without who is lost, and has batches to hand out."""
    leases = EpochLeases(members, paradigm.allows)
    coordinator = Coordinator(members, paradigm, leases=leases, on_loss="go on", record=record)
    started(coordinator, members)
    return coordinator


def test_a_lease_that_was_taken_back_is_refused_and_its_batch_granted_again() -> None:
    coordinator, plan = handing_out(ASP(), 2), planned(2, 2)
    assert coordinator.handle(m.Request(0, 1, plan=plan), 1.0) == [m.Granted(0, Grant(0, 0, 1, 0))]
    assert coordinator.handle(m.Request(1, 1, plan=plan), 1.0) == [m.Granted(1, Grant(1, 1, 2, 0))]
    another = m.Push(0, 1, leases=(0, 1), asks=True)
    assert coordinator.refuses(another)
    assert coordinator.handle(another, 2.0) == [m.Refused(0, 1)], "it is another's"
    assert coordinator.handle(m.Lose(1, 1), 3.0) == []
    assert not coordinator.refuses(m.Push(0, 1, leases=(0,)))
    assert coordinator.handle(m.Push(0, 1, leases=(0,)), 4.0) == [m.Released(0, 1, 0)]
    assert coordinator.handle(m.Request(0, 1), 5.0) == [m.Granted(0, Grant(2, 1, 2, 0))]
    assert coordinator.refuses(m.Push(0, 1, leases=(1,)))
    assert coordinator.handle(m.Request(0, 1, leases=(1,)), 5.5) == [m.Refused(0, 1)]
    over = Grant(NONE_LEFT, 2, 2, 1)
    assert coordinator.handle(m.Push(0, 1, leases=(2,), asks=True), 6.0) == [m.Released(0, 2, 0, over)]


def test_gradients_that_are_kept_hold_nobody_up_who_keeps_them() -> None:
    """With a delay of one, a worker that steps every third batch is granted three, and the other waits meanwhile."""
    coordinator, plan = handing_out(BoundedDelay(1), 2), planned(4, 2)
    assert coordinator.handle(m.Request(0, 1, plan=plan), 1.0) == [m.Granted(0, Grant(0, 0, 1, 0))]
    assert coordinator.handle(m.Request(1, 1, plan=plan), 1.0) == []
    for lease in (1, 2):
        kept = tuple(range(lease))
        assert coordinator.handle(m.Request(0, 1, kept=kept), 2.0) == [m.Granted(0, Grant(lease, lease, lease + 1, 0))]
    push = m.Push(0, 1, leases=(0, 1, 2), commits=False)
    assert not coordinator.refuses(push)
    assert coordinator.is_new(push, 0)
    assert coordinator.handle(push, 3.0) == [m.Released(0, 1, 1)]
    assert coordinator.handle(m.Request(0, 1, leases=(0, 1, 2), steps=1), 4.0) == [
        m.Granted(1, Grant(3, 3, 4, 1, (), 0, 1))
    ]


def keeping(lost: int | None = None) -> tuple[Coordinator, list[events.Event], list[m.Reply]]:
    """Two workers keep the gradients of the only two batches; or one is lost once it has pushed both."""
    recorded: list[events.Event] = []
    coordinator, plan = handing_out(ASP(), 2, recorded.append), planned(4, 2)
    for rank in (0, 1):
        coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
    for rank in (0, 1):
        replies = coordinator.handle(m.Request(rank, 1, kept=(rank,)), 2.0)
        assert [(reply.member, reply.grant.lease) for reply in replies] == [(rank, 2 + rank)]  # type: ignore[union-attr]
    if lost is not None:
        push = m.Push(lost, 1, leases=(lost, 2 + lost), commits=False)
        assert coordinator.is_new(push, 0)
        coordinator.handle(push, 3.0)
        replies = coordinator.handle(m.Lose(lost, 1), 3.0)
    else:
        assert coordinator.handle(m.Request(0, 1, kept=(0, 2)), 3.0) == []
        replies = coordinator.handle(m.Request(1, 1, kept=(1, 3)), 3.0)
    return coordinator, recorded, replies


def committed(recorded: list[events.Event]) -> list[int]:
    return [event.lease for event in recorded if isinstance(event, events.Committed)]


def test_gradients_that_are_kept_when_no_batch_is_left_wait_for_no_push() -> None:
    _, recorded, replies = keeping()
    over = Grant(NONE_LEFT, 4, 4, 2)
    assert replies == [m.Granted(0, over), m.Granted(1, over)]
    assert sorted(committed(recorded)) == [0, 1, 2, 3]


def test_batches_in_one_push_are_trained_with_it_if_the_pusher_is_lost_right_after_it() -> None:
    coordinator, recorded, replies = keeping(lost=1)
    assert replies == []
    assert committed(recorded) == [1, 3]
    assert coordinator.handle(m.Request(0, 1, leases=(0, 2)), 4.0) == [m.Granted(0, Grant(NONE_LEFT, 4, 4, 2))]
    assert sorted(committed(recorded)) == [0, 1, 2, 3]


def test_kept_gradients_are_lost_with_who_keeps_them_and_not_at_a_meeting() -> None:
    for message, trained, granted in (
        (m.Lose(1, 1), [], [(4, 1)]),
        (m.Arrive(1, 1, "a checkpoint"), [1], [(4, 3)]),
    ):
        recorded: list[events.Event] = []
        coordinator, plan = handing_out(ASP(), 2, recorded.append), planned(4, 2)
        for rank in (0, 1):
            coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
        for rank in (0, 1):
            coordinator.handle(m.Request(rank, 1, kept=(rank,)), 2.0)
        coordinator.handle(message, 3.0)
        assert committed(recorded) == trained
        replies = coordinator.handle(m.Request(0, 1, leases=(0, 2)), 4.0)
        assert [(reply.grant.lease, reply.grant.first) for reply in replies] == granted  # type: ignore[union-attr]


def test_a_push_that_asks_gets_its_grant_with_its_ok_once_the_gate_opens() -> None:
    coordinator, plan = handing_out(SSP(0), 2), planned(6, 2)
    for rank in (0, 1):
        coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
    assert coordinator.handle(m.Push(0, 1, (0,), asks=True), 2.0) == [], "rank 1 has not pushed"
    assert coordinator.handle(m.Push(1, 1, (1,)), 3.0) == [m.Released(1, 1, 0), m.Released(0, 1, 0, Grant(2, 2, 3, 1))]


def test_nobody_waits_for_the_push_of_who_waits_for_a_batch() -> None:
    coordinator, plan = handing_out(SSP(0), 2), planned(4, 2, until=1)
    for rank in (0, 1):
        coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
    assert coordinator.handle(m.Request(0, 1, leases=(0,)), 2.0) == [], "what rank 1 holds may come back"
    assert coordinator.handle(m.Push(1, 1), 3.0) == [m.Released(1, 1, 0)]
    assert coordinator.handle(m.Push(1, 1), 4.0) == [m.Released(1, 2, 0)]
    assert coordinator.handle(m.Lose(1, 1), 5.0) == [m.Granted(0, Grant(2, 1, 2, 0))]
    assert dict(coordinator.paradigm.clocks) == {0: 2}, "it takes part again"  # type: ignore[union-attr]


def test_the_mean_of_a_round_is_due_before_its_pushers_have_batches() -> None:
    coordinator, plan = handing_out(BSP(), 3), planned(3, 3)
    for rank in (0, 1, 2):
        coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
    assert coordinator.handle(m.Request(2, 1, leases=(2,)), 2.0) == []
    assert coordinator.handle(m.Push(0, 1, (0,), asks=True), 3.0) == []
    over = Grant(NONE_LEFT, 3, 3, 1)
    first, *others = coordinator.handle(m.Push(1, 1, (1,), asks=True), 4.0)
    assert first == m.RoundOver(), "rank 2 waited for a batch when the last gradient came"
    told = sorted(others, key=lambda reply: reply.member)
    assert told == [m.Released(0, 1, 0, over), m.Released(1, 1, 0, over), m.Granted(2, over)]


def test_the_mean_of_a_round_is_due_when_who_has_pushed_is_gone() -> None:
    coordinator = handing_out(BSP(), 2)
    assert coordinator.handle(m.Push(1, 1), 1.0) == []
    assert coordinator.handle(m.Lose(1, 1), 2.0) == [], "rank 0 has still to push"
    assert coordinator.handle(m.Arrive(0, 1, "validation"), 3.0) == [m.RoundOver(), m.Met(0, {}, ((0, 1),))]
    assert coordinator.handle(m.Push(0, 1), 4.0) == [m.RoundOver(), m.Released(0, 2, 0)]


def test_who_is_at_the_next_meeting_is_kept_no_batch() -> None:
    coordinator, plan = handing_out(ASP(), 2), planned(2, 2)
    assert coordinator.handle(m.Arrive(1, 1, "validation"), 1.0) == []
    assert coordinator.handle(m.Request(0, 1, plan=plan), 2.0) == [m.Granted(0, Grant(0, 0, 1, 0))]
    second = m.Released(0, 1, 0, Grant(1, 1, 2, 0))
    assert coordinator.handle(m.Push(0, 1, (0,), asks=True), 3.0) == [second]


def test_who_arrives_gives_back_what_it_has_not_begun() -> None:
    coordinator, plan = handing_out(ASP(), 2), planned(2, 2)
    for rank in (0, 1):
        coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
    assert coordinator.handle(m.Push(0, 1, (0,), asks=True), 2.0) == []
    assert coordinator.handle(m.Arrive(1, 1, "validation"), 3.0) == [m.Released(0, 1, 0, Grant(2, 1, 2, 0))]


def test_who_gets_the_batches_of_another_begins_at_the_clock_of_the_rest() -> None:
    coordinator, plan = handing_out(SSP(3), 3), planned(3, 3)
    for rank in (0, 1, 2):
        coordinator.handle(m.Request(rank, 1, plan=plan), 1.0)
    for clock in (1, 2, 3):
        assert coordinator.handle(m.Push(0, 1), 2.0) == [m.Released(0, clock, clock)]
        assert coordinator.handle(m.Push(1, 1), 2.0) == [m.Released(1, clock, clock)]
    assert coordinator.handle(m.Request(0, 1, leases=(0,)), 3.0) == [], "what ranks 1 and 2 hold may come back"
    assert coordinator.handle(m.Lose(2, 1), 4.0) == [m.Granted(0, Grant(3, 2, 3, 0))]
    assert dict(coordinator.paradigm.clocks) == {0: 3, 1: 3}, "rank 1 is not held up"  # type: ignore[union-attr]


def test_a_step_that_was_skipped_is_trained() -> None:
    coordinator, plan = handing_out(SSP(0), 1), planned(2, 1)
    assert coordinator.handle(m.Request(0, 1, plan=plan), 1.0) == [m.Granted(0, Grant(0, 0, 1, 0))]
    assert coordinator.handle(m.Request(0, 1, leases=(0,)), 2.0) == [m.Granted(0, Grant(1, 1, 2, 1))]
    assert coordinator.handle(m.Request(0, 1, leases=(1,)), 3.0) == [m.Granted(0, Grant(NONE_LEFT, 2, 2, 2))]
    assert coordinator.paradigm.clocks[0] == 0, "it was no push"  # type: ignore[union-attr]
    next_epoch = planned(1, 1, epoch=1)
    assert coordinator.handle(m.Request(0, 1, plan=next_epoch), 4.0) == [m.Granted(0, Grant(2, 0, 1, 0))]


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (
            planned(4, 2),
            "rank 1 asks for a batch: a worker goes on with Plan(epoch=0, batches=4, each=1, steps=2, until",
        ),
        (planned(2, 2, epoch=1), "a worker goes on with Plan(epoch=1"),
    ],
)
def test_another_plan_than_the_others_ends_the_run_for_all(plan: Plan, problem: str) -> None:
    coordinator = handing_out(ASP(), 2)
    coordinator.handle(m.Request(0, 1, plan=planned(2, 2)), 1.0)
    first, second = coordinator.handle(m.Request(1, 1, plan=plan), 2.0)
    assert isinstance(first, m.Failed)
    assert isinstance(second, m.Failed)
    assert ((first.member, second.member), first.text) == ((0, 1), second.text)
    assert problem in first.text
    assert coordinator.handle(m.Push(0, 1, (0,), asks=True), 3.0) == [m.Failed(0, "error", first.text)]
    assert coordinator.handle(m.Request(1, 1), 4.0) == [m.Failed(1, "error", first.text)]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(0, batches=1, each=1, steps=1, until=1),
        Plan(0, batches=-4, each=1, steps=1, until=1),
        Plan(0, batches=4, each=0, steps=2, until=1),
        Plan(0, batches=4, each=-1, steps=2, until=1),
        Plan(0, batches=4, each=1, steps=0, until=0),
        Plan(0, batches=4, each=1, steps=2, until=0),
        Plan(0, batches=4, each=1, steps=2, until=3),
        Plan(0, batches=4, each=2, steps=2, until=1),
    ],
    ids=repr,
)
def test_an_impossible_plan_ends_the_run_with_its_numbers(plan: Plan) -> None:
    coordinator = handing_out(ASP(), 2)
    failed = coordinator.handle(m.Request(0, 1, plan=plan), 1.0)
    assert [(type(reply), reply.member) for reply in failed] == [(m.Failed, 0), (m.Failed, 1)]
    assert f"rank 0 asks for a batch: {plan} cannot be shared by 2 workers" in failed[0].text  # type: ignore[union-attr]


def test_leases_are_recorded_in_order() -> None:
    told: list[events.Event] = []
    coordinator, plan = handing_out(ASP(), 2, told.append), planned(2, 2)
    told.clear()
    coordinator.handle(m.Request(0, 1, plan=plan), 1.0)
    coordinator.handle(m.Request(1, 1, plan=plan), 2.0)
    coordinator.handle(m.Push(0, 1, (0,), asks=True), 3.0)
    coordinator.handle(m.Lose(1, 1), 4.0)
    assert told == [
        events.Planned(1.0, epoch=plan.epoch, batches=plan.batches),
        events.Granted(1.0, 0, lease=0, first=0, last=1),
        events.Granted(2.0, 1, lease=1, first=1, last=2),
        events.Committed(3.0, 0, lease=0),
        events.Left(4.0, 1, lost=True),
        events.TakenBack(4.0, 1, lease=1),
        events.Granted(4.0, 0, lease=2, first=1, last=2),
        events.Released(4.0, 0, lead=0),
    ]


def test_after_a_failure_nobody_is_granted_anything() -> None:
    coordinator = Coordinator(3, ASP(), leases=EpochLeases(3))
    started(coordinator, 3)
    for rank in (0, 1, 2):
        coordinator.handle(m.Request(rank, 1, plan=planned(3, 3)), 1.0)
    assert coordinator.handle(m.Push(2, 1, (2,), asks=True), 2.0) == []
    replies = coordinator.handle(m.Lose(0, 1), 3.0)
    assert [(type(reply), reply.member) for reply in replies] == [(m.Failed, 1), (m.Failed, 2)]
    assert [type(reply) for reply in coordinator.handle(m.Arrive(1, 1, "validation"), 4.0)] == [m.Failed]
    assert coordinator.handle(m.Leave(1, 1), 5.0) == []


class Delayed(ASP):
    """Bounds how many leases are open, and notes what it is told of them."""

    def __init__(self, delay: int) -> None:
        super().__init__()
        self.delay = delay
        self.noted: list[tuple[str, int, float]] = []

    def allows(self, lease: int, oldest: int) -> bool:
        return lease - oldest < self.delay

    def note_grant(self, worker: int, now: float) -> None:
        self.noted.append(("grant", worker, now))

    def note_commit(self, worker: int, now: float) -> None:
        self.noted.append(("commit", worker, now))

    @property
    def thresholds(self) -> dict[str, int]:
        return {"delay": self.delay}

    def _change_thresholds(self, now: float, thresholds: Mapping[str, int]) -> list[int]:
        self.delay = thresholds["delay"]
        return []


def test_a_raised_bound_on_delay_lets_those_that_wait_have_batches_at_once() -> None:
    coordinator, plan = handing_out(Delayed(1), 3), planned(6, 3)
    assert coordinator.handle(m.Request(0, 1, plan=plan), 1.0) == [m.Granted(0, Grant(0, 0, 1, 0))]
    assert coordinator.handle(m.Request(2, 1, plan=plan), 2.0) == []
    assert coordinator.handle(m.Push(1, 1), 3.0) == [m.Released(1, 1, 1)]
    assert coordinator.handle(m.Request(1, 1, plan=plan), 4.0) == []
    assert coordinator.handle(m.SetThresholds(0, 1, {"delay": 2}), 5.0) == [
        m.Granted(2, Grant(1, 1, 2, 0)),
        m.ThresholdsSet(0, None),
    ]
    assert coordinator.handle(m.Push(0, 1, (0,)), 6.0) == [m.Released(0, 1, 1), m.Granted(1, Grant(2, 2, 3, 1))]


def test_the_paradigm_learns_when_leases_begin_and_end() -> None:
    paradigm = Delayed(2)
    coordinator, plan = handing_out(paradigm, 2), planned(2, 2)
    coordinator.handle(m.Request(0, 1, plan=plan), 1.0)
    coordinator.handle(m.Request(1, 1, plan=plan), 2.0)
    coordinator.handle(m.Push(1, 1, (1,), asks=True), 3.0)
    coordinator.handle(m.Request(0, 1, (0,)), 4.0)
    assert paradigm.noted == [("grant", 0, 1.0), ("grant", 1, 2.0), ("commit", 1, 3.0), ("commit", 0, 4.0)]


# --- what is wrong or missing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [m.Push(0, 1, leases=(0,)), m.Push(0, 1, asks=True), m.Request(0, 1)], ids=repr)
def test_where_nobody_hands_out_batches_nobody_asks(message: m.Message) -> None:
    coordinator = Coordinator(1, ASP())
    started(coordinator, 1)
    with pytest.raises(ValueError, match="nobody hands them out"):
        coordinator.handle(message, 1.0)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (m.Join(0, 7), "a second connection for rank 0"),
        (m.Join(2, 7), "rank 2 is none of this run"),
        (m.Join(-1, 7), "rank -1 is none of this run"),
        (m.Push(0, 1), "rank 0 has pushed before all have met"),
        (m.Request(0, 1), "nobody hands them out"),
    ],
)
def test_what_no_member_can_say(message: m.Message, problem: str) -> None:
    coordinator = Coordinator(2, ASP())
    coordinator.handle(m.Join(0, 6), 0.0)
    with pytest.raises(ValueError, match=problem):
        coordinator.handle(message, 1.0)


def test_no_gate_no_thresholds() -> None:
    coordinator = Coordinator(1)
    started(coordinator, 1)
    (reply,) = coordinator.handle(m.SetThresholds(0, 1, {"threshold": 1}), 1.0)
    assert reply == m.ThresholdsSet(0, "there is no paradigm here")


def test_everything_is_recorded_in_order() -> None:
    told: list[events.Event] = []
    coordinator = Coordinator(1, SSP(2), record=told.append)
    started(coordinator, 1)
    coordinator.handle(m.Push(0, 1), 1.0)
    coordinator.handle(m.SetThresholds(0, 1, {"threshold": 5}), 2.0)
    coordinator.handle(m.Abort(0, 1, "interrupt", "was interrupted"), 3.0)
    coordinator.handle(m.Leave(0, 1), 4.0)
    assert told == [
        events.Joined(0.0, 0),
        events.Met(0.0, 0),
        events.Released(1.0, 0, lead=0),
        events.ThresholdsSet(2.0, {"threshold": 5}),
        events.Failed(3.0, "interrupt", "rank 0 was interrupted"),
        events.Left(4.0, 0),
    ]
