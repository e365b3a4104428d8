"""Each apply rule against the papers' loops, in the store; what it remembers, and what it refuses."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale import (
    ApplyRule,
    Dana,
    DelayCompensated,
    Plain,
    Ringmaster,
    Scaled,
    StalePush,
    StaleSyncStrategy,
    Step,
)
from lightning_stale.parameter_server.apply import RULES, as_apply_rule
from lightning_stale.parameter_server.apply.base import changed_rule_warning
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.store import ParameterStore, Push
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.parcel import pack, unpack
from tests.unit.apply.cases import CASES, tensors, vector
from tests.unit.apply.reference import LR, ORDER, START, WORKERS, Trajectory, gradient, plain, play, used

Make = Callable[[list[Tensor]], list[Optimizer]]


def make_store(
    rule: ApplyRule, make: Make = lambda p: [torch.optim.SGD(p, lr=LR)], values: Any = None
) -> ParameterStore:
    values = tensors(START) if values is None else values
    layout = Layout.of(values)
    store = ParameterStore(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, rule)
    with torch.no_grad():
        for parameter, value in zip(store.parameters, values, strict=True):
            parameter.copy_(value)
    store.set_optimizers(make(list(store.parameters)))
    return store


class Workers:
    """Workers whose pushes reach the store in order, each of which pulls at once."""

    def __init__(self, store: ParameterStore, count: int = WORKERS) -> None:
        self.store = store
        self.held = [vector(store.parameters) for _ in range(count)]
        self.pulled = [store.version] * count
        self.seen = Trajectory()

    def push(self, turn: int, worker: int, **fields: Any) -> None:
        staleness = self.store.version - self.pulled[worker]
        push = Push(
            optimizer=0,
            used=used(turn),
            gradients=tensors(gradient(self.held[worker], worker)),
            options=read_options(self.store.optimizers[0]),
            worker=worker,
            staleness=staleness,
            weights_then=tensors(self.held[worker]) if self.store.rule.needs_weights_then else None,
            **fields,
        )
        kept = copy.deepcopy(push.gradients)
        self.seen.applied.append(self.store.apply(push))
        if fields.get("lasting"):
            torch.testing.assert_close(push.gradients, kept, rtol=0.0, atol=0.0)
        self.seen.staleness.append(staleness)
        self.held[worker], self.pulled[worker] = vector(self.store.parameters), self.store.version
        self.seen.weights.append(self.held[worker])


def assert_like(seen: Trajectory, expected: Trajectory) -> None:
    assert (seen.applied, seen.staleness) == (expected.applied, expected.staleness)
    np.testing.assert_allclose(seen.weights, expected.weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_what_the_paper_says(name: str, lasting: bool) -> None:
    make, reference = CASES[name]
    rule = make()
    rule.begin(WORKERS, 1)
    workers = Workers(make_store(rule))
    for turn, worker in enumerate(ORDER):
        workers.push(turn, worker, lasting=lasting)
        assert workers.store.version == sum(workers.seen.applied)
    expected = play(reference())
    assert_like(workers.seen, expected)
    assert max(expected.staleness) > 6, "the order makes nothing stale"
    if name != "plain":
        assert not np.allclose(expected.weights[-1], play(plain()).weights[-1]), "the rule changes nothing"
    assert all(expected.applied) == ("ringmaster" not in name)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_rule_goes_on_from_its_state(name: str) -> None:
    """What was saved half-way, sent through a parcel, makes the rest the same."""
    make, reference = CASES[name]
    rule = make()
    rule.begin(WORKERS, 1)
    workers = Workers(make_store(rule))
    for turn, worker in enumerate(ORDER[:14]):
        workers.push(turn, worker)
    parcel = pack(workers.store.rule_state())
    buffer = torch.empty(parcel.size, dtype=torch.uint8)
    for offset, data in parcel.pieces:
        buffer[offset : offset + data.numel()] = data
    saved = unpack(buffer, parcel.head)
    again = make()
    again.begin(WORKERS, 1)
    assert changed_rule_warning(make(), saved) is None
    workers.store.rule = again
    workers.store.resume_rule(saved)
    for turn, worker in enumerate(ORDER[14:], start=14):
        workers.push(turn, worker)
    assert_like(workers.seen, play(reference()))
    if saved["state"]:
        fresh = make()
        fresh.begin(WORKERS, 1)
        assert repr(fresh.state_dict()) != repr(saved["state"]), "there was nothing to go on from"


def test_the_state_that_was_saved_does_not_change_with_training() -> None:
    rule = Dana()
    workers = Workers(make_store(rule))
    workers.push(0, 0)
    saved = rule.state_dict()
    again = Dana()
    again.load_state_dict(saved)
    before = copy.deepcopy(saved)
    workers.store.rule = again
    workers.push(1, 0)
    torch.testing.assert_close(saved, before, rtol=0.0, atol=0.0)


def test_momenta_go_with_their_ranks_to_another_number_of_workers() -> None:
    rule = Dana()
    workers = Workers(make_store(rule))
    for turn, worker in enumerate((0, 1, 2)):
        workers.push(turn, worker)
    fewer, more = Dana(), Dana()
    for other, count in ((fewer, 2), (more, 5)):
        other.begin(count, 1)
        other.load_state_dict(rule.state_dict())
    assert sorted(more.state_dict()["momenta"]) == sorted(rule.state_dict()["momenta"])
    assert sorted(fewer.state_dict()["momenta"]) == [f"{w}.0.{p}" for w in (0, 1) for p in (0, 1)]


SAVED = {
    "old": None,
    "plain": {"rule": "Plain", "state": {}},
    "dana": {"rule": "Dana", "state": {"momenta": {}}},
    "constant": {"rule": "DelayCompensated", "state": {}},
}


@pytest.mark.parametrize(
    ("rule", "saved", "warning"),
    [
        (Plain(), "old", None),
        (Plain(), "plain", None),
        (Ringmaster(), "plain", None),
        (Ringmaster(), "old", None),
        (Dana(), "dana", None),
        (Plain(), "dana", "the state of the apply rule Dana in the checkpoint is left out: the rule is Plain() now"),
        (Dana(), "old", "the apply rule Dana(momentum=0.9) starts anew: the checkpoint is of Plain"),
        (Scaled(), "dana", "the apply rule Scaled() starts anew: the checkpoint is of Dana"),
        (DelayCompensated(), "constant", "the apply rule DelayCompensated(lambda_=2.0, adaptive=True) starts anew"),
        (DelayCompensated(adaptive=False), "constant", None),
    ],
)
def test_another_rule_than_the_checkpoints_starts_anew_and_says_so(
    rule: ApplyRule, saved: str, warning: str | None
) -> None:
    text = changed_rule_warning(rule, SAVED[saved])
    assert text is None if warning is None else text is not None and text.startswith(warning)
    store, before = make_store(rule), repr(rule.state_dict())
    store.resume_rule(SAVED[saved])
    assert repr(rule.state_dict()) == before


def test_a_run_that_resumes_with_another_rule_warns() -> None:
    strategy = StaleSyncStrategy(paradigm="asp", apply="scaled")
    with pytest.warns(UserWarning, match=r"the apply rule Scaled\(\) starts anew: the checkpoint is of Dana"):
        strategy._update.load_state_dict({"apply": SAVED["dana"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StaleSyncStrategy(paradigm="asp", apply="dana")._update.load_state_dict({"apply": SAVED["dana"]})


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [Dana, DelayCompensated, lambda: DelayCompensated(50.0, adaptive=False)])
def test_16_bit_gradients_are_computed_with_in_32(make: Callable[[], ApplyRule], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    half, full = make(), make()
    for turn in range(30):
        g = 1e-4 * torch.randn(50, generator=generator).to(dtype)  # whose square is zero in float16
        now, then = (torch.randn(50, generator=generator).to(dtype) for _ in range(2))
        results = []
        for rule, convert in ((half, lambda t: t.clone()), (full, lambda t: t.float())):
            push = StalePush(turn % 2, 0, 3, [0], [convert(g)], [convert(now)], [convert(then)])
            (result,) = rule.step(push).gradients  # type: ignore[union-attr]
            results.append(result)
        assert results[0].dtype == dtype
        assert torch.equal(results[0], results[1].to(dtype))
    states = [next(iter(s.values()), {}) for s in (half.state_dict(), full.state_dict())]
    torch.testing.assert_close(states[0], states[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("make", [Dana, DelayCompensated])
def test_a_complex_number_is_two_real_ones(make: Callable[[], ApplyRule]) -> None:
    whole, parts = make(), make()
    for turn in range(3):
        g, now, then = (
            torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(turn + i)) for i in range(3)
        )
        views = [torch.view_as_real(t.clone()) for t in (g, now, then)]
        (mine,) = whole.step(StalePush(0, 0, 1, [0], [g], [now], [then])).gradients  # type: ignore[union-attr]
        (theirs,) = parts.step(StalePush(0, 0, 1, [0], [views[0]], [views[1]], [views[2]])).gradients  # type: ignore[union-attr]
        assert torch.equal(torch.view_as_real(mine), theirs)


def test_compensation_leaves_huge_gradients_that_are_not_stale_alone() -> None:
    g, w = torch.tensor([1e30, -1e30, 1e-40]), torch.tensor([1.0, 2.0, 3.0])
    (result,) = DelayCompensated(adaptive=False).step(StalePush(0, 0, 0, [0], [g.clone()], [w], [w])).gradients
    assert torch.equal(result, g)


def test_two_optimizers_have_their_own_state() -> None:
    """A parameter of both, with the same gradient for each: the second sees it as the worker gave it."""
    store = make_store(Dana(0.5), lambda p: [torch.optim.SGD([p[0]], lr=1.0), torch.optim.SGD([p[0], p[1]], lr=1.0)])
    given = [torch.ones(3, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)]
    for optimizer, count in ((0, 1), (1, 2)):
        options = read_options(store.optimizers[optimizer])
        store.apply(Push(optimizer, [True] * count, given, options))
    assert torch.equal(given[0], torch.ones(3, dtype=torch.float64))
    np.testing.assert_allclose(vector(store.parameters), START - np.array([3.0] * 3 + [1.5] * 4))


# --- the learning rate ------------------------------------------------------------------------------------------------


class Halve(ApplyRule):
    def step(self, push: StalePush) -> Step:
        return Step(push.gradients, lr_factor=0.5)


class OwnRate(torch.optim.SGD):
    """Lets its learning rate decay in ``step``."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.25


