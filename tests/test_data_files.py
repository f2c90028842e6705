"""Data that lies in files: torchvision's sets, image folders, timm's names."""

import bz2
import gzip
import hashlib
import io
import pickle
import struct
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from timm.data import create_dataset
from torchvision import datasets
from torchvision.transforms import v2

from flatreg.data import images as in_memory
from flatreg.data import streamed
from flatreg.data.files import check_rows_apart
from flatreg.data.image_files import Folder, Timm
from flatreg.data.torchvision import Torchvision

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, zipped=True, train=40, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        for part, array in (
            ("images-idx3", noise(count, 6, 6)),
            ("labels-idx1", np.arange(count) % 10),
        ):
            name, content = f"{split}-{part}-ubyte", idx(array)
            if zipped:
                name, content = f"{name}.gz", gzip.compress(content)
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", [".", "KMNIST/raw"])
def test_idx_files_are_read_as_torchvision_reads_them(tmp_path, place, zipped):
    write_idx(tmp_path / place, zipped)
    splits = Torchvision(name="KMNIST", root=str(tmp_path), validation=0.25).load()
    write_idx(tmp_path / "plain" / "KMNIST" / "raw", zipped=False)
    oracle = datasets.KMNIST(tmp_path / "plain", train=False)
    assert torch.equal(splits.test.images[:, 0], oracle.data)
    assert torch.equal(splits.test.labels, oracle.targets)
    assert [len(s) for s in splits[:3]] == [30, 10, 20] and splits.num_classes == 10


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_fashion_mnist_is_read_where_it_lies():
    splits = Torchvision(
        name="FashionMNIST", root=str(DEBIAN), limit=1000, test_limit=500, size=32, channels=3
    ).load()
    assert splits.train.images.shape == (1000, 3, 32, 32) and splits.num_classes == 10
    assert splits.train.labels.bincount().tolist() == [100] * 10
    assert splits.test.images.shape == (500, 3, 32, 32)
    # the mean over all of Fashion-MNIST is 0.286
    assert 0.26 < float(splits.train.images.float().mean()) / 255 < 0.31


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "not read: Not a gzipped file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(noise(40, 6, 6)))[:99], "not read: "),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(noise(5))[:-1]), r"expected 5 .* got 4"),
        (
            "t10k-labels-idx1-ubyte.gz",
            gzip.compress(idx(noise(20, 2))),
            "expected an idx file of bytes with 1 axes",
        ),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(b""), "expected an idx file of bytes"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(noise(19))), "expected 20 labels"),
    ],
    ids=["no gzip", "cut gzip", "cut idx", "two axes", "empty", "a label short"],
)
def test_a_damaged_idx_file_is_named(tmp_path, name, content, message):
    (write_idx(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}") as error:
        Torchvision(name="MNIST", root=str(tmp_path)).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["MNIST", "USPS", "CIFAR10", "SVHN", "OxfordIIITPet", "GTSRB"])
def test_what_is_missing_is_said_with_the_place_and_the_way_out(tmp_path, name):
    with pytest.raises(ValueError, match=f"^data: found no .*{name}.*download: true$") as error:
        Torchvision(name=name, root=str(tmp_path), size=8).load()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_fetched_when_asked_for(tmp_path, monkeypatch):
    source = write_idx(tmp_path / "mirror")

    def fetch(url, download_root, filename, md5):
        if not (source / filename).exists():
            raise URLError("no\nnetwork")
        content = gzip.decompress((source / filename).read_bytes())
        (Path(download_root) / filename.removesuffix(".gz")).write_bytes(content)

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", fetch)
    data = Torchvision(name="MNIST", root=str(tmp_path / "here"), download=True)
    assert len(data.load().train) == 40
    source.rename(tmp_path / "gone")
    assert len(data.load().train) == 40  # it is there now
    data = Torchvision(name="MNIST", root=str(tmp_path / "elsewhere"), download=True)
    with pytest.raises(ValueError, match=r"^data: MNIST could not be fetched: [^\n]*$"):
        data.load()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_cifar(root, batch):
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    files = [name for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]
    for number, name in enumerate(files):
        (folder / name).write_bytes(pickle.dumps(batch(number)))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return folder


def test_forged_cifar_batches_are_not_unpickled(tmp_path):
    exploded = tmp_path / "exploded"
    write_cifar(tmp_path, lambda number: Bomb(exploded))
    with pytest.raises(ValueError, match="found no complete CIFAR10"):
        Torchvision(name="CIFAR10", root=str(tmp_path)).load()
    assert not exploded.exists()
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists()  # it would have shown


