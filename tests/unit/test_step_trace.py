"""Step times of real jobs: what is read, what is refused, and who replays what."""

from __future__ import annotations

import csv
import gzip
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from lightning_stale import StepTrace, StragglerInjection
from recipes.traces import real_job
from tests.pages import ROOT
from tests.unit.on_demand import step_times

HEAD = "job,worker,stage,step,compute_s"
# two workers of two stages; steps 7 and 9, written in another order; the busiest stage of worker 5 is now 0 and now 1
ROWS = ["A,5,0,9,3.0", "A,5,1,9,2.0", "A,5,0,7,1.0", "A,5,1,7,1.5", "A,2,0,7,4", "A,2,1,7,4", "A,2,0,9,6", "A,2,1,9,5"]
KEPT = ROOT / "recipes" / "traces" / "straggler_steps.csv.gz"


def write(folder: Path, *rows: str, head: str = HEAD) -> Path:
    path = folder / "steps.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def first(trace: StepTrace, rank: int, count: int) -> list[float]:
    return [trace.seconds(rank, step) for step in range(count)]


def test_a_worker_takes_as_long_as_its_busiest_stage_and_wraps_around(tmp_path: Path) -> None:
    trace = StepTrace(write(tmp_path, *ROWS))
    assert (trace.job, trace.workers, len(trace)) == ("A", (2, 5), 2)
    assert first(trace, 0, 5) == [4.0, 6.0, 4.0, 6.0, 4.0]
    assert first(trace, 1, 5) == [1.5, 3.0, 1.5, 3.0, 1.5]


def test_ranks_take_the_workers_that_they_are_given_scaled(tmp_path: Path) -> None:
    trace = StepTrace(write(tmp_path, *ROWS), workers=[5, 2, 5], scale=0.5)
    assert [first(trace, rank, 2) for rank in range(3)] == [[0.75, 1.5], [2.0, 3.0], [0.75, 1.5]]


def test_other_columns_and_another_order_of_them_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, "x,2.5,0,0,3,A", head="note,compute_s,stage,worker,step,job")
    assert first(StepTrace(path), 0, 1) == [2.5]


def test_one_of_several_jobs_packed_or_not(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS, "B,0,0,1,8")
    packed = tmp_path / "steps.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [first(StepTrace(one, job="B"), 0, 1) for one in (path, packed, str(packed))] == [[8.0]] * 3


@pytest.mark.parametrize("job", ["SE", "AR"])
def test_the_real_jobs_are_those_of_the_simulations(job: str) -> None:
    """Read by hand here, and derived independently in tests/unit/data."""
    trace, expected = real_job(job, scale=1.0), step_times(job)
    assert len(trace.workers) == len(expected)
    for rank, times in enumerate(expected):
        assert first(trace, rank, len(trace)) == pytest.approx(times, rel=1e-3)
    with gzip.open(KEPT, "rt") as file:
        rows = [row for row in csv.DictReader(file) if (row["job"], row["worker"]) == (job, "1")]
    steps = sorted({int(row["step"]) for row in rows})
    busiest = [max(float(row["compute_s"]) for row in rows if int(row["step"]) == step) for step in steps]
    assert first(trace, 1, len(trace)) == busiest