RATES: dict[str, Callable[[list[Tensor], float], Optimizer]] = {
    "a number": lambda p, f: torch.optim.SGD(p, lr=0.5 * f, momentum=0.5),
    "groups": lambda p, f: torch.optim.SGD([{"params": p[:1], "lr": 0.5 * f}, {"params": p[1:], "lr": 0.125 * f}]),
    "a tensor that groups share": lambda p, f: torch.optim.Adam(
        [{"params": p[:1]}, {"params": p[1:]}], lr=torch.tensor(0.5 * f), foreach=False
    ),
    "its own": lambda p, f: OwnRate(p, lr=0.5 * f),
    "AdamW": lambda p, f: torch.optim.AdamW(p, lr=0.5 * f, weight_decay=0.5),
}


@pytest.mark.parametrize("name", RATES)
def test_a_factor_on_the_learning_rate_is_that_of_this_step_only(name: str) -> None:
    halved = make_store(Halve(), lambda p: [RATES[name](p, 1.0)])
    smaller = make_store(Plain(), lambda p: [RATES[name](p, 0.5)])
    (optimizer,) = halved.optimizers
    rates = [group["lr"] for group in optimizer.param_groups]
    for seed in range(3):
        g = tensors(np.random.default_rng(seed).normal(size=7))
        for store in (halved, smaller):
            store.apply(Push(0, [True, True], copy.deepcopy(g), read_options(store.optimizers[0])))
        np.testing.assert_array_equal(vector(halved.parameters), vector(smaller.parameters))
        decay = 0.25 ** (seed + 1) if name == "its own" else 1.0
        assert [float(group["lr"]) for group in optimizer.param_groups] == [float(rate) * decay for rate in rates]
    if name == "its own":
        assert halved.optimizer_state(0)["param_groups"] == [{"lr": 0.5 * 0.25**3}]
    else:
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        assert all("lr" not in group for group in halved.optimizer_state(0)["param_groups"])


