"""A precision plugin that clips in a way of our own is the user's in everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType

from lightning_stale.strategies.clipping import clipping_with
from tests.integration.models import Regression, loader, trainer

Clipped = list[tuple[Any, float, GradClipAlgorithmType]]


class Loud(Precision):
    """The user's own."""

    def convert_input(self, data: Any) -> Any:
        return [data]


@pytest.mark.parametrize(
    "make", [Precision, Loud, lambda: MixedPrecision("bf16-mixed", "cpu"), lambda: HalfPrecision("bf16-true")]
)
def test_only_clipping_is_another(make: Any) -> None:
    clipped: Clipped = []
    plain = make()
    plugin = clipping_with(plain, lambda *noted: clipped.append(noted))
    assert isinstance(plugin, type(plain))
    assert type(plugin).__qualname__ == type(plain).__qualname__, "under which its state is in checkpoints"
    assert type(plugin).__module__ == type(plain).__module__
    assert plugin.precision == plain.precision
    data = torch.ones(2)
    assert str(plugin.convert_input(data)) == str(plain.convert_input(data))
    plugin.clip_gradients("optimizer", 0.5, "value")  # type: ignore[arg-type]
    plugin.clip_gradients("optimizer", 2, GradClipAlgorithmType.NORM)  # type: ignore[arg-type]
    plugin.clip_gradients("optimizer", 0.0)  # type: ignore[arg-type]
    assert clipped == [
        ("optimizer", 0.5, GradClipAlgorithmType.VALUE),
        ("optimizer", 2.0, GradClipAlgorithmType.NORM),
    ]
    assert type(plain) is not type(plugin)


def test_state_is_shared_with_the_users_plugin() -> None:
    plain = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu", init_scale=8.0))
    plugin: Any = clipping_with(plain, lambda *_: None)
    assert plugin.scaler is plain.scaler
    plugin.scaler = None
    assert plain.scaler is None


@pytest.mark.parametrize("strategy", ["bsp", "dsp"])
def test_the_users_plugin_is_back_after_fit_and_after_a_failure(strategy: str) -> None:
    class Failing(Regression):
        def on_train_batch_end(self, *_: Any) -> None:
            assert type(self.trainer.precision_plugin) is not Precision, "the test looks at the wrong time"
            if self.fails:
                raise ArithmeticError

    for fails in (False, True):
        model = Failing()
        model.fails = fails
        t = trainer(1, strategy, max_steps=2, gradient_clip_val=0.5)
        before = t.strategy.precision_plugin
        if fails:
            with pytest.raises(ArithmeticError):
                t.fit(model, loader())
        else:
            t.fit(model, loader())
        assert t.strategy.precision_plugin is before
