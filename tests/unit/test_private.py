"""The private parts of Lightning and torch that are used are still where they were, and do what is expected."""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, Timer, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_stale import HPSGDStrategy
from lightning_stale.private import of_lightning, of_torch
from tests.integration.models import Regression, loader


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)


def test_a_batch_of_lightning_ends_in_the_collective_that_is_replaced() -> None:
    """If it is gone from `advance`, so is the reason for `free_batches`."""
    assert "_broadcast_sigterm_tensor" in _TrainingEpochLoop.advance.__code__.co_names
    assert callable(_SignalConnector._sigterm_notifier_fn)


def test_free_batches_replaces_and_restores(trainer: Trainer) -> None:
    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    undo = of_lightning.free_batches(trainer)
    assert "_broadcast_sigterm_tensor" in vars(loop)
    assert "_sigterm_notifier_fn" in vars(connector)
    undo()
    assert loop._broadcast_sigterm_tensor.__func__ is _TrainingEpochLoop._broadcast_sigterm_tensor
    assert connector._sigterm_notifier_fn.__func__ is _SignalConnector._sigterm_notifier_fn


def test_a_batch_without_collectives_calls_none(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("broadcast", "all_reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name, **__: calls.append(name))
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.distributed, name, lambda: True)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    loop = trainer.fit_loop.epoch_loop
    undo = of_lightning.free_batches(trainer)
    loop._broadcast_sigterm_tensor()
    assert calls == []
    undo()
    loop._broadcast_sigterm_tensor()
    assert calls, "this version of Lightning calls something else: the test above would not notice a collective"


def test_the_handler_of_sigterm_notes_it_without_a_collective(trainer: Trainer) -> None:
    undo = of_lightning.free_batches(trainer)
    assert not trainer.received_sigterm
    trainer._signal_connector._sigterm_notifier_fn(signal.SIGTERM, None)
    assert trainer.received_sigterm
    undo()


def test_a_loop_without_the_collective_is_an_error_that_says_so(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    with pytest.raises(
        of_lightning.LightningChangedError, match=r"_TrainingEpochLoop\._broadcast_sigterm_tensor is gone"
    ):
        of_lightning.free_batches(trainer)


def test_note_sigterm(trainer: Trainer) -> None:
    of_lightning.note_sigterm(trainer)
    assert trainer.received_sigterm


def test_callbacks_are_the_trainers_own_list(trainer: Trainer) -> None:
    assert of_lightning.callbacks(trainer) is trainer.callbacks  # type: ignore[attr-defined]


@pytest.mark.parametrize(("interval", "by_time"), [(timedelta(minutes=1), True), (0.5, False), (None, False)], ids=repr)
def test_validates_by_time(interval: Any, by_time: bool, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, val_check_interval=interval, default_root_dir=tmp_path
    )
    assert of_lightning.validates_by_time(trainer) is by_time


@pytest.mark.parametrize(
    ("options", "by_time"), [({"train_time_interval": timedelta(minutes=1)}, True), ({"every_n_epochs": 1}, False)]
)
def test_saves_by_time(options: dict[str, Any], by_time: bool) -> None:
    assert of_lightning.saves_by_time(ModelCheckpoint(**options)) is by_time


@pytest.mark.parametrize(
    ("timer", "by_batch"),
    [
        (Timer(timedelta(hours=1)), True),
        (Timer(timedelta(hours=1), interval="epoch"), False),
        (Timer(), False),
    ],
    ids=["step", "epoch", "measures only"],
)
def test_limits_time_by_batch(timer: Timer, by_batch: bool) -> None:
    assert of_lightning.limits_time_by_batch(timer) is by_batch


def test_in_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_lightning.in_notebook() is False
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    assert of_lightning.in_notebook() is True


def test_logs_in(trainer: Trainer) -> None:
    class Logging(BoringModel):
        seen: ClassVar[list[bool]] = []

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("norm", 1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            hooks = (["on_before_optimizer_step"], ["on_after_backward"])
            self.seen.extend(of_lightning.logs_in(self.trainer, hook) for hook in hooks)

    trainer.fit_loop.epoch_loop.max_steps = 1
    trainer.fit(Logging())
    assert Logging.seen == [True, False]
    assert of_lightning.logs_in(trainer, ["on_before_optimizer_step"]) is False, "after fit there are no results"


def test_replace_forward_and_back() -> None:
    body = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"wrapped": torch.compile(body, backend="eager")})
    before = [dict(vars(module)) for module in (body, model["wrapped"])]
    undo = of_lightning.replace_forward(model, body, lambda x: x + 1)
    assert model["wrapped"](torch.ones(2)).tolist() == body(torch.ones(2)).tolist() == [2.0, 2.0]
    undo()
    assert [dict(vars(module)) for module in (body, model["wrapped"])] == before


def test_current_hook() -> None:
    module = LightningModule()
    assert of_lightning.current_hook(module) is None
    module._current_fx_name = "training_step"
    assert of_lightning.current_hook(module) == "training_step"


def test_note_device() -> None:
    module = LightningModule()
    of_lightning.note_device(module, torch.device("meta"))
    assert module.device == torch.device("meta")


def test_averaged_models_are_those_of_the_callbacks(trainer: Trainer) -> None:
    averaging, not_yet = EMAWeightAveraging(), WeightAveraging()
    of_lightning.callbacks(trainer).extend([averaging, not_yet])
    assert of_lightning.averaged_models(trainer) == []
    averaging.setup(trainer, BoringModel(), "fit")
    (average,) = of_lightning.averaged_models(trainer)
    assert isinstance(average.module, BoringModel)


def test_skips_backward(trainer: Trainer) -> None:
    assert not of_lightning.skips_backward(trainer)
    trainer.fit_loop._skip_backward = True
    assert of_lightning.skips_backward(trainer)
    assert trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward, "which the loop asks"


def test_ddp_has_what_the_strategy_overrides() -> None:
    for name in ("_configure_launcher", "_setup_model", "setup_environment", "reduce", "teardown", "_layer_sync"):
        assert hasattr(DDPStrategy(), name), name


def test_a_saved_tensor_is_taken_for_unchanged_once_its_version_is_put_back() -> None:
    weight = torch.ones(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    product, version, values = (x * weight).sum(), weight._version, weight.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward(retain_graph=True)
    with torch.no_grad():
        weight.copy_(values)
    of_torch.set_versions([weight], [version])
    assert weight._version == version
    product.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3))


