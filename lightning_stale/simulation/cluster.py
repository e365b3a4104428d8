"""What an exchange costs on a cluster, how much its server can take, and how often workers die."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Cluster:
    """Everything beside the workers' own step times. By default, nothing costs anything.

    A push goes over the link of its worker and then, one after the other, over the server's link and into an update;
    an OK goes the way back with the weights.

    Args:
        model_bytes: of the weights, and as many of a gradient.
        exchange_s: what an exchange takes besides, however large the model (messages, copies of small ones), in
            seconds.
        link_gbit: bandwidth of a worker, in Gbit/s, each way.
        server_gbit: bandwidth of the server, in Gbit/s, each way, shared by all.
        update_s: how long the server takes for an update of its weights, in seconds; with HPSGD, each worker at the end
            of a round.
        all_reduce_s: what DDP's takes in a step, and HPSGD's in a round; ``None`` for that of a ring, worked out from
            the rest.
        deaths_per_hour: of a worker; that of worker 0 (the server is on its host) is left out.
        back_after_s: after how long another one takes its place; ``inf`` for never, with data on demand.
        checkpoint_s: how often a checkpoint is written; what ends at a death goes on from the last one.

    Raises:
        ValueError: for a negative value.
    """

    model_bytes: float = 0.0
    exchange_s: float = 0.0
    link_gbit: float = math.inf
    server_gbit: float = math.inf
    update_s: float = 0.0
    all_reduce_s: float | None = None
    deaths_per_hour: float = 0.0
    back_after_s: float = 60.0
    checkpoint_s: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value >= 0:
                raise ValueError(f"Cluster({name}={value}): write a number of at least 0")
        for name in ("link_gbit", "server_gbit", "checkpoint_s"):
            if getattr(self, name) == 0:
                raise ValueError(f"Cluster({name}=0): write a number above 0")

    @property
    def one_way_s(self) -> float:
        """From a worker to the server's link, or back."""
        return self.exchange_s / 2 + self.model_bytes / (self.link_gbit * GIGABIT)

    @property
    def server_link_s(self) -> float:
        """How long the weights, or a gradient, keep the server's link busy."""
        return self.model_bytes / (self.server_gbit * GIGABIT)

    def ring_s(self, workers: int) -> float:
        """What an all-reduce takes: each link carries a gradient nearly twice."""
        if self.all_reduce_s is not None:
            return self.all_reduce_s
        if workers == 1:
            return 0.0
        return self.exchange_s + 2 * (workers - 1) / workers * self.model_bytes / (self.link_gbit * GIGABIT)

    def deaths_per_second(self, workers: int) -> float:
        """Of all workers but worker 0."""
        return (workers - 1) * self.deaths_per_hour / 3600

    def with_restarts(self, seconds: float, workers: int, seed: int) -> float:
        """Return how long takes what takes ``seconds`` without deaths, if each death ends it.

        It begins again after ``back_after_s`` from the last checkpoint (which costs nothing to write).

        Raises:
            ValueError: if it would not come to an end in a thousand times as long.
        """
        rate = self.deaths_per_second(workers)
        if rate == 0:
            return seconds
        generator = random.Random(seed)
        took = done = 0.0
        while True:
            alive = generator.expovariate(rate)
            if done + alive >= seconds:
                return took + seconds - done
            reached = done + alive
            took += alive + self.back_after_s
            done = max(done, reached // self.checkpoint_s * self.checkpoint_s)
            if not took <= 1000 * seconds + 1e6:
                raise ValueError(
                    f"deaths_per_hour={self.deaths_per_hour} with {workers} workers, back_after_s={self.back_after_s} "
                    f"and checkpoint_s={self.checkpoint_s}: a run that ends at each death makes no progress. Write "
                    "fewer deaths or more checkpoints"
                )


FREE = Cluster()
"""Nothing costs anything."""
