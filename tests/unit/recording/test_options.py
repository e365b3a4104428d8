"""Which fit can be the one that is replayed, and what a push's checksums tell."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_stale import ASP, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.events import Recorder
from lightning_stale.parameter_server.fingerprints import fingerprint
from lightning_stale.recording.log import EventLog
from lightning_stale.recording.options import REPLAY, Recording, free, of_rank
from lightning_stale.recording.turns import RecordedTurns, ReplayedTurns, ReplayError, Turns
from lightning_stale.strategies import recorded
from lightning_stale.strategies.recorded import Records
from tests.integration.models import Regression, loader, trainer

HEADER: dict[str, Any] = {
    "strategy": "StaleSyncStrategy",
    "paradigm": "ASP()",
    "apply": "Plain()",
    "world_size": 2,
    "on_demand": True,
    "elastic": None,
    "updates": 0,
    "weights": {"net.weight": 5, "net.bias": 6},
}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    EventLog(tmp_path / "run.record", HEADER).close()
    return tmp_path / "run.record"


def test_the_fit_that_is_recorded_can_be_replayed(record: Path) -> None:
    Recording(replay=record).check(HEADER)
    Recording(record=record).check({**HEADER, "world_size": 3})  # nothing is replayed


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"paradigm": "BSP()"},
            r"with paradigm='ASP\(\)', and this one has paradigm='BSP\(\)': write the same paradigm",
        ),
        ({"world_size": 3}, r"world_size=2, and this one has world_size=3: have as many workers"),
        ({"updates": 120}, r"updates=0, and this one has updates=120: begin where it began: trainer.fit\(ckpt_path"),
        ({"on_demand": False}, "write the same data="),
        ({"weights": {"net.weight": 5}}, "of a model with the parameter .net.bias., which this one lacks"),
        ({"weights": {"net.weight": 5, "net.bias": 7}}, r"other weights .*, first in 'net.bias': call seed_everything"),
    ],
)
def test_another_fit_is_refused_with_the_cure(other: dict[str, Any], says: str, record: Path) -> None:
    with pytest.raises(ReplayError, match=says):
        Recording(replay=record).check({**HEADER, **other})


def test_what_turns_there_are(record: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    assert type(Recording().begin(HEADER, recorder, print)) is Turns
    assert type(Recording(record=tmp_path / "new").begin(HEADER, recorder, print)) is RecordedTurns
    assert type(Recording(replay=record, record=tmp_path / "other").begin(HEADER, recorder, print)) is ReplayedTurns


@pytest.mark.parametrize("strategy", [StaleSyncStrategy, HPSGDStrategy])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"record": 3}, "record=3: write True, or the path of a file"),
        ({"record": ""}, "record='': write True"),
        ({"replay": True}, "replay=True: write the path of a file that record= has written"),
        ({"replay": "nowhere.record"}, "replay='nowhere.record': .*No such file.* Write the path of a file"),
        ({"replay": __file__}, "is no record of a run"),
    ],
)
def test_bad_options_are_refused_where_they_are_written(strategy: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        strategy(**options)


def test_the_strategies_take_good_ones(record: Path) -> None:
    StaleSyncStrategy(paradigm=ASP(), record=True, replay=str(record))
    HPSGDStrategy(record="run.record", replay=record)


def some(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 5), (7,), (), (2, 3, 4, 4)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[3] = made[3].to(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_checksums_are_those_of_the_bits_wherever_they_lie(dtype: torch.dtype) -> None:
    buffer = torch.zeros(4096, dtype=torch.uint8)
    moved, start = [], 2 * torch.empty((), dtype=dtype).element_size()  # not where words begin
    for tensor in some(dtype):
        size = tensor.numel() * tensor.element_size()
        view = buffer[start : start + size].view(dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        moved.append(view)
        start += size
    assert fingerprint(0.0, 1, moved, [{"lr": 0.1}]) == fingerprint(0.0, 1, some(dtype), [{"lr": 0.1}])


@pytest.mark.parametrize("place", range(4))
def test_one_bit_of_one_parameter_is_seen_and_named(place: int) -> None:
    one, other = some(), some()
    other[place].as_strided((other[place].numel(),), (1,))[-1:].view(torch.int32).bitwise_xor_(1)
    mine, its = (fingerprint(0.0, 1, gradients, []) for gradients in (one, other))
    assert mine.gradients != its.gradients
    assert [a == b for a, b in zip(mine.parameters, its.parameters, strict=True)] == [p != place for p in range(4)]


def test_a_gradient_that_is_missing_is_none_of_zeros_and_options_count() -> None:
    missing, zero = (fingerprint(0.0, 1, [torch.ones(2), second], []) for second in (None, torch.zeros(3)))
    assert missing.gradients != zero.gradients
    one, other = (fingerprint(0.0, 1, some(), [{"lr": lr}]) for lr in (0.1, 0.1 + 2**-50))
    assert (one.gradients == other.gradients, one.options == other.options) == (True, False)


def test_the_command_tells_the_fit_of_the_process_that_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second, say, as LearningRateFinder has the first; whatever strategies they have."""
    EventLog(tmp_path / "run.record", {**HEADER, "fit": 2}).close()
    monkeypatch.setenv(REPLAY, f"{tmp_path / 'run.record'}\n17")
    monkeypatch.setattr(recorded, "_fits_of_process", itertools.count(1))
    fits = [Records(False, None).next(Trainer(logger=False, accelerator="cpu")) for _ in range(3)]
    assert [(fit.fit, fit.replay, fit.until) for fit in fits] == [
        *((1, None, None), (2, tmp_path / "run.record", 17), (3, None, None)),
    ]


def test_nothing_of_a_rank_is_written_over_either(tmp_path: Path) -> None:
    path = tmp_path / "run.record"
    assert free(path) == path
    of_rank(path, 3).touch()  # that of rank 0 was lost, or is to be written when training has ended
    assert free(path) == tmp_path / "run.2.record"


def test_a_record_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    strategy = StaleSyncStrategy(record=tmp_path / "file" / "run.record")
    t = trainer(1, strategy, max_steps=1)
    with pytest.raises(MisconfigurationException, match=r"record=.*run.record.*Write the path of a file in a folder"):
        t.fit(Regression(), loader())
