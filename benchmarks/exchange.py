"""What one exchange costs: a gradient to the server, its update, and the weights back; beside DDP's all-reduce.

Two workers on one host, one thread each, 4 MB and 100 MB of parameters, plain SGD. Every repetition measures all
of them in turn, in the same processes:

- a copy within memory, the floor of anything that moves a gradient;
- the all-reduce of one gradient (gloo), which is what DDP's exchange costs *without* the update;
- torch RPC to a third process that does the same update and sends the weights back;
- lightning_stale: push, update, pull through shared memory (ASP). The gradient is in the push buffer, where the
  backward pass puts it, as DDP's is in its buckets; a line with that copy is there too. One worker at a time, both at
  once (the time until both have their weights), and one at a time over TCP (authenticated and encrypted).

    python benchmarks/exchange.py [--repetitions 7]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from report import Row, report
from torch import Tensor

from lightning_stale import ASP
from lightning_stale.parameter_server.client import ParameterClient
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.private.of_torch import rendezvous_store
from lightning_stale.transport import memory
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.layout import Layout

SIZES = {"4 MB": (20, 50_000), "100 MB": (100, 250_000)}  # tensors, elements of each
WORKERS = 2
LR = 0.01
BASELINE, OURS = "DDP's all-reduce (gloo)", "lightning_stale"


class _RpcServer:
    """The peer: weights and an optimizer behind torch RPC."""

    weights: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    @classmethod
    def start(cls, shapes: tuple[int, int]) -> None:
        cls.weights = [torch.nn.Parameter(torch.zeros(shapes[1])) for _ in range(shapes[0])]
        cls.optimizer = torch.optim.SGD(cls.weights, lr=LR)

    @classmethod
    def push(cls, gradients: list[Tensor]) -> list[Tensor]:
        for weight, gradient in zip(cls.weights, gradients, strict=True):
            weight.grad = gradient
        cls.optimizer.step()
        return [weight.detach() for weight in cls.weights]


class _Stale:
    """Two workers of lightning_stale over one transport."""

    def __init__(self, rank: int, parameters: list[torch.nn.Parameter], transport: Any) -> None:
        self.optimizer = torch.optim.SGD(parameters, lr=LR)
        self.server: ServerProcess | None = None
        store, key = rendezvous_store(), f"{transport}/{sum(p.numel() for p in parameters)}"
        credentials = Credentials.derive("a benchmark's", run=key)
        if rank == 0:
            layout = Layout.of(parameters)
            self.server = ServerProcess()
            folder, _ = memory.choose_folder(2 * WORKERS * layout.nbytes)
            port = self.server.serve(parameters, [self.optimizer], ASP(), WORKERS, credentials, "127.0.0.1", folder)
            endpoint = Endpoint(
                f"tcp://127.0.0.1:{port}",
                memory.host_id(),
                self.server.pid,
                layout.to_message(),
            )
            store.set(key, endpoint.encode(credentials))
        endpoint = Endpoint.decode(store.get(key).decode(), credentials)
        self.client = ParameterClient(endpoint, credentials, rank, transport)
        self.client.meet("the start", "")
        self.places = list(range(len(parameters)))

    def copy_and_exchange(self, gradients: list[Tensor]) -> None:
        torch._foreach_copy_(self.client.gradients, gradients)
        self.exchange()

    def exchange(self) -> None:
        self.client.push(0, self.places, [True] * len(self.places), read_options(self.optimizer), None)

    def close(self) -> None:
        self.client.close(finished=True)
        if self.server is not None:
            self.server.stop(grace_s=10)


def _alternate(measures: dict[str, Callable[[], None]], repetitions: int, rounds: int) -> dict[str, list[float]]:
    """Return per name the milliseconds of one call, a median of ``rounds`` calls for each repetition."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for repetition in range(repetitions + 1):
        for name, call in measures.items():
            times = []
            for _ in range(rounds):
                dist.barrier()
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            if repetition > 0:  # the first is a warm-up
                results[name].append(1e3 * statistics.median(times))
    return results


def _worker(rank: int, repetitions: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["OMP_NUM_THREADS"] = "1"
    rpc.init_rpc(f"node{rank}", rank=rank, world_size=WORKERS + 1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{os.environ['BENCHMARK_PORT']}", rank=rank, world_size=WORKERS + 1
    )
    workers = dist.new_group(list(range(WORKERS)))
    for size, shapes in SIZES.items():
        if rank == WORKERS:
            _RpcServer.start(shapes)
        dist.barrier()
        if rank < WORKERS:
            torch.manual_seed(rank)
            gradients = [torch.randn(shapes[1]) for _ in range(shapes[0])]
            flat, target = torch.cat(gradients), torch.empty(shapes[0] * shapes[1])
        parameters = [torch.nn.Parameter(torch.zeros(shapes[1])) for _ in range(shapes[0])]
        rounds = 20 if size == "4 MB" else 3
        names = ["copy within memory", BASELINE, "torch RPC", OURS, f"{OURS}, gradient copied first"]
        names += [f"{OURS}, both at once", f"{OURS} over TCP"]
        if rank == WORKERS:  # serves RPC, and keeps the others' barriers company
            _alternate(dict.fromkeys(names, lambda: None), repetitions, rounds)
            continue
        shared, tcp = _Stale(rank, parameters, "shm"), _Stale(rank, parameters, "tcp")

        def only_first(call: Callable[[], Any]) -> Callable[[], None]:
            return (lambda: call()) if rank == 0 else (lambda: None)

        times = _alternate(
            dict(
                zip(
                    names,
                    (
                        only_first(partial(target.copy_, flat)),
                        partial(dist.all_reduce, flat, group=workers),
                        only_first(partial(rpc.rpc_sync, f"node{WORKERS}", _RpcServer.push, args=(gradients,))),
                        only_first(shared.exchange),
                        only_first(partial(shared.copy_and_exchange, gradients)),
                        partial(_both, shared, workers),
                        only_first(tcp.exchange),
                    ),
                    strict=True,
                )
            ),
            repetitions,
            rounds,
        )
        shared.close()
        tcp.close()
        if rank == 0:
            results[size] = times
    dist.barrier()
    rpc.shutdown(graceful=False)


def _both(stale: _Stale, group: Any) -> None:
    stale.exchange()
    dist.barrier(group=group)


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(first.getsockname()[1])
        os.environ["BENCHMARK_PORT"] = str(second.getsockname()[1])
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, args=(arguments.repetitions, results), nprocs=WORKERS + 1)
        for size, times in results.items():
            rows = [
                Row(name, values, None if name == BASELINE else BASELINE, "<= 0.35" if name == OURS else "")
                for name, values in times.items()
            ]
            name = f"exchange_{size.replace(' ', '').lower()}"
            report(name, f"One exchange of {size}, {WORKERS} workers on one host", "ms", rows)


if __name__ == "__main__":
    main()