def test_registered_types_tell_how_they_are_taken_apart() -> None:
    node = of_torch.registered_node(torch.return_types.max)
    assert node is not None
    pair = torch.max(torch.eye(2), 0)
    children, context = node[0](pair)
    assert type(node[1](list(children), context)) is type(pair)
    assert of_torch.registered_node(torch.nn.Linear) is None


def test_something_happens_before_every_loop_makes_its_loaders_or_begins_anew(trainer: Trainer) -> None:
    calls: list[str] = []
    model, data = Regression(), loader(32)
    undo = [
        of_lightning.before_loading(trainer, lambda: calls.append("load")),
        of_lightning.before_fetching(trainer, lambda: calls.append("fetch")),
    ]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data, data)
    assert calls.count("fetch") == 2 * (4 + 4) + 2, "of training and of validation, and two of the sanity check"
    assert calls.index("load") < calls.index("fetch")
    for run in (trainer.validate, trainer.test, trainer.predict):
        calls.clear()
        run(model, data)
        assert calls == ["load"], run
    for step in undo:
        step()
    calls.clear()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data)
    assert calls == []


def test_the_choice_of_samplers_is_undone(trainer: Trainer) -> None:
    undo = of_lightning.use_samplers_as_they_are(trainer)
    assert trainer._accelerator_connector.use_distributed_sampler is False
    undo()
    assert trainer._accelerator_connector.use_distributed_sampler is True


