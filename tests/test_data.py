from collections import Counter
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError

from flatreg.data.configuration import configuration
from flatreg.data.images import (
    ImageArrays,
    Source,
    UnreadImages,
    augment,
    stratified_positions,
    unread_arrays,
)
from flatreg.data.sources import Array, Data, Digits, source_name


def test_digits_are_split_once_and_for_all():
    one, two = Digits(validation=0.1).load(), Digits(validation=0.1).load()
    assert [len(s) for s in (one.train, one.validation, one.test)] == [1293, 144, 360]
    assert torch.equal(one.train.images, two.train.images) and one.channels == 1
    assert one.train.images.shape[1:] == (1, 32, 32) and one.train.images.dtype == torch.uint8
    assert one.test.labels.bincount().min() >= 30
    image, label = one.train[3]
    batch = one.train.__getitems__([3, 5])
    assert torch.equal(batch[0][0], image) and batch[0][1] == label


def write(path, **changes):
    g = np.random.default_rng(0)
    arrays = (
        dict(
            x_train=g.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
            y_train=np.arange(20) % 4,
            x_test=g.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
            y_test=np.arange(8) % 4,
        )
        | changes
    )
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_arrays_of_every_layout(tmp_path):
    path = tmp_path / "a.npz"
    arrays = write(path)
    splits = Array(path=str(path), validation=0.2).load()
    assert splits.num_classes == 4 and len(splits.train) == 16 and len(splits.validation) == 4
    expected = torch.from_numpy(arrays["x_test"][2]).permute(2, 0, 1)
    assert torch.equal(splits.test.images[2], expected)
    write(
        path,
        x_train=arrays["x_train"].transpose(0, 3, 1, 2),
        x_test=arrays["x_test"].transpose(0, 3, 1, 2),
    )
    assert torch.equal(Array(path=str(path)).load().test.images, splits.test.images)
    write(path, x_train=arrays["x_train"][..., 0], x_test=arrays["x_test"][..., 0])
    assert Array(path=str(path)).load().channels == 1
    write(path, x_train=arrays["x_train"] / 255, x_test=arrays["x_test"] / 255)
    assert Array(path=str(path)).load().train.images.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "missing y_test"),
        ({"x_test": np.ones((8, 8, 8, 3)) * 255}, r"uint8 or float in \[0, 1\], got float64"),
        ({"x_test": np.ones((8, 8, 8, 3), dtype=np.int64)}, "got int64"),
        ({"y_test": np.arange(7)}, "expected n images and labels"),
        ({"x_test": np.array([object()])}, "expected|allow_pickle"),
        (
            {"y_train": np.arange(20)[:, None]},
            r"labels must be class numbers .* got int64 of shape",
        ),
        ({"y_train": np.arange(20) - 1}, "labels must be class numbers"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, changes, message):
    write(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        Array(path=str(tmp_path / "a.npz")).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: not an \.npz file"):
        Array(path=str(tmp_path / "a.npz")).load()
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="it holds one array"):
        Array(path=str(tmp_path / "a.npz")).load()


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"expected an \.npz file, found none at nowhere\.npz"):
        Array(path="nowhere.npz").load()


@configuration
class Stripes(Source):
    """A toy source of yours: images with one bright row, which is their class."""

    kind: Literal["stripes"] = "stripes"

    def load(self):
        labels = torch.arange(40) % 4
        images = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
        images[torch.arange(40), 0, labels] = 255
        data = ImageArrays(images, labels)
        return self.splits(unread_arrays(data), unread_arrays(data, size=8, channels=3))


