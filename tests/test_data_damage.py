"""Data that was damaged, or made to harm: one line with the file, before memory is taken for it."""

import contextlib
import gzip
import io
import os
import resource
import shutil
import socket
import struct
import zipfile
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from flatreg.data.image_files import Folder, Timm
from flatreg.data.sources import Array, Digits
from flatreg.data.torchvision import Torchvision


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def arrays(**changes):
    plain = dict(x_train=pixels(6, 4, 4), y_train=np.arange(6) % 2)
    plain |= dict(x_test=pixels(4, 4, 4, seed=1), y_test=np.arange(4) % 2)
    return plain | changes


def npz(path, save=np.savez, **changes):
    save(path, **arrays(**changes))
    return path


@contextlib.contextmanager
def in_one_line(named=None, match=None):
    """The block is refused in one line, which names the file."""
    with pytest.raises(ValueError, match=match) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and len(message) < 700, message
    assert named is None or str(named) in message, message


def equal(one, two):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(one[:3], two[:3], strict=True)
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_with_any_other_byte_is_read_right_or_refused(tmp_path, save):
    path = npz(tmp_path / "a.npz", save)
    whole, expected = path.read_bytes(), Array(path=str(path)).load()
    read = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = Array(path=str(path)).load()
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error), (place, error)
        else:  # a date, or another word that says nothing of the arrays
            read += 1
            assert equal(found, expected), place
    assert read < 0.3 * len(whole)
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        with in_one_line(path):
            Array(path=str(path)).load()