def test_arrays_of_torchvision_come_channels_first(tmp_path, monkeypatch):
    images = noise(6, 10, 3, 32, 32)
    folder = write_cifar(
        tmp_path, lambda n: {"data": images[n].reshape(10, -1), "labels": list(range(10))}
    )

    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        listed = [[name, md5(name)] for name, _ in getattr(datasets.CIFAR10, part)]
        monkeypatch.setattr(datasets.CIFAR10, part, listed)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    splits = Torchvision(name="CIFAR10", root=str(tmp_path), channels=3).load()
    assert np.array_equal(splits.train.images, images[:5].reshape(50, 3, 32, 32))
    assert np.array_equal(splits.test.images, images[5]) and splits.test.labels[7] == 7


def test_svhn_and_usps(tmp_path, monkeypatch):
    images, listed = noise(20, 3, 32, 32), {}
    for split, (url, name, _) in datasets.SVHN.split_list.items():
        mat = {"X": images.transpose(2, 3, 1, 0), "y": 1 + np.arange(20)[:, None] % 10}
        scipy.io.savemat(tmp_path / name, mat)
        listed[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    splits = Torchvision(name="SVHN", root=str(tmp_path)).load()
    assert np.array_equal(splits.test.images, images)
    assert splits.test.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    line = "{} " + " ".join(f"{i + 1}:{-1 + 2 * (i % 2)}" for i in range(256)) + "\n"
    for _, name, _ in datasets.USPS.split_list.values():
        (tmp_path / name).write_bytes(
            bz2.compress("".join(map(line.format, range(1, 11))).encode())
        )
    splits = Torchvision(name="USPS", root=str(tmp_path), channels=3).load()
    assert splits.train.images.shape == (10, 3, 16, 16) and splits.num_classes == 10
    assert splits.train.images[4, 2, 3, :4].tolist() == [0, 255, 0, 255]


def save(path, height, width, seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise(height, width, 3, seed=seed)).convert(mode)
    image.save(path, **options)
    return np.asarray(image)


def test_pets_and_traffic_signs_are_decoded_from_their_files(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, number in (("trainval", 0), ("test", 1)):
        lines = [f"Cat_{number}_{i} {i % 2 + 1} 1 1" for i in range(4)]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))
        for i in range(4):
            save(base / "images" / f"Cat_{number}_{i}.jpg", 20 + i, 30, seed=i)
    splits = Torchvision(name="OxfordIIITPet", root=str(tmp_path), size=8, limit=2).load()
    assert sorted(splits.train.labels.tolist()) == [0, 1] and len(splits.test) == 4
    assert splits.num_classes == 2 and splits.test.images.shape == (4, 3, 8, 8)
    base = tmp_path / "gtsrb" / "GTSRB"
    for name in "01":
        save(base / "Training" / f"0000{name}" / "a.ppm", 9, 12, seed=int(name))
    pixels = save(base / "Final_Test" / "Images" / "b.ppm", 9, 12, seed=7)
    (base.parent / "GT-final_test.csv").write_text("Filename;ClassId\nb.ppm;1\n")
    splits = Torchvision(name="GTSRB", root=str(tmp_path), size=9).load()
    assert splits.train.labels.tolist() == [0, 1] and splits.test.labels.tolist() == [1]
    assert np.array_equal(splits.test.images[0], pixels[:, 2:11].transpose(2, 0, 1))