def test_a_source_of_yours_is_read_from_a_recipe_and_split():
    data = {"kind": "stripes", "validation": 0.25, "limit": 20, "test_limit": 8}
    kinds = TypeAdapter(Annotated[Digits | Stripes, Field(discriminator="kind")])
    splits = kinds.validate_python(data).load()
    assert [len(part) for part in splits[:3]] == [15, 5, 8] and splits.num_classes == 4
    for part in splits[:3]:
        height = part.images.shape[2] // 4
        rows = part.images[:, 0, height // 2 :: height, 0]
        assert torch.equal(rows.argmax(1), part.labels)
    assert splits.channels == 1 and splits.test.images.shape[1:] == (3, 8, 8)
    large = UnreadImages(torch.arange(40) % 4, lambda positions: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"^data: 48 images of 3x1000000x1000000 take "):
        Stripes(limit=20, test_limit=28).splits(large, large, shape=(3, 10**6, 10**6))


def test_a_limit_comes_before_what_is_held_back():
    whole = Digits().load()
    splits = Digits(limit=200, test_limit=50, validation=0.1).load()
    assert [len(s) for s in splits[:3]] == [180, 20, 50] and splits.num_classes == 10
    kept = stratified_positions(whole.train.labels, 200)
    images = torch.cat([splits.train.images, splits.validation.images])
    both = {image.numpy().tobytes() for image in images}
    assert both == {image.numpy().tobytes() for image in whole.train.images[kept]}
    only = Digits(test_limit=50).load()
    assert torch.equal(only.test.images, splits.test.images) and len(only.train) == 1437
    for limit in (1437, 5000):
        assert torch.equal(Digits(limit=limit).load().train.images, whole.train.images)
    with pytest.raises(ValueError, match=r"^data.limit: expected at least the 10 classes, got 9$"):
        Digits(limit=9).load()
    with pytest.raises(
        ValueError, match=r"^data.validation: .* of the 20 images .* 10 classes, got 0.1$"
    ):
        Digits(limit=20, validation=0.1).load()


@pytest.mark.parametrize("limit", [5, 13, 60, 119])
def test_a_limit_keeps_the_shares_of_the_classes(limit):
    labels = torch.tensor([0] * 60 + [1] * 30 + [5] * 20 + [7] * 9 + [8])
    labels = labels[torch.randperm(120, generator=torch.Generator().manual_seed(3))]
    taken = stratified_positions(labels, limit)
    assert len(set(taken.tolist())) == limit and taken.tolist() == sorted(taken.tolist())
    assert set(stratified_positions(labels, limit - 1 or 1).tolist()) < set(taken.tolist())
    # oracle: one image at a time, to the class that is furthest behind its share
    counts = Counter(labels.tolist())
    given = dict.fromkeys(counts, 1)
    for _ in range(limit - len(counts)):
        behind = {c: (given[c] + 0.5) / counts[c] for c in counts if given[c] < counts[c]}
        given[min(behind, key=behind.get)] += 1
    found = Counter(labels[taken].tolist())
    assert all(abs(found[c] - given[c]) <= 1 for c in counts) and found[8] == 1


def test_a_limit_knows_only_the_labels_and_leaves_random_numbers_alone():
    labels = torch.arange(100) % 7
    state = torch.get_rng_state()
    first, again = stratified_positions(labels, 30), stratified_positions(labels, 30)
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    assert first.tolist() != list(range(30))


def test_limits_and_channels_of_an_array(tmp_path):
    path = str(tmp_path / "a.npz")
    arrays = write(path)
    splits = Array(path=path, limit=8, test_limit=4, channels=3).load()
    assert splits.train.labels.bincount().tolist() == [2] * 4 and len(splits.test) == 4
    assert splits.channels == 3 and splits.num_classes == 4
    write(path, x_train=arrays["x_train"][..., 0], x_test=arrays["x_test"][..., 0])
    splits = Array(path=path, channels=3).load()
    assert splits.channels == 3
    for channel in range(3):
        expected = torch.from_numpy(arrays["x_train"][..., 0])
        assert torch.equal(splits.train.images[:, channel], expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "torchvison"}, "'digits', 'array', 'torchvision', 'timm', 'folder'"),
        ({"kind": "torchvision", "name": "Cifar10", "root": "."}, "'CIFAR10', 'CIFAR100'"),
        ({"kind": "torchvision", "name": "DTD", "root": "."}, "size is needed"),
        ({"kind": "torchvision", "name": "MNIST", "root": ".", "limits": 3}, "limits"),
        ({"kind": "folder", "path": "."}, "size"),
        ({"kind": "digits", "limit": 0}, "limit"),
        ({"kind": "timm", "name": "tfds/mnist", "size": 8}, "random access .* an iterable"),
        ({"kind": "timm", "name": "HFIDS/a/b", "size": 8}, "random access .* an iterable"),
        ({"kind": "timm", "name": "torch/cifar10", "size": 8}, "kind: torchvision here"),
        (
            {"kind": "timm", "name": "hdfs/a/b", "size": 8},
            "without a slash, wds/, or hfds/",
        ),
    ],
)
def test_a_typo_is_answered_with_what_there_is(data, message):
    with pytest.raises(ValidationError, match=message) as error:
        TypeAdapter(Data).validate_python(data)
    assert len(error.value.errors()) == 1


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"kind": "digits", "size": 8}, "digits"),
        ({"kind": "array", "path": "sets/a.b.npz"}, "a.b"),
        ({"kind": "torchvision", "name": "KMNIST", "root": "sets"}, "KMNIST"),
        ({"kind": "timm", "name": "hfds/uoft-cs/cifar10", "root": None}, "cifar10"),
        ({"kind": "timm", "name": "folder", "root": "sets/birds"}, "birds"),
        ({"kind": "timm", "name": "wds/", "root": "sets/birds"}, "birds"),
        ({"kind": "folder", "path": "sets/birds.v2"}, "birds.v2"),
        ({"kind": "folder", "path": "."}, "folder"),
    ],
)
def test_data_has_a_name(data, name):
    assert source_name(data) == name


def test_augmentation_equals_one_image_at_a_time():
    x = torch.rand(16, 3, 10, 12)
    torch.manual_seed(0)
    out = augment(x, crop=2, flip=True)
    seeded = torch.Generator().manual_seed(0)
    assert torch.equal(augment(x, crop=2, flip=True, generator=seeded), out)
    torch.manual_seed(0)
    top, left = torch.randint(0, 5, (2, 16, 1))
    mirrored = torch.rand(16) < 0.5
    for i in range(16):
        padded = torch.zeros(3, 14, 16)
        padded[:, 2:12, 2:14] = x[i]
        expected = padded[:, top[i] : top[i] + 10, left[i] : left[i] + 12]
        assert torch.equal(out[i], expected.flip(2) if mirrored[i] else expected)
    assert 0 < int(mirrored.sum()) < 16
    assert augment(x, crop=0, flip=False) is x
