"""The packaged configs in any Hydra app, their schemas, and the configs of the recipes."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

import lightning_stale
import recipes.schemas  # noqa: F401 - as recipes/train.py does
from hydra_plugins.lightning_stale import names
from lightning_stale import DSSP, Elastic, ThresholdSchedule
from lightning_stale.paradigms import PARADIGMS
from lightning_stale.parameter_server.apply import RULES
from lightning_stale.strategies import strategy_names
from lightning_stale.strategies.base import StaleStrategy

ROOT = Path(__file__).parents[2]
TRAINERS_OWN = {"accelerator", "cluster_environment", "checkpoint_io", "precision_plugin"}
"""What Lightning's Trainer takes itself, or as plugins; the schemas leave it out."""
MADE_BY_EACH = {"update"}
"""Parts that each strategy makes itself."""


def an_app(folder: Path, config: str = "trainer: {strategy: ddp, devices: 2}") -> Callable[..., DictConfig]:
    """Return ``compose`` of an app with its own config."""
    (folder / "config.yaml").write_text(config)

    def compose_app(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose("config", list(overrides))

    return compose_app


def parameters(*functions: Any) -> dict[str, Any]:
    """Return names and defaults of what can be given by name."""
    return {
        name: parameter.default
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    }


def plain(schema: Any) -> dict[str, Any]:
    """Return names and defaults of a schema's fields."""
    return {k: v for k, v in OmegaConf.to_container(OmegaConf.structured(schema)).items() if not k.startswith("_")}


def test_the_plugin_knows_the_names_of_all_strategies() -> None:
    assert set(names.NAMES) == set(strategy_names())
    for name, (strategy, options) in strategy_names().items():
        assert strategy(**options)._start_method == ("popen" if "_" not in name else options["start_method"])


# --- schemas ----------------------------------------------------------------------------------------------------------


def schemas() -> dict[str, Any]:
    Plugins.instance()  # has Hydra load its plugins, and ours with them
    from hydra_plugins.lightning_stale.schemas import SCHEMAS

    return SCHEMAS


@pytest.mark.parametrize("name", [*PARADIGMS, "hpsgd", "dsp"])
def test_the_schemas_of_strategies_are_their_constructors(name: str) -> None:
    target = OmegaConf.structured(schemas()[name])["_target_"]
    cls = getattr(lightning_stale, target.rpartition(".")[2])
    expected = {k: v for k, v in parameters(cls, StaleStrategy).items() if k not in TRAINERS_OWN | MADE_BY_EACH}
    fields = plain(schemas()[name])
    minutes = fields.pop("timeout")
    assert minutes == {"_target_": "datetime.timedelta", "minutes": expected.pop("timeout").total_seconds() / 60}
    if name in PARADIGMS:
        assert expected.pop("paradigm") in PARADIGMS
        paradigm = fields.pop("paradigm")
        assert paradigm.pop("_target_") == f"lightning_stale.{PARADIGMS[name].__name__}"
        assert paradigm == {k: v for k, v in parameters(PARADIGMS[name]).items() if k not in ("args", "kwargs")}
    assert fields == expected


def test_the_schemas_of_adaptations_are_their_targets() -> None:
    assert plain(schemas()["adaptation_schedule"]) == parameters(ThresholdSchedule)
    assert plain(schemas()["adaptation_dssp"]) | {"threshold": 3} == parameters(DSSP.from_ssp)


def test_the_schemas_of_rules_are_their_constructors() -> None:
    for name in set(RULES) - {"plain"}:
        schema = schemas()[f"apply_{name.replace('-', '_')}"]
        assert OmegaConf.structured(schema)["_target_"] == f"lightning_stale.{RULES[name].__name__}"
        assert plain(schema) == {k: v for k, v in parameters(RULES[name]).items() if k not in ("args", "kwargs")}


LOOSER = {"start_method", "transport", "mode", "timeout", "paradigm", "interval", "queues"}
LOOSER |= {"apply", "data", "elastic", "delay", "staleness", "split", "gather", "milestones", "outer_optimizer"}
"""What OmegaConf cannot say as the constructors do (a Literal, say), or is an object of its own."""


@pytest.mark.parametrize("name", [*PARADIGMS, "hpsgd", "dsp", "adaptation_schedule", "adaptation_dssp"])
def test_the_types_of_the_schemas_are_those_of_the_constructors(name: str) -> None:
    def compare(schema: Any, *functions: Callable[..., Any]) -> None:
        theirs = {k: v for function in functions for k, v in typing.get_type_hints(function).items()}
        ours = {k: v for k, v in typing.get_type_hints(schema).items() if not k.startswith("_") and k not in LOOSER}
        assert ours == {k: theirs[k] for k in ours}

    schema = schemas()[name]
    if name == "adaptation_dssp":
        compare(schema, DSSP.from_ssp)
        return
    target = OmegaConf.structured(schema)["_target_"]
    compare(schema, StaleStrategy.__init__, getattr(lightning_stale, target.rpartition(".")[2]).__init__)
    if name in PARADIGMS:
        compare(typing.get_type_hints(schema)["paradigm"], PARADIGMS[name].__init__)
        for rule in set(RULES) - {"plain"}:
            compare(schemas()[f"apply_{rule.replace('-', '_')}"], RULES[rule].__init__)


# --- in any app -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PARADIGMS, "hpsgd", "dsp"])
@pytest.mark.parametrize(
    "config", ["trainer: {strategy: ddp}", "defaults: [_self_]\ntrainer: {strategy: auto}", "a: 1"]
)
def test_a_packaged_strategy_takes_the_place_of_the_apps(tmp_path: Path, name: str, config: str) -> None:
    cfg = an_app(tmp_path, config)(f"+trainer/strategy={name}")
    assert repr(instantiate(cfg.trainer.strategy)) == repr(L.Trainer(strategy=name, logger=False).strategy)


def test_values_reach_the_constructors(tmp_path: Path) -> None:
    app = an_app(tmp_path)
    assert app("+trainer/strategy=ssp", "trainer.strategy.paradigm.threshold=5").trainer.devices == 2
    ssp = instantiate(
        app("+trainer/strategy=ssp", "trainer.strategy.paradigm.threshold=5", "trainer.strategy.timeout.minutes=1")
    ).trainer.strategy
    assert (ssp.paradigm.threshold, ssp._timeout.total_seconds()) == (5, 60)
    dsp = instantiate(
        app("+trainer/strategy=dsp", "trainer.strategy.staleness=[4,2,0]", "trainer.strategy.split=[a,b]")
    )
    assert (dsp.trainer.strategy.staleness, dsp.trainer.strategy.split) == ([4, 2, 0], ["a", "b"])
    assert isinstance(dsp.trainer.strategy.split, list)
    bounded = ["+trainer/strategy=bounded-delay", "trainer.strategy.paradigm.delay=auto"]
    auto = instantiate(app(*bounded, "trainer.strategy.paradigm.upper=9", "trainer.strategy.data=on-demand"))
    assert repr(auto.trainer.strategy.paradigm) == "BoundedDelay(delay='auto', lower=None, upper=9, waiting=0.02)"
    assert auto.trainer.strategy.data == "on-demand"
    for name in set(PARADIGMS) - {"bounded-delay"}:
        shares = [app(f"+trainer/strategy={name}", *more) for more in ([], ["trainer.strategy.data=on-demand"])]
        assert [instantiate(cfg.trainer.strategy).data for cfg in shares] == ["auto", "on-demand"]
    outer = "+trainer.strategy.outer_optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.7}"
    hpsgd = instantiate(app("+trainer/strategy=hpsgd", "trainer.strategy.interval=4", outer)).trainer.strategy
    assert (hpsgd.interval, hpsgd.outer_optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]) == (4, 0.7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+trainer/strategy=ssp", "trainer.strategy.paradigm.treshold=5"], "Key 'treshold' not in 'SSP'"),
        (["+trainer/strategy=ssp", "trainer.strategy.paradigm.threshold=five"], "'five' of type 'str' could not be"),
        (["+trainer/strategy=ssp", "trainer.strategy.paradigm.threshold=2.5"], "could not be converted to Integer"),
        (["+trainer/strategy=dssp", "trainer.strategy.paradigm.enforce_upper=3.5"], "not a valid bool"),
        (["+trainer/strategy=dssp", "trainer.strategy.paradigm=ssp"], "str is not a subclass of DSSP"),
        (["+trainer/strategy=dssp", "trainer.strategy.timout=3"], "Key 'timout' not in 'DSSPStrategy'"),
        (["+trainer/strategy=hpsgd", "trainer.strategy.interval=4.5"], "'4.5' of type 'float' is incompatible"),
        (["+trainer/strategy=dsp", "trainer.strategy.queues=[a]"], "'a' of type 'str' could not be converted"),
        (["+trainer/strategy=dssq"], "Could not find 'trainer/strategy/dssq'"),
        (["+trainer/strategy=asp", "+adaptation=dssp"], "adaptation_dssp.*AdaptedSSP is not a subclass of ASP"),
        (["+trainer/strategy=dssp", "+adaptation=dssp"], "adaptation_dssp.*AdaptedSSP is not a subclass of DSSP"),
        (["+trainer/strategy=bounded-delay", "+adaptation=dssp"], "dssp.*AdaptedSSP is not a subclass of BoundedDelay"),
        (
            ["+trainer/strategy=bounded-delay", "trainer.strategy.paradigm.threshold=5"],
            "'threshold' not in 'BoundedDel",
        ),
        (
            ["+trainer/strategy=bounded-delay", "trainer.strategy.paradigm.delay=2.5"],
            "'2.5' of type 'float' is incompat",
        ),
        (
            ["+trainer/strategy=bounded-delay", "trainer.strategy.paradigm.waiting=much"],
            "'much' of type 'str' could not",
        ),
        (["+trainer/strategy=hpsgd", "trainer.strategy.elastic=true"], "Key 'elastic' not in 'HPSGDStrategy'"),
        (["+trainer/strategy=dsp", "trainer.strategy.data=shards"], "Key 'data' not in 'DSPStrategy'"),
        (["+trainer/strategy=dsp", "trainer.strategy.elastic=true"], "Key 'elastic' not in 'DSPStrategy'"),
        (["+trainer/strategy=hpsgd", "+adaptation=dssp"], "adaptation_dssp.*Key 'paradigm' not in 'HPSGDStrategy'"),
        (["+trainer/strategy=asp", "+apply=ringmaster", "trainer.strategy.apply.r=8"], "Key 'r' not in 'Ringmaster'"),
        (["+trainer/strategy=asp", "+apply=ringmaster", "trainer.strategy.apply.R=2.5"], "not be converted to Integer"),
        (["+trainer/strategy=asp", "+apply=dana", "trainer.strategy.apply.momentum=much"], "'much' of type 'str'"),
        (["+trainer/strategy=asp", "+apply=dna"], "Could not find 'apply/dna'"),
        (["+trainer/strategy=hpsgd", "+apply=dana"], "apply_dana.*Key 'apply' not in 'HPSGDStrategy'"),
        (["+trainer/strategy=ssp", "+adaptation=schedule", "callbacks.threshold_schedule.patience=x"], "'x' of type"),
    ],
)
def test_typos_and_wrong_types_are_errors_when_the_config_is_composed(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((ConfigCompositionException, MissingConfigException)) as error:
        an_app(tmp_path)(*overrides)
    shown = f"{error.value}\n{error.value.__cause__}"  # as Hydra prints it
    assert re.search(f"(?s){message}", shown), shown


def test_typos_in_an_apps_own_files_are_errors_too(tmp_path: Path) -> None:
    config = "defaults: [trainer/strategy: ssp, _self_]\ntrainer: {strategy: {paradigm: {treshold: 4}}}"
    with pytest.raises(ConfigCompositionException, match="Key 'treshold' not in 'SSP'"):
        an_app(tmp_path, config)()


def test_values_out_of_range_are_the_constructors_errors(tmp_path: Path) -> None:
    cfg = an_app(tmp_path)("+trainer/strategy=ssp", "trainer.strategy.paradigm.threshold=-1")
    with pytest.raises(
        InstantiationException, match=r"threshold counts clocks and must be an integer >= 0.*\n.*paradigm"
    ):
        instantiate(cfg.trainer.strategy)
    for override, message in {
        "paradigm.delay=0": r"BoundedDelay\(delay=0\): delay counts leases.*\n.*paradigm",
        "paradigm.delay=often": r"BoundedDelay\(delay='often'\): delay counts leases.*\n.*paradigm",
        "paradigm.upper=9": r"lower, upper and waiting are for delay='auto'.*\n.*paradigm",
        "data=on_demand": r"data='on_demand' is unknown: write 'auto', 'on-demand' or 'shards'.*\n.*strategy",
    }.items():
        cfg = an_app(tmp_path)("+trainer/strategy=bounded-delay", f"trainer.strategy.{override}")
        with pytest.raises(InstantiationException, match=message):
            instantiate(cfg)
    cfg = an_app(tmp_path)("+trainer/strategy=hpsgd", "trainer.strategy.data=on-demand")
    assert instantiate(cfg.trainer.strategy).data == "on-demand"


def test_adaptations(tmp_path: Path) -> None:
    app = an_app(tmp_path)
    cfg = app("+trainer/strategy=ssp", "+adaptation=dssp", "trainer.strategy.paradigm.threshold=5")
    assert repr(instantiate(cfg.trainer.strategy).paradigm) == "DSSP(lower=5, upper=15, enforce_upper=True)"
    assert app("+trainer/strategy=ssp", "+adaptation=fixed") == app("+trainer/strategy=ssp")
    overrides = [
        "callbacks.threshold_schedule.monitor=null",
        "callbacks.threshold_schedule.milestones={5:{threshold:8}}",
    ]
    by_metric = instantiate(app("+trainer/strategy=ssp", "+adaptation=schedule").callbacks.threshold_schedule)
    by_epoch = instantiate(
        app("+trainer/strategy=ssp", "+adaptation=schedule", *overrides).callbacks.threshold_schedule
    )
    assert (by_metric.monitor, by_epoch.milestones) == ("val_loss", {5: {"threshold": 8}})
    overrides[-1] = "callbacks.threshold_schedule.milestones={5:{delay:4}}"
    bounded = instantiate(app("+trainer/strategy=bounded-delay", "+adaptation=schedule", *overrides))
    bounded.callbacks.threshold_schedule.setup(bounded.trainer, None, "fit")


@pytest.mark.parametrize("name", RULES)
def test_apply_rules(tmp_path: Path, name: str) -> None:
    app = an_app(tmp_path)
    cfg = app("+trainer/strategy=asp", f"+apply={name}")
    by_name = instantiate(app("+trainer/strategy=asp", f"trainer.strategy.apply={name}").trainer.strategy)
    assert repr(instantiate(cfg.trainer.strategy)) == repr(by_name)
    assert type(by_name.apply) is RULES[name]
    recipe = train_config("trainer/strategy=ssp", "adaptation=dssp", f"apply={name}")
    assert repr(instantiate(recipe.trainer.strategy).apply) == repr(RULES[name]())
    if name != "plain":
        with pytest.raises(InstantiationException, match="is a rule for stale gradients"):
            instantiate(app("+trainer/strategy=bsp", f"+apply={name}").trainer.strategy)
        with pytest.raises(ConfigCompositionException, match="Key 'apply' not in 'DDPStrategy'"):
            train_config("trainer/strategy=ddp", f"apply={name}")


def test_values_of_apply_rules(tmp_path: Path) -> None:
    app = an_app(tmp_path)
    asp = ["+trainer/strategy=asp"]
    rules = [
        app(*asp, "+apply=ringmaster", "trainer.strategy.apply.R=8"),
        app(
            *asp,
            "+apply=delay-compensated",
            "trainer.strategy.apply.lambda_=3",
            "trainer.strategy.apply.adaptive=false",
        ),
        app(*asp, "+apply=dana", "trainer.strategy.apply.momentum=0.5"),
        app(*asp, "trainer.strategy.apply={_target_: lightning_stale.Ringmaster, R: 3}"),
    ]
    assert [repr(instantiate(cfg.trainer.strategy).apply) for cfg in rules] == [
        "Ringmaster(R=8)",
        "DelayCompensated(lambda_=3.0, adaptive=False)",
        "Dana(momentum=0.5)",
        "Ringmaster(R=3)",
    ]
    with pytest.raises(InstantiationException, match=r"Ringmaster\(R=0\): R counts updates.*\n.*apply"):
        instantiate(app(*asp, "+apply=ringmaster", "trainer.strategy.apply.R=0").trainer.strategy)


@pytest.mark.parametrize("name", PARADIGMS)
def test_elastic_runs(tmp_path: Path, name: str) -> None:
    app = an_app(tmp_path)

    def elastic(*overrides: str) -> Any:
        return instantiate(app(f"+trainer/strategy={name}", *overrides).trainer.strategy).elastic

    node = "{_target_: lightning_stale.Elastic, min_workers: 2, patience_s: 5}"
    assert elastic() is elastic("trainer.strategy.elastic=false") is None
    assert elastic("trainer.strategy.elastic=true") == Elastic()
    expected = Elastic(min_workers=2, max_restarts=3, patience_s=5.0)
    assert elastic(f"trainer.strategy.elastic={node}") == expected
    recipe = train_config(f"trainer/strategy={name}", f"trainer.strategy.elastic={node}")
    assert instantiate(recipe.trainer.strategy).elastic == expected
    own = f"defaults: [trainer/strategy: {name}, _self_]\ntrainer: {{strategy: {{elastic: {node}}}}}"
    assert instantiate(an_app(tmp_path, own)().trainer.strategy).elastic == expected
    for value, message in {
        "maybe": r"elastic='maybe': write elastic=True",
        "{_target_: lightning_stale.Elastic, min_workers: 0}": r"Elastic\(min_workers=0\): write an integer >= 1",
        "{_target_: lightning_stale.Elastic, max_restart: 1}": r"unexpected keyword argument 'max_restart'",
    }.items():
        with pytest.raises(InstantiationException, match=message):
            elastic(f"trainer.strategy.elastic={value}")


def test_dssp_needs_a_threshold_to_adapt(tmp_path: Path) -> None:
    with pytest.raises(MissingMandatoryValue, match="threshold"):
        instantiate(an_app(tmp_path)("+adaptation=dssp").trainer)


# --- the recipes' configs ---------------------------------------------------------------------------------------------


def train_config(*overrides: str) -> DictConfig:
    """Compose the config of ``recipes/train.py``."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", ["output=somewhere", *overrides])


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["data", "model", "trainer", "callbacks", "logger", "hparams_search", "experiment"])
def test_every_option_of_a_group_composes(group: str) -> None:
    for option in options(group):
        choice = f"[default,{option}]" if group == "callbacks" and option != "default" else option
        OmegaConf.to_container(train_config(f"{group}={choice}"), resolve=False)


@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_build_their_model_data_strategy_and_callbacks(name: str) -> None:
    cfg = train_config(f"experiment={name}", "data=fake", "data.samples=8")
    with torch.device("meta"):
        model = instantiate(cfg.model)
        outputs = model.model(torch.zeros(2, cfg.dataset.channels, cfg.dataset.size, cfg.dataset.size))
    assert outputs.shape == (2, cfg.dataset.num_classes)
    assert model.configure_optimizers() is not None
    assert isinstance(instantiate(cfg.data), L.LightningDataModule)
    assert isinstance(instantiate(cfg.trainer.strategy), Strategy)
    for callback in cfg.callbacks.values():
        assert isinstance(instantiate(callback), L.Callback)


@pytest.mark.parametrize("name", [name for name in options("experiment") if name.startswith("dsp_resnet")])
def test_the_blocks_of_a_pipeline_are_the_groups_of_the_network(name: str) -> None:
    cfg = train_config(f"experiment={name}")
    with torch.device("meta"):
        names = [name for name, _ in instantiate(cfg.model).model.named_children()]
    assert [names[start] for start in cfg.trainer.strategy.split] == ["group2_block1", "group3_block1"]


@pytest.mark.parametrize("callbacks", ["[default]", "[default,monitor]"])
@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_keep_their_stragglers_whatever_callbacks_are_chosen(name: str, callbacks: str) -> None:
    chosen = train_config(f"experiment={name}", f"callbacks={callbacks}").callbacks
    for node in chosen.values():
        assert "_target_" in node
    if "stragglers" in chosen:
        alone = train_config(f"experiment={name}", "~callbacks.stragglers").callbacks
        assert "stragglers" not in alone


@pytest.mark.parametrize("strategy", ["ddp", "ssp"])
def test_what_belongs_to_another_strategy_does_not_compose(strategy: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        train_config("experiment=dsp_digits", f"trainer/strategy={strategy}")
    assert "staleness" in str(caught.value.__cause__ or caught.value)


def test_a_pipeline_of_the_papers_runs(tmp_path: Path) -> None:
    small = ["data=fake", "dataset.size=8", "data.samples=4", "data.batch_size=2", "trainer.devices=1"]
    cfg = train_config("experiment=dsp_resnet98_cifar10", *small)
    trainer = instantiate(
        cfg.trainer, accelerator="cpu", fast_dev_run=1, default_root_dir=str(tmp_path), enable_progress_bar=False
    )
    trainer.fit(instantiate(cfg.model), instantiate(cfg.data))
    assert trainer.strategy.summary()["staleness"] == (4, 2, 0)
