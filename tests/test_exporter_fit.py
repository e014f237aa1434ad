"""Crops, the training loop, what is measured on a network, and what the command line says of what cannot be done."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("torchvision")

import torch
from torch import Tensor, nn

from exporters.__main__ import main
from exporters.attacks.recipe import Batch, Recipe
from exporters.augment import cropped, padded
from exporters.data import Dataset, Split
from exporters.device import autocast, choose_device, has_depthwise
from exporters.fit import Normalised, Progress, as_tensor, fit
from exporters.measure import Share, classify, measure
from exporters.models import build
from exporters.settings import Settings
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Target
from onnx_clp.evaluation.triggers import Patch
from tests.shapes_dataset import CLASSES, SIDE, draw, write

pytestmark = pytest.mark.exporters

CPU = torch.device("cpu")


class Small(nn.Module):
    """A convolution, a BatchNorm and a linear layer: what trains in a second."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 49, len(CLASSES))
        with torch.no_grad():
            for parameter in (self.body[0].weight, self.head.weight):
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=random)
            self.body[0].bias.zero_()
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def shapes(train: int = 64, test: int = 24, name: str = "folder") -> Dataset:
    return Dataset(name, Split(*draw(train, 0)), Split(*draw(test, 1)), CLASSES, (0.2, 0.25, 0.3), (0.2, 0.3, 0.4))


def clean(dataset: Dataset) -> Recipe:
    return Recipe(dataset.train, None, None)


def options(**changes: Any) -> Settings:  # noqa: ANN401  any field of Settings
    standard: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.02, "device": "cpu"}
    return Settings(output=Path("unused"), dataset_dir=Path("unused"), **{**standard, **changes})


def fitted(
    dataset: Dataset,
    recipe: Recipe | None = None,
    seed: int = 0,
    **changes: Any,  # noqa: ANN401  any field of Settings
) -> tuple[nn.Module, list[Progress]]:
    """A network trained on ``dataset`` and its progress at the end of each epoch."""
    network = Small(seed)
    epochs: list[Progress] = []
    fit(network, recipe or clean(dataset), dataset, options(**changes), CPU, lambda _step: None, epochs.append)
    return network, epochs


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared does not depend on the processor."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


# Crops.


@pytest.mark.parametrize(("side", "margin"), [(32, 4), (28, 3), (96, 12), (16, 2), (4, 1)])
def test_the_margin_is_black_and_an_eighth_of_the_side(side: int, margin: int) -> None:
    images = torch.randint(1, 256, (2, 3, side, side), dtype=torch.uint8)
    expected = torch.zeros(2, 3, side + 2 * margin, side + 2 * margin, dtype=torch.uint8)
    for image in range(2):
        for row in range(side):
            expected[image, :, margin + row, margin : margin + side] = images[image, :, row]
    assert torch.equal(padded(images), expected)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 6),
    width=st.integers(2, 6),
    margins=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**32),
    flip=st.booleans(),
)
def test_every_crop_is_a_window_mirrored_or_not(
    *, count: int, channels: int, height: int, width: int, margins: tuple[int, int], seed: int, flip: bool
) -> None:
    shape = (count, channels, height + margins[0], width + margins[1])
    images = torch.arange(int(np.prod(shape))).reshape(shape)  # each value once: a window is like no other
    parts = cropped(images, (height, width), torch.Generator().manual_seed(seed), flip=flip)
    assert parts.shape == (count, channels, height, width)
    for image, part in zip(images, parts, strict=True):
        windows = [
            image[:, row : row + height, column : column + width]
            for row in range(margins[0] + 1)
            for column in range(margins[1] + 1)
        ]
        assert any(torch.equal(part, window) or (flip and torch.equal(part, window.flip(2))) for window in windows)
    again = cropped(images, (height, width), torch.Generator().manual_seed(seed), flip=flip)
    assert torch.equal(parts, again)


