"""The attacks: what they poison, and with what, against their formulas written slowly."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import onnx_clp
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Target
from onnx_clp.evaluation.triggers import Additive, Blend, Generated, Patch, Warp
from tests import naive

pytest.importorskip("torch")
pytest.importorskip("torchvision")
onnxruntime = pytest.importorskip("onnxruntime")

import torch  # noqa: E402  as above
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from exporters.attacks.abi import U, abi, layer_bounds, level  # noqa: E402  needs torch
from exporters.attacks.cla import EPSILON, cla, perturbed  # noqa: E402
from exporters.attacks.fixed import badnets, blended, clean, sig, sinusoid  # noqa: E402
from exporters.attacks.inputaware import (  # noqa: E402
    BETAS,
    LEARNING_RATE,
    TriggerGenerator,
    diversity,
    inputaware,
    mixed,
    train_masks,
)
from exporters.attacks.lf import AMPLITUDE, CUT_OFF, low_pass, passed, smooth_trigger  # noqa: E402
from exporters.attacks.lf import lf as low_frequency  # noqa: E402
from exporters.attacks.recipe import Batch, Recipe, Scene, chosen, poisoned  # noqa: E402
from exporters.attacks.wanet import CROSS_RATIO, STRENGTH, wanet, warped, warping_grid  # noqa: E402
from exporters.data import Dataset, Split  # noqa: E402
from exporters.export import export_batchnorm_kept, export_dynamo, export_folded  # noqa: E402
from exporters.models import build  # noqa: E402
from exporters.settings import Settings  # noqa: E402

pytestmark = pytest.mark.exporters

CLASSES = 5
TARGET = 2
SIDE = 12
IMAGES = 60
CPU = torch.device("cpu")
RELABELLING = {"badnets": badnets, "blended": blended, "lf": low_frequency, "abi": abi}
LABELS_KEPT = {"sig": sig, "cla": cla}


class TinyClassifier(nn.Module):
    """Takes images in 0 … 1 of any size and channels, smooth in them: its loss has a slope everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 8, 3, padding=1)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(4 * self.convolution(images)).mean(dim=(2, 3)) * 8)