def npy(shape, dtype="|u1", data=b"", version=(1, 0)):
    """A member that claims any shape and type."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + data


def with_member(path, content, name="x_train.npy", compression=zipfile.ZIP_DEFLATED):
    members = {}
    for key, value in arrays().items():
        stream = io.BytesIO()
        np.save(stream, value)
        members[f"{key}.npy"] = stream.getvalue()
    members[name] = content
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return path


MEMBERS = {
    "many rows": (npy((10**12, 4, 4)), "takes 16000000000000 bytes, got 0"),
    "too many rows for a number": (npy((10**30, 4, 4)), "bytes, got 0"),
    "negative": (npy((-6, 4, 4), data=bytes(96)), "takes -96 bytes, got 96"),
    "a row more": (npy((7, 4, 4), data=bytes(96)), "takes 112 bytes, got 96"),
    "a row less": (npy((5, 4, 4), data=bytes(96)), "takes 80 bytes, got 96"),
    "not a shape": (npy("six", data=bytes(96)), "not valid"),
    "version 9": (npy((6, 4, 4), data=bytes(96), version=(9, 0)), "version"),
    "objects": (npy((6, 4, 4), "|O", b"\x80\x04K\x01."), "got object"),
    "code": (npy((6, 4, 4), "__import__('os').getcwd()"), "descr"),
    "no array": (b"PNG", "a.npz: "),
    "nothing": (b"", "a.npz: "),
    "deep": (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "a.npz: "),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_that_lies_is_refused_before_memory_is_taken(tmp_path, name):
    content, message = MEMBERS[name]
    path = with_member(tmp_path / "a.npz", content)
    with in_one_line(path, message):
        Array(path=str(path)).load()


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flatreg.data.images.physical_memory", lambda: 2**22)
    path = with_member(tmp_path / "a.npz", npy((2**22, 4, 4), data=bytes(2**26)))
    assert path.stat().st_size < 2**18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with in_one_line(path, "the arrays of a.npz take 0.1 GiB, more than half"):
        Array(path=str(path)).load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


def test_members_that_stand_twice_or_are_encrypted_are_refused(tmp_path):
    path = npz(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("y_test.npy", b"")
    with in_one_line(path, r"expected every array once, y_test.npy stands there twice"):
        Array(path=str(path)).load()
    content = bytearray(npz(path).read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + flags] |= 1
    path.write_bytes(content)
    with in_one_line(path, "x_train.npy is encrypted"):
        Array(path=str(path)).load()


WRONG = {
    "strings": (dict(x_train=np.full((6, 4, 4), "a")), "got <U1"),
    "bytes": (dict(x_test=np.full((4, 4, 4), b"a")), r"got \|S1"),
    "complex": (dict(x_train=np.ones((6, 4, 4), complex)), "got complex128"),
    "structured": (dict(x_train=np.zeros((6, 4, 4), [("a", "u1")])), "got "),
    "dates": (dict(x_train=np.zeros((6, 4, 4), "M8[s]")), "got datetime64"),
    "booleans": (dict(x_train=np.zeros((6, 4, 4), bool)), "got bool"),
    "nan": (dict(x_train=np.full((6, 4, 4), np.nan)), "from nan to nan"),
    "one nan": (dict(x_test=np.where(np.arange(64) == 5, np.nan, 0.5).reshape(4, 4, 4)), "nan"),
    "infinite": (dict(x_train=np.full((6, 4, 4), np.inf)), "from inf to inf"),
    "signed": (dict(x_train=np.ones((6, 4, 4), np.int8)), "got int8"),
    "0-d images": (dict(x_train=np.uint8(3)), "expected n images and labels"),
    "vectors": (dict(x_train=pixels(6, 16), x_test=pixels(4, 16)), "expected n images"),
    "five axes": (dict(x_train=pixels(6, 1, 1, 4, 4)), "expected n images"),
    "no images": (dict(x_train=pixels(0, 4, 4), y_train=np.arange(0)), "expected n images"),
    "no pixels": (dict(x_train=pixels(6, 0, 4)), "expected n images"),
    "0-d labels": (dict(y_train=np.int64(3)), "expected n images and labels"),
    "labels of two axes": (dict(y_train=np.eye(6, dtype=int)), "labels must be class numbers"),
    "half a label": (dict(y_train=np.arange(6) / 2), "labels must be class numbers"),
    "nan label": (dict(y_train=np.full(6, np.nan)), "labels must be class numbers"),
    "beyond int64": (dict(y_train=np.full(6, 2**63, np.uint64)), "labels must be class numbers"),
    "int64 minimum": (dict(y_test=np.full(4, -(2**63))), "labels must be class numbers"),
    "truth values": (dict(y_train=np.arange(6) > 2), "labels must be class numbers"),
    "words": (dict(y_train=np.array(list("ababab"))), "expected class numbers, got <U1"),
    "a billion classes": (dict(y_train=np.arange(6) * 10**8), "expected class numbers from 0"),
    "other sizes": (dict(x_test=pixels(4, 5, 5)), "one shape and type in both splits"),
    "other channels": (dict(x_test=pixels(4, 4, 4, 3)), "one shape and type in both splits"),
    "other types": (dict(x_test=np.ones((4, 4, 4)) / 2), "one shape and type in both splits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_are_no_images_or_labels_are_refused(tmp_path, name):
    changes, message = WRONG[name]
    path = npz(tmp_path / "a.npz", **changes)
    with in_one_line(None if "billion" in name else path, message):
        Array(path=str(path)).load()


RIGHT = {
    "Fortran order": dict(x_train=np.asfortranarray(arrays()["x_train"])),
    "whole floats": dict(y_train=arrays()["y_train"].astype(float)),
    "half precision": dict(y_train=arrays()["y_train"].astype(np.float16)),
    "big endian": dict(y_train=arrays()["y_train"].astype(">i2"), y_test=np.arange(4) % 2),
    "unsigned": dict(y_train=arrays()["y_train"].astype(np.uint64)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_same_numbers_in_another_form_are_the_same(tmp_path, name):
    expected = Array(path=str(npz(tmp_path / "a.npz"))).load()
    assert equal(Array(path=str(npz(tmp_path / "b.npz", **RIGHT[name]))).load(), expected)


def test_images_beyond_the_memory_are_refused_before_they_are_made(tmp_path):
    folder(tmp_path)
    for size in (20_000, 10**6, 10**30):
        with in_one_line(None, r"^data: 1,797 images of 1x.* GiB, more than half"):
            Digits(size=size).load()
        with in_one_line(None, r"^data: 8 images of 3x.* GiB, more than half"):
            Folder(path=str(tmp_path), size=100 * size).load()


@pytest.mark.parametrize(("limit", "refused"), [("65536\n", True), ("max\n", False), ("", False)])
def test_the_memory_of_a_container_counts(tmp_path, monkeypatch, limit, refused):
    (tmp_path / "memory.max").write_text(limit, encoding="utf-8")
    places = (tmp_path / "memory.max", tmp_path / "nowhere")
    monkeypatch.setattr("flatreg.data.images._CONTAINER", places)
    with in_one_line(None, "this machine's 0.0") if refused else contextlib.nullcontext():
        Digits(size=8).load()


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(pixels(9, 9, 3))).save(path, **options)


def folder(root):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            for i in range(2):
                save(root / split / name / f"{i}.png")
    return root / "train" / "ant" / "0.png"


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def bomb(width):
    """A PNG that says it has so many rows of as many pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, width, 1, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def deep_colour(path):
    """A PNG of 16 bits a channel in three colours, which Pillow does not write."""
    rows = b"".join(b"\0" + bytes(range(6 * 4)) for _ in range(4))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    packed = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def replaced(make):
    def spoil(path):
        path.unlink()
        make(path)

    return spoil


def bound(path):
    here = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def frames(kind):
    images = [Image.fromarray(pixels(9, 9, 3, seed=i)) for i in range(3)]
    return lambda p: images[0].save(p, format=kind, save_all=True, append_images=images[1:])


