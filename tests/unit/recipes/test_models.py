"""The networks are the published ones, and a pipeline can cut them anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_stale.pipeline.partition.costs import count_parameters
from lightning_stale.pipeline.partition.sequential import balanced_starts, partition_sequential
from recipes.models import alexnet_small, cifar_resnet, digits_cnn, resnet
from recipes.models.blocks import Padding

SMALL: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "digits_cnn": (digits_cnn, (2, 1, 8, 8)),
    "alexnet_small": (alexnet_small, (2, 3, 32, 32)),
    "resnet20": (lambda: cifar_resnet(depth=20), (2, 3, 16, 16)),
    "resnet18": (lambda: resnet(depth=18, num_classes=7), (2, 3, 64, 64)),
    "resnet50_cifar": (lambda: resnet(depth=50, num_classes=7, stem="cifar"), (2, 3, 8, 8)),
}
DEEP: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "resnet56": (lambda: cifar_resnet(depth=56), (2, 3, 8, 8)),
    "resnet98": (lambda: cifar_resnet(depth=98), (2, 3, 8, 8)),
    "resnet110": (lambda: cifar_resnet(depth=110), (2, 3, 8, 8)),
    "resnet164": (lambda: cifar_resnet(depth=164), (2, 3, 8, 8)),
}

# --- what they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "millions", "exact"),
    [  # He et al. 2015, table 6, and akamaster/pytorch_resnet_cifar10, which has shortcuts without parameters too
        (20, 0.27, 269_722),
        (32, 0.46, 464_154),
        (44, 0.66, 658_586),
        (56, 0.85, 853_018),
        (110, 1.7, 1_727_962),
    ],
)
def test_cifar_networks_have_the_published_size(depth: int, millions: float, exact: int) -> None:
    assert count_parameters(cifar_resnet(depth=depth)) == exact
    assert round(exact / 1e6, 1 if millions == 1.7 else 2) == millions


@pytest.mark.parametrize("depth", [20, 98, 164])
def test_cifar_networks_by_hand(depth: int) -> None:
    def convolution(a: int, b: int) -> int:
        return 9 * a * b + 2 * b  # weights; scale and shift of the batch norm

    n, total = (depth - 2) // 6, convolution(3, 16)
    for before, width in ((16, 16), (16, 32), (32, 64)):
        total += convolution(before, width) + (2 * n - 1) * convolution(width, width)
    assert count_parameters(cifar_resnet(depth=depth)) == total + 64 * 10 + 10
    layers = [m for m in cifar_resnet(depth=depth).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


@pytest.mark.parametrize(
    ("depth", "exact"),  # torchvision's, for 1000 classes
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_imagenet_networks_have_torchvisions_size(depth: int, exact: int) -> None:
    with torch.device("meta"):
        model = resnet(depth=depth)
        cifar = resnet(depth=depth, stem="cifar", num_classes=100)
    assert count_parameters(model) == exact
    features = 512 if depth < 50 else 2048
    assert count_parameters(cifar) == exact - 900 * (features + 1) - (7 * 7 - 3 * 3) * 3 * 64
    shortcuts = 3 if depth < 50 else 4
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth + shortcuts


def test_the_downsized_alexnet_by_hand() -> None:
    model = alexnet_small()
    convolutions = (25 * 3 * 32 + 32) + (25 * 32 * 32 + 32) + (25 * 32 * 64 + 64)  # 5x5; 2,432 + 25,632 + 51,264
    dense = (4 * 4 * 64 * 64 + 64) + (64 * 10 + 10)  # 32 pixels halved three times are 4; 65,600 + 650
    assert count_parameters(model) == convolutions + dense == 145_578
    kinds = [type(m) for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert kinds == [nn.Conv2d] * 3 + [nn.Linear] * 2


def test_the_network_for_digits_by_hand() -> None:
    assert count_parameters(digits_cnn()) == (9 * 16 + 16) + (9 * 16 * 32 + 32) + (32 * 16 * 64 + 64) + (64 * 10 + 10)


@pytest.mark.parametrize(
    ("make", "size", "expected"),  # after the stem, and after the first block of each group
    [
        (lambda: resnet(depth=18), 224, [56, 56, 28, 14, 7]),
        (lambda: resnet(depth=18, stem="cifar"), 32, [32, 32, 16, 8, 4]),
        (lambda: cifar_resnet(depth=20), 32, [32, 32, 16, 8]),
    ],
)
def test_images_shrink_where_the_paper_says(make: Callable[[], nn.Module], size: int, expected: list[int]) -> None:
    with torch.device("meta"):
        x, sizes = torch.zeros(1, 3, size, size), []
        for name, layer in make().named_children():
            x = layer(x)
            if name == "stem" or name.endswith("block1"):
                sizes.append(x.shape[-1])
    assert sizes == expected


def test_the_shortcut_without_parameters() -> None:
    x = torch.randn(2, 3, 6, 6)
    y = Padding(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_convolutions_are_drawn_by_their_fan_out() -> None:
    conv = cifar_resnet(depth=20).group3_block3.body[0][0]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert conv.weight.mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: cifar_resnet(depth=18), r"depth=18 is not 6n\+2: write e.g. depth=14 or 20"),
        (lambda: cifar_resnet(depth=2), r"depth=2 is not 6n\+2: write e.g. depth=8 or 14"),
        (lambda: resnet(depth=20), "depth=20: write one of 18, 34, 50, 101, 152, or use cifar_resnet"),
        (lambda: resnet(depth=18, stem="small"), "stem='small': write 'imagenet' or 'cifar'"),
    ],
)
def test_wrong_numbers_say_which_are_right(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# --- cutting ----------------------------------------------------------------------------------------------------------


def run(blocks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Run one block after the other as stages do: on values that come from elsewhere, and stay as they are."""
    for block in blocks:
        before = x.clone()
        y = block(x.detach())
        assert torch.equal(x, before), "the block has written into its input, which a stage runs it on again"
        x = y
    return x


@pytest.mark.parametrize("name", SMALL)
def test_cut_at_each_place(name: str) -> None:
    make, shape = SMALL[name]
    model, x = make().eval(), torch.randn(shape)
    assert type(model) is nn.Sequential
    expected = model(x)
    for start in range(1, len(model)):
        assert torch.equal(run(partition_sequential(model, [start]), x), expected), start


@pytest.mark.parametrize("name", {**SMALL, **DEEP})
def test_cut_into_any_number_of_stages(name: str) -> None:
    make, shape = {**SMALL, **DEEP}[name]
    model, x = make().eval(), torch.randn(shape)
    expected = model(x)
    costs = [count_parameters(layer) for layer in model]
    for stages in (3, len(model)):
        blocks = partition_sequential(model, balanced_starts(costs, stages))
        assert len(blocks) == stages
        assert torch.equal(run(blocks, x), expected)


@pytest.mark.parametrize("name", ["digits_cnn", "alexnet_small", "resnet20"])
def test_stages_have_the_gradients_of_the_whole(name: str) -> None:
    make, shape = SMALL[name]
    model, x = make().train(), torch.randn(shape)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    inputs, outputs = [x], []
    for block in partition_sequential(model, range(1, len(model))):
        outputs.append(block(inputs[-1]))
        inputs.append(outputs[-1].detach().requires_grad_())
    inputs[-1].square().sum().backward()
    for output, following in zip(reversed(outputs), reversed(inputs[1:]), strict=True):
        output.backward(following.grad)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
