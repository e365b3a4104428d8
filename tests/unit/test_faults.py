"""What the soak of faults would call wrong is called so."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults
from benchmarks.faults import SAMPLES, Fault, Outcome

EPOCHS = 3


def ended(counts: list[float], **changed: Any) -> dict[str, Any]:
    """Return what a run saves that has trained each sample so often."""
    total = sum((sample + 1) * count for sample, count in enumerate(counts))
    return {"epochs": EPOCHS, "pages": [-one for one in counts], "sum": -total, "taken": [counts, [total]], **changed}


def outcome_of(end: dict[str, Any], paradigm: str = "asp", elastic: bool = False) -> Outcome:
    outcome = Outcome(paradigm, "auto")
    faults.check(end, outcome, workers=2, elastic=elastic)
    return outcome


def each(count: float, **but: float) -> list[float]:
    counts = [float(count)] * SAMPLES
    for sample, other in but.items():
        counts[int(sample.removeprefix("s"))] = other
    return counts


def test_each_sample_once_per_epoch_is_sound() -> None:
    assert outcome_of(ended(each(3))).sound
    assert outcome_of(ended(each(1.5)), "bsp").sound, "the mean of two workers"
    assert outcome_of(ended(each(1.5), taken=None), "hpsgd").sound


@pytest.mark.parametrize(
    ("end", "lost", "doubled", "wrong"),
    [
        (ended(each(3, s5=2.0)), 1, 0, ""),
        (ended(each(3, s5=4.0, s6=1.0)), 2, 1, ""),
        (ended(each(3, s5=3.5)), 0, 0, "a sample was trained 3.5 times"),
        (ended(each(3), taken=[each(3, s5=2.0), [0.0]]), 1, 0, "the weights are not what the optimizer has taken"),
        (ended(each(3), sum=-1.0), 0, 0, "the weights of a batch were applied in part"),
    ],
)
def test_what_is_not_is_counted(end: dict[str, Any], lost: int, doubled: int, wrong: str) -> None:
    outcome = outcome_of(end)
    assert (outcome.lost, outcome.doubled, outcome.wrong) == (lost, doubled, wrong)
    assert not outcome.sound


@pytest.mark.parametrize("wrong", [{"hung": "it does not end"}, {"left": ["1 python"]}])
def test_a_run_that_hangs_or_leaves_something_is_not_sound(wrong: dict[str, Any]) -> None:
    assert not Outcome("asp", "auto", **wrong).sound


@pytest.mark.parametrize(
    ("kind", "victim", "elastic", "bearable"),
    [
        ("pause", "server", False, True),
        ("garbage", "server", False, True),
        ("kill", "rank 1", False, False),
        ("kill", "rank 1", True, True),
        ("drop", "rank 3", True, True),
        ("hang", "rank 0", True, False),
        ("segv", "server", True, False),
    ],
)
def test_a_run_that_ends_where_it_should_go_on_is_not_sound(
    kind: str, victim: str, elastic: bool, bearable: bool
) -> None:
    assert faults.is_bearable(kind, victim, elastic) == bearable
    for went_on in (True, False):
        assert Outcome("asp", "auto", [Fault(kind, victim, went_on, bearable)]).sound == (went_on or not bearable)


def test_the_same_seed_plans_the_same_faults_and_as_many_as_asked_for() -> None:
    def planned(seed: int, kinds: tuple[str, ...] = faults.KINDS) -> list[tuple[str, Any]]:
        return faults.plan(25, random.Random(seed), list(faults.PARADIGMS), list(kinds), 4)

    assert planned(1) == planned(1) != planned(2)
    for seed in range(20):
        assert sum(len(kinds) for _, kinds in planned(seed)) == 25
        for paradigm, kinds in planned(seed):
            assert not {"drop", "shm"} <= set(kinds), "one is for TCP, one for shared memory"
            assert paradigm != "hpsgd" or not {"drop", "shm"} & set(kinds)
    assert {kind for seed in range(20) for _, kinds in planned(seed) for kind in kinds} == set(faults.KINDS)


def test_the_report_has_all_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(faults, "RESULTS", tmp_path)
    injected = [Fault("kill", "rank 1", went_on=False, bearable=True), Fault("pause", "server", went_on=True)]
    outcomes = [Outcome("asp", "auto", injected, 3, lost=2, doubled=1), Outcome("bsp", "tcp", left=["a", "b"])]
    faults.report(outcomes, seed=5, elastic=False)
    written = json.loads((tmp_path / "faults.json").read_text())
    assert written["total"] == {
        **{
            "faults": 2,
            "runs": 2,
            "epochs": 3,
            "lost": 2,
            "doubled": 1,
            "wrong": 0,
            "ended": 1,
            "hangs": 0,
            "leftovers": 2,
        }
    }
    assert written["kinds"]["kill"] == {"injected": 1, "went on": 0, "started anew": 1}
    assert "faults 2, runs 2, epochs 3, lost 2, doubled 1" in capsys.readouterr().out