def judged_on_training_images(path):
    shutil.rmtree(test := path.parents[2] / "test" / "ant")
    test.symlink_to("../train/ant")


SPOILT = {
    "pipe": (replaced(os.mkfifo), "got a pipe"),
    "socket": (replaced(bound), "got a socket"),
    "device": (replaced(lambda p: p.symlink_to("/dev/zero")), "got a device"),
    "broken link": (replaced(lambda p: p.symlink_to("nowhere.png")), "No such file"),
    "link to itself": (replaced(lambda p: p.symlink_to(p.name)), "Too many levels"),
    "link to the class": (lambda p: (p.parent / "more").symlink_to("../ant"), "remove it"),
    "link to the root": (lambda p: (p.parent / "more").symlink_to("../.."), "remove it"),
    "link to a class": (lambda p: (p.parents[1] / "bee/more").symlink_to("../ant"), "remove it"),
    "link to the training": (judged_on_training_images, r"test/ant: a link .* remove it"),
    "two links": (
        lambda p: [(p.parent / n).symlink_to(p.parent.parent.parent) for n in "ab"],
        "remove it",
    ),
    "class that leads nowhere": (lambda p: (p.parents[1] / "cow").symlink_to("x"), "leads nowhere"),
    "empty file": (lambda p: p.write_bytes(b""), "not decoded"),
    "text": (lambda p: p.write_text("no image"), "not decoded: cannot identify"),
    "cut PNG": (lambda p: cut(p, 0.5), "not decoded"),
    "cut JPEG": (lambda p: (save(p.with_suffix(".jpg")), cut(p.with_suffix(".jpg"), 0.7)), "cut"),
    "grey of 16 bits": (
        lambda p: Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(p),
        "8 bits a channel",
    ),
    "colour of 16 bits": (deep_colour, "8 bits a channel"),
    "floats": (
        lambda p: Image.fromarray(np.ones((9, 9), np.float32)).save(p.with_suffix(".tif")),
        "8 bits a channel",
    ),
    "animated PNG": (frames("png"), "expected one image, got 3 frames"),
    "animated WebP": (lambda p: frames("webp")(p.with_suffix(".webp")), "got 3 frames"),
    "pages": (lambda p: frames("tiff")(p.with_suffix(".tiff")), "got 3 frames"),
    "bomb": (lambda p: p.write_bytes(bomb(10_000)), "not decoded: Image size"),
    "large bomb": (lambda p: p.write_bytes(bomb(10**5)), "not decoded: Image size"),
    "a thread": (
        lambda p: Image.fromarray(pixels(1, 60_000, 3)).save(p),
        "not decoded: expected images that resize to at most 1 GiB",
    ),
    "odd name": (lambda p: p.with_name("a\nb\x1b[31m.png").write_text("no image"), r"a\\nb\\x1b"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_refused_in_one_line(tmp_path, name):
    spoil, message = SPOILT[name]
    spoil(folder(tmp_path))
    size = 512 if name == "a thread" else 8
    sources = [Folder(path=str(tmp_path), size=size)]
    sources += [Timm(name="folder", root=str(tmp_path), size=size, test_split="test")]
    for source in sources:
        with in_one_line(tmp_path, "not decoded" if message == "cut" else message):
            source.load()


def test_a_name_that_is_no_utf8_is_read_and_shown(tmp_path):
    folder(tmp_path)
    odd = os.fsencode(tmp_path / "train" / "ant") + b"/\xff\xfe.png"
    with open(odd, "wb") as file:
        Image.fromarray(pixels(9, 9, 3)).save(file, "png")
    assert len(Folder(path=str(tmp_path), size=8).load().train) == 5
    with open(odd, "wb") as file:
        file.write(b"no image")
    with in_one_line(tmp_path, r"\\udcff\\udcfe.png: not decoded"):
        Folder(path=str(tmp_path), size=8).load()


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    folder(tmp_path)
    (tmp_path / "train" / "ant" / "more").mkdir()
    scan = os.scandir

    def closed(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with in_one_line(tmp_path, "more: not read: Permission denied"):
        Folder(path=str(tmp_path), size=8).load()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_8_bits_in_any_colours_are_read(tmp_path, mode, channels):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read the YCbCr TIFF that it writes")
    folder(tmp_path)
    image = Image.fromarray(pixels(8, 8, 3, seed=4)).convert(mode)
    options = {"transparency": bytes([0, 128])} if mode == "P" else {}
    path = (tmp_path / "train" / "ant" / "a").with_suffix(
        ".tif" if mode in ("CMYK", "YCbCr") else ".png"
    )
    save(path, image, **options)
    found = Folder(path=str(tmp_path), size=8, channels=channels).load().train
    expected = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(8, 8, channels)
    assert torch.equal(found.images[2], torch.from_numpy(expected).permute(2, 0, 1))


def idx(array):
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def mnist(root, zipped, **changes):
    files = {
        "train-images-idx3-ubyte": idx(pixels(20, 4, 4)),
        "train-labels-idx1-ubyte": idx(np.arange(20, dtype=np.uint8) % 10),
        "t10k-images-idx3-ubyte": idx(pixels(10, 4, 4, seed=1)),
        "t10k-labels-idx1-ubyte": idx(np.arange(10, dtype=np.uint8)),
    }
    for name, content in (files | changes).items():
        path = root / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return Torchvision(name="MNIST", root=str(root))


IDX = {
    "many rows": ("images", bytes((0, 0, 8, 3)) + b"\xff" * 12 + bytes(320), "GiB, more than half"),
    "a row less": ("images", idx(pixels(20, 4, 4)) + b"1", "expected 320 values"),
    "no pixels": ("images", idx(pixels(20, 0, 4)), "expected images, got shape"),
    "floats": ("images", bytes((0, 0, 13, 3)) + bytes(40), "expected an idx file of bytes"),
    "other labels": ("labels", idx(np.arange(20, dtype=np.uint8)), "labels from 0 to 9, got 19"),
    "other size": ("images", idx(pixels(20, 5, 5)), "one shape in both splits"),
}


@pytest.mark.parametrize("name", IDX)
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_that_lie_are_refused(tmp_path, name, zipped):
    part, content, message = IDX[name]
    stem = f"train-{part}-idx{3 if part == 'images' else 1}-ubyte"
    with in_one_line(None if name == "other size" else stem, message):
        mnist(tmp_path, zipped, **{stem: content}).load()


def test_a_zipped_bomb_is_not_unpacked(tmp_path):
    source = mnist(
        tmp_path, True, **{"train-images-idx3-ubyte": idx(pixels(20, 4, 4)) + bytes(2**28)}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with in_one_line("train-images-idx3-ubyte.gz", "expected 320 values, .* got more"):
        source.load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_a_zipped_idx_file_with_any_other_byte_is_refused(tmp_path):
    source = mnist(tmp_path, True)
    expected = source.load()
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = source.load()
        except ValueError as error:
            assert "\n" not in str(error) and path.name in str(error), (place, error)
        else:
            assert place < 10 and equal(found, expected), place  # a date, a system


@pytest.mark.parametrize("name", ["USPS", "GTSRB", "OxfordIIITPet", "SVHN", "CIFAR100", "STL10"])
@pytest.mark.parametrize("content", [b"", b"odd", b"\xff" * 99])
def test_damaged_sets_of_torchvision_are_named(tmp_path, name, content):
    places = {
        "USPS": ["usps.bz2", "usps.t.bz2"],
        "GTSRB": ["gtsrb/GT-final_test.csv", "gtsrb/GTSRB/Training/00000/a.ppm"],
        "OxfordIIITPet": [f"oxford-iiit-pet/annotations/{n}.txt" for n in ("trainval", "test")],
        "SVHN": ["train_32x32.mat", "test_32x32.mat"],
        "CIFAR100": ["cifar-100-python/train", "cifar-100-python/test"],
        "STL10": ["stl10_binary/train_X.bin", "stl10_binary/test_X.bin"],
    }
    for place in places[name]:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(content)
    (tmp_path / "gtsrb/GTSRB/Final_Test/Images").mkdir(parents=True)
    (tmp_path / "oxford-iiit-pet/images").mkdir(parents=True, exist_ok=True)
    with in_one_line(tmp_path, name):
        Torchvision(name=name, root=str(tmp_path), size=8).load()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("USPS", "usps.bz2"),
        ("GTSRB", "gtsrb/GT-final_test.csv"),
        ("OxfordIIITPet", "oxford-iiit-pet/annotations/trainval.txt"),
        ("Food101", "food-101/meta/train.json"),
        ("DTD", "dtd/dtd/labels/train1.txt"),
        ("FGVCAircraft", "fgvc-aircraft-2013b/data/variants.txt"),
        ("Imagenette", "imagenette2/train/n01440764/a.JPEG"),
    ],
)
def test_a_pipe_in_a_set_of_torchvision_is_not_waited_for(tmp_path, name, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with in_one_line(path, "expected a file, got a pipe"):
        Torchvision(name=name, root=str(tmp_path), size=8).load()
    path.unlink()
    if path.parent != tmp_path:
        (path.parent / "back").symlink_to(tmp_path / path.relative_to(tmp_path).parts[0])
        with in_one_line(tmp_path, "read already"):
            Torchvision(name=name, root=str(tmp_path), size=8).load()