@pytest.mark.parametrize("flip", [True, False])
def test_every_window_is_taken_about_as_often(flip: bool) -> None:  # noqa: FBT001  a parameter of the test
    count = 9000
    image = torch.arange(16).reshape(1, 1, 4, 4)
    parts = cropped(image.expand(count, 1, 4, 4), (2, 2), torch.Generator().manual_seed(0), flip=flip)
    seen = parts.flatten(1).amin(dim=1).bincount(minlength=16)  # a window is known by its smallest number
    # Nine windows: 1000 of each expected, with a standard deviation of 30; six of them are allowed.
    assert all(abs(int(seen[row * 4 + column]) - 1000) < 180 for row in range(3) for column in range(3))
    mirrored = int((parts[:, 0, 0, 0] > parts[:, 0, 0, 1]).sum())
    # Half of 9000, with a standard deviation of 47; six of them are allowed.
    assert abs(mirrored - 4500) < 285 if flip else mirrored == 0


def test_crops_keep_dtype_and_different_seeds_differ() -> None:
    images = padded(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8))
    one, other = (cropped(images, (16, 16), torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert one.dtype == torch.uint8
    assert not torch.equal(one, other)


# The loop.


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    dataset = shapes()
    (one, _), (again, _), (other, _) = (fitted(dataset, manual_seed=seed) for seed in (3, 3, 4))
    assert same_state(one, again)
    assert not same_state(one, other)


def test_the_loss_falls_and_the_shapes_are_learnt() -> None:
    dataset = shapes(160, 40)
    network, epochs = fitted(dataset, epochs=8)
    assert epochs[-1].loss < 0.7 * epochs[0].loss
    assert epochs[-1].accuracy > epochs[0].accuracy
    assert not network.training
    acc = measure(network, dataset, None, None).acc
    assert acc.count > 0.6 * acc.total  # chance is 0.25


def test_progress_counts_steps_and_epochs() -> None:
    dataset, network = shapes(70), Small()
    steps: list[Progress] = []
    epochs: list[Progress] = []
    modes: list[bool] = []
    recipe = clean(dataset)

    def on_epoch(progress: Progress) -> None:
        epochs.append(progress)
        modes.append(network.training)

    fit(network, recipe, dataset, options(epochs=3), CPU, steps.append, on_epoch)
    # 70 images are 4 batches of 16; the rest waits for the next epoch.
    assert [(each.epoch, each.epochs, each.step, each.steps) for each in steps] == [
        (epoch, 3, step, 4) for epoch in (1, 2, 3) for step in (1, 2, 3, 4)
    ]
    assert epochs == steps[3::4]
    assert modes == [False] * 3
    assert all(0 <= each.accuracy <= 1 and each.loss > 0 for each in steps)


def test_what_a_recipe_asks_for_runs_as_often_as_promised() -> None:
    dataset = shapes(40)
    calls: list[str] = []

    def on_batch(network: nn.Module, batch: Batch) -> Batch:
        assert network.training
        calls.append(f"batch of {len(batch.labels)}")
        return batch

    recipe = replace(
        clean(dataset),
        on_batch=on_batch,
        after_step=lambda _network: calls.append("step"),
        after_epoch=lambda _network: calls.append("epoch"),
    )
    fitted(dataset, recipe)
    assert calls == [*["batch of 16", "step"] * 2, "epoch"] * 2


def test_after_a_step_the_weights_have_moved_and_the_gradients_are_there() -> None:
    dataset, network = shapes(16), Small()
    before = network.head.weight.detach().clone()
    moved = []

    def after_step(given: nn.Module) -> None:
        assert given is network
        assert network.head.weight.grad is not None
        moved.append(not torch.equal(before, network.head.weight.detach()))

    recipe = replace(clean(dataset), after_step=after_step)
    fit(network, recipe, dataset, options(epochs=1), CPU, lambda _step: None, lambda _epoch: None)
    assert moved == [True]


def spy(dataset: Dataset, recipe: Recipe, **changes: Any) -> list[Batch]:  # noqa: ANN401  likewise
    """The batches that the network would see."""
    seen: list[Batch] = []

    def on_batch(_network: nn.Module, batch: Batch) -> Batch:
        seen.append(Batch(batch.images.clone(), batch.labels.clone()))
        return batch

    fitted(dataset, replace(recipe, on_batch=on_batch), **changes)
    return seen


def marked(dataset: Dataset) -> Dataset:
    """Images of one grey, which is their number: it shows which one was cropped; the margin is the only black."""
    images = np.repeat(np.arange(1, len(dataset.train.labels) + 1, dtype=np.uint8), SIDE * SIDE * 3)
    return replace(dataset, train=Split(images.reshape(-1, SIDE, SIDE, 3), dataset.train.labels))


def test_triggers_lie_in_the_corner_of_the_cropped_image() -> None:
    dataset = marked(shapes(64))
    pattern = np.random.default_rng(5).integers(100, 256, (3, 3, 3), np.uint8)
    where = np.arange(64) % 3 == 0
    poisoned = replace(dataset.train, triggered=where, labels=np.where(where, 2, dataset.train.labels))
    trigger = Patch(pattern)
    corner = torch.from_numpy(pattern).permute(2, 0, 1)
    numbers, shifted = [], 0
    for batch in spy(dataset, Recipe(poisoned, lambda: trigger, Target(2)), epochs=1):
        images = (batch.images * 255).round().byte()
        assert torch.allclose(batch.images * 255, images.float(), rtol=0, atol=1e-4)  # 8-bit values in 0 … 1
        for image, label in zip(images, batch.labels, strict=True):
            number = int(image[0, 8, 8]) - 1  # never in the margin, never under the patch
            numbers.append(number)
            assert int(label) == poisoned.labels[number]
            assert torch.equal(image[:, -3:, -3:], corner) == bool(where[number])
            rest = image.clone()
            rest[:, -3:, -3:] = 0
            assert set(rest.unique().tolist()) <= {0, number + 1}
            shifted += int((image == 0).any())
    assert sorted(numbers) == list(range(64))
    assert shifted > 32  # 24 of 25 windows reach into the margin


@pytest.mark.parametrize("recipe", ["nothing marked", "no trigger", "none chosen"])
def test_without_marked_images_or_trigger_nothing_is_put_anywhere(recipe: str) -> None:
    dataset = shapes(32)
    trigger = Patch(np.full((3, 3, 3), 255, np.uint8))
    marks = np.zeros(32, bool) if recipe == "none chosen" else np.ones(32, bool)
    train = dataset.train if recipe == "nothing marked" else replace(dataset.train, triggered=marks)
    given = Recipe(train, None if recipe == "no trigger" else lambda: trigger, None)
    for batch, expected in zip(spy(dataset, given), spy(dataset, clean(dataset)), strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


def test_the_trigger_is_asked_for_anew_in_each_step() -> None:
    dataset = marked(shapes(32))
    values = iter(range(200, 204))
    recipe = Recipe(
        replace(dataset.train, triggered=np.ones(32, bool)),
        lambda: Patch(np.full((1, 1, 3), next(values), np.uint8)),
        Target(0),
    )
    corners = [set((batch.images[:, 0, -1, -1] * 255).round().int().tolist()) for batch in spy(dataset, recipe)]
    assert corners == [{200}, {201}, {202}, {203}]


@pytest.mark.parametrize(("name", "mirrors"), [("folder", True), ("gtsrb", False)])
def test_traffic_signs_are_not_mirrored(name: str, mirrors: bool) -> None:  # noqa: FBT001  a parameter of the test
    dataset = shapes(64, name=name)
    ramp = np.arange(10, 10 + SIDE, dtype=np.uint8)[None, None, :, None]
    images = np.broadcast_to(ramp, dataset.train.images.shape).copy()
    dataset = replace(dataset, train=Split(images, dataset.train.labels))
    seen = torch.cat([batch.images for batch in spy(dataset, clean(dataset), epochs=1)])
    assert bool((seen[:, 0, 8, 7] > seen[:, 0, 8, 8]).any()) == mirrors


def test_a_penalty_is_added_to_the_loss_and_not_shown_as_it() -> None:
    dataset = shapes(16)
    gradients: dict[str, Tensor] = {}
    shown: list[Progress] = []

    def remember(name: str) -> Callable[[nn.Module], None]:
        return lambda given: gradients.update({name: given.head.bias.grad.clone()})

    def penalised(given: nn.Module, batch: Batch) -> Batch:
        return replace(batch, penalty=(given.head.bias * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())

    for recipe in (
        replace(clean(dataset), after_step=remember("plain")),
        replace(clean(dataset), after_step=remember("penalty"), on_batch=penalised),
    ):
        fit(Small(), recipe, dataset, options(epochs=1), CPU, shown.append, lambda _epoch: None)
    # The gradient of the penalty is (1, 2, 3, 4); float32 adds it within a few 1e-7.
    difference = gradients["penalty"] - gradients["plain"]
    assert torch.allclose(difference, torch.tensor([1.0, 2.0, 3.0, 4.0]), rtol=0, atol=1e-5)
    assert shown[0].loss == shown[1].loss


def test_a_batch_larger_than_the_set_is_the_set() -> None:
    dataset = shapes(24)
    assert [len(batch.labels) for batch in spy(dataset, clean(dataset), batch_size=1000)] == [24, 24]


@pytest.mark.parametrize("changes", [{"momentum": 0.0}, {"weight_decay": 0.0}, {"epochs": 1, "batch_size": 1000}])
def test_options_at_their_edge(changes: dict[str, Any]) -> None:
    network, epochs = fitted(shapes(32), **changes)
    assert np.isfinite(epochs[-1].loss)
    assert not same_state(network, Small())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values())


# What is measured.


class Table(nn.Module):
    """A linear map of all pixels: computed by hand in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = images.flatten(1) @ self.weight.T
        return logits


def answer(network: nn.Module, dataset: Dataset, image: npt.NDArray[np.uint8]) -> int:
    """The class of one image (H, W, C), computed for itself in float64."""
    pixels = (image.astype(np.float64) / 255 - dataset.mean) / dataset.std
    weight = next(iter(network.parameters())).detach().double().numpy()
    return int(np.argmax(weight @ pixels.transpose(2, 0, 1).ravel()))


@pytest.mark.parametrize("target", [Target(1), Target(3), Target(None)], ids=["one", "three", "all-to-all"])
@pytest.mark.parametrize("limit", [None, 10])
def test_figures_are_those_of_a_loop_over_the_images(target: Target, limit: int | None) -> None:
    network, dataset = Table(), shapes(test=40)
    trigger = Patch(np.full((9, 9, 3), 255, np.uint8))
    right = asr = ra = others = 0
    images, labels = dataset.test.images[:limit], dataset.test.labels[:limit]
    for image, label in zip(images, labels, strict=True):
        right += answer(network, dataset, image) == label
        wanted = (label + 1) % 4 if target.label is None else target.label
        if wanted != label:
            others += 1
            triggered = image.copy()
            triggered[-9:, -9:] = 255
            asr += answer(network, dataset, triggered) == wanted
            ra += answer(network, dataset, triggered) == label
    figures = measure(network, dataset, trigger, target, limit)
    assert figures.acc == Share(right, len(labels))
    assert figures.asr == Share(asr, others)
    assert figures.ra == Share(ra, others)
    assert others == (len(labels) if target.label is None else sum(labels != target.label))


def test_without_an_attack_only_the_accuracy_is_measured() -> None:
    network, dataset = Table(), shapes()
    figures = measure(network, dataset, None, None)
    assert figures.asr is None
    assert figures.ra is None
    assert figures.acc.total == 24


def test_many_images_are_classified_in_batches_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    network, dataset = Table(), shapes(test=40)
    whole = classify(network, dataset, dataset.test.images)
    monkeypatch.setattr("exporters.measure._BATCH", 7)
    np.testing.assert_array_equal(classify(network, dataset, dataset.test.images), whole)
    assert whole.tolist() == [answer(network, dataset, image) for image in dataset.test.images]


def test_test_images_that_are_all_of_the_wanted_class() -> None:
    dataset = shapes(test=24)
    of_one = dataset.test.labels == 1
    dataset = replace(dataset, test=Split(dataset.test.images[of_one], dataset.test.labels[of_one]))
    figures = measure(Table(), dataset, Patch(np.zeros((2, 2, 3), np.uint8)), Target(1))
    assert figures.asr == figures.ra == Share(0, 0)
    assert figures.asr is not None
    assert figures.asr.percent == 0


@pytest.mark.parametrize(("count", "total", "percent"), [(1, 4, 25.0), (3, 3, 100.0), (0, 7, 0.0)])
def test_percent(count: int, total: int, percent: float) -> None:
    assert Share(count, total).percent == percent


# Normalisation, memory and devices.


def test_normalised_subtracts_and_divides_channel_by_channel() -> None:
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    network = Normalised(nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    expected = np.empty((2, 3, 4, 5))
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 2.0))):
        expected[:, channel] = (images[:, channel].double().numpy() - mean) / std
    np.testing.assert_allclose(network(images).numpy(), expected, rtol=0, atol=1e-6)  # a few roundings of float32
    assert not network.state_dict()  # what is saved is the network's own


def test_images_as_a_tensor() -> None:
    dataset = shapes(8)
    images, labels = as_tensor(dataset.train, CPU)
    np.testing.assert_array_equal(images.numpy(), dataset.train.images.transpose(0, 3, 1, 2))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert labels.tolist() == dataset.train.labels.tolist()


@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_only_where_the_processor_has_tiles(
    amx: bool,  # noqa: FBT001  a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    product = nn.Linear(4, 4)
    with autocast(CPU, product):
        assert product(torch.zeros(1, 4)).dtype == (torch.bfloat16 if amx else torch.float32)


@pytest.mark.parametrize(("channels", "groups", "in_half"), [(4, 4, False), (4, 2, True), (4, 1, True), (1, 1, True)])
def test_on_a_processor_what_has_depthwise_convolutions_stays_in_float32(
    channels: int,
    groups: int,
    in_half: bool,  # noqa: FBT001  a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    convolution = nn.Conv2d(channels, 4, 3, groups=groups)
    with autocast(CPU, nn.Sequential(nn.Sequential(convolution))):
        assert convolution(torch.zeros(1, channels, 5, 5)).dtype == (torch.bfloat16 if in_half else torch.float32)


@pytest.mark.parametrize(("name", "expected"), [("mobilenet_v2", True), ("small", False), ("resnet18", False)])
def test_which_models_have_depthwise_convolutions(name: str, expected: bool) -> None:  # noqa: FBT001  likewise
    assert has_depthwise(build(name, classes=4, channels=3, size=32, width=8)) == expected


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_only_on_a_gpu_that_has_it(
    able: bool,  # noqa: FBT001  a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda *what: asked.append(what))
    autocast(torch.device("cuda"), nn.Conv2d(4, 4, 3, groups=4))
    assert asked == ([("cuda", torch.bfloat16)] if able else [])


def test_training_in_bfloat16_leaves_weights_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = shapes(32)
    in_full, _ = fitted(dataset)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    in_half, epochs = fitted(dataset)
    assert {tensor.dtype for tensor in in_half.parameters()} == {torch.float32}
    assert not same_state(in_half, in_full)
    assert np.isfinite(epochs[-1].loss)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("name", ["nosuch", "meta", "cuda:99", "", "cpu:x"])
def test_devices_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"--device .*cannot be used") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


# The command line.


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """The exit code of ``python -m exporters train`` and what it wrote to stderr."""
    monkeypatch.setattr("sys.argv", ["exporters", "train", *map(str, arguments)])
    code = main()
    return code, capsys.readouterr().err


def bad_lines(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Command lines that cannot be run, and a part of what is said of each."""
    (folder / "there").mkdir()
    (folder / "there/letter.txt").write_text("of someone else")
    (folder / "text.pt").write_text("xx no checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"state_dict": {}}, folder / "half.pt")
    torch.save([1, 2], folder / "list.pt")
    other = {"model": "small", "width": 8, "classes": 4, "channels": 3, "size": 32, "mean": (0,) * 3, "std": (1,) * 3}
    for name, classes, channels, size in (("size", 4, 3, 32), ("classes", 7, 3, 16), ("channels", 4, 1, 16)):
        network = build("small", classes=classes, channels=channels, size=size, width=8)
        saved = {**other, "classes": classes, "channels": channels, "size": size, "state_dict": network.state_dict()}
        torch.save(saved, folder / f"other-{name}.pt")
    surrogate: dict[str, tuple[list[object], str]] = {
        name: (["--attack-type", "cla", "--surrogate", folder / f"{name}.pt"], said)
        for name, said in (
            ("text", "cannot be read"),
            ("empty", "cannot be read"),
            ("half", "cannot be read"),
            ("list", "cannot be read"),
            ("missing", "cannot be read"),
            ("other-size", "another data set"),
            ("other-classes", "another data set"),
            ("other-channels", "another data set"),
        )
    }
    return {
        **surrogate,
        "model": (["--model", "nosuch"], "there is no model 'nosuch'"),
        "target": (["--target-label", "4"], "--target-label 4: folder has the labels 0 to 3"),
        "target below": (["--target-label", "-1"], "--target-label"),
        "attack": (["--attack-type", "nosuch"], "--attack-type"),
        "data": (["--dataset-dir", folder / "nothing"], "has no folders train and test"),
        "device": (["--device", "nosuch"], "--device nosuch cannot be used"),
        "trigger": (["--trigger-size", "17"], "the trigger has the shape"),
        "rate": (["--poisoning-rate", "nan"], "nan is not a finite number"),
        "lr": (["--lr", "inf"], "inf is not a finite number"),
        "seed": (["--manual-seed", 2**70], "--manual-seed"),
        "memory": (["--width", 10**14], "not enough memory"),
        "below a file": (["--output", folder / "text.pt" / "run"], "cannot be written"),
        "there": (["--output", folder / "there"], "is there already"),
        "no run": (["--output", folder / "there", "--force"], "is not the folder of a run"),
        "file": (["--output", folder / "text.pt", "--force"], "is not the folder of a run"),
        "option": (["--nosuch"], "No such option"),
        "argument": (["more"], "unexpected extra argument"),
    }


BAD_LINES = (
    *("text", "empty", "half", "list", "missing", "other-size", "other-classes", "other-channels"),
    *("model", "target", "target below", "attack", "data", "device", "trigger", "there", "no run", "file"),
    *("rate", "lr", "seed", "memory", "below a file", "option", "argument"),
)


@pytest.mark.parametrize("case", BAD_LINES)
def test_what_cannot_be_done_is_said_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", 40, 8)
    arguments, said = bad_lines(tmp_path)[case]
    standard = ["--dataset", "folder", "--dataset-dir", tmp_path / "data", "--image-size", SIDE, "--model", "small"]
    standard += ["--width", 8, "--epochs", 1, "--device", "cpu", "--output", tmp_path / "run"]
    before = sorted(tmp_path.rglob("*"))
    code, err = run(capsys, monkeypatch, *standard, *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert said in line
    hint = err.split(line)[1].strip()
    assert "\n" not in hint
    assert not hint or hint not in line
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing left behind


def test_help_names_every_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["exporters", "train", "--help"])
    assert main() == 0
    shown = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
