"""What ``docs/simulation.md`` shows is what its commands print."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest

from lightning_stale.simulation.command import main
from tests.pages import ROOT, commands, snippets
from tests.unit.on_demand import step_times

PAGE = ROOT / "docs" / "simulation.md"


def test_the_page_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("ar.csv").open("w", newline="") as file:
        times = enumerate(step_times("AR"))
        rows = [(worker, step, time) for worker, each in times for step, time in enumerate(each)]
        csv.writer(file).writerows([("worker", "step", "compute_s"), *rows])
    blocks = [snippet for snippet in snippets() if snippet.page == PAGE and snippet.language in ("bash", "text")]
    assert [block.language for block in blocks] == ["bash", "text"] * 3
    for command, printed in zip(blocks[::2], blocks[1::2], strict=True):
        [line] = commands(command)
        assert main(shlex.split(line)[4:]) == 0
        assert "\n".join(each.rstrip() for each in capsys.readouterr().out.splitlines()) == printed.code.rstrip("\n")