def test_a_step_that_fails_leaves_the_learning_rate_as_it_was() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError

    store = make_store(Halve(), lambda p: [Failing(p, lr=0.5)])
    with pytest.raises(ArithmeticError):
        store.apply(Push(0, [True, True], tensors(START), read_options(store.optimizers[0])))
    assert store.optimizers[0].param_groups[0]["lr"] == 0.5


def test_no_learning_rate_to_scale() -> None:
    class Free(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                del group["lr"]

    store = make_store(Halve(), lambda p: [Free(p)])
    with pytest.raises(ValueError, match=r"Free has no 'lr'.*Step\(lr_factor=0.5\): write lr_factor=1.0"):
        store.apply(Push(0, [True, True], tensors(START), read_options(store.optimizers[0])))
    with pytest.raises(ValueError, match=r"Free has no 'lr'.*write another optimizer or apply='plain'"):
        Scaled().check(store.optimizers)


# --- what a user's rule may do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (True, r"Odd\(\).step\(\) returned True: return Step\(push.gradients\), or None"),
        (Step([]), r"returned 0 gradients and lr_factor=1.0: return one for each of the 2"),
        (Step(tensors(START), lr_factor=-1.0), r"returned 2 gradients and lr_factor=-1.0: .* finite factor >= 0"),
        (Step(tensors(START), lr_factor=float("nan")), "lr_factor=nan"),
    ],
)
def test_an_answer_that_makes_no_sense(answer: Any, error: str) -> None:
    class Odd(ApplyRule):
        def step(self, push: StalePush) -> Any:
            return answer

    store = make_store(Odd())
    with pytest.raises((TypeError, ValueError), match=error):
        store.apply(Push(0, [True, True], tensors(START), read_options(store.optimizers[0])))
    assert store.version == 0


