"""What a forward demands of its inputs (``assert t <= self.length``) is no branch: it is traced, and checked later."""

from __future__ import annotations

import ast
import functools
import linecache
from types import FrameType


def demanded(frame: FrameType) -> bool | None:
    """Return the only value of a condition with which ``frame`` goes on, if the other one raises; else ``None``.

    ``frame`` is about to evaluate the condition of ``assert ...``, or of ``if ...: raise ...``.
    """
    for node in _statements(frame.f_code.co_filename):
        last = node.test.end_lineno or node.test.lineno
        if node.lineno <= frame.f_lineno <= last:
            return _only_value(node)
    return None


def demand(value: object, wanted: bool, where: str) -> None:
    """Raise if ``value`` is not the one with which the forward goes on.

    Raises:
        ValueError: with the line that demands it.
    """
    if bool(value) is not wanted:
        raise ValueError(f"the inputs do not meet what the model demands of them in {where}")


def line_of(frame: FrameType) -> str:
    """Return file, line and source of what ``frame`` runs."""
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({source})"


def _only_value(node: ast.Assert | ast.If) -> bool | None:
    raises_if_false = isinstance(node, ast.Assert)
    if isinstance(node, ast.If) and not (isinstance(node.body[-1], ast.Raise) and not node.orelse):
        return None
    test, wanted = node.test, raises_if_false
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, wanted = test.operand, not wanted
    operands = [test]
    if isinstance(test, ast.BoolOp):  # all of `a and b`, or none of `a or b`
        if isinstance(test.op, ast.And) is not wanted:
            return None
        operands = test.values
    if not all(_is_plain(operand, chained=wanted) for operand in operands):
        return None
    return wanted


def _is_plain(operand: ast.expr, chained: bool) -> bool:
    """Whether ``operand`` is asked for its truth once, or in ``0 < a < b`` for the same one twice."""
    if isinstance(operand, ast.Compare) and len(operand.ops) > 1 and not chained:
        return False
    return not any(
        isinstance(part, (ast.BoolOp, ast.IfExp, ast.comprehension, ast.Lambda))
        or (isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not))
        or (isinstance(part, ast.Compare) and part is not operand)
        for part in ast.walk(operand)
    )


@functools.lru_cache(maxsize=32)
def _statements(filename: str) -> list[ast.Assert | ast.If]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Assert, ast.If))]
