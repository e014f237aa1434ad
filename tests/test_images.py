"""Labelled images from everything they come in, against Pillow, torchvision and naive twins; and what is refused."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnx_clp.errors import UsageError
from onnx_clp.evaluation import files
from onnx_clp.evaluation.images import labelled, read_images, some_of, stratified
from onnx_clp.evaluation.npy import load_array
from onnx_clp.evaluation.pictures import Fit, fitted, grey, read_picture
from onnx_clp.evaluation.unpickle import read_pickle

Image = pytest.importorskip("PIL.Image")

RGB = Fit((6, 5), 3)


def pixels(seed: int, count: int = 4, height: int = 6, width: int = 5, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def save_folder(root: Path, names: Sequence[str], each: int = 2) -> dict[str, NDArray[np.uint8]]:
    """A folder of PNGs for each name; their pixels."""
    made = {}
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        made[name] = pixels(seed, each)
        for number, image in enumerate(made[name]):
            Image.fromarray(image).save(root / name / f"{number}.png")
    return made


# ---- folders


@pytest.mark.parametrize("inner", ["", "test", "val"])
def test_a_folder_of_pictures_for_each_class(inner: str, tmp_path: Path) -> None:
    made = save_folder(tmp_path / inner, ["cat", "ant", "bee"])
    if inner:
        save_folder(tmp_path / "train", ["cat", "ant", "bee", "dog"])
    (tmp_path / inner / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / inner / ".hidden").mkdir()
    found = read_images(tmp_path, RGB)
    assert found.source.classes == ("ant", "bee", "cat")
    assert found.source.used == str(tmp_path / inner)
    assert (found.source.kind, found.source.count, found.source.seed) == ("image folder", 6, None)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.images == np.concatenate([made["ant"], made["bee"], made["cat"]])).all()


def test_test_goes_before_val(tmp_path: Path) -> None:
    for split in ("val", "test"):
        save_folder(tmp_path / split, ["a", "b"])
    assert read_images(tmp_path, RGB).source.used == str(tmp_path / "test")


def test_names_say_which_folder_is_which_class(tmp_path: Path) -> None:
    made = save_folder(tmp_path, ["cat", "ant"])
    found = read_images(tmp_path, RGB, ("cat", "ant"))
    assert found.source.order == "names"
    assert (found.images[found.labels == 0] == made["cat"]).all()
    assert (found.images[found.labels == 1] == made["ant"]).all()


def test_other_names_are_matched_by_their_order(tmp_path: Path) -> None:
    made = save_folder(tmp_path, ["n02", "n01"])
    found = read_images(tmp_path, RGB, ("cat", "ant"))
    assert (found.source.order, found.source.classes) == ("order", ("cat", "ant"))
    assert (found.images[found.labels == 0] == made["n01"]).all()


def test_folders_of_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    names = [str(number) for number in range(11)]
    made = save_folder(tmp_path, names, 1)
    found = read_images(tmp_path, RGB, 11)
    assert found.source.classes == tuple(names)
    for number in range(11):
        assert (found.images[found.labels == number] == made[str(number)]).all()


@pytest.mark.parametrize("classes", [("a",), ("a", "b", "c"), 1, 3])
def test_another_number_of_folders_than_of_classes_is_refused(classes: tuple[str, ...] | int, tmp_path: Path) -> None:
    save_folder(tmp_path, ["a", "b"])
    with pytest.raises(UsageError, match="2 classes"):
        read_images(tmp_path, RGB, classes)


def test_some_of_the_classes_are_enough_where_that_is_said(tmp_path: Path) -> None:
    save_folder(tmp_path / "names", ["c", "b"])
    save_folder(tmp_path / "numbers", ["2", "1"])
    for folder in ("names", "numbers"):
        found = read_images(tmp_path / folder, RGB, ("a", "b", "c"), partial=True)
        assert found.labels.tolist() == [1, 1, 2, 2]
    save_folder(tmp_path / "others", ["x", "y"])
    with pytest.raises(UsageError, match="2 classes"):
        read_images(tmp_path / "others", RGB, ("a", "b", "c"), partial=True)


def test_nothing_that_holds_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "text").write_text("x")
    for name in ("empty", "text", "missing"):
        with pytest.raises(UsageError, match=name):
            read_images(tmp_path / name, RGB)


# ---- pictures


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(0, 1, 64, 64)[0]).save(file, "PNG")
    return file.getvalue()[:3000]


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no known format"),
        (b"no picture", "no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n", "no known format"),
        (png(5, 6), "no picture that can be read"),
        (png(60000, 60000), "60000"),
        (png(12000, 12000), "12000"),
        (truncated(), "truncated"),
        (deep(), "I;16"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(content: bytes, complaint: str, number: int, tmp_path: Path) -> None:
    save_folder(tmp_path, ["a", "b"])
    bad = tmp_path / "a" / f"{number}.png"
    bad.write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        read_images(tmp_path, RGB)
    assert str(bad) in caught.value.message
    assert "\n" not in str(caught.value)


def test_pictures_of_several_sizes_need_one_to_be_named(tmp_path: Path) -> None:
    save_folder(tmp_path, ["a"], 3)
    Image.fromarray(pixels(9, 1, 7, 5)[0]).save(tmp_path / "a" / "2.png")
    with pytest.raises(UsageError, match="--size"):
        read_images(tmp_path, Fit(None, 3))
    assert read_images(tmp_path, RGB).images.shape == (3, 6, 5, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixels_is_read_as_pillow_converts_it(mode: str, channels: int, tmp_path: Path) -> None:
    picture = Image.fromarray(pixels(1, 1)[0]).convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture.save(path)
    expected = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(1, 6, 5, channels)
    assert (read_picture(path, Fit((6, 5), channels)) == expected).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_grey_is_what_pillow_makes_of_colours(seed: int) -> None:
    images = pixels(seed, 1)
    assert (grey(images)[0, ..., 0] == np.asarray(Image.fromarray(images[0]).convert("L"))).all()


def test_grey_becomes_three_equal_channels() -> None:
    images = pixels(0, channels=1)
    assert (fitted(images, RGB) == np.concatenate([images] * 3, axis=3)).all()


@pytest.mark.exporters
@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (33, 33), (20, 90)])
def test_resizing_and_cutting_is_what_torchvision_does(height: int, width: int) -> None:
    pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    images = pixels(3, 2, height, width)
    chain = transforms.Compose([transforms.Resize(16), transforms.CenterCrop((13, 9))])
    expected = np.stack([np.asarray(chain(Image.fromarray(image))) for image in images])
    assert (fitted(images, Fit((13, 9), 3, 16)) == expected).all()
    stretched = np.stack([np.asarray(transforms.Resize((13, 9))(Image.fromarray(image))) for image in images])
    assert (fitted(images, Fit((13, 9), 3)) == stretched).all()


def test_an_image_of_the_wanted_size_is_left_as_it_is() -> None:
    images = pixels(0)
    assert (fitted(images, Fit((6, 5), 3, 9)) == images).all()


@pytest.mark.parametrize("resize", [4, 10**9])
def test_a_shorter_side_that_gives_no_such_image_is_refused(resize: int) -> None:
    with pytest.raises(UsageError, match="shorter side"):
        fitted(pixels(0, 1, 12, 12), Fit((6, 5), 3, resize))


# ---- arrays


@pytest.mark.parametrize(
    "keys",
    [("images", "labels"), ("test_x", "test_y"), ("x_test", "y_test"), ("x", "y"), ("test_images", "test_labels")],
)
def test_arrays_of_any_usual_name(keys: tuple[str, str], tmp_path: Path) -> None:
    images, labels = pixels(0), np.array([0, 2, 1, 2], np.uint8)
    content: dict[str, Any] = {keys[0]: images, keys[1]: labels, "more": np.zeros(3)}
    np.savez_compressed(tmp_path / "a.npz", **content)
    found = read_images(tmp_path / "a.npz", RGB)
    assert (found.images == images).all()
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [0, 2, 1, 2]
    assert (found.source.classes, found.source.order) == (("0", "1", "2"), "numbers")


def test_arrays_in_a_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "test_x.npy", pixels(0, channels=1)[..., 0])
    np.save(tmp_path / "test_y.npy", np.array([[0], [1], [1], [0]]))
    found = read_images(tmp_path, Fit((6, 5), 1), 2)
    assert (found.images == pixels(0, channels=1)).all()
    assert found.labels.tolist() == [0, 1, 1, 0]


WRONG_ARRAYS: dict[str, dict[str, NDArray[Any]]] = {
    "objects": {"images": np.array([None] * 4), "labels": np.zeros(4, int)},
    "objects as labels": {"images": pixels(0), "labels": np.array([None] * 4)},
    "floats": {"images": pixels(0) / 255, "labels": np.zeros(4, int)},
    "channels first": {"images": pixels(0).transpose(0, 3, 1, 2), "labels": np.zeros(4, int)},
    "float labels": {"images": pixels(0), "labels": np.zeros(4)},
    "too few labels": {"images": pixels(0), "labels": np.zeros(3, int)},
    "one number for labels": {"images": pixels(0)[:1], "labels": np.array(0)},
    "negative labels": {"images": pixels(0), "labels": np.array([0, 1, -1, 0])},
    "one-hot labels": {"images": pixels(0), "labels": np.eye(4, dtype=int)},
    "no pixels": {"images": np.zeros((4, 0, 5, 3), np.uint8), "labels": np.zeros(4, int)},
    "no images": {"images": np.zeros((0, 6, 5, 3), np.uint8), "labels": np.zeros(0, int)},
    "a label beyond the classes": {"images": pixels(0), "labels": np.array([0, 1, 2, 3])},
    "other names": {"pictures": pixels(0), "classes": np.zeros(4, int)},
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_arrays_are_refused(case: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **WRONG_ARRAYS[case])  # type: ignore[arg-type]  # one of its names is another parameter
    with pytest.raises(UsageError, match=r"a\.npz") as caught:
        read_images(tmp_path / "a.npz", RGB, 3)
    assert "\n" not in str(caught.value)


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"x", header((1 << 60, 6, 5, 3)), header((4, 6, 5, 3)), header((1 << 62, 1 << 62, 5, 3))]
)
def test_a_broken_member_of_an_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
        archive.writestr("labels.npy", content)
    with pytest.raises(UsageError, match=r"a\.npz"):
        read_images(tmp_path / "a.npz", RGB)


def test_an_npz_that_unpacks_to_more_than_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((4, 6, 5, 3), np.uint8), labels=np.zeros(4, np.uint8))
    assert len(read_images(tmp_path / "a.npz", RGB).labels) == 4
    monkeypatch.setattr(files, "LARGEST", 400)  # 360 bytes of pixels, 4 of labels, two heads of 128
    with pytest.raises(UsageError, match="unpacks to more"):
        read_images(tmp_path / "a.npz", RGB)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_what_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.npz"):
        read_images(tmp_path / "a.npz", RGB)


# ---- torchvision's data sets


def old_pickle(content: dict[str, Any]) -> bytes:
    """A pickle of protocol 2, with NumPy's names of the time when CIFAR's files were written."""
    return pickle.dumps(content, 2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar(folder: Path, images: NDArray[np.uint8], labels: Sequence[int]) -> None:
    folder.mkdir(parents=True)
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    content = {"batch_label": "testing batch 1 of 1", "labels": list(labels), "data": data, "filenames": ["a.png"]}
    (folder / "test_batch").write_bytes(old_pickle(content))
    (folder / "batches.meta").write_bytes(old_pickle({"label_names": ["plane", "car", "bird"], "num_vis": 3072}))


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10(inner: str, tmp_path: Path) -> None:
    images = pixels(0, 4, 32, 32)
    write_cifar(tmp_path / "cifar-10-batches-py", images, [2, 0, 1, 1])
    found = read_images(tmp_path / inner, Fit((32, 32), 3), ("car", "bird", "plane"))
    assert (found.images == images).all()
    assert found.labels.tolist() == [1, 2, 0, 0]
    assert (found.source.kind, found.source.order) == ("CIFAR-10", "names")


def test_cifar10_as_python_2_wrote_it(tmp_path: Path) -> None:
    """By hand, opcode by opcode: texts of bytes throughout, as in the published files."""

    def text(value: bytes) -> bytes:
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value

    data = pixels(0, 2, 32, 32)
    raw = np.ascontiguousarray(data.transpose(0, 3, 1, 2)).tobytes()
    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array += b"(K\x01(K\x02M\x00\x0ct" + dtype + b"\x89" + text(raw) + b"tb"
    content = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](K\x01K\x00eu."
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(content)
    assert pickle.loads(content, encoding="latin1")["labels"] == [1, 0]  # it is a pickle that Python reads
    found = read_images(tmp_path, Fit((32, 32), 3))
    assert (found.images == data).all()
    assert found.labels.tolist() == [1, 0]


class Hostile:
    """Pickles into a call."""

    def __init__(self, call: Callable[..., Any], *arguments: object) -> None:
        self.call = call
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    numpy_call = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "a call of the system": pickle.dumps(Hostile(os.mkdir, str(mark)), 2),
        "a call in a value": pickle.dumps({"data": Hostile(os.mkdir, str(mark))}, 4),
        "eval": pickle.dumps(Hostile(eval, f"__import__('os').mkdir({str(mark)!r})"), 0),
        "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93.",
        "a module of NumPy": b"cnumpy.testing._private.utils\nrunstring\n.",
        "an array of objects": pickle.dumps({"data": np.array([None])}, 2),
        "a large array": pickle.dumps({"data": np.array([1 << 40])}, 2),
        "an array that is none": b"\x80\x02}U\x04data" + numpy_call + b"s.",
        "a note with attributes": b"\x80\x02" + numpy_call + b"}U\x04kindU\x05bytessb.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent name": b"Pname\n.",
        "a memo of gigabytes": b"\x80\x02}r\xff\xff\xff\x7fN.",
        "a text of gigabytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "a bytearray of gigabytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
        "a long recursion": b"(" * 100_000 + b"t" * 100_000 + b".",
        "a list": pickle.dumps([1, 2]),
        "a number as key": pickle.dumps({1: 2}),
        "nothing": b"",
        "half": old_pickle({"data": pixels(0, 1, 32, 32).reshape(1, -1)})[:1000],
        "text": b"hello",
    }


@pytest.mark.parametrize("case", hostile_pickles(Path("mark")))
def test_a_hostile_pickle_runs_nothing(case: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "test_batch"
    path.write_bytes(hostile_pickles(mark)[case])
    with pytest.raises(UsageError) as caught:
        read_images(tmp_path, Fit((32, 32), 3))
    assert not mark.exists()
    assert str(path) in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_small_pickle_takes_no_memory(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
    often = b"c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01](" + b"h\x00h\x01R" * 256 + b"e."
    for content in (b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b"x.", b"\x80\x02" + often):
        (tmp_path / "test_batch").write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(UsageError, match="test_batch"):
                read_images(tmp_path, Fit((32, 32), 3))
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()


def test_texts_that_python_3_wrote_as_bytes_are_read(tmp_path: Path) -> None:
    images = pixels(0, 2, 32, 32)
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(2, -1)
    assert b"_codecs\nencode" in pickle.dumps({b"data": data}, 2)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": [1, 0]}, 2))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"plane", b"car"]}, 2))
    found = read_images(tmp_path, Fit((32, 32), 3))
    assert (found.images == images).all()
    assert found.source.classes == ("plane", "car")


def test_a_huge_label_makes_no_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(0), labels=np.array([0, 1, 2, 1 << 20]))
    with pytest.raises(UsageError, match="a label is 1048576"):
        read_images(tmp_path / "a.npz", RGB)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trigger.npy")
    with pytest.raises(UsageError, match="not a regular file"):
        load_array(tmp_path / "trigger.npy")


def test_the_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    for case in ("a call of the system", "a call in a value", "eval"):
        pickle.loads(hostile_pickles(tmp_path / case)[case])
        assert (tmp_path / case).is_dir()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2000), st.integers(1, 8))
def test_a_broken_pickle_is_an_error_of_the_user(noise: bytes, place: int, length: int) -> None:
    content = bytearray(old_pickle({"data": np.zeros((1, 8), np.uint8), "labels": [1]}))
    content[place % len(content) : place % len(content) + length] = noise
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(UsageError):  # anything else is a fault
            read_pickle(Path(file.name))


def test_cifar100_takes_its_fine_labels(tmp_path: Path) -> None:
    images = pixels(0, 2, 32, 32)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = images.transpose(0, 3, 1, 2).reshape(2, -1)
    (folder / "test").write_bytes(old_pickle({"data": data.copy(), "fine_labels": [1, 0], "coarse_labels": [0, 0]}))
    (folder / "meta").write_bytes(old_pickle({"fine_label_names": ["apple", "fish"]}))
    for path in (tmp_path, folder):
        found = read_images(path, Fit((32, 32), 3))
        assert (found.images == images).all()
        assert (found.labels.tolist(), found.source.classes) == ([1, 0], ("apple", "fish"))


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("inner", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist(inner: str, packed: bool, tmp_path: Path) -> None:  # noqa: FBT001  # of parametrize
    images, labels = pixels(0, 3, 28, 28, 1), np.array([9, 0, 3], np.uint8)
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    for name, array in (("t10k-images-idx3-ubyte", images[..., 0]), ("t10k-labels-idx1-ubyte", labels)):
        content = gzip.compress(idx(array), mtime=0) if packed else idx(array)
        (tmp_path / inner / (f"{name}.gz" if packed else name)).write_bytes(content)
    found = read_images(tmp_path, Fit((28, 28), 1), 10)
    assert (found.images == images).all()
    assert found.labels.tolist() == [9, 0, 3]
    if inner == "FashionMNIST/raw":
        assert found.source.kind == "Fashion-MNIST"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        gzip.compress(b"\0\0\x08\x03", mtime=0),
        gzip.compress(idx(pixels(0)), mtime=0)[:-20],
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1 << 31, 1 << 31, 1 << 31), mtime=0),
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 100, 28, 28), mtime=0),
        gzip.compress(b"\0\0\x0d\x03" + bytes(100), mtime=0),
        b"\x1f\x8b\x08" + bytes(40),
    ],
)
def test_broken_idx_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(UsageError, match="idx3"):
        read_images(tmp_path, Fit((28, 28), 1))


def test_stl10_is_stored_by_columns(tmp_path: Path) -> None:
    images = pixels(0, 2, 96, 96)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    with (folder / "test_X.bin").open("wb") as file:
        for image in images:
            for channel in range(3):
                for column in range(96):
                    file.write(bytes(image[row, column, channel] for row in range(96)))
    (folder / "test_y.bin").write_bytes(bytes([10, 1]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    found = read_images(tmp_path, Fit((96, 96), 3))
    assert (found.images == images).all()
    assert found.labels.tolist() == [9, 0]
    assert found.source.classes == tuple("abcdefghij")
    (folder / "test_y.bin").write_bytes(bytes([10, 0]))
    with pytest.raises(UsageError, match=r"test_y\.bin"):
        read_images(tmp_path, Fit((96, 96), 3))


def write_gtsrb(root: Path, rows: Sequence[str]) -> NDArray[np.uint8]:
    images = pixels(0, 2, 6, 5)
    folder = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"0000{number}.ppm")
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    (root / "gtsrb" / "GT-final_test.csv").write_text("\r\n".join([head, *rows]))
    return images


@pytest.mark.parametrize("inner", ["", "gtsrb"])
def test_gtsrb(inner: str, tmp_path: Path) -> None:
    images = write_gtsrb(tmp_path, ["00001.ppm;5;6;0;0;5;6;16", "00000.ppm;5;6;0;0;5;6;1"])
    found = read_images(tmp_path / inner, RGB, 43)
    assert (found.images == images[::-1]).all()
    assert found.labels.tolist() == [16, 1]


@pytest.mark.parametrize(
    "row", ["../a.ppm;5;6;0;0;5;6;1", "00000.ppm;5;6;0;0;5;6;-1", "00000.ppm", ";;;;;;;1", "00000.ppm;5;6;0;0;5;6;43"]
)
def test_a_broken_table_of_gtsrb_is_refused(row: str, tmp_path: Path) -> None:
    write_gtsrb(tmp_path, [row])
    complaint = "43" if row.endswith(";43") else "row without"
    with pytest.raises(UsageError, match=complaint):
        read_images(tmp_path, RGB, 43)


@pytest.mark.exporters
def test_torchvision_reads_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    write_gtsrb(tmp_path, ["00001.ppm;5;6;0;0;5;6;16", "00000.ppm;5;6;0;0;5;6;1"])
    theirs = datasets.GTSRB(tmp_path, split="test")
    ours = read_images(tmp_path, RGB, 43)
    assert (np.stack([np.asarray(image) for image, _ in theirs]) == ours.images).all()
    assert [label for _, label in theirs] == ours.labels.tolist()
    save_folder(tmp_path / "folder", ["b", "10", "9", "a"])
    folder = datasets.ImageFolder(tmp_path / "folder")
    ours = read_images(tmp_path / "folder", RGB)
    assert folder.classes == list(ours.source.classes)
    assert (np.stack([np.asarray(image) for image, _ in folder]) == ours.images).all()


# ---- some of the images


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(1, 210), st.integers(0, 99))
def test_a_choice_keeps_each_class_with_its_share(labels: list[int], limit: int, seed: int) -> None:
    array = np.array(labels)
    chosen = stratified(array, limit, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(limit, len(labels))
    assert chosen.tolist() == sorted(chosen.tolist())
    assert (chosen == stratified(array, limit, seed)).all()
    share = min(1.0, limit / len(labels))
    taken = Counter(array[chosen].tolist())
    # Each class is off by less than one image for itself and one for what is left over of the whole.
    assert all(abs(taken[label] - share * count) < 2 + 1e-9 for label, count in Counter(labels).items())


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_of_a_balanced_set_is_balanced(seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(5), 100))
    assert set(Counter(labels[stratified(labels, 50, seed)].tolist()).values()) == {10}


def test_every_image_may_be_chosen_and_the_seed_says_which() -> None:
    labels = np.zeros(20, np.int64)
    times = Counter(int(index) for seed in range(400) for index in stratified(labels, 5, seed))
    # Each is drawn 100 times on average with standard deviation √(400 · ¼ · ¾) = 8.7: 5 of them on both sides.
    assert set(times) == set(range(20))
    assert all(56 < count < 144 for count in times.values())


def test_a_limit_is_said_and_reads_no_other_picture(tmp_path: Path) -> None:
    save_folder(tmp_path, ["a", "b"], 10)
    found = read_images(tmp_path, RGB, limit=4, seed=3)
    assert (found.source.count, found.source.available, found.source.seed) == (4, 20, 3)
    assert Counter(found.labels.tolist()) == {0: 2, 1: 2}
    assert found.images.shape == (4, 6, 5, 3)
    everything = read_images(tmp_path, RGB)
    assert (some_of(everything, 4, 3).images == found.images).all()
    for number in range(10):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UsageError):
        read_images(tmp_path, RGB, limit=4, seed=3)


def test_images_in_memory() -> None:
    found = labelled(pixels(0), np.array([1, 0, 1, 0]), ("a", "b"))
    assert (found.images == pixels(0)).all()
    assert found.source.classes == ("a", "b")
    with pytest.raises(UsageError, match="label 2"):
        labelled(pixels(0), np.array([1, 0, 1, 2]), ("a", "b"))
