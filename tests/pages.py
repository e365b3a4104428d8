"""The README and the pages of ``docs/``, as what a test can look at: their snippets, links and headings.

A fenced block may have a comment above it: ``<!-- run: NAME -->`` names the test that runs it. Without one, a block
runs by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- run: (?P<name>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(language: str | None = None) -> list[Snippet]:
    """Return the blocks of all pages, in their order; of one language only if asked for."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in _BLOCK.finditer(text):
            line = text.count("\n", 0, block.start("code"))
            found.append(Snippet(page, line, block["language"], block["code"], block["name"]))
    return [snippet for snippet in found if language in (None, snippet.language)]


def named(name: str) -> list[Snippet]:
    """Return the blocks under ``<!-- run: name -->``."""
    return [snippet for snippet in snippets() if snippet.name == name]


def commands(snippet: Snippet) -> list[str]:
    """Return the commands of a bash block, continued lines joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", snippet.code)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def anchors(page: Path) -> set[str]:
    """Return the names of the headings of ``page``, as GitHub and Python-Markdown make them."""
    prose = _BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(page: Path) -> list[str]:
    """Return the relative targets of the links and images of ``page``."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\s*\n\s*", " ", _BLOCK.sub("", page.read_text())))
    return [target for target in found if not re.match(r"[a-z]+:", target)]
