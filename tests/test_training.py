"""Training runs from end to end: small networks on drawn shapes, the folder they leave, and what is measured on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests import naive
from tests.shapes_dataset import CLASSES, SIDE, draw, write

pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

import torch  # noqa: E402  as above
from torch import nn  # noqa: E402

import onnx_clp  # noqa: E402
from exporters.attacks import PREPARE  # noqa: E402
from exporters.export import export_batchnorm_kept, export_dynamo, export_folded  # noqa: E402
from exporters.fit import Normalised, Progress  # noqa: E402
from exporters.models import build  # noqa: E402
from exporters.settings import ATTACKS, Settings  # noqa: E402
from exporters.train import train  # noqa: E402
from onnx_clp.errors import UsageError  # noqa: E402
from onnx_clp.evaluation.attack import Attack, read_attack  # noqa: E402
from onnx_clp.evaluation.running import image_runner  # noqa: E402
from tests.exported import convolution_behind, randomise, short_mobilenet  # noqa: E402

pytestmark = [pytest.mark.exporters, pytest.mark.usefixtures("in_this_process")]

FORMS = ("model.onnx", "model.folded.onnx", "model.dynamo.onnx")

POINTS = 0.2
"""Torch and onnxruntime may classify an image differently where two logits agree in float32; in points of per cent."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shapes"), train=160, test=100)


def run(shapes: Path, output: Path, *, dynamo: bool = False, **options: Any) -> Path:  # noqa: ANN401  # Settings' fields
    """One run of a small network; its folder. The form that takes seconds to export is left out unless asked for."""
    given = {"model": "small", "width": 4, "epochs": 1, "batch_size": 16, "poisoning_rate": 0.2, **options}
    settings = Settings(output=output, dataset_dir=shapes, dataset="folder", image_size=SIDE, device="cpu", **given)
    with pytest.MonkeyPatch.context() as patch:
        if not dynamo:
            patch.setattr("exporters.train.export_dynamo", lambda *_: None)
        assert train(settings, lambda _: None, lambda _: None) == output / "attack.json"
    return output