def test_it_travels_to_other_processes(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS)
    trace = StepTrace(path, scale=2)
    path.unlink()
    assert first(pickle.loads(pickle.dumps(trace)), 1, 2) == [3.0, 6.0]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/steps.csv: there is no such file \(in .*columns job, worker"):
        StepTrace("nowhere/steps.csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        StragglerInjection(trace="nowhere/steps.csv")


@pytest.mark.parametrize(
    ("rows", "head", "text"),
    [
        (ROWS, "job,worker,stage,step,seconds", "no column compute_s, but job, worker, stage, step, seconds; write"),
        (["0,1,3,0,f,1.0"], "worker,stage,step,microbatch,optype,compute_s", "no column job, but worker"),
        ([], HEAD, "it has no steps"),
        (["A,0,0,1,nan"], HEAD, r"line 2: compute_s=nan: write seconds, > 0"),
        (["A,0,0,1,1", "A,0,0,2,inf"], HEAD, r"line 3: compute_s=inf: write seconds, > 0"),
        (["A,0,0,1,0"], HEAD, r"line 2: compute_s=0: write seconds, > 0"),
        (["A,0,0,1,-1"], HEAD, r"line 2: compute_s=-1: write seconds, > 0"),
        (["A,0,0,1,fast"], HEAD, r"line 2: A,0,0,1,fast: worker, stage and step are integers, and compute_s a number"),
        (["A,0,0,1"], HEAD, r"line 2: A,0,0,1,: worker, stage and step are integers"),
        (["A,zero,0,1,1"], HEAD, r"line 2: A,zero,0,1,1: worker, stage and step are integers"),
        ([*ROWS, "A,5,1,9,2.0"], HEAD, r"line 10: step 9 of worker 5, stage 1 of job A is there twice"),
        (ROWS[:-1], HEAD, r"job A has no step 9 of worker 2, stage 1; leave such steps out for all"),
        (["A,0,0,1,1", "A,1,1,1,1"], HEAD, r"job A has no step 1 of worker 0, stage 1"),
        ([*ROWS, "B,0,0,1,8"], HEAD, r"job=None: write one of 'A', 'B'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_trace_is_refused_with_the_place_and_the_cure(
    tmp_path: Path, rows: list[str], head: str, text: str
) -> None:
    path = write(tmp_path, *rows, head=head)
    with pytest.raises(ValueError, match=text) as error:
        StepTrace(path)
    assert str(path) in str(error.value)


def test_what_is_no_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "packed.csv").write_bytes(gzip.compress(HEAD.encode()))
    (tmp_path / "plain.csv.gz").write_text(HEAD)
    with pytest.raises(ValueError, match="no column job, worker, stage, step, compute_s, but none"):
        StepTrace(tmp_path / "empty.csv")
    for name in ("packed.csv", "plain.csv.gz"):
        with pytest.raises(ValueError, match=f"{name}: it is not a CSV, or not packed as its name says"):
            StepTrace(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"job": "B"}, r"job='B': write one of 'A'"),
        ({"workers": [2, 3]}, r"workers=\[2, 3\]: job A of .* has no worker 3; write some of 2, 5, one for each rank"),
        ({"workers": []}, r"workers=\[\]: write some of 2, 5, one for each rank, or leave it out"),
        ({"scale": 0}, "scale=0: write seconds of training per second of the trace, > 0, e.g. 0.001"),
        ({"scale": float("nan")}, "scale=nan: write"),
        ({"scale": "1"}, "scale='1': write"),
    ],
    ids=repr,
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        StepTrace(write(tmp_path, *ROWS), **arguments)


def set_up(callback: StragglerInjection, ranks: int, stage: str = "fit") -> None:
    trainer: Any = SimpleNamespace(world_size=ranks, global_rank=0)
    module: Any = None
    callback.setup(trainer, module, stage)


def test_there_is_a_worker_for_each_rank(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS)
    for ranks in (1, 2):
        set_up(StragglerInjection(trace=path), ranks)
    with pytest.raises(
        MisconfigurationException, match=r"has 2 workers for 3 ranks: write StepTrace\(workers="
    ) as error:
        set_up(StragglerInjection(trace=path), 3)
    assert "StepTrace(workers=[2, 5, 2]), in which a worker stands for several, or Trainer(devices=2)" in str(
        error.value
    )
    set_up(StragglerInjection(trace=StepTrace(path, workers=[2, 5, 2])), 3)
    with pytest.raises(MisconfigurationException, match=r"workers=\[2, 5, 2\]: they are 3, and there are 2 ranks"):
        set_up(StragglerInjection(trace=StepTrace(path, workers=[2, 5, 2])), 2)


# --- replayed ---------------------------------------------------------------------------------------------------------


def test_each_rank_replays_its_own_worker_the_same_in_every_run(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS)
    alone = StragglerInjection(trace=path)
    assert [alone.delay_s(1, step_s=0.5) for _ in range(5)] == [1.0, 2.5, 1.0, 2.5, 1.0]
    both = StragglerInjection(trace=path)
    assert [(both.delay_s(0, step_s=0.5), both.delay_s(1, step_s=0.5)) for _ in range(3)] == [
        (3.5, 1.0),
        (5.5, 2.5),
        (3.5, 1.0),
    ]


def test_factors_act_on_the_times_of_the_trace(tmp_path: Path) -> None:
    callback = StragglerInjection(trace=write(tmp_path, *ROWS), factors={0: 2.0}, probability=1.0, slowdown=3.0)
    assert [callback.delay_s(0, step_s=1.0), callback.delay_s(1, step_s=1.0)] == [4 * 2 * 3 - 1, 1.5 * 3 - 1]


def test_that_it_begins_again_is_said_when_fit_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = StragglerInjection(trace=write(tmp_path, *ROWS))
    with caplog.at_level("INFO"):
        set_up(callback, 2, "validate")
        assert caplog.messages == []
        set_up(callback, 2)
    (message,) = caplog.messages
    assert message == "StragglerInjection replays 2 steps of job A; after the last comes the first again"


@pytest.mark.parametrize(("late", "warned"), [(1, False), (2, True)])
def test_steps_that_take_longer_by_themselves_are_told(
    tmp_path: Path, late: int, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    callback = StragglerInjection(trace=write(tmp_path, *ROWS))
    for number in range(10):
        assert callback.delay_s(0, step_s=7.0 if number < late else 1.0) == (0 if number < late else [3, 5][number % 2])
    trainer: Any = SimpleNamespace(global_rank=0)
    module: Any = None
    callback.on_train_end(trainer, module)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == warned
    assert not warned or "2 of 10 steps of rank 0 took longer by themselves than the trace says" in told[0]


def test_in_hydra(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS)
    trace = {"_target_": "lightning_stale.StepTrace", "path": str(path), "workers": [5, 2], "scale": 0.5}
    config = OmegaConf.load(ROOT / "conf" / "callbacks" / "stragglers.yaml").stragglers
    assert set(config) - {"_target_"} == {"trace", "factors", "probability", "slowdown", "step_s", "seed"}
    callback = instantiate(config, trace=trace, seed=1)
    assert [callback.delay_s(0, step_s=0.25) for _ in range(2)] == [0.5, 1.25]
    assert instantiate(config, trace=str(path), seed=1).delay_s(0, step_s=1.0) == 3.0
