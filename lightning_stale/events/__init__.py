"""What happens in a run, as values, and the one place that is told of it; all counts are derived from these."""

from __future__ import annotations

from lightning_stale.events.kinds import (
    Committed,
    Event,
    Exchanged,
    Failed,
    Fingerprint,
    Granted,
    Joined,
    Left,
    Met,
    Planned,
    Pushed,
    Refused,
    Released,
    RoundEnded,
    Spent,
    StageRan,
    Stepped,
    TakenBack,
    ThresholdsSet,
    Turn,
    Updated,
)
from lightning_stale.events.recorder import Reader, Recorder

__all__ = [
    "Committed",
    "Event",
    "Exchanged",
    "Failed",
    "Fingerprint",
    "Granted",
    "Joined",
    "Left",
    "Met",
    "Planned",
    "Pushed",
    "Reader",
    "Recorder",
    "Refused",
    "Released",
    "RoundEnded",
    "Spent",
    "StageRan",
    "Stepped",
    "TakenBack",
    "ThresholdsSet",
    "Turn",
    "Updated",
]
