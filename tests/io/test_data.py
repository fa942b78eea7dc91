"""Clean data from image folders, .npz files and CIFAR-10's batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnp_fast.io import DataError, class_names, load_clean_data


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def save_image(path: Path, value: Any, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_image(tmp_path / "data" / "cat" / "b.png", (0, 0, 255))
    save_image(tmp_path / "data" / "cat" / "a.png", (255, 0, 51))
    save_image(tmp_path / "data" / "ant" / "x.png", (0, 255, 0))
    (tmp_path / "data" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "data" / ".cache").mkdir()
    return tmp_path / "data"


def test_folder(folder: Path) -> None:
    images, labels = load_clean_data(folder)
    assert images.shape == (3, 3, 4, 6)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 1]
    assert labels.dtype == torch.int64
    assert class_names(folder) == ["ant", "cat"]
    torch.testing.assert_close(
        images[:, :, 0, 0], torch.tensor([[0, 1, 0], [1, 0, 0.2], [0, 0, 1]])
    )


def test_gray_folder_has_one_channel_and_mixed_has_three(tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "x.png", 51, "L")
    save_image(tmp_path / "b" / "x.png", 65535, "I;16")
    images, _ = load_clean_data(tmp_path)
    assert images.shape == (2, 1, 4, 6)
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.2, 1.0]))
    save_image(tmp_path / "c" / "x.png", (255, 0, 0, 0), "RGBA")
    images, _ = load_clean_data(tmp_path)
    torch.testing.assert_close(
        images[:, :, 0, 0], torch.tensor([[0.2, 0.2, 0.2], [1, 1, 1], [1, 0, 0]])
    )


def test_folder_of_several_sizes_needs_image_size(folder: Path) -> None:
    save_image(folder / "cat" / "c.png", (1, 2, 3), size=(5, 5))
    with pytest.raises(
        DataError, match=r"c.png' is 5×5 pixels where the others are 4×6.*image_size"
    ):
        load_clean_data(folder)
    assert load_clean_data(folder, image_size=8)[0].shape == (4, 3, 8, 8)
    assert load_clean_data(folder, image_size=(3, 7))[0].shape == (4, 3, 3, 7)


def test_unreadable_images_are_named(folder: Path) -> None:
    content = (folder / "cat" / "a.png").read_bytes()
    (folder / "cat" / "broken.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"image '.*broken.png' cannot be read"):
        load_clean_data(folder)


def test_postscript_is_never_opened(folder: Path) -> None:
    # Pillow would hand it to an interpreter.
    (folder / "cat" / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n")
    with pytest.raises(DataError, match=r"page.png' cannot be read"):
        load_clean_data(folder)


def test_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "x.tiff", 0.5, "F")
    with pytest.raises(DataError, match="32-bit pixels; 8 or 16 bits are allowed"):
        load_clean_data(tmp_path)


def test_missing_and_empty_folders(tmp_path: Path, folder: Path) -> None:
    for read in (load_clean_data, class_names):
        with pytest.raises(FileNotFoundError, match="there is no data at"):
            read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no subfolders"):
        load_clean_data(tmp_path / "empty")
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder '.*dog' has no images"):
        load_clean_data(folder)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


IMAGES = np.full((2, 3, 4, 4), 51, dtype=np.uint8)
LABELS = np.array([0, 2])


def test_npz_scales_bytes_and_keeps_floats(tmp_path: Path) -> None:
    images, labels = load_clean_data(npz(tmp_path, images=IMAGES, labels=LABELS.astype(np.uint8)))
    torch.testing.assert_close(images, torch.full((2, 3, 4, 4), 0.2))
    assert labels.tolist() == [0, 2]
    assert labels.dtype == torch.int64
    assert class_names(tmp_path / "data.npz") == ["0", "1", "2"]
    floats = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    images, _ = load_clean_data(npz(tmp_path, images=floats, labels=LABELS))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.from_numpy(floats).float())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "has no array 'labels'; it holds images"),
        ({"labels": LABELS}, "has no array 'images'"),
        ({"images": IMAGES[0], "labels": LABELS}, r"shape \(3, 4, 4\); \(N, C, H, W\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"images has shape \(0, 3, 4, 4\)"),
        ({"images": IMAGES, "labels": LABELS[:1]}, r"labels has shape \(1,\); \(2,\) is expected"),
        ({"images": IMAGES, "labels": LABELS[None]}, r"labels has shape \(1, 2\)"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels are float64; integers"),
        ({"images": IMAGES, "labels": LABELS == 0}, "labels are bool; integers"),
        ({"images": IMAGES, "labels": LABELS - 1}, "label -1; labels count from 0"),
        ({"images": IMAGES.astype(int), "labels": LABELS}, "images are int64; uint8 and float"),
        (
            {"images": np.stack([IMAGES[0], IMAGES[1] * np.nan]), "labels": LABELS},
            "image 1 has NaN or infinite",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_clean_data(npz(tmp_path, **arrays))


def test_npz_with_pickled_content_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = npz(tmp_path, images=IMAGES, labels=np.array([Payload(marker)], dtype=object))
    with pytest.raises(DataError, match="pickled content is refused and not run"):
        load_clean_data(path)
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DataError, match="pickled content is refused and not run"):
        load_clean_data(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", IMAGES)
    with pytest.raises(DataError, match=r"is not an .npz archive"):
        load_clean_data(tmp_path / "data.npy")
    path = npz(tmp_path, images=IMAGES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot be read as an .npz archive"):
        load_clean_data(path)


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and its numpy pickled CIFAR-10: byte strings, protocol 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else long_text(value)

    def long_text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85"
    array += text(b"b") + b"\x87R(" + number(1) + number(len(pixels)) + number(pixels.shape[1])
    array += b"\x86" + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    items = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + items + b"u."


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(1, 6):
        pixels = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        (folder / f"data_batch_{index}").write_bytes(python2_batch(pixels, [index, 9]))
        np.save(tmp_path / f"pixels_{index}.npy", pixels)
    # A rewrite by Python 3 at protocol 2 goes through numpy's other module and _codecs.encode.
    test = {b"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), b"labels": [3, 8, 0]}
    (folder / "test_batch").write_bytes(pickle.dumps(test, protocol=2))
    names = {b"label_names": [b"airplane", b"automobile"]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def test_cifar(cifar: Path) -> None:
    for path in (cifar, cifar.parent):
        images, labels = load_clean_data(path)
        assert images.shape == (10, 3, 32, 32)
        assert labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
        assert class_names(path) == ["airplane", "automobile"]
    pixels = np.load(cifar.parent / "pixels_2.npy").reshape(2, 3, 32, 32)
    torch.testing.assert_close(images[2:4], torch.from_numpy(pixels).float() / 255)
    images, labels = load_clean_data(cifar, split="test", image_size=16)
    assert images.shape == (3, 3, 16, 16)
    assert labels.tolist() == [3, 8, 0]


def test_cifar_batch_is_what_pickle_reads(cifar: Path) -> None:
    content = pickle.loads((cifar / "data_batch_2").read_bytes(), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], np.load(cifar.parent / "pixels_2.npy"))


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_malicious_cifar_is_refused_and_not_run(cifar: Path, name: str) -> None:
    marker = cifar / "marker"
    (cifar / name).write_bytes(pickle.dumps({b"data": Payload(marker)}, protocol=2))
    read: Callable[[Path], Any] = class_names if name == "batches.meta" else load_clean_data
    with pytest.raises(
        DataError, match=rf"{name}' was refused and nothing in it was run.*asks for"
    ):
        read(cifar)
    assert not marker.exists()
    pickle.loads((cifar / name).read_bytes())
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no entry 'data'"),
        ({b"data": b"x"}, "no entry 'labels'"),
        ({b"data": b"x", b"labels": [1]}, "data is not a uint8 array"),
        ({b"data": np.zeros((1, 12), np.uint8), b"labels": [1]}, r"not a uint8 array \(N, 3072\)"),
        ({b"data": np.zeros((1, 3072), np.int64), b"labels": [1]}, "dtype .*uint8 is expected"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}, "not a list of integers"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "1 images but 2 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-2]}, "label -2"),
    ],
)
def test_malformed_cifar(cifar: Path, content: Any, message: str) -> None:
    for file in cifar.glob("data_batch_*"):
        file.unlink()
    (cifar / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=message):
        load_clean_data(cifar)


def test_empty_cifar(cifar: Path) -> None:
    (cifar / "test_batch").write_bytes(python2_batch(np.zeros((0, 3072), np.uint8), []))
    with pytest.raises(DataError, match="holds no images"):
        load_clean_data(cifar, split="test")


def test_incomplete_cifar(cifar: Path) -> None:
    (cifar / "test_batch").unlink()
    with pytest.raises(DataError, match="has no CIFAR-10 test batch"):
        load_clean_data(cifar, split="test")
    content = (cifar / "data_batch_1").read_bytes()
    (cifar / "data_batch_1").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="truncated or damaged pickle"):
        load_clean_data(cifar)
    (cifar / "batches.meta").write_bytes(pickle.dumps({b"label_names": b"x"}, protocol=2))
    with pytest.raises(DataError, match="not a list of names"):
        class_names(cifar)
    (cifar / "batches.meta").unlink()
    with pytest.raises(DataError, match=r"no file batches.meta"):
        class_names(cifar)


def test_normalisation(folder: Path) -> None:
    plain, _ = load_clean_data(folder)
    images, _ = load_clean_data(folder, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5))
    expected = (plain - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor(
        [0.1, 0.2, 0.5]
    ).view(1, 3, 1, 1)
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5,) * 3}, "mean and std are given together"),
        ({"std": (0.5,) * 3}, "mean and std are given together"),
        ({"mean": (0.5,), "std": (0.5,) * 3}, r"mean is \[0.5\]; the images have 3 channels"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 2}, "std is .* 3 channels"),
        ({"mean": (float("nan"),) * 3, "std": (1,) * 3}, "finite numbers"),
        ({"mean": (0.5,) * 3, "std": (1, 1, 0)}, "only numbers above 0"),
        ({"image_size": 0}, "image_size is 0; allowed"),
        ({"image_size": (3, 4, 5)}, r"image_size is \(3, 4, 5\); allowed"),
        ({"image_size": (3, 2.5)}, "image_size is"),
        ({"split": "val"}, "split is 'val'; allowed: 'train', 'test'"),
    ],
)
def test_arguments_out_of_range(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_clean_data(folder, **arguments)