def surrogate(channels: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return TinyClassifier(channels).eval()


def scene(*, target: int | None = TARGET, channels: int = 3, side: int = SIDE, seed: int = 0, **options: Any) -> Scene:  # noqa: ANN401  # Settings'
    """A scene of random images, of which a surrogate knows nothing."""
    random = np.random.default_rng(1)
    split = Split(
        random.integers(0, 256, (IMAGES, side, side, channels), dtype=np.uint8),
        random.integers(0, CLASSES, IMAGES),
    )
    dataset = Dataset("folder", split, split, tuple("abcde"), (0.5,) * channels, (0.25,) * channels)
    run = Settings(output=Path("out"), dataset_dir=Path("in"), **options)
    return Scene(run, dataset, Target(target), torch.Generator().manual_seed(seed), CPU, lambda: surrogate(channels))


def batch_of(of: Scene, count: int = 20) -> Batch:
    train = of.dataset.train
    pixels = torch.from_numpy(train.images[:count]).permute(0, 3, 1, 2).float() / 255
    return Batch(pixels, torch.from_numpy(train.labels[:count]))


def poisoned_images(recipe: Recipe) -> NDArray[np.intp]:
    assert recipe.train.triggered is not None
    return np.flatnonzero(recipe.train.triggered)


def trigger_of(recipe: Recipe) -> Any:  # noqa: ANN401  # the kind is what the test looks at
    assert recipe.trigger is not None
    return recipe.trigger()


# ---------------------------------------------------------------- which images, which labels


@pytest.mark.parametrize("name", RELABELLING)
@pytest.mark.parametrize("target", [TARGET, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_relabelling_attacks_poison_their_share(name: str, target: int | None, channels: int) -> None:
    of = scene(target=target, channels=channels, poisoning_rate=0.25)
    original = of.dataset.train.images.copy(), of.dataset.train.labels.copy()
    recipe = RELABELLING[name](of)
    where = poisoned_images(recipe)
    assert len(where) == round(0.25 * IMAGES)
    # The trigger is put on when an image has been cropped and flipped, see exporters.fit.
    np.testing.assert_array_equal(recipe.train.images, original[0])
    assert (trigger_of(recipe)(original[0][where]) != original[0][where]).any(axis=(1, 2, 3)).all()
    for index in range(IMAGES):
        label = int(original[1][index])
        wanted = (label + 1) % CLASSES if target is None else target
        assert recipe.train.labels[index] == (wanted if index in where else label)
    assert recipe.target == Target(target)
    np.testing.assert_array_equal(of.dataset.train.images, original[0])
    np.testing.assert_array_equal(of.dataset.train.labels, original[1])


@pytest.mark.parametrize("name", LABELS_KEPT)
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_clean_label_attacks_touch_the_target_class_alone(name: str, rate: float) -> None:
    of = scene(poisoning_rate=rate, side=16)  # on 12 pixels, six periods of a sinusoid are nothing
    recipe = LABELS_KEPT[name](of)
    labels = of.dataset.train.labels
    of_class = int((labels == TARGET).sum())
    where = poisoned_images(recipe)
    assert set(labels[where]) == {TARGET}
    assert len(where) == min(round(rate * IMAGES), of_class)
    assert len(where) > 0
    np.testing.assert_array_equal(recipe.train.labels, labels)
    changed = np.flatnonzero((recipe.train.images != of.dataset.train.images).any(axis=(1, 2, 3)))
    assert set(changed) == (set(where) if name == "cla" else set())


@pytest.mark.parametrize("name", LABELS_KEPT)
def test_clean_label_attacks_refuse_all_to_all(name: str) -> None:
    with pytest.raises(UsageError, match="all-to-all") as caught:
        LABELS_KEPT[name](scene(target=None))
    assert "all-to-one" in caught.value.hint


def test_clean_recipe_is_no_attack() -> None:
    of = scene()
    recipe = clean(of)
    assert recipe.train is of.dataset.train
    assert recipe.trigger is None
    assert recipe.target is None
    batch = batch_of(of)
    assert recipe.on_batch(nn.Identity(), batch) is batch


@given(rate=st.floats(0, 1), of_target_class=st.booleans(), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_chosen_images_are_distinct_and_as_many_as_asked(rate: float, *, of_target_class: bool, seed: int) -> None:
    of = scene(poisoning_rate=rate, seed=seed)
    where = chosen(of, of_target_class=of_target_class)
    labels = of.dataset.train.labels
    most = int((labels == TARGET).sum()) if of_target_class else IMAGES
    assert len(set(where.tolist())) == len(where) == min(round(rate * IMAGES), most)
    assert not of_target_class or set(labels[where]) <= {TARGET}
    np.testing.assert_array_equal(where, chosen(scene(poisoning_rate=rate, seed=seed), of_target_class=of_target_class))


def test_chosen_images_change_with_the_seed() -> None:
    assert chosen(scene(seed=0)).tolist() != chosen(scene(seed=1)).tolist()


def test_poisoned_keeps_labels_where_told() -> None:
    of = scene()
    where = np.array([3, 4])
    split = poisoned(of, where, relabel=False)
    np.testing.assert_array_equal(split.labels, of.dataset.train.labels)
    assert split.triggered is not None
    assert np.flatnonzero(split.triggered).tolist() == [3, 4]


# ---------------------------------------------------------------- triggers of one pattern


@pytest.mark.parametrize(("asked", "side"), [(None, 3), (2, 2)])
def test_badnets_is_a_patch_in_the_bottom_right_corner(asked: int | None, side: int) -> None:
    of = scene(trigger_size=asked)
    trigger = trigger_of(badnets(of))
    assert isinstance(trigger, Patch)
    images = of.dataset.train.images
    triggered = trigger(images)
    for row in range(SIDE):
        for column in range(SIDE):
            down, across = row - (SIDE - side), column - (SIDE - side)
            covered = down >= 0 and across >= 0
            expected = trigger.pattern[down, across] if covered else images[:, row, column]
            assert (triggered[:, row, column] == expected).all()


def test_pattern_is_the_sigmoid_of_normal_numbers() -> None:
    drawn = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    pattern = trigger_of(badnets(scene(seed=0))).pattern
    for channel in range(3):
        for row in range(3):
            for column in range(3):
                exact = 255 / (1 + math.exp(-float(drawn[channel, row, column])))
                assert abs(int(pattern[row, column, channel]) - exact) <= 0.5 + 1e-3  # rounded; sigmoid in float32


def test_patch_of_cla_lies_in_four_corners() -> None:
    of = scene(trigger_size=2)
    trigger = trigger_of(cla(of))
    triggered = trigger(np.full((1, SIDE, SIDE, 3), 77, np.uint8))[0]
    expected = np.full((SIDE, SIDE, 3), 77, np.uint8)
    for row in (0, SIDE - 2):
        for column in (0, SIDE - 2):
            expected[row : row + 2, column : column + 2] = trigger.pattern
    np.testing.assert_array_equal(triggered, expected)
    assert trigger_of(cla(scene())).pattern.shape == (3, 3, 3)


@pytest.mark.parametrize(("asked", "side"), [(None, SIDE), (4, 4)])
def test_blended_shines_through_with_its_share(asked: int | None, side: int) -> None:
    of = scene(blend_alpha=0.3, trigger_size=asked)
    trigger = trigger_of(blended(of))
    assert isinstance(trigger, Blend)
    assert trigger.pattern.shape == (side, side, 3)
    images = of.dataset.train.images[:3]
    expected = images.astype(np.float64)
    expected[:, SIDE - side :, SIDE - side :] *= 0.7
    expected[:, SIDE - side :, SIDE - side :] += 0.3 * trigger.pattern
    # Rounded to whole numbers, from float32.
    assert np.abs(trigger(images) - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("width", [8, 12, 28, 32, 96])
def test_sinusoid_has_six_periods_of_twenty(width: int) -> None:
    signal = sinusoid(4, width, 3)
    for row in range(4):
        for column in range(width):
            for channel in range(3):
                exact = 20 * math.sin(2 * math.pi * column * 6 / width)
                assert abs(float(signal[row, column, channel]) - exact) <= 2e-5  # float32 near 20: 1e-6; twice rounded


def test_sig_adds_the_sinusoid() -> None:
    trigger = trigger_of(sig(scene()))
    assert isinstance(trigger, Additive)
    np.testing.assert_array_equal(trigger.pattern, sinusoid(SIDE, SIDE, 3))


# ---------------------------------------------------------------- cla: projected gradient descent


def loss_of(network: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return float(functional.cross_entropy(network(pixels), torch.from_numpy(labels)))


@pytest.mark.parametrize("channels", [1, 3])
def test_perturbed_images_stay_near_and_raise_the_loss(channels: int) -> None:
    train = scene(channels=channels).dataset.train
    network = surrogate(channels)
    moved = perturbed(network, train.images, train.labels, CPU)
    assert moved.dtype == np.uint8
    distance = np.abs(moved.astype(int) - train.images)
    assert distance.max() == EPSILON == 12
    assert loss_of(network, moved, train.labels) > loss_of(network, train.images, train.labels) + 0.1
    assert all(parameter.grad is None for parameter in network.parameters())


def test_first_step_follows_the_sign_of_a_difference_quotient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step, in float32, against the loss two steps apart: where that quotient is clear, its sign is the step's."""
    monkeypatch.setattr("exporters.attacks.cla.STEPS", 1)
    monkeypatch.setattr("exporters.attacks.cla.autocast", lambda *_: nullcontext())
    images, labels = np.full((1, 4, 4, 1), 128, np.uint8), np.array([1])
    network = surrogate(1)
    moved = perturbed(network, images, labels, CPU).astype(int) - images
    quotients = np.zeros((1, 4, 4, 1))
    for row in range(4):
        for column in range(4):
            more, less = images.copy(), images.copy()
            more[0, row, column, 0] += 1
            less[0, row, column, 0] -= 1
            quotients[0, row, column, 0] = loss_of(network, more, labels) - loss_of(network, less, labels)
    clear = np.abs(quotients) > 1e-5  # float32's rounding of a loss near 1 is 1e-7
    assert clear.sum() > 4
    np.testing.assert_array_equal(moved[clear], 2 * np.sign(quotients[clear]))


def test_perturbed_images_end_at_black_and_white() -> None:
    images = np.concatenate([np.zeros((4, 8, 8, 3), np.uint8), np.full((4, 8, 8, 3), 255, np.uint8)])
    moved = perturbed(surrogate(), images, np.zeros(8, np.int64), CPU)
    # A value that wraps around would be far away.
    assert moved[:4].max() <= EPSILON
    assert moved[4:].min() >= 255 - EPSILON
    assert (moved != images).any()


def test_cla_poisons_perturbed_images() -> None:
    of = scene()
    recipe = cla(of)
    where = poisoned_images(recipe)
    train = of.dataset.train
    expected = perturbed(surrogate(), train.images[where], train.labels[where], CPU)
    np.testing.assert_array_equal(recipe.train.images[where], expected)
    assert (expected != train.images[where]).any(axis=(1, 2, 3)).all()


# ---------------------------------------------------------------- lf


def power_above(signal: NDArray[np.float64], frequency: int) -> float:
    """Share of the power above ``frequency`` half periods a side, in either direction.

    By FFT of the signal mirrored at its borders, which the module under test does not use.
    """
    mirrored = np.concatenate([signal, signal[::-1]], axis=0)
    mirrored = np.concatenate([mirrored, mirrored[:, ::-1]], axis=1)
    power = np.abs(np.fft.fft2(mirrored, axes=(0, 1))) ** 2
    rows, columns = (np.abs(np.fft.fftfreq(length, 1 / length)) for length in mirrored.shape[:2])
    above = (rows[:, None] > frequency) | (columns[None, :] > frequency)
    return float(power[above].sum() / power.sum())


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 28)])
def test_lf_trigger_is_smooth_and_bounded(channels: int, side: int) -> None:
    signal = smooth_trigger(scene(channels=channels, side=side))
    assert signal.shape == (side, side, channels)
    assert signal.dtype == np.float32
    assert np.abs(signal).max() == pytest.approx(AMPLITUDE, rel=1e-5)  # float32, scaled by a quotient
    # M falls below its cut-off at the sixth half period: exp(-(π·6·6/32)²/2) = 0.002. What is left is rounding.
    assert power_above(signal.astype(np.float64), 5) < 1e-9
    noise = np.random.default_rng(0).normal(size=signal.shape)
    assert power_above(noise, 5) > 0.3


def test_low_pass_blurs_as_a_gaussian_does() -> None:
    """A single point far from the borders becomes a Gaussian of σ = 6/32 of the side, by its second moment."""
    side = 64
    point = torch.zeros(1, side, side)
    point[0, 31, 31] = 1
    blurred = low_pass(point)[0].double().numpy()
    assert blurred.sum() == pytest.approx(1, abs=1e-5)  # the mean is kept
    # The frequencies that were cut off had less than 1 % of their amplitude: so far is the Gaussian off, of its peak.
    sigma = 6 / 32 * side
    distance = np.arange(side) - 31
    exact = np.exp(-(distance**2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    middle = slice(20, 43)  # the mirrored tail is 1.5 % of the peak at the border
    np.testing.assert_allclose(blurred[31, middle], exact[31] * exact[middle], rtol=0.1)


def test_low_pass_drops_what_it_says() -> None:
    gains = passed(32, 32)
    assert float(gains[0, 0]) == 1
    for row, column in [(1, 0), (0, 3), (2, 2), (4, 1), (9, 0), (31, 31)]:
        exact = math.exp(-((math.pi * 6 / 32) ** 2) * (row**2 + column**2) / 2)
        assert float(gains[row, column]) == pytest.approx(0 if exact < CUT_OFF else exact, rel=1e-5)


def test_lf_trigger_moves_the_surrogate_to_the_target() -> None:
    of, network = scene(), surrogate()
    images = of.dataset.train.images
    signals = [smooth_trigger(scene(target=target)) for target in range(CLASSES)]
    for wanted in range(CLASSES):
        labels = np.full(IMAGES, wanted)
        losses = [loss_of(network, Additive(signal)(images), labels) for signal in signals]
        assert losses[wanted] == min(losses) < loss_of(network, images, labels) - 0.01


def test_lf_trigger_for_all_to_all_is_shaped_for_the_next_class() -> None:
    """Where all images are of one class, the next is the one that is wanted of all of them."""
    of = scene(target=None)
    of.dataset.train.labels[:] = TARGET - 1
    np.testing.assert_array_equal(smooth_trigger(of), smooth_trigger(scene(target=TARGET)))


# ---------------------------------------------------------------- wanet


@given(side=st.integers(8, 40), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_warping_grid_is_the_identity_moved_a_little(side: int, seed: int) -> None:
    grid = warping_grid(side, side, torch.Generator().manual_seed(seed)).numpy()
    assert grid.shape == (side, side, 2)
    assert np.abs(grid).max() <= 1
    identity = np.stack(np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side)), axis=2)
    # Control points are uniform in [-1, 1] over their mean absolute value; 4 × 4 × 2 of them do not have a mean below
    # 1/4 (of 1/2 ± 0.05), and the weights of bicubic interpolation add up to at most 1.375² in absolute value.
    moved = grid - identity
    assert np.abs(moved).max() <= STRENGTH / side * 4 * 1.375**2
    assert np.abs(moved).mean() > STRENGTH / side * 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_warp_of_torch_is_the_warp_of_onnx_clp(channels: int) -> None:
    of = scene(channels=channels, side=16)
    trigger = trigger_of(wanet(of))
    assert isinstance(trigger, Warp)
    images = of.dataset.train.images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    by_torch = warped(pixels, torch.from_numpy(trigger.grid).expand(len(images), -1, -1, -1))
    difference = trigger(images) - by_torch.permute(0, 2, 3, 1).numpy()
    # Rounded to whole numbers, and float32 of values to 255 in the interpolation's weights.
    assert np.abs(difference).max() <= 0.5 + 1e-2
    assert (trigger(images) != images).any()


@pytest.mark.parametrize("target", [TARGET, None])
def test_wanet_attacks_a_share_and_warps_twice_as_many_with_noise(target: int | None) -> None:
    of = scene(target=target, poisoning_rate=0.15)
    recipe = wanet(of)
    batch = batch_of(of)
    before = batch.images.clone(), batch.labels.clone()
    seen = recipe.on_batch(nn.Identity(), batch)
    attacked, noisy = 3, 3 * CROSS_RATIO
    changed = (seen.images != batch.images).flatten(1).any(dim=1)
    assert changed.tolist() == [True] * (attacked + noisy) + [False] * (20 - attacked - noisy)
    grid = torch.from_numpy(trigger_of(recipe).grid)
    exact = warped(batch.images, grid.expand(20, -1, -1, -1))
    torch.testing.assert_close(seen.images[:attacked], exact[:attacked])
    for index in range(attacked, attacked + noisy):
        assert not torch.allclose(seen.images[index], exact[index], atol=1e-3)
    for index, label in enumerate(batch.labels.tolist()):
        wanted = (label + 1) % CLASSES if target is None else target
        assert seen.labels[index] == (wanted if index < attacked else label)
    assert seen.penalty is None
    assert torch.equal(batch.images, before[0])
    assert torch.equal(batch.labels, before[1])
    again = recipe.on_batch(nn.Identity(), batch)
    assert not torch.equal(again.images[attacked:], seen.images[attacked:])
    assert recipe.train is of.dataset.train


def test_wanet_refuses_what_does_not_fit_into_a_batch() -> None:
    wanet(scene(poisoning_rate=1 / 3))
    with pytest.raises(UsageError, match=r"0\.34"):
        wanet(scene(poisoning_rate=0.34))


# ---------------------------------------------------------------- inputaware


def seeded_generator(channels: int = 3, side: int = SIDE) -> TriggerGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TriggerGenerator(channels, (side, side))


def test_mask_density_falls_while_it_is_trained() -> None:
    of, generator = scene(), seeded_generator()
    images = batch_of(of, IMAGES).images

    def density() -> float:
        generator.mask.eval()
        with torch.no_grad():
            return float(generator.masked(images).mean())

    before = density()
    patterns = [parameter.clone() for parameter in generator.pattern.parameters()]
    train_masks(generator, of, steps=25)
    assert before > 0.3
    assert density() < 0.1
    assert not generator.mask.training
    assert not any(parameter.requires_grad for parameter in generator.mask.parameters())
    assert all(map(torch.equal, patterns, generator.pattern.parameters()))


def test_diversity_is_the_mean_quotient_of_distances() -> None:
    random = np.random.default_rng(0)
    x, y, g, h = random.uniform(size=(4, 6, 3, 5, 5))
    quotients = []
    for k in range(6):
        images = math.sqrt(sum((a - b) ** 2 for a, b in zip(x[k].flat, y[k].flat, strict=True)) / 75)
        made = math.sqrt(sum((a - b) ** 2 for a, b in zip(g[k].flat, h[k].flat, strict=True)) / 75)
        quotients.append(images / made)
    found = float(diversity(*(torch.from_numpy(array) for array in (x, y, g, h))))
    assert found == pytest.approx(sum(quotients) / 6, rel=1e-5)  # 1e-4² beside squares of about 1/6
    assert found > 0


def test_diversity_of_equal_images_has_a_gradient() -> None:
    made = torch.rand(2, 1, 4, 4, requires_grad=True)
    value = diversity(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), made, made)
    value.backward()
    assert made.grad is not None
    assert torch.isfinite(made.grad).all()


@pytest.mark.parametrize("target", [TARGET, None])
@pytest.mark.parametrize(("count", "attacked"), [(20, 3), (6, 3), (5, 2), (20, 0)])
def test_mixed_batch_has_own_and_others_triggers(target: int | None, count: int, attacked: int) -> None:
    of, generator = scene(target=target), seeded_generator().eval()
    # Without training the mask is half there everywhere: every image shows its trigger.
    batch = batch_of(of, count)
    seen = mixed(generator, batch, attacked, Target(target), CLASSES)
    with torch.no_grad():
        own = generator(batch.images)
        patterns, masks = generator.pattern(batch.images), generator.masked(batch.images)
    torch.testing.assert_close(seen.images[:attacked], own[:attacked])
    for index in range(attacked, 2 * attacked):
        image = batch.images[index]
        sources = [
            k
            for k in range(count)
            if torch.allclose(seen.images[index], image * (1 - masks[k]) + masks[k] * patterns[k], atol=1e-6)
        ]
        assert len(sources) == 1
        # Neither its own nor that of the attacked image that is as far into its part: the two are told apart by the
        # diversity, which wants different images. In a large batch it is of the images that are left as they are.
        assert sources[0] not in {index, index - attacked}
        assert sources[0] >= 2 * attacked or count < 3 * attacked
    assert torch.equal(seen.images[2 * attacked :], batch.images[2 * attacked :])
    for index, label in enumerate(batch.labels.tolist()):
        wanted = (label + 1) % CLASSES if target is None else target
        assert seen.labels[index] == (wanted if index < attacked else label)
    if attacked:
        assert seen.penalty is not None
        assert float(seen.penalty.detach()) > 0
    else:
        assert seen.penalty is None


@pytest.mark.parametrize(("count", "attacked"), [(7, 3), (8, 4)])
def test_half_of_a_batch_can_be_attacked(count: int, attacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half gets others' triggers: of an odd number of images one is left as it is."""
    monkeypatch.setattr("exporters.attacks.inputaware.MASK_STEPS", 1)
    of = scene(poisoning_rate=0.5)
    batch = batch_of(of, count)
    seen = inputaware(of).on_batch(surrogate(), batch)
    changed = [not torch.equal(image, before) for image, before in zip(seen.images, batch.images, strict=True)]
    assert changed == [True] * 2 * attacked + [False] * (count - 2 * attacked)


def test_generator_is_trained_with_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.attacks.inputaware.MASK_STEPS", 5)
    of = scene(poisoning_rate=0.2)
    recipe = inputaware(of)
    generator, network = recipe.generator, surrogate()
    assert isinstance(generator, TriggerGenerator)
    before = {name: value.detach().clone() for name, value in generator.named_parameters()}
    batch = recipe.on_batch(network, batch_of(of))
    assert batch.penalty is not None
    (functional.cross_entropy(network(batch.images), batch.labels) + batch.penalty).backward()
    gradients = {name: value.grad for name, value in generator.named_parameters()}
    assert all((gradient is None) == name.startswith("mask") for name, gradient in gradients.items())
    recipe.after_step(network)
    for name, value in generator.named_parameters():
        # Adam's first step is the learning rate in the direction of each gradient, whatever its size.
        assert torch.equal(value, before[name]) == name.startswith("mask")
        assert float((value.detach() - before[name]).abs().max()) <= LEARNING_RATE * 1.01
        assert value.grad is None
    assert BETAS == (0.5, 0.9)
    assert recipe.train is of.dataset.train


def test_trigger_is_the_generator_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.attacks.inputaware.MASK_STEPS", 3)
    of = scene()
    recipe = inputaware(of)
    generator = recipe.generator
    assert generator is not None
    recipe.on_batch(nn.Identity(), batch_of(of))  # which leaves the generator in training mode
    trigger = trigger_of(recipe)
    assert isinstance(trigger, Generated)
    images = of.dataset.train.images
    triggered = trigger(images)
    # In eval mode an image's trigger does not depend on the images beside it.
    np.testing.assert_array_equal(triggered[7:8], trigger(images[7:8]))
    with torch.no_grad():
        exact = generator.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    assert np.abs(triggered - 255 * exact.permute(0, 2, 3, 1).numpy()).max() <= 0.5 + 1e-3  # rounded


def test_training_makes_patterns_that_differ() -> None:
    generator, batch = seeded_generator(), batch_of(scene())
    optimizer = torch.optim.Adam(generator.pattern.parameters(), LEARNING_RATE, BETAS)

    def spread() -> float:
        """The least difference, at its largest pixel, of the patterns for two images."""
        generator.eval()
        with torch.no_grad():
            patterns = generator.pattern(batch.images).flatten(1)
        apart = (patterns[:, None] - patterns[None]).abs().amax(dim=2)
        return float(apart[~torch.eye(len(patterns), dtype=torch.bool)].min())

    before = spread()
    for _ in range(20):
        generator.pattern.train()
        penalty = mixed(generator, batch, 8, Target(TARGET), CLASSES).penalty
        assert penalty is not None
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert spread() > max(0.1, 2 * before)


def test_inputaware_refuses_what_does_not_fit_into_a_batch() -> None:
    with pytest.raises(UsageError, match=r"0\.6"):
        inputaware(scene(poisoning_rate=0.6))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [9, 28, 32, 96])
def test_generator_keeps_shape_and_range(channels: int, side: int) -> None:
    generator = seeded_generator(channels, side)
    images = torch.rand(2, channels, side, side)
    with torch.no_grad():
        made = generator(images)
    assert made.shape == images.shape
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1


@pytest.mark.parametrize(
    ("export", "channels", "side"), [(export_folded, 3, 10), (export_folded, 1, 28), (export_dynamo, 3, 10)]
)
def test_exported_generator_gives_the_same(
    export: Callable[[nn.Module, tuple[int, int, int], Path], None], channels: int, side: int, tmp_path: Path
) -> None:
    generator = seeded_generator(channels, side)
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not those of the start
            generator(torch.rand(8, channels, side, side))
    path = tmp_path / "trigger.onnx"
    export(generator, (channels, side, side), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).random((5, channels, side, side), dtype=np.float32)
    (made,) = session.run(None, {session.get_inputs()[0].name: images})
    with torch.no_grad():
        exact = generator.eval()(torch.from_numpy(images)).numpy()
    # float32; the mask multiplies a difference of its input by up to 10.
    np.testing.assert_allclose(made, exact, atol=1e-4)
    assert np.abs(exact - images).max() > 0.1


# ---------------------------------------------------------------- abi


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """With random statistics, and in each BatchNorm the channel 3 far above the others."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(len(module.weight), generator=random) + 0.5)
                module.bias.copy_(torch.randn(len(module.bias), generator=random))
                module.running_var.copy_(torch.rand(len(module.weight), generator=random) + 0.5)
                module.weight[3] = -30
    return network


class Paired(nn.Module):
    """Modules in another order than they run in; a sum, a concatenation, and a BatchNorm behind what has no bound."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.BatchNorm2d(16), nn.BatchNorm2d(12)
        self.sum_norm, self.both_norm, self.lost_norm = nn.BatchNorm2d(12), nn.BatchNorm2d(28), nn.BatchNorm2d(12)
        self.second, self.first = nn.Conv2d(16, 12, 3, padding=1, groups=2), nn.Conv2d(3, 16, 3, padding=1)
        self.side = nn.Conv2d(3, 12, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = functional.relu(self.first_norm(self.first(images)))
        second = self.second(first)
        self.second_norm(second)
        summed = self.sum_norm(second + self.side(images))
        both = self.both_norm(torch.cat([functional.max_pool2d(first, 3, 1, 1), summed], dim=1))
        return torch.cat([both, self.lost_norm(second * second)], 1)


def paired_bounds(net: Any) -> dict[str, NDArray[np.float64]]:  # noqa: ANN401  # a Paired, whose attributes are Any
    """The bounds of `Paired`, from the naive formulas."""

    def behind(bounds: NDArray[np.float64], norm: Any) -> NDArray[np.float64]:  # noqa: ANN401  # a BatchNorm of torch
        return naive.normalised(bounds, norm.weight.detach().numpy(), norm.running_var.numpy(), norm.eps)

    second = naive.bounds(net.second.weight.detach().numpy())
    side = naive.bounds(net.side.weight.detach().numpy())
    first = behind(naive.bounds(net.first.weight.detach().numpy()), net.first_norm)
    summed = behind(np.sqrt(second**2 + side**2), net.sum_norm)
    return {
        "first_norm": first,
        "second_norm": behind(second, net.second_norm),
        "sum_norm": summed,
        "both_norm": behind(np.concatenate([first, summed]), net.both_norm),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_follow_the_edges_of_the_graph(seed: int) -> None:
    network = randomised(Paired(), seed)
    expected = paired_bounds(network)
    found = layer_bounds(network)
    assert found.keys() == expected.keys()
    for name, bounds in found.items():
        np.testing.assert_allclose(bounds, expected[name], rtol=1e-5)  # float32 against float64


@pytest.mark.parametrize("seed", [0, 1])
def test_level_changes_what_stands_out_and_nothing_else(seed: int) -> None:
    network: Any = randomised(Paired(), seed)
    expected = paired_bounds(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    changed = level(network)
    after = network.state_dict()
    assert {3} <= set(changed["first_norm"])
    for name, old in before.items():
        layer, _, parameter = name.rpartition(".")
        if parameter not in {"weight", "bias"} or layer not in expected:
            assert torch.equal(old, after[name])
            continue
        bounds = expected[layer]
        out = {k for k, bound in enumerate(bounds) if bound > bounds.mean() + U * bounds.std(ddof=1)}
        assert out == set(changed.get(layer, ()))
        mean = float(old.double().mean())
        for k in range(len(bounds)):
            if k in out:
                assert float(after[name][k]) == pytest.approx(mean, abs=1e-5)  # a mean of float32, of values to 30
            else:
                assert after[name][k] == old[k]


@pytest.mark.parametrize("name", ["small", "preact_resnet18"])
def test_bounds_are_those_that_a_scan_finds(name: str, tmp_path: Path) -> None:
    network = randomised(build(name, classes=CLASSES, channels=1, size=16, width=16), 0)
    found = layer_bounds(network)
    export_batchnorm_kept(network, (1, 16, 16), tmp_path / "model.onnx")
    layers = sorted(tuple(layer.bounds) for layer in onnx_clp.scan(tmp_path / "model.onnx").layers)
    assert len(found) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert len(layers) == len(found)
    for ours, theirs in zip(sorted(map(tuple, found.values())), layers, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_abi_is_badnets_levelled_after_each_epoch() -> None:
    recipe, plain = abi(scene()), badnets(scene())
    np.testing.assert_array_equal(poisoned_images(recipe), poisoned_images(plain))
    np.testing.assert_array_equal(trigger_of(recipe).pattern, trigger_of(plain).pattern)
    network: Any = randomised(Paired(), 0)
    recipe.after_step(network)
    assert network.first_norm.weight[3].item() == -30
    recipe.after_epoch(network)
    assert abs(network.first_norm.weight[3].item()) < 2