def test_weights_then_have_to_be_asked_for() -> None:
    push = StalePush(0, 0, 0, [0], [torch.zeros(1)], [torch.zeros(1)])
    with pytest.raises(RuntimeError, match="set needs_weights_then = True"):
        push.weights_then  # noqa: B018


def test_a_rule_may_give_other_tensors_than_it_got() -> None:
    class Zero(ApplyRule):
        def step(self, push: StalePush) -> Step:
            return Step([torch.zeros_like(gradient) for gradient in push.gradients])

    store = make_store(Zero())
    assert store.apply(Push(0, [True, True], tensors(START), read_options(store.optimizers[0])))
    np.testing.assert_array_equal(vector(store.parameters), START)
    assert store.version == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_names_stand_for_rules_with_default_values(name: str) -> None:
    strategy = StaleSyncStrategy(paradigm="asp", apply=name)
    assert type(strategy.apply) is RULES[name]
    assert repr(strategy.apply) == repr(RULES[name]())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ringmaster(R=0), ValueError, r"Ringmaster\(R=0\): R counts updates and must be an integer >= 1"),
        (lambda: Ringmaster(R=2.5), ValueError, r"R=2.5"),  # type: ignore[arg-type]
        (lambda: Ringmaster(R=True), ValueError, r"R=True"),
        (lambda: DelayCompensated(lambda_=-1.0), ValueError, r"lambda_=-1.0\): write a number >= 0"),
        (lambda: DelayCompensated(lambda_=float("nan")), ValueError, r"lambda_=nan"),
        (lambda: DelayCompensated(lambda_="2"), ValueError, r"lambda_='2'"),  # type: ignore[arg-type]
        (lambda: DelayCompensated(adaptive=1), ValueError, r"adaptive=1\): write True or False"),  # type: ignore[arg-type]
        (lambda: Dana(momentum=1.0), ValueError, r"momentum=1.0\): write a number >= 0 and < 1"),
        (lambda: Dana(momentum=float("nan")), ValueError, r"momentum=nan"),
        (
            lambda: as_apply_rule("dannna"),
            ValueError,
            "write one of 'plain', 'ringmaster', 'delay-compensated', 'dana'",
        ),
        (lambda: as_apply_rule(Dana), TypeError, r"apply=Dana is a class: write Dana\(\)"),  # type: ignore[arg-type]
        (lambda: as_apply_rule(None), TypeError, "apply=None: write one of"),  # type: ignore[arg-type]
        (lambda: StaleSyncStrategy(paradigm="bsp", apply="dana"), ValueError, "apply='dana' is a rule for stale gradi"),
        (
            lambda: StaleSyncStrategy(paradigm="bsp", apply=Halve()),
            ValueError,
            "paradigm='asp', 'ssp', 'dssp' or 'bounded-delay'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bsp_is_plain() -> None:
    assert type(StaleSyncStrategy(paradigm="bsp").apply) is Plain


def test_a_rule_that_cannot_be_sent() -> None:
    rule = Halve()
    rule.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"apply=Halve\(\) cannot be sent to the parameter server: .*lock.* Keep locks"):
        StaleSyncStrategy(paradigm="asp", apply=rule)


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"SGD has momentum=0.9.*Write SGD\(..., momentum=0\)"),
        (lambda p: torch.optim.Adam(p), r"Adam has betas=\(0.9, 0.999\).*betas=\(0.0, 0.999\)"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.5), "RMSprop has momentum=0.5"),
    ],
)
def test_two_momenta_do_not_multiply(make: Callable[[list[Tensor]], Optimizer], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        Dana().check([make([torch.zeros(1)])])
    Dana().check([torch.optim.SGD([torch.zeros(1)], lr=0.1), torch.optim.Adam([torch.zeros(1)], betas=(0.0, 0.9))])
