"""Docstrings as Markdown: what only Sphinx understands is put into its words, and what is returned keeps its type."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):`(~?)([^`]+)`")
_EXAMPLE = re.compile(r"^Example::\n\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)
_RETURNS = re.compile(r"^(Returns:\n\s+)(?=``)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Read by mkdocstrings, see ``mkdocs.yml``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            returns = str(obj.returns) if isinstance(obj, griffe.Function) else ""
            obj.docstring.value = as_markdown(obj.docstring.value, returns)


def as_markdown(docstring: str, returns: str = "") -> str:
    """Return ``docstring`` in Markdown.

    Args:
        docstring: with ``:class:`~package.Name```, which becomes ``Name``, and ``Example::``, which becomes the code;
            of a further ``::`` one colon stays.
        returns: the type of what is returned: code at the beginning of that section would be taken for it.
    """
    plain = _ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", docstring)
    typed = _RETURNS.sub(lambda found: f"{found[1]}{returns}: ", plain)
    shown = _EXAMPLE.sub(lambda found: f"**Example**\n\n```python\n{textwrap.dedent(found[1]).strip()}\n```\n", typed)
    return re.sub(r"::$", ":", shown, flags=re.MULTILINE)
