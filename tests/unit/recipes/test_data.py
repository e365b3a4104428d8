"""Images come out as they went in, augmented in training and nowhere else, and by the seed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_stale import DSPStrategy
from recipes.classifier import ImageClassifier
from recipes.data import CIFAR, Digits, Fake, ImageNet
from recipes.data.base import ImageDataModule
from recipes.data.imagenet import Crops
from tests.integration.harness import run_workers
from tests.integration.models import trainer
from tests.unit.recipes.images import REAL, Record, noise, subset, whereabouts, write_cifar, write_class_folders


def fit(data: ImageDataModule, strategy: Any = "auto", world_size: int = 1, epochs: int = 2, **kwargs: Any) -> Record:
    """Train something on ``data``; return the batches it saw."""
    record = Record()
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))
    model = ImageClassifier(model=net, optimizer=partial(torch.optim.SGD, lr=0.01), num_classes=10)
    kwargs = {"max_epochs": epochs, "callbacks": [record], **kwargs}
    checkpoint = kwargs.pop("ckpt_path", None)
    t = trainer(world_size, strategy, **kwargs)
    t.fit(model, data, ckpt_path=checkpoint)
    if save := kwargs.get("default_root_dir"):
        t.save_checkpoint(Path(save) / "saved.ckpt", weights_only=False)
    return record


def originals(data: CIFAR, images: Tensor) -> Tensor:
    """Return images in 0..1, as they were before they were normalized."""
    return images * data.std + data.mean


def draws(data: CIFAR, record: Record) -> list[list[tuple[int, int, bool]]]:
    """Return how each image of each batch was moved and flipped."""
    whole = data._sets[True].tensors[0].float() / 255
    return [[whereabouts(image, whole)[1:] for image in originals(data, images)] for images, _ in record.train]


# --- CIFAR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "label"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_pixels_and_labels_are_those_of_the_files(tmp_path: Path, name: str, label: str) -> None:
    data = CIFAR(name=name, root=str(write_cifar(tmp_path / "data", label, train=12)), batch_size=4)
    data.prepare_data()
    data.setup("fit")
    for split, count in (("train", 12), ("test", 8)):
        images, labels = data._sets[split == "train"].tensors
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert np.array_equal(images.permute(0, 2, 3, 1), noise(count, seed=len(split)))
        assert labels.tolist() == [i % 10 for i in range(count)]


def test_images_are_decoded_once(tmp_path: Path) -> None:
    data = CIFAR(name="cifar10", root=str(write_cifar(tmp_path / "data")), batch_size=4)
    data.prepare_data()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert len([path for path in files if path.name.startswith("cache-")]) == 2
    CIFAR(name="cifar10", root=str(tmp_path / "data"), batch_size=4).setup("fit")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == files


def test_training_images_are_moved_and_flipped_originals_and_others_are_as_they_were(tmp_path: Path) -> None:
    data = CIFAR(name="cifar10", root=str(write_cifar(tmp_path / "data")), batch_size=16)
    record = fit(data)
    whole, labels = data._sets[True].tensors
    seen, moves = [], set()
    for images, targets in record.train:
        for image, target in zip(originals(data, images), targets, strict=True):
            index, *move = whereabouts(image, whole.float() / 255)
            assert labels[index] == target
            seen.append(index)
            moves.add(tuple(move))
    assert sorted(seen) == sorted(2 * list(range(32)))
    assert len(moves) > 20
    assert {move[2] for move in moves} == {False, True}
    downs, rights = ({move[i] for move in moves} for i in (0, 1))
    assert min(len(downs), len(rights)) > 5
    images, targets = (torch.cat(parts[:1]) for parts in zip(*record.validation, strict=True))
    torch.testing.assert_close(originals(data, images), data._sets[False].tensors[0].float() / 255)
    assert torch.equal(targets, data._sets[False].tensors[1])


def test_the_seed_decides_and_the_epoch_too(tmp_path: Path) -> None:
    root = str(write_cifar(tmp_path / "data"))
    batches = {}
    for name, seed in (("once", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(len(batches))  # what else the run draws does not matter
        batches[name] = [images for images, _ in fit(CIFAR(name="cifar10", root=root, batch_size=16, seed=seed)).train]
    assert all(torch.equal(a, b) for a, b in zip(batches["once"], batches["again"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(batches["once"], batches["other"], strict=True))
    data = CIFAR(name="cifar10", root=root, batch_size=16, seed=1)
    of_epochs = draws(data, fit(data))
    assert of_epochs[:2] != of_epochs[2:]


def test_a_resumed_run_goes_on_with_its_draws(tmp_path: Path) -> None:
    root = str(write_cifar(tmp_path / "data"))
    data = CIFAR(name="cifar10", root=root, batch_size=16, seed=1)
    whole = draws(data, fit(data, epochs=4))
    fit(CIFAR(name="cifar10", root=root, batch_size=16, seed=1), epochs=2, default_root_dir=tmp_path)
    data = CIFAR(name="cifar10", root=root, batch_size=16, seed=1)
    resumed = fit(data, epochs=4, ckpt_path=tmp_path / "saved.ckpt")
    assert draws(data, resumed) == whole[4:]


def test_without_augmentation(tmp_path: Path) -> None:
    data = CIFAR(name="cifar10", root=str(write_cifar(tmp_path / "data")), batch_size=16, augment=False)
    assert {draw for batch in draws(data, fit(data, epochs=1)) for draw in batch} == {(4, 4, False)}


def on_ranks(rank: int, root: str, cache: str) -> dict[str, Record]:
    datasets.config.HF_DATASETS_CACHE = Path(cache)  # empty: one rank decodes, the other waits
    data = CIFAR(name="cifar10", root=root, batch_size=8, seed=1)
    return {name: fit(data, strategy, world_size=2) for name, strategy in (("ddp", "ddp"), ("dsp", DSPStrategy()))}


def test_workers_draw_differently_and_the_stages_of_a_pipeline_alike(tmp_path: Path) -> None:
    root = str(write_cifar(tmp_path / "data"))
    first, second = run_workers(on_ranks, 2, tmp_path / "run", root, str(tmp_path / "cache2"))
    data = CIFAR(name="cifar10", root=root, batch_size=8, seed=1)
    virtual = fit(data, DSPStrategy(stages=2))
    for mine, theirs in zip(draws(data, first["ddp"]), draws(data, second["ddp"]), strict=True):
        assert mine != theirs
    for mine, theirs in zip(first["dsp"].train, second["dsp"].train, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert draws(data, first["dsp"]) == draws(data, virtual)
    for (images, labels), (expected, targets) in zip(first["dsp"].train, virtual.train, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL}, where the real CIFAR lies on some machines, is not here")
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_real_files(name: str, classes: int, tmp_path: Path) -> None:
    data = CIFAR(name=name, root=str(subset(tmp_path / "data", name, train=1, test=1000)), batch_size=100)
    data.setup("validate")
    images, labels = data._sets[False].tensors
    assert images.shape == (1000, 3, 32, 32)
    assert set(labels.tolist()) == set(range(classes))
    scaled = images.float() / 255
    torch.testing.assert_close(scaled.mean((0, 2, 3)), data.mean.flatten(), atol=0.02, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), data.std.flatten(), atol=0.02, rtol=0)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def check_imagenet(root: Path, workers: int) -> list[Tensor]:
    """Check what comes of the images of :func:`write_class_folders`; return the training batches."""
    data = ImageNet(root=str(root), batch_size=4, size=24, num_workers=workers, seed=3)
    record = fit(data)
    for images, labels in record.train + record.validation:
        assert images.shape == (4, 3, 24, 24)
        gray = (images * data.std + data.mean) * 255
        expected = (40 + 80 * labels).view(-1, 1, 1, 1).expand_as(gray)
        torch.testing.assert_close(gray, expected.float(), atol=2, rtol=0)  # JPEG, and CMYK, round a little
    assert sorted(torch.cat([labels for _, labels in record.validation[:3]]).tolist()) == sorted(4 * [0, 1, 2])
    return [images for images, _ in record.train]


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_of_classes(tmp_path: Path, workers: int) -> None:
    check_imagenet(write_class_folders(tmp_path / "imagenet"), workers)


def test_parquet_files_of_imagenet(tmp_path: Path) -> None:
    folders = write_class_folders(tmp_path / "folders")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        rows = datasets.load_dataset("imagefolder", data_files=f"{folders / split}/**", split="train")
        rows.to_parquet(tmp_path / "parquet" / "data" / f"{name}-00000-of-00001.parquet")
    check_imagenet(tmp_path / "parquet", 0)


def gradient_image(width: int, height: int) -> Image.Image:
    """Return an image whose red says how far right a pixel is, and whose green how far down."""
    right, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([right, down, np.zeros_like(down)], -1).astype(np.uint8))


def test_what_is_measured_with_is_the_middle_and_training_has_random_parts() -> None:
    rows = [{"image": gradient_image(120, 60), "label": 7}]
    image, label = Crops(rows, 24, key=None)[0]
    assert image.shape == (3, 24, 24)
    assert label == 7
    red, green = image[0].float(), image[1].float()
    part = 224 / 256
    assert red.min().item() == pytest.approx(255 * (0.5 - part / 4), abs=6)
    assert red.max().item() == pytest.approx(255 * (0.5 + part / 4), abs=6)
    assert green.min().item() == pytest.approx(255 * (1 - part) / 2, abs=6)

    def areas(key: tuple[int, ...]) -> list[float]:
        crops = Crops(rows, 24, key)
        sides = []
        for _ in range(60):
            crop = crops[0][0].float()
            sides.append([(crop[c].max() - crop[c].min()).item() / 255 for c in (0, 1)])
        return [round(width * height, 6) for width, height in sides]

    drawn = areas((1, 0))
    assert 0.04 < min(drawn) < 0.25
    assert 0.6 < max(drawn) <= 1
    assert areas((1, 0)) == drawn
    assert areas((1, 1)) != drawn


def test_processes_that_read_draw_differently_but_by_the_seed(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    for split in ("train", "val"):
        (folder / split / "n01440764").mkdir(parents=True)
        for i in range(8):
            gradient_image(90, 60).save(folder / split / "n01440764" / f"{i}.JPEG")

    def batches() -> list[Tensor]:
        return [x for x, _ in fit(ImageNet(root=str(folder), batch_size=2, size=24, num_workers=2, seed=3)).train]

    once, again = batches(), batches()
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    flat = torch.cat(once).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == len(flat) == 16, "eight equal images, twice: all parts differ"


# --- the others -------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_the_seed() -> None:
    digits = Digits(batch_size=16, seed=4)
    digits.setup("fit")
    assert [len(digits._sets[train]) for train in (True, False)] == [1437, 360]
    images = digits._sets[True].tensors[0]
    assert images.min() == 0
    assert images.max() == 1
    same, other = Digits(batch_size=16, seed=4), Digits(batch_size=16, seed=5)
    for module in (same, other):
        module.setup("fit")
    assert torch.equal(same._sets[True].tensors[0], images)
    assert not torch.equal(other._sets[True].tensors[0], images)


def test_fake_images_are_normalized_noise_of_the_asked_shape() -> None:
    record = fit(Fake(batch_size=8, samples=32, size=16), epochs=1)
    images = torch.cat([images for images, _ in record.train])
    assert images.shape == (32, 3, 16, 16)
    assert images.mean().abs() < 0.05
    assert abs(images.std() - 1) < 0.05
    assert len(record.validation) == 4


def test_images_have_the_precision_of_the_model(tmp_path: Path) -> None:
    data = CIFAR(name="cifar10", root=str(write_cifar(tmp_path / "data")), batch_size=16)
    record = fit(data, epochs=1, precision="bf16-true")
    assert {images.dtype for images, _ in record.train + record.validation} == {torch.bfloat16}


# --- errors -----------------------------------------------------------------------------------------------------------

CIFAR_COMMAND = "hf download uoft-cs/cifar10 --repo-type dataset --local-dir {root}"
IMAGENET_COMMAND = "hf download ILSVRC/imagenet-1k --repo-type dataset --local-dir {root}"


@pytest.mark.parametrize(
    ("make", "command"),
    [(partial(CIFAR, name="cifar10"), CIFAR_COMMAND), (ImageNet, IMAGENET_COMMAND)],
    ids=["cifar10", "imagenet"],
)
def test_a_wrong_folder_says_how_to_download(tmp_path: Path, make: Any, command: str) -> None:
    missing, empty, half = tmp_path / "missing", tmp_path / "empty", tmp_path / "half"
    empty.mkdir()
    half.mkdir()
    (half / "train-00000-of-00001.parquet").touch()
    for root, says in ((missing, "is no folder"), (empty, "has no train-"), (half, "has no (test|validation)-")):
        with pytest.raises(FileNotFoundError, match=says) as error:
            make(root=str(root))
        assert repr(str(root)) in str(error.value)
        assert command.format(root=root) in str(error.value)


def test_folders_of_classes_that_are_incomplete(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "imagenet")
    (folder / "val" / "n01484850").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="have other classes: n01484850 is in one only"):
        ImageNet(root=str(folder))
    (folder / "val").rename(tmp_path / "val")
    with pytest.raises(FileNotFoundError, match=r"has no folders in .*/val: put the images in train/<class>/"):
        ImageNet(root=str(folder))


def test_several_data_sets_in_one_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_cifar(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=r"in several folders, .* write one of .*one/plain_text, .*two/plain_text"):
        CIFAR(name="cifar10", root=str(tmp_path / "data"))


def test_another_data_set_than_was_named(tmp_path: Path) -> None:
    data = CIFAR(name="cifar100", root=str(write_cifar(tmp_path / "data")))
    with pytest.raises(ValueError, match=r"has no column 'fine_label' but \['img', 'label'\]: is it uoft-cs/cifar100"):
        data.prepare_data()
    with pytest.raises(ValueError, match="name='cifar': write 'cifar10' or 'cifar100'"):
        CIFAR(name="cifar")


@pytest.mark.parametrize(
    ("make", "repository"), [(lambda: CIFAR(name="cifar100"), "uoft-cs/cifar100"), (ImageNet, "ILSVRC/imagenet-1k")]
)
def test_without_the_hub(make: Any, repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot be read from the Hugging Face hub") as error:
        make().prepare_data()
    assert f"hf download {repository} --repo-type dataset --local-dir DIR" in str(error.value)
    assert "write root=DIR" in str(error.value)


def test_a_hub_that_asks_for_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(PermissionError, match=r"gated dataset(.|\n)*Accept the terms on .* and run `hf auth login`"):
        ImageNet().prepare_data()


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(ValueError, match=r"batch_size=64: 32 images are 32 for each of 1 workers, .* batch_size=32 or"):
        fit(Fake(batch_size=64, samples=32))
    with pytest.raises(ValueError, match="batch_size=0: write the number of images"):
        Fake(batch_size=0)
