"""Service, coordinator and shard, driven message by message through a socket that only remembers what was sent."""

from __future__ import annotations

import collections
import copy
import errno
import io
import logging
import os
import re
import select
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.coordinator.coordinator import Coordinator, OnLoss
from lightning_stale.coordinator.leases import NONE_LEFT, EpochLeases
from lightning_stale.coordinator.service import Service
from lightning_stale.events import Recorder
from lightning_stale.events.stale_sync import StaleSyncCounts
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, Paradigm
from lightning_stale.parameter_server.apply import ApplyRule
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.shard import Shard
from lightning_stale.parameter_server.store import ParameterStore
from lightning_stale.recording.turns import Turns
from lightning_stale.transport import memory, wire
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.parcel import unpack

SHAPES = [(3,), (2, 2)]
LR = 0.5
SHARED = [False, pytest.param(True, marks=pytest.mark.skipif(not memory.supported(), reason="needs Linux"))]


class FakeFrame:
    """A received frame: its bytes, and the descriptor of the connection."""

    def __init__(self, data: bytes, connection: int) -> None:
        self.bytes = data
        self.buffer = memoryview(data)
        self._connection = connection

    def get(self, option: int) -> int:
        assert option == zmq.SRCFD
        return self._connection


class FakeRouter:
    """A ROUTER whose other ends are lists."""

    def __init__(self) -> None:
        self.incoming: collections.deque[list[FakeFrame]] = collections.deque()
        self.sent: dict[bytes, list[list[bytes]]] = collections.defaultdict(list)
        self.gone: dict[bytes, int] = {}

    def recv_multipart(self, flags: int, copy: bool) -> list[FakeFrame]:
        assert flags == zmq.NOBLOCK
        if not self.incoming:
            raise zmq.Again
        return self.incoming.popleft()

    def send_multipart(self, frames: list[Any]) -> None:
        identity, *rest = (bytes(frame) for frame in frames)
        if identity in self.gone:
            raise zmq.ZMQError(self.gone[identity])
        self.sent[identity].append(rest)


class FakeSocket:
    """A ServerSocket without a network."""

    def __init__(self) -> None:
        self.router = FakeRouter()
        self.closed: list[int] = []
        self.ended: set[int] = set()  # descriptors that no connection has now
        self.refused = False

    def closed_connections(self) -> tuple[list[int], bool]:
        answer = self.closed, self.refused
        self.closed, self.refused = [], False
        return answer

    def is_open(self, connection: int) -> bool:
        return connection not in self.ended


def identity_of(rank: int) -> bytes:
    return b"worker-%d" % rank


def connection_of(rank: int) -> int:
    return 100 + rank


