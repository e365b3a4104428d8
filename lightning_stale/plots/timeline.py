"""What everybody did in a chosen second."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_stale.plots.style import COLOURS, HATCHES, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Span(NamedTuple):
    """Something that took a while."""

    row: str
    """Whose it is: a worker, a stage, the server."""
    start_s: float
    end_s: float
    kind: str
    """What it is: computing, waiting; those of one kind look alike."""


def timeline(spans: Iterable[Span], *, start_s: float = 0.0, seconds: float = 1.0) -> Figure:
    """Draw a row for everybody, with what they did from ``start_s`` on.

    Args:
        spans: from :func:`read_trace`, or made of anything else that has times; those outside are left out.
        start_s: where the chosen second begins, in the time of the spans.
        seconds: how long it lasts.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if nothing happened then, or ``seconds`` is not above 0.

    Example::

        >>> from lightning_stale.plots import Span, timeline
        >>> spans = [Span("worker 0", 0.0, 0.4, "compute"), Span("worker 0", 0.4, 0.9, "wait"),
        ...          Span("worker 1", 0.2, 5.0, "compute")]
        >>> axes = timeline(spans, seconds=1.0).axes[0]
        >>> [label.get_text() for label in axes.get_yticklabels()], len(axes.patches)
        (['worker 0', 'worker 1'], 3)
    """
    if seconds <= 0:
        raise ValueError(f"seconds={seconds}: write how long the part lasts that is drawn, above 0, e.g. 1.0")
    spans, end_s = list(spans), start_s + seconds
    seen = [span for span in spans if span.start_s < end_s and span.end_s > start_s]
    if not seen:
        there = f"they are from {min(s.start_s for s in spans):g} to {max(s.end_s for s in spans):g} s" if spans else ""
        raise ValueError(f"start_s={start_s}, seconds={seconds}: no span is there; {there or 'there is none at all'}")
    rows = {row: place for place, row in enumerate(sorted({span.row for span in seen}, key=_in_order))}
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(span.kind for span in spans))}
    figure = new_figure(9.0, 1.5 + 0.42 * len(rows))
    axes = figure.subplots()
    labelled: set[str] = set()
    for span in seen:
        number = kinds[span.kind]
        begin, end = max(span.start_s, start_s), min(span.end_s, end_s)
        axes.barh(
            rows[span.row],
            end - begin,
            left=begin,
            height=0.8,
            color=_FILLS[number % len(_FILLS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="black",
            linewidth=0.4,
            label=None if span.kind in labelled else span.kind,
        )
        labelled.add(span.kind)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel="time (s)", xlim=(start_s, end_s))
    bare(axes)
    figure.legend(loc="outside upper center", ncols=min(5, len(labelled)), frameon=False, fontsize="small")
    return figure


_FILLS = (COLOURS[3], COLOURS[1], COLOURS[2], COLOURS[4], COLOURS[6], COLOURS[5], "#FFFFFF")
"""Black hatches must be seen on them."""


def _in_order(row: str) -> list[Any]:
    """Put worker 10 after worker 9."""
    parts: list[Any] = []
    word = ""
    for letter in [*row, ""]:
        if word and (not letter or letter.isdigit() != word.isdigit()):
            parts.append((0, int(word), "") if word.isdigit() else (1, 0, word))
            word = ""
        word += letter
    return parts


# --- the Chrome trace format ------------------------------------------------------------------------------------------


def read_trace(source: str | Path | Sequence[Mapping[str, Any]]) -> list[Span]:
    """Return the spans of a trace that Perfetto and ``chrome://tracing`` open: its complete events, ``"ph": "X"``.

    A row is a thread, under the names that the trace gives to processes and threads; a kind is the name of an event.
    Times are from the first event on.

    Args:
        source: a file, or its events. A file that ends amid an event, or without the closing bracket, as a crash leaves
            it, is read as far as it goes.

    Raises:
        ValueError: if it is no such trace.

    Example::

        >>> from lightning_stale.plots import read_trace
        >>> read_trace([{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "worker 1"}},
        ...             {"ph": "X", "name": "compute", "pid": 1, "tid": 0, "ts": 5_000_000, "dur": 250_000}])
        [Span(row='worker 1', start_s=0.0, end_s=0.25, kind='compute')]
    """
    found = list(events_of(Path(source)) if isinstance(source, (str, Path)) else source)
    complete = [event for event in found if event.get("ph") == "X"]
    named: dict[tuple[Any, Any, str], str] = {}
    for event in found:
        if event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name"):
            thread = event.get("tid") if event["name"] == "thread_name" else None
            named[event.get("pid"), thread, event["name"]] = str(event["args"]["name"])
    threads = {(event.get("pid"), event.get("tid")) for event in complete}
    rows = {}
    for pid, tid in threads:
        process = named.get((pid, None, "process_name"), f"process {pid}")
        alone = sum(other == pid for other, _ in threads) == 1
        thread = named.get((pid, tid, "thread_name"), f"thread {tid}")
        rows[pid, tid] = process if alone else f"{process}, {thread}"
    begin = min((event["ts"] for event in complete), default=0.0)
    return [
        Span(
            rows[event.get("pid"), event.get("tid")],
            (event["ts"] - begin) / 1e6,
            (event["ts"] - begin + event.get("dur", 0)) / 1e6,
            str(event.get("name", "")),
        )
        for event in sorted(complete, key=lambda event: float(event["ts"]))
    ]


def events_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace in Chrome's format, an array or ``{"traceEvents": [...]}``, as far as they are whole.

    Raises:
        ValueError: if it is no such trace.
    """
    text = path.read_text()
    start = text.find("[")
    before = text[:start].strip()
    if start < 0 or (before and not (before.startswith("{") and before.endswith(":"))):
        raise ValueError(f"{path} is no trace in Chrome's format: it is an array of events, or has traceEvents")
    if before and not before.endswith('"traceEvents":'):
        start = text.find("[", text.find('"traceEvents"'))
    decoder, place = json.JSONDecoder(), start + 1
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place >= len(text) or text[place] == "]":
            return
        try:
            event, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:  # the last one, cut off
            return
        if isinstance(event, dict):
            yield event
