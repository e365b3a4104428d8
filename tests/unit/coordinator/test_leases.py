"""Batches of an epoch as leases: how they are divided, who gets which, and the end of an epoch as a table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from lightning_stale.coordinator.leases import NONE_LEFT, Division, EpochLeases, Grants, Plan, merged
from tests.unit.coordinator.epoch_leases_machine import EpochLeasesMachine, a_plan, dealt, seen

# --- a plan and its division ------------------------------------------------------------------------------------------


def everyone_has_a_batch_in_every_step(plan: Plan, workers: int) -> bool:
    """By dealing out: in every step all take what is theirs in turn, in the last one each a single batch."""
    left = plan.batches
    for step in range(plan.steps):
        for _ in range(workers):
            if left <= 0:
                return False
            left -= plan.each if step < plan.steps - 1 else 1
    return left >= 0


@given(
    workers=st.integers(1, 6),
    batches=st.integers(-1, 60),
    each=st.integers(0, 4),
    steps=st.integers(0, 12),
    until=st.integers(-1, 13),
)
@settings(max_examples=500)
def test_a_plan_is_refused_if_somebody_would_have_nothing_to_do(
    workers: int, batches: int, each: int, steps: int, until: int
) -> None:
    plan = Plan(3, batches, each, steps, until)
    if each >= 1 and until in range(1, steps + 1) and everyone_has_a_batch_in_every_step(plan, workers):
        plan.check(workers)
        return
    with pytest.raises(ValueError, match=f"batches={batches}, .* cannot be shared by {workers} workers"):
        plan.check(workers)


@pytest.mark.parametrize(("batches", "fits"), [(3, False), (4, False), (5, False), (6, True)])
def test_the_last_step_needs_one_batch_per_worker(batches: int, fits: bool) -> None:
    plan = Plan(epoch=0, batches=batches, each=2, steps=2, until=1)
    if fits:
        plan.check(2)
    else:
        with pytest.raises(ValueError, match="each needs a batch in every step"):
            plan.check(2)


@given(st.data(), st.integers(1, 6))
def test_every_batch_is_in_one_lease(data: st.DataObject, workers: int) -> None:
    plan = a_plan(lambda able: data.draw(st.sampled_from(able)), workers)
    plan.check(workers)
    division = Division(plan, workers)
    ends = [0, *(division.end(step) for step in range(1, plan.steps + 1))]
    assert ends[-1] == division.leases
    steps = [[list(range(*division.batches(number))) for number in range(*part)] for part in pairwise(ends)]
    assert list(chain(*chain(*steps))) == list(range(plan.batches))
    for step in steps[:-1]:
        assert [len(lease) for lease in step] == [plan.each] * workers
    assert len(steps[-1]) >= workers
    assert all(1 <= len(lease) <= plan.each for lease in steps[-1])
    assert steps == dealt(plan, workers)


@given(workers=st.integers(1, 6), per_worker=st.integers(1, 20), each=st.integers(1, 5))
def test_equal_shards_make_equal_leases(workers: int, per_worker: int, each: int) -> None:
    plan = Plan(0, workers * per_worker, each, steps=-(-per_worker // each), until=1)
    plan.check(workers)
    division = Division(plan, workers)
    shard = [min(each, per_worker - begun) for begun in range(0, per_worker, each)]  # sizes of what a shard accumulates
    sizes = [last - first for first, last in map(division.batches, range(division.leases))]
    assert sizes == [size for size in shard for _ in range(workers)]
    assert [division.end(step + 1) for step in range(plan.steps)] == [
        workers * (step + 1) for step in range(plan.steps)
    ]


@pytest.mark.parametrize(
    ("plan", "workers", "leases"),
    [
        (Plan(0, 4, 1, 2, 2), 2, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (Plan(0, 5, 1, 2, 2), 2, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (Plan(0, 10, 3, 2, 2), 2, [(0, 3), (3, 6), (6, 8), (8, 10)]),
        (Plan(0, 11, 3, 2, 2), 2, [(0, 3), (3, 6), (6, 8), (8, 10), (10, 11)]),
        (Plan(0, 5, 4, 1, 1), 3, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (Plan(0, 9, 4, 1, 1), 2, [(0, 4), (4, 8), (8, 9)]),
    ],
)
def test_leases_of_an_epoch(plan: Plan, workers: int, leases: list[tuple[int, int]]) -> None:
    division = Division(plan, workers)
    assert [division.batches(number) for number in range(division.leases)] == leases


@given(st.sets(st.integers(0, 30)))
def test_merged_ranges_cover_the_same(numbers: set[int]) -> None:
    ranges = merged((number, number + 1) for number in sorted(numbers))
    assert [number for first, last in ranges for number in range(first, last)] == sorted(numbers)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))


# --- whatever happens -------------------------------------------------------------------------------------------------


def test_whatever_happens() -> None:
    run_state_machine_as_test(
        EpochLeasesMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=20,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    happened = {"granted", "over", "waits", "a worker begins nothing", "a worker joins", "epochs", "segments"}
    happened |= {"a worker asks twice", "the bound is raised", "another plan is refused"}
    happened |= {f"lost when {state}" for state in ("free", "waiting", "holding", "over")}
    assert min(seen[what] for what in happened) >= 10, seen
    print(dict(seen))


# --- as a table -------------------------------------------------------------------------------------------------------


def told(grants: Grants) -> Iterator[str]:
    for member, grant in grants:
        if grant.over:
            assert grant.lease == NONE_LEFT
            yield f"{member}: none left, step {grant.step}"
        else:
            batches = ",".join(map(str, range(grant.first, grant.last)))
            yield f"{member}: lease {grant.lease} of {batches}, step {grant.step}"


def play(leases: EpochLeases, table: list[tuple[str, str]]) -> None:
    """Do what the left column says ("1 asks", "1 commits 4 and asks", "1 is lost"); expect what the right one says."""
    for line, expected in table:
        member = int(line.split()[0])
        match line.split()[1:]:
            case ["asks"]:
                grants = leases.request(member)
            case ["commits", lease, *asks]:
                grants = leases.commit(member, [int(lease)])
                grants += leases.request(member) if asks else []
            case _:
                assert line == f"{member} is lost"
                grants = leases.take_back(member)
        assert "; ".join(told(grants)) == expected, line


def test_a_fast_and_a_slow_worker() -> None:
    leases = EpochLeases(workers=2)
    leases.open(Plan(epoch=0, batches=6, each=1, steps=3, until=3), {0, 1})
    play(
        leases,
        [
            ("0 asks", "0: lease 0 of 0, step 0"),
            ("1 asks", "1: lease 1 of 1, step 0"),
            ("0 commits 0 and asks", "0: lease 2 of 2, step 1"),
            ("0 commits 2 and asks", "0: lease 3 of 3, step 1"),
            ("0 commits 3 and asks", "0: lease 4 of 4, step 2"),
            ("0 commits 4 and asks", "0: lease 5 of 5, step 2"),
            ("0 commits 5 and asks", ""),  # it waits for no more than the batch that the slow one has begun
        ],
    )
    assert leases.waits_for_others(0)
    assert not leases.waits_for_others(1)
    assert leases.state_dict()["committed"] == [[0, 1], [2, 6]]
    play(leases, [("1 commits 1 and asks", "0: none left, step 3; 1: none left, step 3")])
    assert not leases.waits_for_others(0)
    assert leases.state_dict()["committed"] == [[0, 6]]


def test_the_batch_of_a_lost_worker_goes_to_who_waits() -> None:
    leases = EpochLeases(workers=3)
    leases.open(Plan(epoch=0, batches=6, each=2, steps=1, until=1), {0, 1, 2})
    play(
        leases,
        [
            ("0 asks", "0: lease 0 of 0,1, step 0"),
            ("1 asks", "1: lease 1 of 2,3, step 0"),
            ("2 asks", "2: lease 2 of 4,5, step 0"),
            ("2 commits 2 and asks", ""),
            ("0 commits 0 and asks", ""),
            ("1 is lost", "2: lease 3 of 2,3, step 0"),  # the oldest of those that wait
        ],
    )
    assert leases.stale(1, [1]) == 1
    play(leases, [("2 commits 3 and asks", "0: none left, step 1; 2: none left, step 1")])


def test_what_is_taken_back_comes_first() -> None:
    leases = EpochLeases(workers=2)
    leases.open(Plan(epoch=0, batches=6, each=1, steps=3, until=3), {0, 1})
    play(
        leases,
        [
            ("0 asks", "0: lease 0 of 0, step 0"),
            ("1 asks", "1: lease 1 of 1, step 0"),
            ("0 commits 0 and asks", "0: lease 2 of 2, step 1"),
            ("1 is lost", ""),
            ("0 is lost", ""),
            ("1 asks", "1: lease 3 of 2, step 1"),  # the last that has come back
            ("0 asks", "0: lease 4 of 1, step 1"),
            ("0 commits 4 and asks", "0: lease 5 of 3, step 1"),
        ],
    )


def test_a_worker_with_several_leases_gives_them_back_in_order() -> None:
    leases = EpochLeases(workers=1)
    leases.open(Plan(epoch=0, batches=4, each=1, steps=4, until=4), {0})
    for _ in range(3):
        leases.request(0)
    assert leases.of(0) == [0, 1, 2]
    leases.commit(0, [1])
    play(
        leases,
        [
            ("0 is lost", ""),
            ("1 asks", "1: lease 3 of 0, step 1"),
            ("1 commits 3 and asks", "1: lease 4 of 2, step 2"),
            ("1 commits 4 and asks", "1: lease 5 of 3, step 3"),
            ("1 commits 5 and asks", "1: none left, step 4"),
        ],
    )


def test_a_joiner_takes_part_but_not_what_is_kept_for_another() -> None:
    leases = EpochLeases(workers=2)
    leases.open(Plan(epoch=0, batches=4, each=1, steps=2, until=2), {0, 1})
    play(
        leases,
        [
            ("0 asks", "0: lease 0 of 0, step 0"),
            ("2 asks", "2: lease 1 of 1, step 0"),
            ("2 commits 1 and asks", "2: lease 2 of 2, step 1"),
            ("0 commits 0 and asks", ""),  # the last one is worker 1's
            ("2 commits 2 and asks", ""),
        ],
    )
    assert leases.waits_for_others(0)
    assert leases.waits_for_others(2)
    assert leases.left == 1
    play(
        leases,
        [
            ("1 asks", "1: lease 3 of 3, step 1"),
            ("1 is lost", "0: lease 4 of 3, step 1"),
            ("1 asks", ""),  # it comes again, and is owed nothing any more
            ("0 commits 4", "2: none left, step 2; 1: none left, step 2"),
        ],
    )


def test_who_is_lost_while_it_waits_is_granted_nothing() -> None:
    leases = EpochLeases(workers=2)
    leases.open(Plan(epoch=0, batches=2, each=1, steps=1, until=1), {0, 1})
    play(
        leases,
        [
            ("0 asks", "0: lease 0 of 0, step 0"),
            ("1 asks", "1: lease 1 of 1, step 0"),
            ("1 commits 1 and asks", ""),
            ("1 is lost", ""),
            ("0 is lost", ""),
            ("1 asks", "1: lease 2 of 0, step 0"),
            ("1 commits 2 and asks", "1: none left, step 1"),
        ],
    )


def test_what_is_kept_for_a_worker_is_free_when_it_is_lost() -> None:
    leases = EpochLeases(workers=2)
    leases.open(Plan(epoch=0, batches=2, each=1, steps=1, until=1), {0, 1})
    play(
        leases,
        [
            ("0 asks", "0: lease 0 of 0, step 0"),
            ("0 commits 0 and asks", ""),
            ("1 is lost", "0: lease 1 of 1, step 0"),
        ],
    )


def test_more_workers_than_batches_are_left() -> None:
    """A run of one worker that two have joined: it meets after every step."""
    leases = EpochLeases(workers=1)
    leases.open(Plan(epoch=0, batches=2, each=1, steps=2, until=1), {0, 1, 2})
    play(
        leases,
        [
            ("1 asks", "1: lease 0 of 0, step 0"),
            ("0 asks", ""),
            ("2 asks", ""),
            ("1 commits 0 and asks", "0: none left, step 1; 2: none left, step 1; 1: none left, step 1"),
        ],
    )
    leases.open(Plan(epoch=0, batches=2, each=1, steps=2, until=2), {0, 1, 2})
    play(
        leases,
        [
            ("0 asks", "0: lease 1 of 1, step 1"),
            ("1 asks", ""),
            ("0 is lost", "1: lease 2 of 1, step 1"),
            ("2 asks", ""),
            ("1 commits 2", "2: none left, step 2"),
        ],
    )


def test_a_bound_holds_the_fast_one_until_the_oldest_is_trained() -> None:
    bound = 2
    leases = EpochLeases(workers=2, allows=lambda lease, oldest: lease - oldest < bound)
    leases.open(Plan(epoch=0, batches=6, each=1, steps=3, until=3), {0, 1})
    play(
        leases,
        [
            ("1 asks", "1: lease 0 of 0, step 0"),
            ("0 asks", "0: lease 1 of 1, step 0"),
            ("0 commits 1 and asks", ""),
        ],
    )
    assert not leases.waits_for_others(0)  # there is one for it, later
    play(leases, [("1 commits 0 and asks", "0: lease 2 of 2, step 1; 1: lease 3 of 3, step 1")])
    play(leases, [("1 commits 3 and asks", "")])
    bound = 3
    assert list(told(leases.serve())) == ["1: lease 4 of 4, step 2"]
    play(leases, [("1 commits 4 and asks", ""), ("0 is lost", "1: lease 5 of 2, step 2")])


def test_who_waits_for_the_bound_does_not_wait_for_what_others_hold() -> None:
    leases = EpochLeases(workers=2, allows=lambda lease, oldest: lease == oldest)
    leases.open(Plan(epoch=0, batches=2, each=1, steps=1, until=1), {0, 1})
    play(leases, [("0 asks", "0: lease 0 of 0, step 0"), ("1 asks", "")])
    assert not leases.waits_for_others(1)  # the other batch is kept for it
    play(leases, [("0 commits 0 and asks", "1: lease 1 of 1, step 0")])
    assert leases.waits_for_others(0)


def test_who_asks_before_the_epoch_is_known_waits_for_it() -> None:
    leases = EpochLeases(workers=1)
    play(leases, [("1 asks", "")])
    assert (leases.plan, leases.step, leases.left, leases.state_dict()) == (None, 0, 0, {"plan": None, "committed": []})
    leases.open(Plan(epoch=4, batches=2, each=1, steps=2, until=2), {0})
    play(leases, [("0 asks", "1: lease 0 of 0, step 0; 0: lease 1 of 1, step 0")])


# --- going on ---------------------------------------------------------------------------------------------------------

FIRST = Plan(epoch=1, batches=8, each=2, steps=2, until=1)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(epoch=1, batches=6, each=2, steps=2, until=2),  # would train its first batches again
        Plan(epoch=1, batches=8, each=1, steps=4, until=2),
        Plan(epoch=1, batches=8, each=2, steps=1, until=1),
        Plan(epoch=1, batches=9, each=2, steps=2, until=1),
        Plan(epoch=0, batches=8, each=2, steps=2, until=2),
    ],
)
def test_an_epoch_goes_on_as_it_has_begun(plan: Plan) -> None:
    leases = EpochLeases(workers=2)
    leases.open(FIRST, {0, 1})
    for member in (0, 1):
        leases.request(member)
        leases.commit(member, [member])
    with pytest.raises(ValueError, match="does not follow"):
        leases.open(plan, {0, 1})
    assert (leases.plan, leases.committed, leases.left) == (FIRST, 2, 0)


@pytest.mark.parametrize("until", [2, 1])
def test_it_never_goes_back(until: int) -> None:
    leases = EpochLeases(workers=1)
    leases.open(Plan(epoch=0, batches=3, each=1, steps=3, until=2), {0})
    play(leases, [("0 asks", "0: lease 0 of 0, step 0"), ("0 commits 0 and asks", "0: lease 1 of 1, step 1")])
    play(leases, [("0 commits 1 and asks", "0: none left, step 2")])
    again = Plan(epoch=0, batches=3, each=1, steps=3, until=until)
    if until == 2:
        leases.open(again, {0})  # the same: nothing happens
        play(leases, [("0 asks", "0: none left, step 2")])
    else:
        with pytest.raises(ValueError, match="does not follow"):
            leases.open(again, {0})


def test_a_plan_that_cannot_be_shared_is_refused() -> None:
    leases = EpochLeases(workers=3)
    with pytest.raises(ValueError, match="cannot be shared by 3 workers"):
        leases.open(Plan(epoch=0, batches=2, each=1, steps=1, until=1), {0, 1, 2})
    assert leases.plan is None


def test_the_next_epoch_begins_at_its_first_batch_with_a_new_number() -> None:
    leases = EpochLeases(workers=1)
    leases.open(Plan(epoch=0, batches=3, each=1, steps=3, until=1), {0})
    play(leases, [("0 asks", "0: lease 0 of 0, step 0"), ("0 commits 0 and asks", "0: none left, step 1")])
    plan = Plan(epoch=1, batches=2, each=2, steps=1, until=1)
    leases.open(plan, {0})
    assert leases.state_dict() == {
        "plan": {"epoch": 1, "batches": 2, "each": 2, "steps": 1, "until": 1, "prefetch": 0},
        "committed": [],
    }
    play(leases, [("0 asks", "0: lease 1 of 0,1, step 0"), ("0 commits 1 and asks", "0: none left, step 1")])


@given(st.data(), st.integers(1, 4))
def test_equal_workers_are_told_what_shards_would_tell_them(data: st.DataObject, workers: int) -> None:
    """All in turn: each hears how many steps it has done itself."""
    each, per_worker = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    steps = -(-per_worker // each)
    leases = EpochLeases(workers)
    leases.open(Plan(0, workers * per_worker, each, steps, steps), range(workers))
    heard = dict(grant for member in range(workers) for grant in leases.request(member))
    for step in range(steps):
        assert [(grant.step, grant.over) for _, grant in sorted(heard.items())] == [(step, False)] * workers
        grants: Grants = []
        for member in range(workers):
            grants += [*leases.commit(member, [heard[member].lease]), *leases.request(member)]
        assert len(grants) == workers
        heard = dict(grants)
    assert [(grant.step, grant.over) for _, grant in sorted(heard.items())] == [(steps, True)] * workers