def test_a_loop_without_the_seam_is_an_error_that_says_so(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_TrainingEpochLoop, "_on_before_fetch")
    with pytest.raises(of_lightning.LightningChangedError, match=r"_TrainingEpochLoop\._on_before_fetch is gone"):
        of_lightning.before_fetching(trainer, lambda: None)


def test_trainer_of(trainer: Trainer) -> None:
    module = BoringModel()
    assert of_lightning.trainer_of(module) is None
    module.trainer = trainer
    assert of_lightning.trainer_of(module) is trainer


@pytest.mark.parametrize("synchronizes", [True, False])
def test_synchronizes_batch_norm(synchronizes: bool, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", strategy="dssp", sync_batchnorm=synchronizes, logger=False, default_root_dir=tmp_path
    )
    assert of_lightning.synchronizes_batch_norm(trainer.strategy) is synchronizes


def test_what_is_replaced_on_one_object_comes_back(trainer: Trainer) -> None:
    loop = trainer.validate_loop
    undo = of_lightning.replace(loop, "run", lambda: 3)
    assert loop.run() == 3
    assert "run" not in vars(trainer.test_loop)
    undo()
    assert loop.run.__func__ is type(loop).run


def test_lightning_asks_the_strategy_for_what_becomes_of_the_model_before_optimizers_are_made(tmp_path: Path) -> None:
    """So the model need not be wrapped, and DDP's own set-up is left out."""
    calls: list[str] = []

    class Watching(BoringModel):
        def configure_optimizers(self) -> Any:
            calls.append("optimizers")
            return super().configure_optimizers()

    class Strategy(HPSGDStrategy):
        def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
            calls.append("model")
            return super()._setup_model(model)

    trainer = Trainer(
        accelerator="cpu", strategy=Strategy(), devices=1, fast_dev_run=1, logger=False, default_root_dir=tmp_path
    )
    trainer.fit(Watching())
    assert calls == ["model", "optimizers"]
    trainer.validate(Watching(), verbose=False)
    assert calls == ["model", "optimizers", "model"]


def test_a_run_resumes_from_what_it_was_not_told_once(tmp_path: Path) -> None:
    """Whether the script names a checkpoint or not; also one with more in it than weights, as hyper-parameters are."""

    class Told(BoringModel):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            loaded.append(checkpoint["name"])

        def setup(self, stage: str) -> None:
            if stage == "fit":
                of_lightning.resume_from(self.trainer, str(tmp_path / "newest.ckpt"))

    loaded: list[str] = []
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 0}
    saver = Trainer(**options)
    saver.fit(BoringModel())
    for name in ("told", "newest"):
        saver.save_checkpoint(tmp_path / f"{name}.ckpt")
        content = torch.load(tmp_path / f"{name}.ckpt", weights_only=False)
        torch.save({**content, "name": name, "more": object if name == "newest" else 0}, tmp_path / f"{name}.ckpt")
    for told in (None, tmp_path / "told.ckpt"):
        trainer = Trainer(**options)
        trainer.fit(Told(), ckpt_path=told)
        assert loaded.pop() == "newest"
        assert trainer.ckpt_path == str(tmp_path / "newest.ckpt")
        trainer._checkpoint_connector.resume_start(tmp_path / "told.ckpt")
        assert trainer.ckpt_path == tmp_path / "told.ckpt", "as LearningRateFinder's own"


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (2, 2)])
def test_logs_now_is_true_where_lightning_writes(tmp_path: Path, every: int, accumulate: int) -> None:
    """Against what a logger is given."""
    said: list[int] = []
    written: list[int] = []

    class Noting(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if of_lightning.logs_now(trainer):
                said.append(batch_idx)
            pl_module.log("batch", float(batch_idx), on_step=True, on_epoch=False)

    class Written(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            written.extend(int(value) for name, value in metrics.items() if name == "batch")

    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=11,
        limit_val_batches=0,
        log_every_n_steps=every,
        accumulate_grad_batches=accumulate,
        callbacks=[Noting()],
        logger=Written(tmp_path),
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(BoringModel())
    assert said == written != []
