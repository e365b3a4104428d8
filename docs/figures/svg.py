"""Just enough SVG for the figures of these pages.

A figure is :data:`WIDTH` units wide, about what a phone is in pixels, so that its letters can be read there; on a wide
screen ``style.css`` lets it grow. Nothing depends on fonts or versions: the same script writes the same file anywhere.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH = 400
SMALL, NORMAL = 12, 13.5
INK, FAINT, PALE, PAPER = "#1f2933", "#61707d", "#e3e8ec", "#ffffff"
BLUE, ORANGE, GREEN = "#2667a8", "#b85c00", "#2a7a4b"
WORKERS = (BLUE, ORANGE, GREEN)
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Figure:
    """Shapes on white, from the top left corner; ``y`` grows downwards."""

    def __init__(self, title: str, height: float) -> None:
        self._shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" font-family="{_FONT}" role="img">',
            f"<title>{escape(title)}</title>",
            "<defs>",
            *(_arrow_head(colour) for colour in (INK, FAINT, *WORKERS)),
            "</defs>",
            f'<rect width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = NORMAL,
        colour: str = INK,
        at: str = "start",
        bold: bool = False,
    ) -> None:
        """Write ``text`` on the base line ``y``; ``x`` is where it starts, its ``middle`` or its ``end``."""
        weight = ' font-weight="600"' if bold else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" text-anchor="{at}"{weight}>'
            f"{escape(text)}</text>"
        )

    def lines(
        self, x: float, y: float, lines: list[str], size: float = SMALL, colour: str = FAINT, at: str = "start"
    ) -> None:
        """Write several lines of text."""
        for number, line in enumerate(lines):
            self.text(x, y + number * (size + 3.5), line, size, colour, at)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = PALE,
        edge: str | None = None,
        dashed: bool = False,
    ) -> None:
        """Draw a rectangle."""
        stroke = "" if edge is None else f' stroke="{edge}" stroke-width="1.3"'
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"{stroke}{dash}/>'
        )

    def line(
        self, points: list[tuple[float, float]], colour: str = FAINT, arrow: bool = False, dashed: bool = False
    ) -> None:
        """Draw a line through ``points``, with an arrow head at its end if asked for."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        head = f' marker-end="url(#head{colour[1:]})"' if arrow else ""
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self._shapes.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}{head}/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        """Draw a dot."""
        self._shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>')

    def __str__(self) -> str:
        return "\n".join([*self._shapes, "</svg>", ""])


def save(figures: dict[str, Figure]) -> None:
    """Write ``NAME.svg`` beside this file for each of ``figures``."""
    for name, figure in figures.items():
        (Path(__file__).parent / f"{name}.svg").write_text(str(figure))


def _arrow_head(colour: str) -> str:
    return (
        f'<marker id="head{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
    )
