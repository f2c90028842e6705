"""Images that stay in their files: the same batches by any number of workers, timm's transforms."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from flatreg import evaluate, load_recipe
from flatreg.data import Folder, StreamedImages, Torchvision
from flatreg.data import images as in_memory
from flatreg.data import streamed as streaming
from flatreg.data.streamed import Augmentation
from flatreg.models.state import derived_seed
from flatreg.run import epoch as epochs
from flatreg.run.build import build_training, load_model
from flatreg.run.interrupt import Interrupted
from flatreg.run.recipe import dump_recipe, holds_another
from flatreg.run.settings import RecipeError
from flatreg.run.train import make_accelerator, train
from flatreg.run.trial import build_all

CLASSES = ("ant", "bee", "cat")
HARD = Augmentation(scale=(0.3, 1.0), flip=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(20, 40, 2)
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def recipe(tmp_path, folder):
    def load(*overrides, **data):
        raw = {
            "data": {"kind": "folder", "path": str(folder), "size": 16, "workers": 1, **data},
            "augment": {"scale": [0.5, 1.0], "flip": True, "auto_augment": "rand-m9-mstd0.5"},
            "model": {"name": "test_resnet", "mean": [0.5], "std": [0.5]},
            "optimizer": {"lr": 1.0e-3},
            "epochs": 1,
            "batch_size": 12,
            "evaluation": {"eps": 0.1, "samples": 4, "attack": "fast"},
        }
        (tmp_path / "small.yaml").write_text(json.dumps(raw), encoding="utf-8")
        return load_recipe(tmp_path / "small.yaml", overrides)

    return load


def of_an_epoch(images, *, workers, epoch=0, batch_size=8):
    generator = torch.Generator()
    images.workers = workers
    loader = images.augmented(HARD).loader(batch_size, count=32, generator=generator)
    generator.manual_seed(derived_seed(0, epoch))
    return loader


def test_batches_depend_on_seed_epoch_and_index_alone(folder):
    images = Folder(path=str(folder), size=16, workers=1).load().train
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    drawn = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    images.augmented(HARD)[5, 7]  # puts the streams back
    assert torch.equal(drawn[0], torch.rand(3))
    assert drawn[1:] == (random.random(), np.random.rand())
    first, *others = [list(of_an_epoch(images, workers=n)) for n in (0, 1, 2)]
    assert all(
        torch.equal(x, u) and torch.equal(y, v)
        for other in others
        for (x, y), (u, v) in zip(first, other, strict=True)
    )
    left = list(skip_first_batches(of_an_epoch(images, workers=1), 2))
    assert torch.equal(left[0][0], first[2][0])
    again = next(iter(of_an_epoch(images, workers=0, epoch=1)))
    assert not torch.equal(first[0][0], again[0])
    generator = torch.Generator()  # a second epoch of the same loader, its workers go on
    images.workers = 1
    loader = images.augmented(HARD).loader(8, count=32, generator=generator)
    for epoch in (0, 1):
        generator.manual_seed(derived_seed(0, epoch))
        batches = list(loader)
    assert torch.equal(batches[0][0], again[0])


def test_two_processes_share_out_the_batches_of_one(folder):
    images = Folder(path=str(folder), size=16, workers=1).load().train
    whole = list(of_an_epoch(images, workers=0))
    shares = [
        list(
            prepare_data_loader(
                of_an_epoch(images, workers=0),
                num_processes=2,
                process_index=process,
                split_batches=True,
                rng_types=[],
            )
        )
        for process in (0, 1)
    ]
    for (x, y), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop_pct", [None, 1.0])
def test_evaluation_is_timms_transform(folder, channels, crop_pct):
    source = Folder(path=str(folder), size=16, workers=1, channels=channels, crop_pct=crop_pct)
    data = source.load().test
    with Image.open(folder / "test" / "bee" / "1.png") as image:
        mode = image.convert("L" if channels == 1 else "RGB")
        theirs = create_transform(16, crop_pct=crop_pct, use_prefetcher=True)(mode)
    assert theirs.shape == data.shape
    assert torch.equal(data[5][0], theirs)
    assert data[5][1] == 1


def test_training_is_timms_transform(folder):
    data = Folder(path=str(folder), size=16, workers=1, interpolation="bicubic").load().train
    how = Augmentation((0.3, 0.9), (0.5, 2.0), True, None, (0.4, 0.4, 0.4, 0.1), 1.0)
    ours = data.augmented(how)
    theirs = create_transform(
        16,
        is_training=True,
        scale=(0.3, 0.9),
        ratio=(0.5, 2.0),
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        interpolation="bicubic",
        use_prefetcher=True,
    )
    erase = RandomErasing(1.0, mode="const", max_count=1, device="cpu")
    for number in range(4):
        with Image.open(
            folder / "train" / "ant" / f"{sorted(map(str, range(12)))[number]}.png"
        ) as image:
            picture = image.convert("RGB")
        seed = derived_seed(9, number)
        random.seed(seed), torch.manual_seed(seed)
        assert torch.equal(ours[number, 9][0], erase(theirs(picture)))


def test_without_a_scale_images_are_cut_as_for_evaluation(folder):
    data = Folder(path=str(folder), size=16, workers=1).load().train
    assert torch.equal(data.augmented(Augmentation())[3, 1][0], data[3][0])
    mirrored = data.augmented(Augmentation(flip=True))
    seen = {torch.equal(mirrored[3, key][0], data[3][0]) for key in range(12)}
    assert seen == {True, False}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "policy",
    ["rand-m9-inc1", "rand-mstd101-n3", "v0", "v0r", "original", "originalr", "3a", "augmix-m5-b1"],
)
def test_every_policy_makes_images(folder, policy, channels):
    data = Folder(path=str(folder), size=16, workers=1, channels=channels).load().train
    changed = data.augmented(Augmentation(auto_augment=policy))
    for key in range(40):  # v0 and inc1 keep 0 bits now and then
        assert changed[0, key][0].shape == (channels, 16, 16)


def test_splits_are_those_in_memory(tmp_path):
    for split, count in (("train", 40), ("test", 4)):
        for number in range(count):
            place = tmp_path / split / str(number % 4)
            place.mkdir(parents=True, exist_ok=True)
            grey = np.full((10, 12, 3), number, np.uint8)
            Image.fromarray(grey).save(place / f"{number}.png")
    how = {"path": str(tmp_path), "size": 8, "validation": 0.25, "limit": 30, "test_limit": 3}
    whole, stream = Folder(**how).load(), Folder(**how, workers=2).load()
    assert stream.num_classes == whole.num_classes == 4
    assert stream.class_names == whole.class_names == ("0", "1", "2", "3")
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(stream, name), getattr(whole, name)
        assert isinstance(ours, StreamedImages)
        assert torch.equal(ours.images_at(range(len(ours))), theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert len(stream.to_fit()) == len(stream.train)


def test_a_manifold_is_fitted_to_a_stratified_part(folder, monkeypatch):
    splits = Folder(path=str(folder), size=16, workers=1).load()
    monkeypatch.setattr(in_memory, "_FITTED", 6 * 3 * 16 * 16)
    assert len(splits.to_fit()) == 6
    known = {image.numpy().tobytes(): label for image, label in splits.train}
    found = [known[image.numpy().tobytes()] for image in splits.to_fit()]
    assert sorted(found) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.workers=0"], "augment.scale is for images that are decoded as they are needed"),
        (["data={kind: digits}"], "augment.scale is for images that are decoded"),
        (["data.workers=-1"], "data.*workers"),
        (["data.workers=1.5"], "data.*workers"),
        (["data.crop_pct=1.2"], "crop_pct"),
        (["data.interpolation=cubic"], "did you mean bicubic"),
        (["data.workers=0", "data.crop_pct=0.9", "augment={}"], "crop_pct is for images that str"),
        (["augment.scale=[0.9, 0.1]"], r"expected \[least, greatest\]"),
        (["augment.scale=[0, 1]"], "augment.scale"),
        (["augment.scale=0.5"], "augment.scale"),
        (["augment.scale=null", "augment.ratio=[0.5, 2]"], "ratio has no effect without scale"),
        (["augment={interpolation: bicubic}"], "interpolation has no effect without scale"),
        (["augment.color_jitter=0.4"], "color_jitter has no effect beside auto_augment"),
        (["augment={color_jitter: [0.1, 0.1]}"], "a list of 3 or 4"),
        (["augment={color_jitter: [0.1, 0.1, 0.1, 0.7]}"], "a hue of at most 0.5"),
        (["augment={re_prob: 1.5}"], "augment.re_prob"),
        *(
            ([f"augment.auto_augment={policy}"], "expected a policy of timm")
            for policy in ("rand-foo", "randx", "rand-mx", "rand-m9.5", "v1", "''", "augmix-q1")
        ),
    ],
    ids=str,
)
def test_settings_without_effect_or_sense_are_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message) as told:
        recipe(*overrides)
    assert "\n" not in str(told.value)


def test_images_are_cut_as_for_the_pretrained_weights(recipe):
    """The configuration of the weights is timm's own; what the recipe says goes first."""
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg("vit_small_patch16_224").to_dict()
    )
    pretrained = ("model={name: vit_small_patch16_224, pretrained: true}", "augment={}")
    data = recipe(*pretrained).data
    assert (data.crop_pct, data.interpolation) == (config["crop_pct"], config["interpolation"])
    assert (data.crop_pct, data.interpolation) == (0.9, "bicubic")
    said = recipe(*pretrained, "data.crop_pct=0.7").data
    assert (said.crop_pct, said.interpolation) == (0.7, "bicubic")
    for other in ("model.pretrained=false", "data.workers=0"):
        data = recipe(*pretrained, other).data
        assert data.crop_pct is data.interpolation is None


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_arrays_do_not_stream(name):
    with pytest.raises(ValueError, match=f"workers: expected 0, as the images of {name} are one"):
        Torchvision(name=name, root=".", workers=2)


