"""How a run that has failed on another rank ends on this one."""

from __future__ import annotations

import traceback
from typing import Literal

FailureKind = Literal["error", "interrupt", "sigterm", "over"]


class RunFailedError(RuntimeError):
    """The run has ended because of another worker, or of the parameter server; the text holds the traceback."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        """``"error"``, ``"interrupt"`` (Ctrl-C), ``"sigterm"``, or ``"over"``: nothing is left to take part in."""

    def __reduce__(self) -> tuple[type[RunFailedError], tuple[str, str]]:
        return type(self), (self.kind, str(self))


def describe(exception: BaseException) -> tuple[FailureKind, str]:
    """Return what the other ranks are told of ``exception``: its kind, and a text to follow "rank 1 "."""
    if isinstance(exception, KeyboardInterrupt):
        return "interrupt", "was interrupted"
    if type(exception).__name__ == "SIGTERMException":
        return "sigterm", "received SIGTERM"
    lines = "".join(traceback.format_exception(exception))
    return "error", f"raised {type(exception).__name__}; its traceback:\n{lines}"
