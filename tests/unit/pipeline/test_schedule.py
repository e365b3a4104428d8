"""The schedule of a stage, read as a table: every batch goes forward once and backward once, ``m`` iterations later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stale.pipeline.schedule import drain, iteration


def written(m: int, batches: int) -> str:
    """Return the operations of a run of ``batches`` as text, one iteration per column, draining after the bar."""
    columns = ["".join(f"{kind[0].upper()}{batch}" for kind, batch in iteration(n, m)) for n in range(batches)]
    return " ".join([*columns, "|", *(f"B{batch}" for _, batch in drain(batches, m))])


@pytest.mark.parametrize(
    ("m", "table"),
    [
        (0, "F0B0 F1B1 F2B2 F3B3 F4B4 |"),
        (2, "F0 F1 F2B0 F3B1 F4B2 | B3 B4"),
        (4, "F0 F1 F2 F3 F4B0 | B1 B2 B3 B4"),
        (5, "F0 F1 F2 F3 F4 | B0 B1 B2 B3 B4"),
        (9, "F0 F1 F2 F3 F4 | B0 B1 B2 B3 B4"),
    ],
)
def test_the_table_of_five_batches(m: int, table: str) -> None:
    assert written(m, batches=5) == table


@given(batches=st.integers(0, 40), m=st.integers(0, 50))
def test_every_batch_goes_forward_once_and_backward_once_in_order(batches: int, m: int) -> None:
    run = [operation for n in range(batches) for operation in iteration(n, m)] + list(drain(batches, m))
    assert [batch for kind, batch in run if kind == "forward"] == list(range(batches))
    assert [batch for kind, batch in run if kind == "backward"] == list(range(batches))
    for batch in range(batches):
        assert run.index(("forward", batch)) < run.index(("backward", batch))


@given(n=st.integers(0, 1000), m=st.integers(0, 50))
def test_the_backward_of_an_iteration_lags_exactly_by_the_staleness(n: int, m: int) -> None:
    kinds = dict(iteration(n, m))
    assert kinds == ({"forward": n, "backward": n - m} if n >= m else {"forward": n})


def test_no_batch_leaves_nothing_to_drain() -> None:
    assert list(drain(0, 4)) == []