def test_what_does_not_fit_the_memory_can_stream(folder, monkeypatch):
    monkeypatch.setattr(in_memory, "physical_memory", lambda: 2**10)
    with pytest.raises(ValueError, match="set workers: 4"):
        Folder(path=str(folder), size=16).load()
    assert len(Folder(path=str(folder), size=16, workers=4).load().train) == 36


def trained(recipe, place, **data):
    one = recipe(**data)
    splits = one.data.load()
    history = train(
        build_all(one, splits, place)[place / "checkpoints/flatreg"], place, make_accelerator()
    )
    return history, (place / "epoch-0001/model.safetensors").read_bytes()


def test_training_is_the_same_by_any_number_of_workers(recipe, tmp_path):
    (one, weights), (_, others) = (
        trained(recipe, tmp_path / str(workers), workers=workers) for workers in (1, 2)
    )
    assert weights == others
    assert 0 < one[0].waiting_seconds < one[0].seconds
    assert load_model(tmp_path / "1").class_names == CLASSES


def test_a_run_goes_on_with_another_number_of_workers(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(workers=2)), encoding="utf-8")
    assert not holds_another(tmp_path / "recipe.yaml", recipe(workers=3))
    assert holds_another(tmp_path / "recipe.yaml", recipe("augment={}", workers=0))


