"""Images in tar files: what timm and webdataset read of the same files, and damage of each kind."""

import gc
import io
import json
import os
import tarfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from flatreg.data.image_files import Folder, Timm
from flatreg.data.images import resize
from flatreg.data.streamed import Augmentation
from flatreg.data.tar_files import shards, web_dataset
from flatreg.models.state import derived_seed


def picture(seed, suffix="png", size=9):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 2, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    return stream.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(number, label, key="{:04d}", suffix="png"):
    name = key.format(number)
    return [(f"{name}.{suffix}", picture(number, suffix)), (f"{name}.cls", str(label).encode())]


def write_shards(root, shard="{split}-{number:04d}.tar"):
    """Six training images in two shards, three for validation in one."""
    for split, sizes in (("train", (4, 2)), ("validation", (3,))):
        for number, size in enumerate(sizes):
            start = 10 * number + 100 * (split != "train")
            content = [pair for i in range(size) for pair in sample(start + i, (number + i) % 3)]
            write_tar(root / shard.format(split=split, number=number), content)
    return root


def wds(place, **settings):
    return Timm(**{"name": "wds/", "root": str(place), "size": 7} | settings)


def pixels(image):
    return v2.functional.pil_to_tensor(image.convert("RGB"))


@contextmanager
def files_left_open():
    """Their readers close files when they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def of_webdataset(files):
    with files_left_open():
        rows = webdataset.WebDataset(files, shardshuffle=False).decode("pil")
        return [(pixels(image), label) for image, label in rows.to_tuple("png", "cls")]


def of_timm(root, split):
    with files_left_open():
        return [(pixels(image), label) for image, label in ReaderWds(str(root), split=split)]


def of_timms_tar(file, count):
    def read():
        reader = ReaderImageInTar(str(file))
        pairs = [reader[index] for index in range(count)]
        return [(pixels(Image.open(stream)), label) for stream, label in pairs]

    with files_left_open():
        return read()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_what_webdataset_and_timm_read(tmp_path, workers):
    write_shards(tmp_path)
    splits = wds(tmp_path, workers=workers, **{"crop_pct": 1.0} if workers else {}).load()
    files = [str(tmp_path / f"train-000{n}.tar") for n in (0, 1)]
    theirs = of_webdataset(files)
    assert splits.train.labels.tolist() == [label for _, label in theirs] == [0, 1, 2, 0, 1, 2]
    assert len(splits.test) == 3 and splits.num_classes == 3
    also = of_timm(tmp_path, "train-{0000..0001}.tar|6")
    for index, ((image, label), (same, equal)) in enumerate(zip(theirs, also, strict=True)):
        assert torch.equal(image, same) and label == equal
        ours, expected = splits.train[index][0], resize(image[None], 7)[0]
        # in memory bit for bit; timm's own transform, of Pillow, for images that stream
        assert (ours.int() - expected.int()).abs().max() <= (1 if workers else 0)
    loader = DataLoader(splits.train, batch_size=4, num_workers=workers)
    assert torch.cat([labels for _, labels in loader]).tolist() == splits.train.labels.tolist()


@pytest.mark.parametrize(
    ("shard", "split"),
    [
        ("{split}-{number:04d}.tar", "train"),
        ("{split}/{number:04d}.tar", "train"),
        ("{split}-{number:04d}.tar", "train-{0000..0001}.tar"),
        ("{split}-{number:04d}.tar", "train-{0000..0001}.tar|6"),
        ("{split}-{number:04d}.tar", "train-0000.tar::train-0001.tar"),
        ("{split}-{number:04d}.tar", "train-{0000,0001}.tar"),
        ("{split}_{number}.tar", "train_{0..1}.tar"),
        ("{number:04d}-of-{split}.tar", "train"),  # by _info.json
    ],
)
def test_a_split_is_named_as_in_timm(tmp_path, shard, split):
    write_shards(tmp_path, shard)
    names = [shard.format(split="train", number=number) for number in (0, 1)]
    if "-of-" in shard:
        (tmp_path / "_info.json").write_text(
            json.dumps({"splits": {"train": {"filenames": names, "num_samples": 6}}})
        )
    assert shards(tmp_path, split) == [str(tmp_path / name) for name in names]


def test_the_order_of_an_epoch_depends_on_no_worker(tmp_path):
    write_shards(tmp_path)
    epochs = []
    for workers in (1, 2):
        images = wds(tmp_path, workers=workers).load().train
        generator = torch.Generator().manual_seed(derived_seed(0, 1))
        augmented = images.augmented(Augmentation(scale=(0.3, 1.0), flip=True))
        batches = list(augmented.loader(2, count=6, generator=generator))
        epochs.append([torch.cat(column) for column in zip(*batches, strict=True)])
    assert torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][1], epochs[1][1])
    assert epochs[0][1].sort()[0].tolist() == [0, 0, 1, 1, 2, 2]


def test_labels_in_json_and_several_suffixes(tmp_path):
    for split in ("train", "validation"):
        members = []
        for i in range(4):
            members += [
                (f"a/{i}.JPG", picture(i, "jpg")),
                (f"a/{i}.json", json.dumps({"label": i % 2, "cls": 9}).encode()),
                (f"a/{i}.mask.png", picture(50 + i)),
            ]
        write_tar(tmp_path / f"{split}.tar", [("__meta__.json", b"{}"), *members])
    splits = wds(tmp_path, target_key="label").load()
    assert splits.train.labels.tolist() == [0, 1, 0, 1]
    whole = pixels(Image.open(io.BytesIO(picture(2, "jpg"))))
    assert torch.equal(splits.train.images[2], resize(whole[None], 7)[0])
    masks = wds(tmp_path, target_key="label", input_key="mask.png").load()
    assert not torch.equal(masks.train.images, splits.train.images)


def test_a_tar_file_of_classes_is_what_timm_reads(tmp_path):
    names = ["10/b.png", "9/a10.png", "9/a9.png", "./B2/c.png", "10/notes.txt"]
    members = [(name, picture(i) if name.endswith("png") else b"") for i, name in enumerate(names)]
    train = write_tar(tmp_path / "train.tar", members)
    write_tar(tmp_path / "val.tar", members)
    data = Timm(name="", root=str(tmp_path), size=7)
    splits = data.load()
    theirs = of_timms_tar(train, 4)
    assert splits.class_names == ("9", "10", "B2")  # in natural order
    assert splits.train.labels.tolist() == [label for _, label in theirs]
    for ours, (image, _) in zip(splits.train.images, theirs, strict=True):
        assert torch.equal(ours, resize(image[None], 7)[0])


@pytest.mark.parametrize("packed", [True, False])
def test_digits_that_are_none_of_a_number_are_sorted_as_letters(tmp_path, packed):
    names = ["10/1\u00b22.png", "10/10.png", "9/9.png", "9\u2460/a.png"]
    for split in ("train", "val"):
        members = [(name, picture(i)) for i, name in enumerate(names)]
        for name, content in [] if packed else members:
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).write_bytes(content)
        if packed:
            write_tar(tmp_path / f"{split}.tar", members)
    splits = Timm(name="", root=str(tmp_path), size=7).load()
    assert splits.class_names == ("9", "9\u2460", "10")
    assert splits.train.labels.tolist() == [0, 1, 2, 2]


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def overwrite(path, at, content):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


def damaged_header(path):
    """Of the third member: tarfile takes it for the end of the file."""
    with tarfile.open(path) as archive:
        overwrite(path, archive.getmembers()[2].offset, b"\xff" * 512)


def cut_between(path):
    with tarfile.open(path) as archive:
        cut(path, archive.getmembers()[4].offset)


def linked(path):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.LNKTYPE, "1.png"
        archive.addfile(info)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: cut(p, 700), "train-0000.tar: not read as a tar file: "),
        (lambda p: cut(p, 0), "not read as a tar file: "),
        (cut_between, "damaged or cut short at byte "),
        (damaged_header, "damaged or cut short at byte "),
        (linked, "is sparse, or a link"),
        (lambda p: write_tar(p, sample(0, 0), "w:gz"), "not read as a tar file: "),
        (
            lambda p: write_tar(p, sample(0, "cat")),
            "a class number in .cls, got TypeError",
        ),
        (lambda p: write_tar(p, sample(0, 1.5)), "a class number in .cls, got TypeError"),
        (lambda p: write_tar(p, sample(0, -1)), "expected class numbers from 0"),
        (lambda p: write_tar(p, sample(0, 0)[:1]), r"0000: expected .jpg/.*.cls, got .png"),
        (lambda p: write_tar(p, sample(0, 0)[1:]), "and .cls, got .cls"),
        (lambda p: write_tar(p, sample(0, 0) * 2), "it stands there twice"),
        (lambda p: write_tar(p, sample(0, 0) + sample(1, 0) + sample(0, 0)), "two samples"),
        (lambda p: write_tar(p, [("0.png", b"no"), ("0.cls", b"0")]), "0.png: not decoded: "),
        (lambda p: write_tar(p, []), "from 0 to|expected images"),
    ],
)
def test_damaged_shards_are_refused_in_one_line(tmp_path, break_it, message):
    write_shards(tmp_path)
    (tmp_path / "train-0001.tar").unlink()
    break_it(tmp_path / "train-0000.tar")
    with pytest.raises(ValueError, match=message) as error:
        wds(tmp_path, train_split="train-{0000..0000}.tar").load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": None}, "data.root: expected a folder of data, found none at None"),
        ({"root": "nowhere"}, "data.root: expected a folder of data, found none at nowhere"),
        ({"train_split": "dev"}, r"expected dev.tar, dev-\*.tar or dev/\*.tar in"),
        ({"train_split": "train-{b..a}.tar"}, "expected a rising range"),
        ({"train_split": "train-{9..1}.tar"}, "expected a rising range"),
        ({"train_split": "http://host/train-{0..1}.tar"}, "shards on a disk of this machine"),
        ({"train_split": "pipe:cat train.tar"}, "shards on a disk of this machine"),
    ],
)
def test_a_bad_name_of_shards_is_refused_in_one_line(tmp_path, settings, message):
    write_shards(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        wds(tmp_path, **settings).load()
    assert "\n" not in str(error.value)


def test_info_that_names_no_split_is_refused(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "_info.json").write_text('{"splits": {}}')
    with pytest.raises(ValueError, match=r"_info.json: expected splits.train.filenames, .*Key"):
        wds(tmp_path).load()


def test_a_local_set_of_hugging_face(tmp_path, monkeypatch):
    """As `hfds/` reads a set that is fetched already: a folder of parquet files."""
    hugging_face = pytest.importorskip("datasets")
    Features, Column = hugging_face.Features, hugging_face.Image
    ClassLabel, Dataset = hugging_face.ClassLabel, hugging_face.Dataset
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = Features({"image": Column(), "label": ClassLabel(names=["ant", "bee"])})
    for split, count in (("train", 5), ("validation", 3)):
        rows = {
            "image": [{"bytes": picture(i), "path": None} for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"set/{split}.parquet")
    for workers in (0, 2):
        data = Timm(
            name=f"hfds/{tmp_path}/set", root=str(tmp_path / "cache"), size=7, workers=workers
        )
        splits = data.load()
        assert splits.class_names == ("ant", "bee") and splits.train.labels.tolist() == [
            0,
            1,
            0,
            1,
            0,
        ]
        whole = pixels(Image.open(io.BytesIO(picture(3))))
        ours = splits.train.images_at([3])[0]
        if not workers:
            assert torch.equal(ours, resize(whole[None], 7)[0])
        batches = list(DataLoader(splits.train, batch_size=2, num_workers=workers))
        assert torch.equal(batches[1][0][1], ours)


CLASSES = [("a/0.png", picture(0)), ("b/0.png", picture(1))]
LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"Z"]


def write_folders(root, members=CLASSES):
    for split in ("train", "validation"):
        write_tar(root / f"{split}.tar", members)
    return Timm(name="folder", root=str(root), size=7)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("train-{0000..0001}.tar::train-0001.tar", "validation", "train-0001.tar twice"),
        ("train-{0000,0000}.tar", "validation", "train-0000.tar twice"),
        ("linked", "validation", "linked-1.tar twice"),
        ("train", "train", "expected other images for test than for training"),
        ("train", "train-{0001..0001}.tar", "got train-0001.tar for both"),
        ("train", "linked-0.tar", "got train-0000.tar for both"),
    ],
)
def test_images_that_would_count_twice_are_refused(tmp_path, train, test, message):
    write_shards(tmp_path)
    for number in range(2):
        (tmp_path / f"linked-{number}.tar").symlink_to(tmp_path / "train-0000.tar")
    data = wds(tmp_path, train_split=train, test_split=test)
    with pytest.raises(ValueError, match=message) as error:
        data.load()
    assert "\n" not in str(error.value)
    if "both" in message or "other" in message:
        assert len(data.load_test().test)  # a model that is evaluated trains on nothing


def test_splits_that_are_one_folder_by_two_names_are_refused(tmp_path):
    data = write_folders(tmp_path)
    assert len(data.load().train) == 2
    both = Timm(name="folder", root=str(tmp_path), size=7, train_split="val")
    with pytest.raises(ValueError, match=r"got validation\.tar for both"):
        both.load()
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(picture(0))
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="got train for both"):
        Folder(path=str(tmp_path), size=7).load()


@pytest.mark.parametrize("name", ["b/0.png", "./b/0.png"])
def test_a_member_that_was_written_anew_is_refused(tmp_path, name):
    data = write_folders(tmp_path, [*CLASSES, (name, picture(2))])
    with pytest.raises(ValueError, match=r"train\.tar, b/0\.png: it stands there twice"):
        data.load()


@pytest.mark.parametrize("kind", LINKS)
def test_members_that_are_no_files_are_refused_and_not_left_out(tmp_path, kind):
    data, info = write_folders(tmp_path), tarfile.TarInfo("b/9.png")
    info.type, info.linkname = kind, "0.png"
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"b/9\.png is sparse, or a link"):
        data.load()


def test_tar_files_one_behind_the_other_are_refused(tmp_path):
    data, file = write_folders(tmp_path), tmp_path / "train.tar"
    file.write_bytes(file.read_bytes() + bytes(2**21))
    assert len(data.load().train) == 2  # zeros alone
    file.write_bytes(file.read_bytes() + (tmp_path / "validation.tar").read_bytes())
    with pytest.raises(ValueError, match=r"its end is at byte [\d,]+, and more lies behind it"):
        data.load()


def test_a_tar_file_that_is_written_after_it_was_indexed_is_refused(tmp_path):
    write_shards(tmp_path)
    opened, labels = web_dataset(
        shards(tmp_path, "train"), "train", image_key=None, target_key=None
    )
    assert opened(5) and len(labels) == 6
    other = [pair for i in range(4) for pair in sample(50 + i, 0)]  # of the same size
    before = (tmp_path / "train-0000.tar").stat()
    write_tar(tmp_path / "train-0000.tar", other)
    os.utime(tmp_path / "train-0000.tar", ns=(0, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"train-0000\.tar: written since its images"):
        opened(0)
    assert opened(5)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{0..10}", ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{8..010}", ["008", "009", "010"]),
        ("{00..1}", ["00", "01"]),
    ],
)
def test_ranges_are_those_of_webdataset(tmp_path, pattern, expected):
    named = [f"{number}.tar" for number in expected]
    assert [Path(file).name for file in shards(tmp_path, f"{pattern}.tar")] == named
    assert webdataset.shardlists.expand_urls(f"{pattern}.tar") == named


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9}" * 7, "{0..999}{0..999}{1..2}"])
def test_more_shards_than_anybody_has_are_refused_at_once(tmp_path, pattern):
    with pytest.raises(ValueError, match="at most 1,000,000 shards"):
        shards(tmp_path, f"{pattern}.tar")


@pytest.mark.parametrize("text", ["1_0", "1" * 30, "1" * 6000, "1 2", "", "0x1", "[" * 100_000])
@pytest.mark.parametrize("key", ["cls", "json"])
def test_what_is_no_class_number_is_refused_by_name(tmp_path, key, text):
    content = text if key == "cls" or text[:1] == "[" else json.dumps({"label": text})
    file = write_tar(tmp_path / "0.tar", [("0.png", b""), (f"0.{key}", content.encode())])
    with pytest.raises(ValueError, match=r"0\.tar, 0: expected a class number") as error:
        web_dataset([str(file)], "", image_key=None, target_key="label" if key == "json" else None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
