import numpy as np
import pytest
import torch

from flatreg.data import Array, Digits, augment


def test_digits_are_split_once_and_for_all():
    one, two = Digits(hold_back=0.1).load(), Digits(hold_back=0.1).load()
    assert [len(s) for s in (one.train, one.held_back, one.test)] == [1293, 144, 360]
    assert torch.equal(one.train.images, two.train.images) and one.channels == 1
    assert one.train.images.shape[1:] == (1, 32, 32) and one.train.images.dtype == torch.uint8
    assert one.test.labels.bincount().min() >= 30
    image, label = one.train[3]
    batch = one.train.__getitems__([3, 5])
    assert torch.equal(batch[0][0], image) and batch[0][1] == label


def write(path, **changes):
    g = np.random.default_rng(0)
    arrays = dict(
        x_train=g.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), y_train=np.arange(20) % 4,
        x_test=g.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), y_test=np.arange(8) % 4,
    ) | changes  # fmt: skip
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_arrays_of_every_layout(tmp_path):
    path = tmp_path / "a.npz"
    arrays = write(path)
    splits = Array(path=str(path), hold_back=0.2).load()
    assert splits.num_classes == 4 and len(splits.train) == 16 and len(splits.held_back) == 4
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


def test_augmentation_equals_one_image_at_a_time():
    x = torch.rand(16, 3, 10, 12)
    torch.manual_seed(0)
    out = augment(x, crop=2, flip=True)
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
