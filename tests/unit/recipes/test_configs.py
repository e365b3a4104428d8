"""Every file of conf/data and conf/model composes with the others, and makes what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_stale.pipeline.partition.costs import count_parameters
from recipes.data.base import ImageDataModule
from tests.integration.harness import ROOT

DATA = sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
SIZES = {  # parameters, and the data set and classes they are for
    "alexnet_small": (145_578, "cifar10"),
    "digits_cnn": (38_282, "digits"),
    "resnet20": (269_722, "cifar10"),
    "resnet56": (853_018, "cifar10"),
    "resnet98": (1_533_530, "cifar10"),
    "resnet110": (1_727_962, "cifar10"),
    "resnet164": (2_602_906, "cifar10"),
    "resnet18": (11_689_512, "imagenet"),
    "resnet50": (25_557_032, "imagenet"),
    "resnet101": (44_549_160, "imagenet"),
    "resnet152": (60_192_808, "imagenet"),
    "resnet50_cifar": (23_705_252, "cifar100"),
    "resnet101_cifar": (42_512_970, "cifar10"),
}
OPEN = {"cifar_resnet": "cifar10", "imagenet_resnet": "imagenet"}  # the depth is left to the user


@pytest.fixture
def composed(tmp_path: Path) -> Any:
    """Return a function that composes the recipes' groups under a root of its own."""
    root = (
        f"defaults: [_self_, data: digits, model: digits_cnn]\nseed: 3\nhydra: {{searchpath: [file://{ROOT}/conf]}}\n"
    )
    (tmp_path / "root.yaml").write_text(root)

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("root", list(overrides))

    return make


def test_all_files_are_tested() -> None:
    assert set(DATA) == {"cifar10", "cifar100", "digits", "fake", "imagenet"}
    assert set(MODELS) == {*SIZES, *OPEN}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, composed: Any) -> None:
    config = composed(f"data={name}")
    data = instantiate(config.data)
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3
    assert set(config.dataset) == {"num_classes", "channels", "size"}
    if name in ("digits", "fake"):
        data.setup("fit")
        images, labels = next(iter(data.train_dataloader()))
        assert images.shape[1:] == (config.dataset.channels, config.dataset.size, config.dataset.size)
        assert labels.max() < config.dataset.num_classes


def test_fake_images_of_another_shape(composed: Any) -> None:
    config = composed("data=fake", "dataset.size=64", "dataset.num_classes=1000", "model=resnet18", "data.samples=64")
    data = instantiate(config.data)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))[0].shape == (32, 3, 64, 64)
    assert data._sets[True].tensors[1].max() > 500


@pytest.mark.parametrize("name", SIZES)
def test_models(name: str, composed: Any) -> None:
    parameters, data = SIZES[name]
    config = composed(f"model={name}", f"data={data}")
    OmegaConf.resolve(config)
    with torch.device("meta"):
        module = instantiate(config.model)
        assert count_parameters(module.model) == parameters
        size = config.dataset.size
        output = module.eval()(torch.zeros(2, config.dataset.channels, size, size))
    assert output.shape == (2, config.dataset.num_classes)
    configured = module.configure_optimizers()
    optimizer = configured[0][0] if isinstance(configured, tuple) else configured
    assert optimizer.param_groups[0]["lr"] == config.model.optimizer.lr


@pytest.mark.parametrize(
    ("name", "depth", "parameters"), [("cifar_resnet", 32, 464_154), ("imagenet_resnet", 34, None)]
)
def test_models_of_any_depth(name: str, depth: int, parameters: int | None, composed: Any) -> None:
    config = composed(f"model={name}", f"data={OPEN[name]}", f"model.model.depth={depth}")
    with torch.device("meta"):
        assert count_parameters(instantiate(config.model).model) == (parameters or 21_797_672)
    with pytest.raises(Exception, match=r"model\.model\.depth|Missing mandatory value"):
        instantiate(composed(f"model={name}", f"data={OPEN[name]}").model)


def test_a_wrong_folder_is_named_when_it_is_instantiated(composed: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="hf download uoft-cs/cifar100 --repo-type dataset"):
        instantiate(composed("data=cifar100", f"data.root={tmp_path}/nowhere").data)