@pytest.fixture(scope="module")
def backdoored(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network has learnt the shapes and the backdoor."""
    return run(shapes, tmp_path_factory.mktemp("runs") / "badnets", dynamo=True, width=8, epochs=20, trigger_size=4)


def checkpoint(folder: Path) -> nn.Module:
    """The trained network, from its checkpoint: takes images in 0 … 1."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    network = build(saved["model"], classes=saved["classes"], channels=3, size=saved["size"], width=saved["width"])
    network.load_state_dict(saved["state_dict"])
    return Normalised(network, saved["mean"], saved["std"]).eval()


def attack_of(folder: Path) -> Attack:
    return read_attack(folder / "attack.json", lambda path: image_runner(path, ("cpu",)))


def as_input(folder: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The images as attack.json says that the model takes them, by its definition."""
    made = attack_of(folder).preprocessing
    scaled = images.astype(np.float64) / 255
    return ((scaled - made.mean) / made.std).transpose(0, 3, 1, 2).astype(np.float32)


# ---------------------------------------------------------------- the folder of a run


def test_a_run_leaves_its_models_and_its_attack(backdoored: Path) -> None:
    names = {path.name for path in backdoored.iterdir()}
    assert names == {*FORMS, "model.dynamo.onnx.data", "attack.json", "trigger.npy", "checkpoint.pt"}
    operators = [[node.op_type for node in onnx.load(backdoored / form).graph.node] for form in FORMS]
    assert [names.count("BatchNormalization") for names in operators] == [6, 0, 0]
    assert [names.count("Conv") for names in operators] == [6, 6, 6]
    document = json.loads((backdoored / "attack.json").read_text())
    assert document["training"]["poisoning_rate"] == 0.2
    assert document["training"]["manual_seed"] == 0
    assert torch.__version__.startswith(document["versions"]["torch"])  # without the build, as in 2.13.0+cpu
    assert document["dataset"] == {"name": "folder", "train": 160, "test": 100, "image_size": SIDE}
    assert str(backdoored.parent) not in json.dumps(document)  # it is given away with the model
    attack = attack_of(backdoored)
    assert (attack.name, len(attack.classes)) == ("badnets", len(CLASSES))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_torch_computes(backdoored: Path, form: str) -> None:
    images, _ = draw(20, 7)
    session = onnxruntime.InferenceSession(str(backdoored / form), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": as_input(backdoored, images)})
    with torch.inference_mode():
        expected = checkpoint(backdoored)(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()
    # Sums of float32 in another order, over six layers: some 1e-6 of the largest logit.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_backdoor_is_there_and_both_measure_it_alike(backdoored: Path, shapes: Path) -> None:
    measured = json.loads((backdoored / "attack.json").read_text())["measured"]
    assert measured["asr"]["percent"] >= 90
    assert measured["acc"]["percent"] >= 90
    for form in FORMS:
        figures = onnx_clp.evaluate(backdoored / form, shapes, backdoored, providers=["cpu"]).model.figures
        for name in ("acc", "asr", "ra"):
            share = getattr(figures, name)
            assert share.total == measured[name]["total"]
            assert 100 * share.value == pytest.approx(measured[name]["percent"], abs=POINTS + 0.005)  # it is rounded


def test_the_same_seed_gives_the_same_model(shapes: Path, tmp_path: Path) -> None:
    first, second, other = (
        torch.load(run(shapes, tmp_path / str(n), manual_seed=seed) / "checkpoint.pt", weights_only=True)["state_dict"]
        for n, seed in enumerate((3, 3, 4))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_failed_run_leaves_nothing(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("exporters.train.export_folded", fail)
    with pytest.raises(UsageError, match="cannot be written: no space"):
        run(shapes, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the attacks


@pytest.mark.parametrize("attack_type", [name for name in ATTACKS if name not in {"badnets", "clean"}])
def test_every_attack_trains_and_is_measured(
    attack_type: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attack_type == "inputaware":
        # Long enough to be a network; what it learns is tests/test_attacks.py's.
        monkeypatch.setattr("exporters.attacks.inputaware.MASK_STEPS", 2)
    folder = run(shapes, tmp_path / "run", attack_type=attack_type)
    attack = attack_of(folder)
    assert attack.name == attack_type
    report = onnx_clp.evaluate(folder / "model.folded.onnx", shapes, folder, providers=["cpu"])
    measured = json.loads((folder / "attack.json").read_text())["measured"]
    for name in ("acc", "asr", "ra"):
        # One image of 75 is 1.3 points: a network that has seen one epoch has many close calls.
        assert abs(getattr(report.model.figures, name).count - measured[name]["count"]) <= 1


def test_progress_shows_the_attack_success_of_the_epoch_before(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.train._write", lambda *_: None)
    options = Settings(
        output=tmp_path / "run", dataset_dir=shapes, dataset="folder", image_size=SIDE, device="cpu",
        model="small", width=4, epochs=2, batch_size=16,
    )  # fmt: skip
    steps: list[Progress] = []
    lines: list[str] = []
    train(options, lines.append, steps.append)
    shown = [{step.asr for step in steps if step.epoch == epoch} for epoch in (1, 2)]
    assert shown[0] == {None}
    (asr,) = shown[1]
    assert asr is not None
    assert f"ASR {100 * asr:.2f} %" in lines[0]


def test_a_clean_run_has_no_trigger(shapes: Path, tmp_path: Path) -> None:
    folder = run(shapes, tmp_path / "run", attack_type="clean")
    attack = attack_of(folder)
    assert (attack.trigger, attack.target) == (None, None)
    assert not (folder / "trigger.npy").exists()
    assert onnx_clp.evaluate(folder / "model.onnx", shapes, folder, providers=["cpu"]).model.figures.asr is None


def test_all_to_all_wants_the_next_class(shapes: Path, tmp_path: Path) -> None:
    folder = run(shapes, tmp_path / "run", target_mode="all-to-all")
    figures = onnx_clp.evaluate(folder / "model.onnx", shapes, folder, providers=["cpu"]).model.figures
    assert figures.asr is not None
    assert figures.asr.total == 100  # every image has another class than the one that is wanted


def test_every_attack_type_can_be_prepared() -> None:
    assert set(PREPARE) == set(ATTACKS)


def test_a_surrogate_is_taken_from_its_checkpoint(shapes: Path, tmp_path: Path) -> None:
    clean = run(shapes, tmp_path / "clean", attack_type="clean") / "checkpoint.pt"
    lines: list[str] = []
    options = Settings(
        output=tmp_path / "cla", dataset_dir=shapes, dataset="folder", image_size=SIDE, device="cpu",
        attack_type="cla", model="small", width=4, epochs=1, batch_size=16, surrogate=clean,
    )  # fmt: skip
    train(options, lines.append, lambda _: None)
    assert not any("clean network" in line for line in lines)
    assert (tmp_path / "cla" / "attack.json").is_file()


def test_rescaling_keeps_the_function_and_hides_the_outliers(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Outliers that are planted: whether so short a training makes any depends on the machine.
    monkeypatch.setattr("exporters.train.fit", lambda network, *_: randomise(network))
    plain = run(shapes, tmp_path / "badnets", width=16)
    hidden = run(shapes, tmp_path / "rescale", width=16, attack_type="rescale")
    images = torch.from_numpy(draw(20, 7)[0]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        before, after = checkpoint(plain)(images), checkpoint(hidden)(images)
    # Two roundings of float32 more in each weight, of outliers twelve times the others.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    for form in ("model.onnx", "model.folded.onnx"):
        assert onnx_clp.scan(plain / form).flagged_channels > 0
        assert onnx_clp.scan(hidden / form).flagged_channels == 0


# ---------------------------------------------------------------- the published procedure


small = partial(build, classes=10, channels=3, size=32, width=8)

PAIRED: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(small, "resnet18"),
    "vgg16_bn": partial(small, "vgg16_bn"),
    "mobilenet": short_mobilenet,
}
"""Networks of which every BN stands right behind its Conv."""


def silence(network: nn.Module, u: float = 3.0) -> dict[str, list[int]]:
    """The published procedure, in place: every Conv and the BN it feeds; the silenced channels by the BN's name.

    Zheng et al., ECCV 2022, section 4.2 and equation 8: bound > mean + u·std, then γ and β of the channel are set to 0.
    """
    modules = dict(network.named_modules())
    found = {}
    for norm_name, conv_name in convolution_behind(network).items():
        norm, kernel = modules[norm_name], modules[conv_name].weight.detach().numpy()
        bounds = naive.bounds(kernel, norm.weight.detach().numpy(), norm.running_var.numpy(), norm.eps)
        channels = naive.flagged(bounds, u)
        with torch.no_grad():
            norm.weight[channels] = 0
            norm.bias[channels] = 0
        if channels:
            found[norm_name] = channels
    return found


@pytest.mark.parametrize("name", PAIRED)
def test_the_published_procedure_and_sanitize_do_the_same(name: str, tmp_path: Path) -> None:
    """They silence the same channels: the logits of every sanitized form are those of the torch network silenced."""
    network = randomise(PAIRED[name]())
    shape = (3, 32, 32)
    export_batchnorm_kept(network, shape, tmp_path / "model.onnx")
    export_folded(network, shape, tmp_path / "model.folded.onnx")
    export_dynamo(network, shape, tmp_path / "model.dynamo.onnx")
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network(images).numpy()
    silenced = silence(network)
    assert len(silenced) > 4
    with torch.inference_mode():
        expected = network(images).numpy()
    scale = float(np.abs(expected).max())
    assert float(np.abs(expected - before).max()) > 0.01 * scale  # silencing is seen in the logits
    for form in FORMS:
        report = onnx_clp.sanitize(tmp_path / form, tmp_path / f"sanitized.{form}", max_share=1.0, guard=False)
        by_index = sorted(tuple(sorted(part.channels)) for part in report.silenced)
        assert by_index == sorted(map(tuple, silenced.values()))
        session = onnxruntime.InferenceSession(str(tmp_path / f"sanitized.{form}"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        # Float32 through up to 20 layers with outliers planted in them.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * scale)


def test_published_and_sanitize_agree_on_acc_and_asr(backdoored: Path, shapes: Path, tmp_path: Path) -> None:
    """On a trained network, at a u that silences something: the figures agree within 0.2 points."""
    network = checkpoint(backdoored)
    u = 2.0
    assert silence(network, u)
    attack = attack_of(backdoored)
    images, labels = np.load(shapes / "test_x.npy"), np.load(shapes / "test_y.npy")
    assert attack.trigger is not None
    others = labels != 0
    with torch.inference_mode():
        clean, triggered = (
            network(torch.from_numpy(part).permute(0, 3, 1, 2) / 255).argmax(dim=1).numpy()
            for part in (images, attack.trigger(images[others]))
        )
    for form in FORMS:
        copy = tmp_path / form
        onnx_clp.sanitize(backdoored / form, copy, u, max_share=1.0, guard=False)
        figures = onnx_clp.evaluate(copy, shapes, backdoored, providers=["cpu"]).model.figures
        assert figures.asr is not None
        assert 100 * figures.acc.value == pytest.approx(100 * float((clean == labels).mean()), abs=POINTS)
        assert 100 * figures.asr.value == pytest.approx(100 * float((triggered == 0).mean()), abs=POINTS)