@pytest.fixture
def torchvision_resizes_uint8(monkeypatch):
    """Some releases do so on a CPU that names itself AVX2, and on others cast to float32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.usefixtures("torchvision_resizes_uint8")
@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 4), (37, 23, 16), (15, 40, 21)])
def test_resizing_is_torchvisions_and_nearly_pillows(height, width, size):
    pixels = noise(height, width, 3)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    ours = in_memory.resize(image[None], size)[0]
    theirs = v2.functional.center_crop(v2.functional.resize(image, [size]), [size])
    assert ours.dtype == torch.uint8 and torch.equal(ours, theirs)
    whole = v2.functional.resize(image, [size]).shape[:0:-1]
    pillow = v2.functional.pil_to_tensor(Image.fromarray(pixels).resize(whole, Image.BILINEAR))
    pillow = v2.functional.center_crop(pillow, [size])
    assert (ours.int() - pillow.int()).abs().max() <= 1


def write_folder(root, test="test", classes=("ant", "bee")):
    for split in ("train", test):
        for number, name in enumerate(classes):
            for i in range(3):
                save(root / split / name / f"{i}.png", 10 + i, 14, seed=9 * number + i)
    return root


@pytest.mark.usefixtures("torchvision_resizes_uint8")
@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_a_folder_is_decoded_image_by_image(tmp_path, test):
    write_folder(tmp_path, test)
    save(tmp_path / "train" / "bee" / "z.webp", 12, 12, lossless=True)
    save(tmp_path / "train" / "bee" / "y.JPG", 12, 12, mode="L")
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    splits = Folder(path=str(tmp_path), size=7, validation=0.25).load()
    assert len(splits.train) == 6 and len(splits.validation) == 2 and splits.num_classes == 2
    for channels, mode in ((3, "RGB"), (1, "L")):
        splits = Folder(path=str(tmp_path), size=7, channels=channels).load()
        oracle = datasets.ImageFolder(tmp_path / "train").samples
        assert len(oracle) == len(splits.train) == 8
        for (path, label), image, number in zip(oracle, *vars(splits.train).values(), strict=True):
            pixels = v2.functional.pil_to_tensor(Image.open(path).convert(mode))
            whole = v2.functional.resize(pixels, [7])
            assert torch.equal(image, v2.functional.center_crop(whole, [7])) and label == number


def spoil(root, what):
    if what == "class":
        save(root / "train" / "cat" / "0.png", 9, 9)
    elif what == "empty":
        for split in ("train", "test"):
            (root / split / "cow").mkdir()
    elif what == "no class":
        for path in (root / "test").rglob("*"):
            path.rename(root / f"{path.parent.name}{path.name}") if path.is_file() else None
        for path in (root / "test").iterdir():
            path.rmdir()
    elif what == "cut":
        path = root / "test" / "bee" / "1.png"
        path.write_bytes(path.read_bytes()[:150])
    elif what == "text":
        (root / "test" / "bee" / "1.png").write_text("no image")
    else:
        deep = Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16))
        deep.save(root / "train" / "ant" / "0.png")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("class", "expected the same classes in both splits, got cat only for training$"),
        ("empty", "train: Found no valid file for the classes cow.$"),
        ("no class", "test: Couldn't find any class folder in"),
        ("cut", "bee/1.png: not decoded: "),
        ("text", "bee/1.png: not decoded: cannot identify image file"),
        ("deep", r"ant/0.png: not decoded: expected 8 bits a channel, got Pillow's mode I"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, what, message):
    spoil(write_folder(tmp_path), what)
    with pytest.raises(ValueError, match=message) as error:
        Folder(path=str(tmp_path), size=8).load()
    assert "\n" not in str(error.value)


def test_a_folder_without_its_splits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected PATH/train/CLASS/"):
        Folder(path=str(tmp_path), size=8).load()
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"expected one of test, val, validation in .* found none"):
        Folder(path=str(tmp_path), size=8).load()


def test_what_does_not_fit_the_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "test" / "bee" / "1.png").write_text("no image")
    monkeypatch.setattr(in_memory, "physical_memory", lambda: 2 * 12 * 3 * 64 * 64 - 1)
    with pytest.raises(ValueError, match=r"^data: 12 images of 3x64x64 take 0.0 GiB, .*limit$"):
        Folder(path=str(tmp_path), size=64).load()
    monkeypatch.setattr(in_memory, "physical_memory", lambda: 2 * 12 * 3 * 64 * 64)
    with pytest.raises(ValueError, match="not decoded"):
        Folder(path=str(tmp_path), size=64).load()
    write_idx(tmp_path)
    monkeypatch.setattr(in_memory, "physical_memory", lambda: 2**31)
    with pytest.raises(ValueError, match=r"60 images of 3x3000x3000 take 1.5 GiB, .* 2.0:"):
        Torchvision(name="MNIST", root=str(tmp_path), size=3000, channels=3).load()


def test_timms_folder_is_the_folder(tmp_path):
    write_folder(tmp_path, "val")
    settings = dict(size=7, validation=0.5, test_limit=3, channels=1)
    ours = Folder(path=str(tmp_path), **settings).load()
    theirs = Timm(name="folder", root=str(tmp_path), **settings).load()
    for one, two in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert theirs.num_classes == 2


@pytest.mark.parametrize("test", ["validation", "val", "eval"])
def test_timms_folder_has_the_order_and_the_splits_of_timm(tmp_path, test):
    write_folder(tmp_path, test, classes=("10", "9", "b", "B2"))
    for i in (10, 9):
        save(tmp_path / "train" / "9" / f"{i}.png", 8, 8, seed=i)
    splits = Timm(name="folder", root=str(tmp_path), size=8).load()
    for ours, split in ((splits.train, "train"), (splits.test, "validation")):
        reader = create_dataset("folder", root=str(tmp_path), split=split).reader
        assert ours.labels.tolist() == [label for _, label in reader.samples]
        for (path, _), image in zip(reader.samples, ours.images, strict=True):
            pixels = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
            assert torch.equal(image, in_memory.resize(pixels[None], 8)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": None}, "data.root: expected a folder of data, found none at None"),
        ({"root": "nowhere"}, "found none at nowhere"),
        ({"train_split": "a", "test_split": "b"}, "data.root: expected one of a in .*, found none"),
        ({"test_split": "odd"}, "odd: Couldn't find any class folder in"),
        ({"test_split": "less"}, "same classes in both splits, got ant only for training"),
        ({"test_split": "cut"}, "bee/0.png: not decoded"),  # timm itself would take the next one
    ],
)
def test_a_bad_folder_of_timms_is_refused_in_one_line(tmp_path, settings, message):
    write_folder(tmp_path)
    (tmp_path / "odd").mkdir()
    save(tmp_path / "less" / "bee" / "0.png", 9, 9)
    write_folder(tmp_path, "cut")
    (tmp_path / "cut" / "bee" / "0.png").write_text("no image")
    settings = {"name": "folder", "root": str(tmp_path), "size": 8} | settings
    with pytest.raises(ValueError, match=message) as error:
        Timm(**settings).load()
    assert "\n" not in str(error.value)


class Column(dict):
    """As much of a set of Hugging Face's `datasets` as timm's reader asks for."""

    def __init__(self, labels, names):
        super().__init__(label=labels)
        feature = SimpleNamespace(names=names, str2int=names.index)
        splits = dict.fromkeys(("train", "test"), SimpleNamespace(num_examples=len(labels)))
        self.info = SimpleNamespace(features={"label": feature}, splits=splits)

    def cast_column(self, *_):
        return self

    def __len__(self):
        return len(self["label"])

    def __getitem__(self, key):
        if key == "label":
            return super().__getitem__(key)
        stream = io.BytesIO()
        Image.fromarray(noise(9, 9, 3, seed=key)).save(stream, "png")
        return {"img": {"bytes": stream.getvalue()}, "label": self["label"][key]}


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [
        ("train", "train[:10%]", "train"),
        ("train[:80%]", "train[75%:]", "train"),
        ("train+dev", "dev", "dev"),
        ("train[:80%]", "train[80%:]", None),
        ("train[:-100]", "train[-100:]", None),
        ("train[:10]+dev", "test", None),
    ],
)
def test_rows_of_both_splits_are_refused(train, test, shared):
    pytest.importorskip("datasets")
    whole = {name: SimpleNamespace(num_examples=1000) for name in ("train", "dev", "test")}
    refused = pytest.raises if shared else lambda *_, **__: nullcontext()
    with refused(ValueError, match=f"got rows of {shared} in both [^\n]*$"):
        check_rows_apart(whole, train, test)


def test_a_row_without_an_image_is_named():
    pytest.importorskip("datasets")
    from timm.data.readers.reader_hfds import ReaderHfds

    reader = object.__new__(ReaderHfds)
    reader.dataset, reader.image_key = [{"img": None}], "img"
    with pytest.raises(ValueError, match=r"^hfds/some/Set, image 0: no image in the column img$"):
        streamed.Column(reader, "hfds/some/Set")(0)


def test_sets_of_hugging_face(monkeypatch):
    data = Timm(name="hfds/some/Set", size=9, test_split="test", input_key="img")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data.name: hfds/some/Set needs a package: pip install"):
        data.load()
    labels = {"train": [0, 1, 2, 1], "test": [2, 0]}

    def load_dataset(name, split, cache_dir, trust_remote_code=False):  # the last of timm 1.0.29
        assert name == "some/Set"
        return Column(labels[split], ["a", "b", "c"])

    package = ModuleType("datasets")
    package.__spec__ = ModuleSpec("datasets", None, origin="datasets/__init__.py")
    package.load_dataset, package.Image = load_dataset, lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", package)
    reader = "timm.data.readers.reader_hfds"  # that of the package above is gone after this test
    monkeypatch.setitem(sys.modules, reader, None)
    monkeypatch.delitem(sys.modules, reader)
    splits = data.load()
    assert splits.train.labels.tolist() == labels["train"] and splits.num_classes == 3
    assert np.array_equal(splits.test.images[1], noise(9, 9, 3, seed=1).transpose(2, 0, 1))
    for wrong in ([-1, -1], ["a", "b"], [0, None], [[0], [1, 2]], [0.0, 1.0]):
        labels["test"] = wrong
        with pytest.raises(
            ValueError, match=r"split test: expected class numbers in label; [^\n]*$"
        ):
            data.load()
    with pytest.raises(ValueError, match="split dev: KeyError"):
        Timm(name="hfds/some/Set", size=9, train_split="dev").load()