def test_one_test_image_is_enough_to_try(recipe, tmp_path):
    for workers, augment in ((1, "augment={flip: true}"), (0, "augment={}")):
        data = {"workers": workers, "limit": 3, "test_limit": 1}
        one = recipe("batch_size=3", augment, **data)
        assert build_all(one, one.data.load(), tmp_path / "run")


def test_nothing_is_decoded_for_arms_without_a_manifold(recipe, tmp_path, monkeypatch):
    one = recipe()
    monkeypatch.setattr(in_memory.Splits, "to_fit", lambda _: pytest.fail("decoded"))
    assert build_all(one, one.data.load(), tmp_path)


def test_a_model_without_names_has_none(recipe, tmp_path):
    one = recipe("data={kind: digits, size: 8, limit: 40}", "augment={}")
    training = build_training(one, "flatreg", one.arms()["flatreg"], one.data.load())
    train(training, tmp_path, make_accelerator())
    assert load_model(tmp_path).class_names is None


@pytest.fixture
def damaged(tmp_path):
    """Images of which one in each split is cut off."""
    root = tmp_path / "damaged"
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
        bad = root / split / "cat" / "4.png"
        bad.write_bytes(bad.read_bytes()[:300])
    return root


def test_a_damaged_file_ends_training_and_evaluation_in_a_line(recipe, damaged, tmp_path):
    one = recipe("batch_size=18", path=str(damaged))
    splits = one.data.load()
    training = build_training(one, "flatreg", one.arms()["flatreg"], splits)
    with pytest.raises(ValueError, match=r"train/cat/4.png: not decoded: ") as told:
        train(training, tmp_path / "run", make_accelerator())
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"test/cat/4.png: not decoded: ") as told:
        evaluate(training.model, splits.test, eps=0.1, attack="fast", progress=False)
    assert "\n" not in str(told.value)


def die(*_):
    import os

    os._exit(7)


def test_a_worker_that_dies_ends_the_training_in_a_line(recipe, tmp_path, monkeypatch):
    one = recipe()
    training = build_training(one, "flatreg", one.arms()["flatreg"], one.data.load())
    monkeypatch.setattr(streaming, "decoded", die)
    with pytest.raises(RuntimeError, match="worker") as told:
        train(training, tmp_path, make_accelerator())
    assert "\n" not in str(told.value).strip()


def test_a_signal_to_all_processes_ends_with_a_checkpoint(recipe, tmp_path, monkeypatch):
    one, real = recipe(), epochs.backward
    training = build_training(one, "flatreg", one.arms()["flatreg"], one.data.load())

    def backward(*arguments, **keywords):
        # As a cluster does; torch's workers obey what comes from their parent.
        workers = [worker.pid for worker in multiprocessing.active_children()]
        assert workers
        code = f"import os\nfor pid in {workers}: os.kill(pid, {signal.SIGTERM:d})"
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **keywords)

    monkeypatch.setattr(epochs, "backward", backward)
    with pytest.raises(Interrupted):
        train(training, tmp_path, make_accelerator())
    assert list(tmp_path.glob("within-0001-*"))


def test_long_images_do_not_fill_the_memory(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (60_000, 1)).save(tmp_path / split / "a" / "long.png")
    data = Folder(path=str(tmp_path), size=224, workers=1).load().test
    with warnings.catch_warnings(), pytest.raises(ValueError, match="at most 1 GiB, got 1x60000"):
        data[0]