def nothing_ahead(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the batches that its grant names ahead, of which there are none."""
    if message["grant"] is not None:
        *grant, ahead, taken, most = message["grant"]
        assert (ahead, taken, most) == ([], 0, 0)
        message["grant"] = grant
    return message


class Harness:
    """A server over two parameters and as many fake workers as are wanted."""

    def __init__(
        self,
        paradigm: Paradigm,
        world_size: int = 2,
        folder: str = "",
        make: Callable[[list[Tensor]], list[Optimizer]] = lambda p: [torch.optim.SGD(p, lr=LR)],
        rule: ApplyRule | None = None,
        values: list[Tensor] | None = None,
        hands_out: bool = False,
    ) -> None:
        values = values or [torch.zeros(shape) for shape in SHAPES]
        self.layout = Layout.of(values)
        self.store = ParameterStore(torch.zeros(self.layout.nbytes, dtype=torch.uint8), self.layout, rule)
        self.store.set_weights(range(len(values)), values)
        self.store.set_optimizers(make(list(self.store.parameters)))
        self.store.rule.begin(world_size, len(self.store.optimizers))
        self.socket = FakeSocket()
        self.time = 0.0
        self.paradigm = paradigm
        counts = StaleSyncCounts(world_size, paradigm.thresholds)
        recorder = Recorder(counts)
        leases = EpochLeases(world_size, paradigm.allows) if hands_out else None
        on_loss: OnLoss = "go on" if hands_out else "end"
        self.service = Service(
            self.socket,  # type: ignore[arg-type]
            Coordinator(world_size, paradigm, leases=leases, on_loss=on_loss, record=recorder.record),
            "parameter server",
            turns=Turns(lambda: self.time),
        )
        self.shard = Shard(self.service, self.store, self.layout, world_size, folder, counts, recorder.record)
        self.world_size = world_size
        self.segments: dict[int, Tensor] = {}

    # --- what a worker does -----------------------------------------------------------------------------------------

    def raw(self, rank: int, *frames: bytes) -> None:
        data = [FakeFrame(frame, connection_of(rank)) for frame in (identity_of(rank), *frames)]
        self.socket.router.incoming.append(data)
        self.service.drain()

    def send(self, rank: int, kind: str, /, payload: bytes | None = None, **fields: Any) -> None:
        frames = [wire.encode_message(kind, **fields)]
        self.raw(rank, *frames, *([] if payload is None else [payload]))

    def hello(self, rank: int, shared: bool = False, anew: bool = False) -> dict[str, Any]:
        self.send(rank, "hello", rank=rank, pid=1000 + rank, shared=shared, anew=anew)
        (welcome,) = self.take(rank)
        if shared and welcome["path"]:
            self.segments[rank] = memory.open_segment(welcome["path"], welcome["nbytes"], welcome["token"])
        return welcome

    def sync(
        self, rank: int, place: str = "the start", detail: str = "step 0", pull: bool = True, **times: float
    ) -> None:
        self.send(
            rank, "sync", place=place, detail=detail, region="", pull=pull, **{"wait_s": 0.0, "compute_s": 0.0, **times}
        )

    def push(self, rank: int, value: float | list[Tensor] = 1.0, **fields: Any) -> None:
        """Push gradients that are ``value`` everywhere, or one for each parameter."""
        optimizer = fields.get("optimizer", 0)
        places = self.store.places(optimizer)
        message = {
            "optimizer": optimizer,
            "used": [True] * len(places),
            "options": read_options(self.store.optimizers[optimizer]),
            "clip": None,
            "whole": True,
            "leases": [],
            "asks": False,
            "commits": True,
            "wait_s": 0.0,
            "compute_s": 0.0,
            **fields,
        }
        if rank in self.segments:
            self._write(self.segments[rank][: self.layout.nbytes], value)
            self.send(rank, "push", nbytes=0, **message)
            return
        data = torch.zeros(self.layout.nbytes, dtype=torch.uint8)
        self._write(data, value)
        ranges = self.layout.ranges([place for place, used in zip(places, message["used"], strict=True) if used])
        self.send(rank, "push", nbytes=sum(end - start for start, end in ranges), **message)
        for start, end in ranges:
            middle = (start + end) // 2  # in two chunks
            for first, last in ((start, middle), (middle, end)):
                self.send(rank, "chunk", offset=first, payload=data[first:last].numpy().tobytes())

    def request(self, rank: int, plan: list[int] | None = None, leases: Sequence[int] = (), **fields: Any) -> None:
        """Ask; a plan without a number to prefetch says zero."""
        plan = None if plan is None else [*plan, 0]
        self.send(rank, "request", **{"leases": list(leases), "plan": plan, "kept": [], "steps": 0, **fields})

    def _write(self, buffer: Tensor, value: float | list[Tensor]) -> None:
        for place, view in enumerate(self.layout.views(buffer)):
            if isinstance(value, list):
                view.copy_(value[place])
            else:
                view.fill_(value)

    def start(self, shared: bool = False) -> None:
        """Have all workers connected, met, and their first messages taken."""
        for rank in range(self.world_size):
            self.hello(rank, shared)
        for rank in range(self.world_size):
            self.sync(rank)
        for rank in range(self.world_size):
            assert [message["type"] for message in self.take(rank)] == ["synced"]

    def close_connection(self, rank: int) -> None:
        self.socket.closed.append(connection_of(rank))
        self.service.note_connections()

    # --- what a worker sees -----------------------------------------------------------------------------------------

    def take(self, rank: int) -> list[dict[str, Any]]:
        """Return the messages for ``rank`` since the last call; the bytes of their chunks as ``"data"``."""
        messages: list[dict[str, Any]] = []
        received = 0
        while frames := self.socket.router.sent.pop(identity_of(rank), []):
            for header, *payload in frames:
                message = wire.decode_message(header)
                if message["type"] == "chunk":
                    whole, offset = messages[-1]["data"], message["offset"]
                    whole.extend(bytes(max(0, offset + len(payload[0]) - len(whole))))
                    whole[offset : offset + len(payload[0])] = payload[0]
                    received += len(payload[0])
                    if received < messages[-1]["nbytes"]:
                        self.send(rank, "more")
                else:
                    messages.append({**message, "data": bytearray()})
                    received = 0
        for message in messages:
            assert message["type"] not in ("released", "granted", "synced", "reply") or bool(message["nbytes"]) == bool(
                message["data"]
            )
        return messages

    def kinds(self, rank: int) -> list[str]:
        return [message["type"] for message in self.take(rank)]

    def released(self, rank: int) -> dict[str, Any]:
        """Return the one message for ``rank``, an OK."""
        (message,) = self.take(rank)
        assert message["type"] == "released"
        return nothing_ahead(message)

    def granted(self, rank: int) -> dict[str, Any]:
        """Return the one message for ``rank``, a grant."""
        (message,) = self.take(rank)
        assert message["type"] == "granted"
        return nothing_ahead(message)

    def weights(self, rank: int, message: dict[str, Any]) -> list[Tensor]:
        """Return the weights that ``rank`` has got with ``message``."""
        if rank in self.segments:
            assert message["nbytes"] == 0
            return self.layout.views(self.segments[rank][self.layout.nbytes :])
        data = torch.zeros(self.layout.nbytes, dtype=torch.uint8)
        data[: len(message["data"])] = torch.frombuffer(message["data"], dtype=torch.uint8)
        return self.layout.views(data)

    def failure(self, rank: int) -> dict[str, Any]:
        """Return the one message for ``rank``, a failure."""
        (message,) = self.take(rank)
        assert message["type"] == "failed"
        return message

    def ask(self, rank: int, question: str, **fields: Any) -> Any:
        self.send(rank, question, **fields)
        (message,) = self.take(rank)
        assert message["type"] == "reply"
        return unpack(torch.frombuffer(message["data"], dtype=torch.uint8), message["head"])


def filled(value: float) -> list[Tensor]:
    return [torch.full(shape, value) for shape in SHAPES]


def assert_weights(tensors: list[Tensor], value: float) -> None:
    torch.testing.assert_close([tensor.detach() for tensor in tensors], filled(value), rtol=0.0, atol=0.0)


# --- connecting and meeting ---------------------------------------------------------------------------------------


def test_hello_without_shared_memory() -> None:
    harness = Harness(ASP())
    welcome = harness.hello(0)
    assert (welcome["type"], welcome["path"], welcome["token"]) == ("welcome", "", b"")


@pytest.mark.parametrize("shared", SHARED)
def test_all_start_with_the_servers_weights(shared: bool, tmp_path: Path) -> None:
    harness = Harness(ASP(), folder=str(tmp_path))
    with torch.no_grad():
        for parameter in harness.store.parameters:
            parameter.fill_(7.0)
    for rank in (1, 0):
        harness.hello(rank, shared)
    harness.sync(0)
    assert harness.take(0) == [], "met alone"
    harness.sync(1)
    for rank in (0, 1):
        (message,) = harness.take(rank)
        assert (message["type"], message["version"]) == ("synced", 0)
        assert_weights(harness.weights(rank, message), 7.0)
    assert list(harness.paradigm.clocks.items()) == [(0, 0), (1, 0)], "they join in rank order, whoever came first"
    assert list(tmp_path.iterdir()) == []


def test_a_meeting_waits_for_workers_that_have_not_connected_yet() -> None:
    harness = Harness(ASP(), world_size=3)
    for rank in (0, 1):
        harness.hello(rank)
        harness.sync(rank)
    assert harness.take(0) == harness.take(1) == []
    harness.hello(2)
    harness.sync(2)
    assert harness.kinds(0) == harness.kinds(1) == harness.kinds(2) == ["synced"]


def test_who_has_the_newest_weights_is_not_sent_them_again() -> None:
    harness = Harness(ASP())
    harness.start()
    for rank in (0, 1):
        harness.sync(rank, "the end")
    assert [harness.take(rank)[0]["nbytes"] for rank in (0, 1)] == [0, 0]
    harness.push(0)
    assert harness.released(0)["nbytes"] == harness.layout.nbytes


@pytest.mark.skipif(not memory.supported(), reason="needs Linux")
def test_segments_are_made_before_the_workers_connect(tmp_path: Path) -> None:
    harness, made = Harness(ASP(), folder=str(tmp_path)), []
    harness.shard.prepare_segments(2, report=lambda: made.append(len(harness.shard._segments)))
    assert made == [1, 2]
    harness.shard._folder = str(tmp_path / "missing")  # so that no other one can be made
    harness.start(shared=True)
    harness.push(0, 2.0)
    assert_weights(harness.weights(0, harness.released(0)), -1.0)
    assert_weights(harness.weights(1, {"nbytes": 0}), 0.0)


def test_unshared_workers_get_chunks(tmp_path: Path) -> None:
    harness = Harness(ASP(), world_size=1, folder=str(tmp_path))
    if not memory.supported():
        pytest.skip("needs Linux")
    harness.hello(0, shared=True)
    harness.segments.clear()
    harness.send(0, "unshare")
    harness.sync(0)
    assert harness.take(0)[0]["nbytes"] == harness.layout.nbytes
    harness.push(0, 2.0)
    assert_weights(harness.weights(0, harness.released(0)), -LR * 2.0)


# --- pushes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
def test_a_push_is_applied_and_answered_with_the_new_weights(shared: bool, tmp_path: Path) -> None:
    harness = Harness(ASP(), folder=str(tmp_path))
    harness.start(shared)
    harness.push(0, 2.0)
    message = harness.released(0)
    assert {name: message[name] for name in ("version", "clock", "lead", "staleness")} == {
        "version": 1,
        "clock": 1,
        "lead": 1,
        "staleness": 0,
    }
    assert_weights(harness.weights(0, message), -1.0)
    assert harness.take(1) == []
    if shared:  # worker 1 computes with its weights: they must not change under it
        assert_weights(harness.layout.views(harness.segments[1][harness.layout.nbytes :]), 0.0)


@pytest.mark.parametrize("shared", SHARED)
def test_who_waits_has_its_gradient_applied_and_pulls_when_released(shared: bool, tmp_path: Path) -> None:
    harness = Harness(SSP(0), folder=str(tmp_path))
    harness.start(shared)
    harness.push(0, 1.0)
    assert harness.take(0) == []
    assert_weights(list(harness.store.parameters), -0.5)
    if shared:
        assert_weights(harness.layout.views(harness.segments[0][harness.layout.nbytes :]), 0.0)
    harness.push(1, 2.0)
    for rank, staleness in ((0, 0), (1, 1)):
        message = harness.released(rank)
        assert (message["version"], message["clock"], message["lead"], message["staleness"]) == (2, 1, 0, staleness)
        assert_weights(harness.weights(rank, message), -1.5)


def test_staleness_counts_the_updates_between_pull_and_push() -> None:
    harness = Harness(ASP(), world_size=3)
    harness.start()
    staleness = []
    for rank in (0, 0, 1, 0, 2, 1):
        harness.push(rank)
        staleness.append(harness.released(rank)["staleness"])
    assert staleness == [0, 0, 2, 1, 4, 2]


@pytest.mark.parametrize("shared", SHARED)
def test_bsp_takes_one_step_with_the_mean(shared: bool, tmp_path: Path) -> None:
    harness = Harness(BSP(), world_size=3, folder=str(tmp_path))
    harness.start(shared)
    for round_number, values in enumerate(((1.0, 2.0, 6.0), (0.0, 0.0, 3.0)), start=1):
        for rank in (2, 0):
            harness.push(rank, values[rank])
        assert harness.store.version == round_number - 1
        harness.push(1, values[1])
        for rank in range(3):
            message = harness.released(rank)
            assert (message["version"], message["clock"], message["staleness"]) == (round_number, round_number, 0)
    assert_weights(list(harness.store.parameters), -LR * (3.0 + 1.0))


def test_bsp_adds_gradients_in_rank_order_whatever_order_they_come_in() -> None:
    harness = Harness(BSP(), world_size=3, make=lambda p: [torch.optim.SGD(p, lr=1.0)])
    harness.start()
    values = (1e8, 1.0, -1e8)
    for rank in (2, 0, 1):
        harness.push(rank, values[rank])
    assert_weights(list(harness.store.parameters), 0.0)  # (1e8 + 1) - 1e8 == 0; in order of arrival it is 1


def test_bsp_forgets_a_round_when_it_is_over() -> None:
    harness = Harness(BSP())
    harness.start()
    for rank in (0, 1):
        harness.push(rank, 100.0)
    before = [parameter.detach().clone() for parameter in harness.store.parameters]
    harness.sync(1, "the end of an epoch")  # it has fewer batches
    harness.push(0, 2.0)
    torch.testing.assert_close([p.detach() for p in harness.store.parameters], [value - LR * 2.0 for value in before])


def test_bsp_clips_the_mean() -> None:
    harness = Harness(BSP())
    harness.start()
    for rank, value in ((0, 1.0), (1, 7.0)):
        harness.push(rank, value, clip=[0.25, "value"])
    assert_weights(list(harness.store.parameters), -LR * 0.25)


def test_a_push_of_one_of_several_optimizers_with_an_unused_parameter() -> None:
    harness = Harness(ASP(), make=lambda p: [torch.optim.SGD(p, lr=LR), torch.optim.SGD([p[1]], lr=0.25)], world_size=1)
    harness.start()
    harness.push(0, 1.0, optimizer=1)
    assert harness.released(0)["version"] == 1
    torch.testing.assert_close([p.detach() for p in harness.store.parameters], [filled(0.0)[0], filled(-0.25)[1]])
    harness.push(0, 1.0, used=[False, True])
    torch.testing.assert_close([p.detach() for p in harness.store.parameters], [filled(0.0)[0], filled(-0.75)[1]])


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("paradigm", [ASP(), BSP()], ids=repr)
def test_a_push_may_bring_back_only_what_it_has_changed(paradigm: Paradigm, shared: bool, tmp_path: Path) -> None:
    """Another loss is still to be differentiated at the rest."""

    def make(parameters: list[Tensor]) -> list[Optimizer]:
        return [torch.optim.SGD([parameters[0]], lr=LR), torch.optim.SGD([parameters[1]], lr=LR)]

    harness = Harness(copy.deepcopy(paradigm), folder=str(tmp_path), make=make)
    harness.start(shared)
    staleness = []
    for optimizer in (0, 1):
        for rank in (0, 1):
            harness.push(rank, 2.0, optimizer=optimizer, whole=False)
        for rank in (0, 1):
            message = harness.released(rank)
            staleness.append(message["staleness"])
            if optimizer == 0:
                first, second = harness.weights(rank, message)
                assert first.unique().item() == (-2.0 if rank == 1 and not paradigm.averages else -1.0)
                assert not second.any(), "the other optimizer's weights have changed"
    # the updates of the other worker since its last whole pull, and not its own
    assert staleness == ([0, 0, 0, 0] if paradigm.averages else [0, 1, 1, 2])
    for rank in (0, 1):
        harness.send(rank, "pull")
        (message,) = harness.take(rank)
        assert_weights(harness.weights(rank, message), -1.0 if paradigm.averages else -2.0)
    for rank in (0, 1):
        harness.push(rank, optimizer=1)
    assert harness.released(0)["staleness"] == 0


def test_what_has_no_gradient_stays_as_it_was_when_a_push_brings_back_its_own() -> None:
    harness = Harness(ASP())
    harness.start()
    harness.push(1, 1.0)
    harness.push(0, 1.0, used=[False, True], whole=False)
    message = harness.released(0)
    assert message["nbytes"] == 16
    first, second = harness.weights(0, message)
    assert (first.unique().item(), second.unique().item()) == (0.0, -1.0)


def test_the_only_worker_sets_weights_itself() -> None:
    harness = Harness(ASP(), world_size=1)
    harness.start()
    harness.send(0, "change", places=[1], nbytes=16)
    start = harness.layout.slots[1].offset
    harness.send(0, "chunk", offset=start, payload=torch.full((2, 2), 3.0).numpy().tobytes())
    assert harness.take(0) == []
    harness.push(0, 2.0)
    first, second = harness.weights(0, harness.released(0))
    assert (first.unique().item(), second.unique().item()) == (-1.0, 2.0)


def test_the_gate_gets_the_time() -> None:
    """DSSP: the grant of the table in test_paradigms."""
    harness = Harness(DSSP(lower=1, upper=3))
    harness.start()
    seen = []
    for harness.time, rank in ((1, 0), (2, 0), (3, 1), (4, 0), (6, 1), (7, 0), (8, 0), (9, 0)):
        harness.push(rank)
        seen.append([other for other in (0, 1) if harness.kinds(other) == ["released"]])
    assert seen == [[0], [], [0, 1], [], [0, 1], [0], [0], []]


@pytest.mark.parametrize(
    ("paradigm", "weights", "version"), [(SSP(0), -LR * 3.0, 1), (BSP(), -LR * 3.0, 1)], ids=["ssp", "bsp"]
)
def test_who_comes_to_a_meeting_point_holds_up_nobody(paradigm: Paradigm, weights: float, version: int) -> None:
    harness = Harness(paradigm)
    harness.start()
    harness.push(0, 3.0)
    assert harness.take(0) == []
    harness.sync(1, "the end of an epoch")
    assert harness.released(0)["lead"] == 0
    assert harness.take(1) == []
    assert_weights(list(harness.store.parameters), weights)
    assert harness.store.version == version
    harness.sync(0, "the end of an epoch")
    assert harness.kinds(0) == harness.kinds(1) == ["synced"]
    assert dict(harness.paradigm.clocks) == {0: 1, 1: 1}


def test_a_meeting_without_a_pull_leaves_the_weights_alone() -> None:
    harness = Harness(ASP())
    harness.start()
    harness.push(0, 1.0)
    harness.take(0)
    for rank in (0, 1):
        harness.sync(rank, "a collective operation", pull=rank == 0)
    assert [harness.take(rank)[0]["version"] for rank in (0, 1)] == [1, 0]
    harness.push(1, 1.0)
    assert harness.released(1)["staleness"] == 1


def test_pull_waits_for_nobody() -> None:
    harness = Harness(ASP())
    harness.start()
    harness.push(0, 1.0)
    harness.take(0)
    harness.send(1, "pull")
    (message,) = harness.take(1)
    assert (message["type"], message["version"]) == ("synced", 1)
    assert_weights(harness.weights(1, message), -LR)


# --- data on demand ---------------------------------------------------------------------------------------------------

PLAN = [0, 4, 1, 2, 2]  # 4 batches for 2 workers


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("paradigm", [ASP(), BSP()], ids=repr)
def test_a_push_of_a_lease_that_was_taken_back_changes_nothing(
    paradigm: Paradigm, shared: bool, tmp_path: Path
) -> None:
    harness = Harness(copy.deepcopy(paradigm), folder=str(tmp_path), hands_out=True)
    harness.start(shared)
    for rank in (0, 1):
        harness.request(rank, PLAN)
        assert harness.granted(rank)["grant"] == [rank, rank, rank + 1, 0]
    harness.close_connection(1)
    harness.hello(1, shared)
    summary = harness.ask(0, "summary")
    for leases, refused in (([1], 1), ([0], 0), ([7], 7)):
        harness.push(1, 8.0, leases=leases, asks=True)
        (message,) = harness.take(1)
        assert (message["type"], message["lease"]) == ("refused", refused)
    assert harness.take(0) == []
    assert_weights(list(harness.store.parameters), 0.0)
    assert (harness.store.version, harness.ask(0, "summary")) == (0, summary)
    harness.push(0, 2.0, leases=[0], asks=True)
    message = harness.released(0)
    assert message["grant"] == [2, 1, 2, 1], "the batch of the other"
    assert_weights(harness.weights(0, message), -LR * 2.0)
    harness.request(1)
    message = harness.granted(1)
    assert (message["grant"], message["version"]) == ([3, 2, 3, 1], 1)
    assert_weights(harness.weights(1, message), -LR * 2.0)
    harness.push(1, 4.0, leases=[3])
    harness.push(0, 4.0, leases=[2])
    assert_weights(list(harness.store.parameters), -LR * (6.0 if paradigm.averages else 10.0))


def two_optimizers(parameters: list[Tensor]) -> list[Optimizer]:
    return [torch.optim.SGD([parameter], lr=LR) for parameter in parameters]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("pushed", [[], [0], [0, 1], [0, 0]], ids=str)
def test_who_is_lost_amid_a_batch_of_several_pushes_has_each_of_them_applied_once(
    pushed: list[int], shared: bool, tmp_path: Path
) -> None:
    """The batch has three pushes, of the first optimizer twice; its next holder computes all three again."""
    harness = Harness(ASP(), folder=str(tmp_path), make=two_optimizers, hands_out=True)
    harness.start(shared)
    for rank in (0, 1):
        harness.request(rank, [0, 2, 1, 1, 1])
        assert harness.granted(rank)["grant"][0] == rank
    for optimizer in pushed:
        harness.push(1, 1.0, optimizer=optimizer, leases=[1], commits=False, whole=False)
    harness.close_connection(1)
    for lease in (0, 2):
        for optimizer in (0, 0, 1):
            harness.take(0)
            harness.push(0, 1.0, optimizer=optimizer, leases=[lease], commits=False, whole=False)
            repeated = lease == 2 and len(pushed) > 0
            assert harness.released(0)["applied"] or repeated
        harness.request(0, leases=[lease], steps=3)
    (message,) = harness.take(0)
    assert message["grant"] == [-1, 2, 2, 1, [], 6 * 1 // 2, 3]
    for parameter, steps in zip(harness.store.parameters, (4.0, 2.0), strict=True):
        assert torch.allclose(parameter, torch.full_like(parameter, -LR * steps))
    assert harness.store.version == 6


@pytest.mark.parametrize("shared", SHARED)
def test_a_push_that_asks_gets_weights_and_grant_in_one_message(shared: bool, tmp_path: Path) -> None:
    harness = Harness(SSP(0), folder=str(tmp_path), hands_out=True)
    harness.start(shared)
    for rank in (0, 1):
        harness.request(rank, PLAN)
        harness.granted(rank)
    harness.push(0, 1.0, leases=[0], asks=True)
    assert harness.take(0) == [], "the gate is closed"
    harness.push(1, 2.0, leases=[1], asks=True)
    for rank, lease in ((1, 2), (0, 3)):
        message = harness.released(rank)
        assert (message["version"], message["clock"], message["lead"]) == (2, 1, 0)
        assert message["grant"] == [lease, lease, lease + 1, 1]
        assert_weights(harness.weights(rank, message), -LR * 3.0)
    harness.push(1, 2.0, leases=[2])
    harness.push(0, 2.0, leases=[3])
    assert [harness.released(rank)["grant"] for rank in (0, 1)] == [None, None], "nobody has asked"


@pytest.mark.parametrize("shared", SHARED)
def test_a_granted_request_brings_the_weights_of_now(shared: bool, tmp_path: Path) -> None:
    harness = Harness(ASP(), folder=str(tmp_path), hands_out=True)
    harness.start(shared)
    harness.request(0, PLAN)
    harness.granted(0)
    harness.push(0, 2.0, leases=[0])
    harness.released(0)
    if shared:
        assert_weights(harness.weights(1, {"nbytes": 0}), 0.0)
    harness.request(1, PLAN)
    message = harness.granted(1)
    assert (message["grant"], message["version"]) == ([1, 1, 2, 1], 1)
    assert_weights(harness.weights(1, message), -LR * 2.0)
    harness.push(1, 2.0, leases=[1])
    assert harness.released(1)["staleness"] == 0
    harness.request(1, leases=[])
    harness.granted(1)
    harness.request(1, leases=[2])  # a step that was skipped
    message = harness.granted(1)
    assert (message["grant"], message["nbytes"]) == ([3, 3, 4, 1], 0), "it has the weights of now"
    harness.request(0)
    assert harness.take(0) == [], "what rank 1 holds may come back"
    harness.push(1, 2.0, leases=[3], asks=True)
    over = [NONE_LEFT, 4, 4, 2]
    message = harness.granted(0)
    assert (message["grant"], message["version"], harness.released(1)["grant"]) == (over, 3, over)
    assert_weights(harness.weights(0, message), -LR * 6.0)


@pytest.mark.parametrize("shared", SHARED)
def test_the_mean_of_a_round_whose_pushers_all_wait_for_batches_is_taken(shared: bool, tmp_path: Path) -> None:
    harness = Harness(BSP(), world_size=3, folder=str(tmp_path), hands_out=True)
    harness.start(shared)
    for rank in range(3):
        harness.request(rank, [0, 3, 1, 1, 1])
        harness.granted(rank)
    harness.request(2, leases=[2])
    harness.push(0, 1.0, leases=[0], asks=True)
    assert harness.store.version == 0
    assert harness.take(0) == harness.take(2) == [], "what rank 1 holds may come back"
    harness.push(1, 5.0, leases=[1], asks=True)
    over = [NONE_LEFT, 3, 3, 1]
    for message in (harness.released(0), harness.released(1), harness.granted(2)):
        assert (message["grant"], message["version"]) == (over, 1)
    assert_weights(list(harness.store.parameters), -LR * 3.0)


@pytest.mark.parametrize("shared", SHARED)
def test_the_gradient_of_who_is_lost_amid_a_round_counts_beside_that_of_its_successor(
    shared: bool, tmp_path: Path
) -> None:
    harness = Harness(BSP(), folder=str(tmp_path), hands_out=True)
    harness.start(shared)
    for rank in (0, 1):
        harness.request(rank, PLAN)
        harness.granted(rank)
    harness.push(1, 1.0, leases=[1])
    harness.close_connection(1)
    harness.hello(1, shared)
    harness.request(1, PLAN)
    assert harness.granted(1)["grant"] == [2, 2, 3, 1]
    harness.push(1, 3.0, leases=[2])
    harness.push(0, 8.0, leases=[0])
    for rank in (0, 1):
        message = harness.released(rank)
        assert message["version"] == 1
        assert_weights(harness.weights(rank, message), -LR * 4.0)


def test_the_gradient_of_who_is_lost_is_in_the_weights_when_the_rest_has_met() -> None:
    harness = Harness(BSP(), hands_out=True)
    harness.start()
    harness.push(1, 6.0)
    harness.close_connection(1)
    assert harness.store.version == 0
    harness.sync(0, "the end of an epoch")
    (message,) = harness.take(0)
    assert (message["type"], message["version"]) == ("synced", 1)
    assert_weights(harness.weights(0, message), -LR * 6.0)


def test_another_plan_fails_the_run() -> None:
    harness = Harness(ASP(), hands_out=True)
    harness.start()
    harness.request(0, PLAN)
    harness.granted(0)
    harness.request(1, [0, 6, 1, 3, 3])
    text = harness.failure(0)["text"]
    assert text == harness.failure(1)["text"]
    assert text.startswith("rank 1 asks for a batch: a worker goes on with Plan(epoch=0, batches=6, each=1, steps=3, ")


@pytest.mark.parametrize("plan", [[0, -4, 1, 2, 2], [0, 4, 0, 2, 2], [0, 4, 1, 2, 3], [0, 1, 1, 1, 1], [0, 4, 1, 0, 0]])
def test_an_impossible_plan_fails_the_run_with_its_numbers(plan: list[int]) -> None:
    harness = Harness(ASP(), hands_out=True)
    harness.start()
    harness.request(1, plan)
    text = harness.failure(0)["text"]
    numbers = "Plan(epoch={}, batches={}, each={}, steps={}, until={}, prefetch=0)".format(*plan)
    assert text.startswith(f"rank 1 asks for a batch: {numbers} cannot be shared by 2 workers")


@pytest.mark.parametrize("push", [{"leases": [0]}, {"asks": True}, None], ids=repr)
def test_where_nobody_hands_out_batches_who_asks_fails_the_run(push: dict[str, Any] | None) -> None:
    harness = Harness(ASP())
    harness.start()
    if push is None:
        harness.request(1, PLAN)
    else:
        harness.push(1, **push)
    text = harness.failure(0)["text"]
    assert "rank 1 " in text
    assert "nobody hands them out" in text


# --- thresholds ---------------------------------------------------------------------------------------------------


def test_a_raised_threshold_lets_waiting_workers_go_on_at_once_oldest_first() -> None:
    harness = Harness(SSP(0), world_size=4)
    harness.start()
    order: list[int] = []
    send_to = harness.service.send_frames

    def send(identity: bytes, *frames: Any) -> None:
        if wire.decode_message(bytes(frames[0]))["type"] == "released":
            order.append(int(identity.rpartition(b"-")[2]))
        send_to(identity, *frames)

    harness.service.send_frames = send  # type: ignore[method-assign]
    for rank in (2, 1, 3):
        harness.push(rank, 1.0)
    assert order == []
    assert harness.ask(0, "thresholds", values={"threshold": 1}) is None
    assert order == [2, 1, 3]
    for rank in (2, 1, 3):
        message = harness.released(rank)
        assert (message["version"], message["lead"]) == (3, 1)
        assert_weights(harness.weights(rank, message), -LR * 3.0)
    harness.push(2)
    assert harness.take(2) == [], "two ahead"


def test_who_is_too_far_ahead_of_a_lowered_threshold_waits_after_its_next_push() -> None:
    harness = Harness(SSP(3))
    harness.start()
    for _ in range(3):
        harness.push(1)
        harness.released(1)
    assert harness.ask(0, "thresholds", values={"threshold": 1}) is None
    assert harness.take(1) == []
    harness.push(1)  # clock 4
    leads = []
    for _ in range(4):
        harness.push(0)
        harness.released(0)
        leads += [message["lead"] for message in harness.take(1)]
    assert leads == [1], "clock 4 goes on when the other is at 3"


def test_leads_are_counted_under_the_thresholds_in_force() -> None:
    harness = Harness(SSP(3))
    harness.start()
    for _ in range(3):
        harness.push(1)
    harness.take(1)
    for threshold in (1, 1):  # no change, no phase
        harness.ask(0, "thresholds", values={"threshold": threshold})
    harness.push(0)
    harness.take(0)
    harness.ask(0, "thresholds", values={"threshold": 2})
    summary = harness.ask(0, "summary")
    assert summary["paradigm"] == "SSP(threshold=2)"
    phases = [
        {"thresholds": {"threshold": 3}, "since": 0, "max_lead": 3},
        {"thresholds": {"threshold": 1}, "since": 3, "max_lead": 0},
        {"thresholds": {"threshold": 2}, "since": 4, "max_lead": 0},
    ]
    assert summary["phases"] == phases
    snapshot = harness.ask(0, "snapshot")
    assert torch.load(saved(snapshot), weights_only=True) == snapshot
    for paradigm, more in ((SSP(2), []), (SSP(7), [{"thresholds": {"threshold": 7}, "since": 4, "max_lead": 0}])):
        resumed = Harness(paradigm)
        resumed.shard.resume(snapshot)
        resumed.start()
        assert resumed.ask(1, "summary")["phases"] == phases + more


def test_all_workers_learn_the_thresholds_where_they_meet() -> None:
    harness = Harness(DSSP(1, 5))
    harness.start()
    assert harness.ask(1, "thresholds", values={"upper": 9}) is None
    for rank in (0, 1):
        harness.sync(rank, "a collective operation", pull=rank == 0)
    assert [harness.take(rank)[0]["thresholds"] for rank in (0, 1)] == [{"lower": 1, "upper": 9}] * 2
    harness.send(1, "pull")
    assert harness.take(1)[0]["thresholds"] == {"lower": 1, "upper": 9}


@pytest.mark.parametrize(
    ("paradigm", "values", "text"),
    [
        (SSP(2), {"threshold": -1}, r"SSP\(threshold=-1\): threshold counts clocks and must be an integer >= 0"),
        (SSP(2), {"threshold": True}, r"SSP\(threshold=True\)"),
        (SSP(2), {"threshold": 1.5}, r"SSP\(threshold=1.5\)"),
        (SSP(2), {"threshold": [1]}, r"SSP\(threshold=\[1\]\)"),
        (SSP(2), {"now": 3}, r"set_thresholds\(now=3\): SSP has threshold"),
        (SSP(2), {"self": 3}, r"set_thresholds\(self=3\): SSP has threshold"),
        (SSP(2), {}, r"set_thresholds\(\): SSP has threshold"),
        (DSSP(1, 3), {"lower": 4}, r"DSSP\(lower=4, upper=3\): lower must not exceed upper"),
        (DSSP(1, 3), {"enforce_upper": 0}, r"enforce_upper=0\): DSSP has lower and upper"),
        (BSP(), {"threshold": 1}, "BSP has no threshold to change: use ssp or dssp"),
        (ASP(), {"threshold": 1}, "ASP has no threshold to change: use ssp or dssp"),
    ],
    ids=repr,
)
def test_impossible_thresholds_are_answered_and_change_nothing(
    paradigm: Paradigm, values: dict[str, Any], text: str
) -> None:
    harness = Harness(copy.deepcopy(paradigm))
    harness.start()
    assert re.search(text, harness.ask(1, "thresholds", values=values))
    assert harness.take(0) == []
    assert repr(harness.paradigm) == repr(paradigm)
    assert len(harness.ask(0, "summary")["phases"]) == 1


def test_thresholds_after_a_failure_release_nobody() -> None:
    harness = Harness(SSP(0), world_size=3)
    harness.start()
    harness.push(1)
    harness.send(2, "abort", kind="error", text="raised")
    harness.take(0), harness.take(1)
    assert harness.ask(0, "thresholds", values={"threshold": 1}) is None
    assert harness.take(1) == [], "it has been told of the failure instead"


# --- questions ----------------------------------------------------------------------------------------------------


def test_summary_counts() -> None:
    harness = Harness(SSP(2))
    harness.start()
    for rank in (0, 0, 1):
        harness.push(rank, wait_s=0.5, compute_s=2.0)
    harness.take(0), harness.take(1)
    harness.sync(0, wait_s=0.25, compute_s=1.0)
    assert harness.ask(1, "summary") == {
        "paradigm": "SSP(threshold=2)",
        "thresholds": {"threshold": 2},
        "apply": "Plain()",
        "updates": 3,
        "joins": 0,
        "leaves": 0,
        "taken_back": 0,
        "phases": [{"thresholds": {"threshold": 2}, "since": 0, "max_lead": 2}],
        "workers": [
            {
                "rank": 0,
                "pushes": 2,
                "refused": 0,
                "max_lead": 2,
                "mean_lead": 1.5,
                "max_staleness": 0,
                "mean_staleness": 0.0,
                "wait_s": 1.25,
                "compute_s": 5.0,
                "leases": 0,
                "taken_back": 0,
                "leads": {1: 1, 2: 1},
                "staleness": {0: 2},
            },
            {
                "rank": 1,
                "pushes": 1,
                "refused": 0,
                "max_lead": 0,
                "mean_lead": 0.0,
                "max_staleness": 2,
                "mean_staleness": 2.0,
                "wait_s": 0.5,
                "compute_s": 2.0,
                "leases": 0,
                "taken_back": 0,
                "leads": {0: 1},
                "staleness": {2: 1},
            },
        ],
    }


def test_optimizer_state() -> None:
    harness = Harness(ASP(), world_size=1, make=lambda p: [torch.optim.SGD(p, lr=LR, momentum=0.5)])
    harness.start()
    harness.push(0, 2.0)
    harness.take(0)
    state = harness.ask(0, "optimizer_state", optimizer=0)["state"]
    torch.testing.assert_close([state[i]["momentum_buffer"] for i in (0, 1)], filled(2.0))


@pytest.mark.parametrize("paradigm", [ASP(), SSP(3), DSSP()], ids=repr)
def test_a_snapshot_goes_on_where_it_was_taken(paradigm: Paradigm) -> None:
    harness = Harness(paradigm)
    harness.start()
    for rank in (0, 0, 1):
        harness.push(rank)
    harness.take(0), harness.take(1)
    for rank in (0, 1):
        harness.sync(rank, "a checkpoint")
    harness.take(0), harness.take(1)
    snapshot, summary = harness.ask(0, "snapshot"), harness.ask(0, "summary")
    assert torch.load(saved(snapshot), weights_only=True) == snapshot  # as it travels in a checkpoint

    for world_size in (2, 3):
        resumed = Harness(type(paradigm)(), world_size)
        resumed.shard.resume(snapshot)
        resumed.start()
        assert dict(resumed.paradigm.clocks) == dict.fromkeys(range(world_size), 2)
        assert resumed.store.version == 3
        resumed.push(0)
        message = resumed.released(0)
        assert (message["version"], message["clock"], message["lead"], message["staleness"]) == (4, 3, 1, 0)
        if world_size == 2:
            again = resumed.ask(1, "summary")
            assert again["workers"][1] == summary["workers"][1]
            assert again["workers"][0]["pushes"] == 3
        else:
            assert [worker["pushes"] for worker in resumed.ask(1, "summary")["workers"]] == [1, 0, 0]


def test_a_snapshot_under_another_paradigm_keeps_the_version_only() -> None:
    harness = Harness(ASP())
    harness.start()
    harness.push(0)
    harness.take(0)
    resumed = Harness(BSP())
    resumed.shard.resume(harness.ask(0, "snapshot"))
    resumed.start()
    assert (dict(resumed.paradigm.clocks), resumed.store.version) == ({0: 0, 1: 0}, 1)


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


# --- failures -----------------------------------------------------------------------------------------------------


def test_different_meeting_places_fail_the_run() -> None:
    harness = Harness(SSP(3), world_size=3)
    harness.start()
    harness.sync(0, "validation", "step 4")
    harness.sync(2, "validation", "step 5")
    harness.sync(1, "the end of an epoch", "step 3")
    failures = [harness.failure(rank) for rank in range(3)]
    assert failures[0] == failures[1] == failures[2]
    assert failures[0]["kind"] == "error"
    for part in (
        "rank 0 is at validation (step 4); rank 1 is at the end of an epoch (step 3); rank 2 is at validation (step 5)",
        "val_check_interval=1.0",
        "limit_train_batches",
    ):
        assert part in failures[0]["text"]


def test_a_lost_worker_is_named_to_the_others_once() -> None:
    harness = Harness(SSP(0), world_size=3)
    harness.start()
    harness.push(0)
    harness.close_connection(1)
    for rank in (0, 2):
        assert harness.failure(rank)["text"] == "rank 1 (process 1001) is gone: it was killed, has crashed or hangs"
    assert harness.take(1) == []
    harness.close_connection(2)
    assert harness.take(0) == [], "the first failure is the one that counts"


def test_a_worker_with_the_descriptor_of_a_stranger_that_has_gone_is_not_gone() -> None:
    harness = Harness(ASP())
    harness.hello(0)
    hello = wire.encode_message("hello", rank=1, pid=1001, shared=False, anew=False)
    harness.socket.router.incoming.append([FakeFrame(f, connection_of(1)) for f in (identity_of(1), hello)])
    harness.close_connection(1)  # the stranger's; the worker's hello has come in meanwhile
    assert harness.kinds(1) == ["welcome"]
    for rank in (0, 1):
        harness.sync(rank)
        assert harness.take(0) == [] or rank == 1
    assert harness.kinds(1) == ["synced"]
    harness.close_connection(1)
    assert "rank 1 (process 1001) is gone" in harness.failure(0)["text"]


def test_a_worker_that_has_died_right_after_its_hello_is_named() -> None:
    harness = Harness(ASP())
    harness.hello(0)
    harness.socket.closed.append(connection_of(1))
    harness.socket.ended.add(connection_of(1))
    harness.send(1, "hello", rank=1, pid=1001, shared=False, anew=False)
    assert harness.failure(0)["text"] == "rank 1 (process 1001) is gone: it was killed, has crashed or hangs"
    assert harness.take(1) == []


@pytest.mark.parametrize("shared", SHARED)
def test_a_worker_that_dies_while_its_welcome_is_sent_is_named(shared: bool, tmp_path: Path) -> None:
    harness = Harness(ASP(), folder=str(tmp_path))
    harness.hello(0)
    harness.socket.router.gone[identity_of(1)] = errno.EHOSTUNREACH
    harness.send(1, "hello", rank=1, pid=1001, shared=shared, anew=False)
    assert harness.take(0) == []
    harness.close_connection(1)
    assert harness.failure(0)["text"] == "rank 1 (process 1001) is gone: it was killed, has crashed or hangs"


def test_who_joins_while_shared_memory_is_full_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(ASP(), folder=str(tmp_path), hands_out=True)
    harness.start(shared=True)
    harness.close_connection(1)
    harness.send(0, "deposit", part=b"where all are", last=True)

    def full(nbytes: int, folder: str) -> memory.Segment:
        raise memory.SharedMemoryError("no space is left")

    monkeypatch.setattr(memory, "create_segment", full)
    welcome = harness.hello(1, shared=True, anew=True)
    assert (welcome["type"], welcome["path"], welcome["generation"]) == ("welcome", "", 2)
    with pytest.raises(memory.SharedMemoryError):  # by which it knows
        memory.open_segment(welcome["path"], welcome["nbytes"], welcome["token"])
    harness.send(1, "unshare")
    harness.send(1, "pull")
    assert harness.take(1)[0]["nbytes"] == harness.layout.nbytes
    assert harness.take(0) == []


def test_a_goodbye_that_comes_with_the_end_of_the_connection_counts() -> None:
    harness = Harness(ASP())
    harness.start()
    frames = [FakeFrame(frame, connection_of(1)) for frame in (identity_of(1), wire.encode_message("bye"))]
    harness.socket.router.incoming.append(frames)
    harness.close_connection(1)
    assert harness.take(0) == []


@pytest.mark.parametrize("nbytes", [-1, 2**40])
def test_a_push_of_an_impossible_size_is_refused(nbytes: int) -> None:
    harness = Harness(ASP())
    harness.start()
    harness.send(0, "push", **{**PUSH, "nbytes": nbytes})
    assert f"a push of {nbytes} bytes" in harness.failure(1)["text"]


def test_a_push_before_the_last_is_complete_is_refused() -> None:
    harness = Harness(ASP())
    harness.start()
    for _ in range(2):
        harness.send(0, "push", **{**PUSH, "nbytes": 8})
    assert "with 8 of the last one missing" in harness.failure(1)["text"]


def test_an_abort_reaches_the_others() -> None:
    harness = Harness(BSP(), world_size=3)
    harness.start()
    harness.push(0)
    harness.send(1, "abort", kind="interrupt", text="was interrupted")
    for rank in (0, 2):
        message = harness.failure(rank)
        assert (message["kind"], message["text"]) == ("interrupt", "rank 1 was interrupted")
    *_, answer = harness.take(1)
    assert (answer["type"], answer["cause"]) == ("aborted", "")
    harness.close_connection(1)
    assert harness.take(0) == []


def test_who_aborts_learns_what_has_failed_before() -> None:
    harness = Harness(ASP(), world_size=3)
    harness.start()
    harness.close_connection(2)
    harness.send(1, "abort", kind="error", text="lost a connection")
    *_, answer = harness.take(1)
    assert (answer["type"], answer["cause"]) == (
        "aborted",
        "rank 2 (process 1002) is gone: it was killed, has crashed or hangs",
    )
    assert "rank 2" in harness.failure(0)["text"]


def test_a_connection_that_has_ended_comes_before_an_abort() -> None:
    """The abort is mostly about it."""
    harness = Harness(ASP(), world_size=3)
    harness.start()
    harness.socket.closed.append(connection_of(2))
    harness.send(1, "abort", kind="error", text="lost a connection")
    assert "rank 2 (process 1002) is gone" in harness.failure(0)["text"]


@pytest.mark.parametrize("paradigm", [ASP(), BSP()], ids=repr)
def test_a_failing_optimizer_is_shown_with_its_traceback(paradigm: Paradigm) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError("this optimizer is broken")

    harness = Harness(paradigm, make=lambda p: [Broken(p, lr=LR)])
    harness.start()
    for rank in (0, 1):
        harness.push(rank)
    for rank in (0, 1):
        text = harness.take(rank)[0]["text"]
        assert text.startswith("the parameter server failed:\nTraceback")
        assert "ArithmeticError: this optimizer is broken" in text


def test_after_a_failure_everybody_learns_of_it_and_may_still_ask() -> None:
    harness = Harness(ASP(), world_size=3)
    harness.start()
    before = harness.store.weights.clone()
    harness.send(1, "abort", kind="error", text="raised")
    harness.take(0), harness.take(2)
    harness.push(0)
    assert harness.failure(0)["text"] == "rank 1 raised"
    harness.sync(0)
    assert harness.failure(0)["text"] == "rank 1 raised"
    assert torch.equal(harness.store.weights, before), "a push after the failure was applied"
    assert harness.ask(2, "summary")["updates"] == 0
    harness.send(2, "pull")
    assert harness.kinds(2) == ["synced"]


def test_who_connects_after_a_failure_learns_of_it() -> None:
    harness = Harness(ASP())
    harness.hello(0)
    harness.send(0, "abort", kind="error", text="raised")
    harness.send(1, "hello", rank=1, pid=1001, shared=False, anew=False)
    assert harness.kinds(1) == ["failed"]


def test_who_cannot_get_shared_memory_is_told(tmp_path: Path) -> None:
    harness = Harness(ASP(), folder=str(tmp_path / "missing"))
    harness.hello(0)
    harness.send(1, "hello", rank=1, pid=1001, shared=True, anew=False)
    for rank in (0, 1):
        assert "cannot take" in harness.failure(rank)["text"]


def test_a_message_to_a_worker_that_is_gone_is_no_failure() -> None:
    harness = Harness(SSP(0))
    harness.start()
    harness.push(0)
    harness.socket.router.gone[identity_of(0)] = errno.EHOSTUNREACH
    harness.push(1)
    assert harness.kinds(1) == ["released"]
    harness.send(1, "abort", kind="error", text="raised")
    assert harness.kinds(1)[-1] == "aborted"


def test_another_error_of_the_socket_is_a_failure() -> None:
    harness = Harness(SSP(0))
    harness.start()
    harness.push(0)
    harness.socket.router.gone[identity_of(0)] = errno.EINVAL
    with pytest.raises(zmq.ZMQError):
        harness.push(1)


ALL = [True, True]
PUSH = {
    **{"optimizer": 0, "used": ALL, "options": [{}], "clip": None, "whole": True},
    **{"leases": [], "asks": False, "commits": True, "nbytes": 28, "wait_s": 0.0, "compute_s": 0.0},
}

NOTHING_KEPT = {"kept": [], "steps": 0}
RELEASED = {"version": 0, "clock": 0, "lead": 0, "staleness": 0, "applied": True, "grant": None, "nbytes": 0}


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([b"\xc1"], "not msgpack"),
        ([], "not msgpack"),
        ([wire.encode_message("hello", rank=0, pid=1, shared=False, anew=False)], "unexpected 'hello'"),
        ([wire.encode_message("released", **RELEASED)], "unexpected 'released'"),
        ([wire.encode_message("push", **{**PUSH, "optimizer": 1})], "a push for optimizer 1"),
        ([wire.encode_message("push", **{**PUSH, "optimizer": -1})], "a push for optimizer -1"),
        ([wire.encode_message("push", **{**PUSH, "used": [True]})], "a push for 1 parameters"),
        ([wire.encode_message("push", **{**PUSH, "leases": ["0"]})], "['0'] where numbers belong"),
        ([wire.encode_message("push", **{**PUSH, "leases": [1.0]})], "[1.0] where numbers belong"),
        ([wire.encode_message("push", **{**PUSH, "leases": [False]})], "[False] where numbers belong"),
        ([wire.encode_message("push", **{**PUSH, "leases": [[0]]})], "[[0]] where numbers belong"),
        ([wire.encode_message("push", **{**PUSH, "leases": 0})], "a 'push' message with leases=0"),
        ([wire.encode_message("push", **{**PUSH, "asks": 1})], "a 'push' message with asks=1"),
        ([wire.encode_message("request", leases=[None], plan=None, **NOTHING_KEPT)], "[None] where numbers belong"),
        (
            [wire.encode_message("request", leases=None, plan=None, **NOTHING_KEPT)],
            "a 'request' message with leases=None",
        ),
        ([wire.encode_message("request", leases=[], plan={}, **NOTHING_KEPT)], "a 'request' message with plan={}"),
        (
            [wire.encode_message("request", leases=[], plan=[0, 4, 1, 2], **NOTHING_KEPT)],
            "[0, 4, 1, 2] is no plan of an epoch",
        ),
        (
            [wire.encode_message("request", leases=[], plan=[0, 4, 1, 2, 2, 0, 0], **NOTHING_KEPT)],
            "[0, 4, 1, 2, 2, 0, 0] is no",
        ),
        ([wire.encode_message("request", leases=[], plan=[], **NOTHING_KEPT)], "[] is no plan of an epoch"),
        (
            [wire.encode_message("request", leases=[], plan=[0, 4, 1, 2, "2", 0], **NOTHING_KEPT)],
            "[0, 4, 1, 2, '2', 0] where numbers",
        ),
        (
            [wire.encode_message("request", leases=[], plan=[0, 4, 1, 2, True, 0], **NOTHING_KEPT)],
            "[0, 4, 1, 2, True, 0] where numbers",
        ),
        (
            [wire.encode_message("request", leases=[], plan=[0, 4.0, 1, 2, 2, 0], **NOTHING_KEPT)],
            "[0, 4.0, 1, 2, 2, 0] where numbers",
        ),
        ([wire.encode_message("granted", version=0, grant=[0, 0, 1, 0], nbytes=0)], "unexpected 'granted'"),
        ([wire.encode_message("refused", lease=0)], "unexpected 'refused'"),
        ([wire.encode_message("optimizer_state", optimizer=3)], "a question about optimizer 3"),
        ([wire.encode_message("thresholds", values={b"threshold": 1})], "thresholds={b'threshold': 1}"),
        ([wire.encode_message("thresholds", values=[3])], "a 'thresholds' message with values=[3]"),
        ([wire.encode_message("chunk", offset=0), b"1234"], "a chunk of 4 bytes at 0 that belongs to no push"),
        ([wire.encode_message("change", places=[0], nbytes=12)], "a change of the weights [0]"),  # one of several
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_worker_must_not_send_fails_the_run_and_names_it(frames: list[bytes], text: str) -> None:
    harness = Harness(ASP())
    harness.start()
    before = harness.store.weights.clone()
    harness.raw(1, *frames)
    message = harness.failure(0)
    assert message["text"].startswith("rank 1 sent what the parameter server cannot read: ")
    assert text in message["text"]
    assert torch.equal(harness.store.weights, before)
    assert harness.store.version == 0


@pytest.mark.parametrize(
    ("offset", "payload"),
    [(-4, [b"1234"]), (10**6, [b"1234"]), (126, [b"1234"]), (0, [b"1" * 29]), (0, []), (0, [b""]), (0, [b"12", b"34"])],
)
def test_chunks_stay_within_the_push_and_the_buffer(offset: int, payload: list[bytes]) -> None:
    harness = Harness(ASP())
    harness.start()
    assert harness.layout.nbytes == 128
    harness.send(1, "push", **PUSH)
    harness.raw(1, wire.encode_message("chunk", offset=offset), *payload)
    assert "that belongs to no push" in harness.failure(0)["text"]
    assert harness.store.version == 0


def test_a_push_while_waiting_fails_the_run() -> None:
    harness = Harness(SSP(0))
    harness.start()
    harness.push(0)
    harness.push(0)
    assert "worker 0 pushed while it waits" in harness.failure(1)["text"]


# --- strangers ----------------------------------------------------------------------------------------------------

STRANGER = 7
STRANGE: dict[str, list[bytes]] = {
    "nothing": [],
    "garbage": [b"\xc1\xc1"],
    "http": [b"GET / HTTP/1.1\r\n\r\n"],
    "a list as type": [b"\x81\xa4type\x93\x01\x02\x03"],
    "a push": [wire.encode_message("push", **PUSH)],
    "a chunk": [wire.encode_message("chunk", offset=0), b"1234"],
    "a rank too large": [wire.encode_message("hello", rank=2, pid=1, shared=False, anew=False)],
    "a negative rank": [wire.encode_message("hello", rank=-1, pid=1, shared=False, anew=False)],
    "a rank that is taken": [wire.encode_message("hello", rank=1, pid=1, shared=False, anew=False)],
    "a request": [wire.encode_message("request", leases=[], plan=[0, 4, 1, 2, 2], **NOTHING_KEPT)],
    "an abort": [wire.encode_message("abort", kind="error", text="boom")],
}


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.DEBUG, logger="lightning_stale"):
        yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", STRANGE)
def test_a_stranger_changes_nothing(name: str, warnings_logged: Callable[[], list[str]]) -> None:
    harness = Harness(SSP(3))
    harness.start()
    before = harness.store.weights.clone()
    harness.raw(STRANGER, *STRANGE[name])
    assert harness.take(0) == harness.take(1) == harness.take(STRANGER) == []
    assert torch.equal(harness.store.weights, before)
    assert dict(harness.paradigm.clocks) == {0: 0, 1: 0}
    assert len(warnings_logged()) == 1
    harness.push(1)
    assert harness.kinds(1) == ["released"]


def test_strangers_are_logged_once(warnings_logged: Callable[[], list[str]]) -> None:
    harness = Harness(ASP())
    harness.start()
    for frames in STRANGE.values():
        harness.raw(STRANGER, *frames)
    harness.close_connection(STRANGER)
    harness.socket.refused = True
    harness.service.note_connections()
    (warning,) = warnings_logged()
    assert warning.startswith("The parameter server ignored a stranger on its port (logged once): ")


@pytest.mark.parametrize("how", ["a closed connection", "a refused handshake"])
def test_a_strangers_connection_is_logged(how: str, warnings_logged: Callable[[], list[str]]) -> None:
    harness = Harness(ASP())
    harness.start()
    if how == "a closed connection":
        harness.close_connection(STRANGER)
    else:
        harness.socket.refused = True
        harness.service.note_connections()
    (warning,) = warnings_logged()
    assert "a connection that is not a worker's was closed" in warning
    assert harness.take(0) == harness.take(1) == []


def test_the_end_of_a_finished_workers_connection_is_nothing_to_log(warnings_logged: Callable[[], list[str]]) -> None:
    harness = Harness(ASP())
    harness.start()
    harness.send(0, "bye")
    harness.close_connection(0)
    assert warnings_logged() == []
    assert harness.take(1) == []


# --- the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A lifeline: (what the server reads, what rank 0 holds)."""
    read, write = os.pipe()
    ends = {read, write}
    yield read, write
    for end in ends:
        try:
            os.close(end)
        except OSError:  # the test has closed it
            pass


class FakePoller:
    """Says that the fakes are always ready, and asks the system about descriptors."""

    def __init__(self) -> None:
        self._sources: list[Any] = []

    def register(self, source: Any, events: int) -> None:
        assert events == zmq.POLLIN
        self._sources.append(source)

    def poll(self, timeout: int) -> list[tuple[Any, int]]:
        descriptors = [source for source in self._sources if isinstance(source, int)]
        fakes = [source for source in self._sources if not isinstance(source, int)]
        readable = select.select(descriptors, [], [], 0)[0]
        return [(source, zmq.POLLIN) for source in (*fakes, *readable)]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setattr(zmq, "Poller", FakePoller)
    harness = Harness(ASP())
    harness.socket.monitor = object()  # type: ignore[attr-defined]
    harness.start()
    return harness


def test_run_ends_when_all_have_said_goodbye(running: Harness, pipe: tuple[int, int]) -> None:
    for rank in (0, 1):
        frames = [FakeFrame(frame, connection_of(rank)) for frame in (identity_of(rank), wire.encode_message("bye"))]
        running.socket.router.incoming.append(frames)
    turns: list[None] = []

    def orphaned() -> bool:
        turns.append(None)
        assert len(turns) < 5, "the server goes on"
        return False

    running.service.run(pipe[0], orphaned)
    assert running.take(0) == running.take(1) == []


def test_run_ends_with_the_lifeline(running: Harness, pipe: tuple[int, int]) -> None:
    os.close(pipe[1])
    running.service.run(pipe[0], lambda: False)
    assert "rank 0, which started the parameter server, has ended" in running.failure(1)["text"]


def test_run_ends_with_its_parent(running: Harness, pipe: tuple[int, int]) -> None:
    running.service.run(pipe[0], lambda: True)
    assert "rank 0, which started the parameter server, has ended" in running.failure(1)["text"]


def test_run_notes_connections(running: Harness, pipe: tuple[int, int]) -> None:
    running.socket.closed.append(connection_of(1))
    turns = iter([False, True])
    running.service.run(pipe[0], lambda: next(turns))
    assert "rank 1 (process 1001) is gone" in running.failure(0)["text"]


def test_an_abort_that_comes_with_the_end_of_its_own_connection_counts(running: Harness, pipe: tuple[int, int]) -> None:
    running.socket.closed.append(connection_of(1))
    running.send(1, "abort", kind="error", text="raised ValueError")
    assert running.failure(0)["text"] == "rank 1 raised ValueError"
    running.send(0, "bye")
    running.service.run(pipe[0], lambda: pytest.fail("the server waits for a worker that is gone"))
