"""Docstrings as Markdown: ``:class:`~package.Name``` becomes ``Name``, and an ``Example::`` the code that it is."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):`(~?)([^`]+)`")
_EXAMPLE = re.compile(r"^Example::\n\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Read by mkdocstrings, see ``mkdocs.yml``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Return ``docstring`` without what only Sphinx understands."""
    plain = _ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", docstring)
    return _EXAMPLE.sub(lambda found: f"**Example**\n\n```python\n{textwrap.dedent(found[1]).strip()}\n```\n", plain)
