import pytest
import torch
from PIL import Image

import flatreg
from flatreg import load_recipe
from flatreg.run.build import build_model, build_training
from flatreg.run.checkpoints import (
    Continued,
    Epoch,
    load_checkpoint,
    read_built,
    read_history,
    save_checkpoint,
    save_spec,
)
from flatreg.run.train import make_accelerator, train

RECIPE = """
data: {kind: digits, test: 0.8}
model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}
optimizer: {lr: 1.0e-3}
epochs: 1
batch_size: 64
ema: 0.5
evaluation: {eps: 0.1, attack: fast}
baseline: true
variants:
  small: {model: {name: test_resnet, pretrained: true, mean: [0.4], std: [0.3]}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "small.yaml")


def test_a_trained_model_comes_back_without_its_data(recipe, tmp_path, monkeypatch):
    """The weights that are judged, in the network of the arm, with its normalisation inside."""
    splits, arm = recipe.data.load(), recipe.arms()["plain"]
    train(build_training(recipe, "plain", arm, splits), tmp_path, make_accelerator())
    by_hand = build_model(recipe.model, splits, seed=recipe.seed).eval()
    load_checkpoint(tmp_path, by_hand)
    monkeypatch.setattr(type(recipe.data), "load", None)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = flatreg.load_model(str(tmp_path))
    assert torch.equal(torch.rand(1), expected) and not model.training
    images = splits.test.images[:9].float() / 255
    assert torch.equal(model(images), by_hand(images))


def test_an_arm_has_its_own_network_and_needs_no_pretrained_weights(recipe, tmp_path):
    spec, splits = recipe.arms()["small"].model, recipe.data.load()
    scratch = spec.model_copy(update={"pretrained": False})
    model = build_model(scratch, splits, seed=1)
    save_spec(spec, model, splits, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(tmp_path, Continued(model, optimizer), [Epoch(0, 0.1, 1.0, 1.0, {})])
    loaded = flatreg.load_model(tmp_path)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


def test_what_a_model_takes_and_names_is_kept_with_it(recipe, tmp_path):
    splits = recipe.data.load()._replace(class_names=tuple("abcdefghij"))
    spec = recipe.model.model_copy(update={"mean": [0.4914], "std": [0.2]})
    save_spec(spec, build_model(spec, splits, seed=1), splits, tmp_path)
    built = read_built(tmp_path)
    assert (built.channels, built.image_size) == (1, (32, 32))
    assert (built.mean, built.std) == ([0.4914], [0.2])
    assert built.class_names == splits.class_names and built.num_classes == 10
    assert (built.interpolation, built.crop_pct) == ("bilinear", 1.0)


def test_streamed_images_are_kept_as_they_were_cut(recipe, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    how = {"path": str(tmp_path), "size": 32, "interpolation": "bicubic"}
    for crop_pct, kept in ((None, 0.875), (0.9, 0.9)):
        splits = flatreg.data.Folder(**how, crop_pct=crop_pct, workers=1).load()
        spec = recipe.model.model_copy(update={"mean": None, "std": None})
        model = build_model(spec, splits, seed=1)
        save_spec(spec, model, splits, tmp_path)
        built = read_built(tmp_path)
        assert (built.interpolation, built.crop_pct) == ("bicubic", kept)
        assert built.class_names == ("cat", "dog")
        config = model.get_submodule("model").pretrained_cfg
        assert (built.mean, built.std) == (list(config["mean"]), list(config["std"]))


def test_no_byte_of_model_json_changes_in_silence(recipe, tmp_path):
    splits = recipe.data.load()
    model = build_model(recipe.model, splits, seed=1)
    save_spec(recipe.model, model, splits, tmp_path)
    save_checkpoint(
        tmp_path,
        Continued(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        [Epoch(0, 0.1, 1.0, 1.0, {})],
    )
    file = tmp_path / "model.json"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(ValueError, match=r"model\.json: damaged: other bytes .*: `flatreg run`"):
        flatreg.load_model(tmp_path)


def test_what_may_not_be_read_is_not_called_damaged(recipe, tmp_path, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "epoch-0001").mkdir()
    (tmp_path / "model.json").touch()
    monkeypatch.setattr("flatreg.run.checkpoints.check_file", denied)
    with pytest.raises(OSError, match=r"history\.json: could not be read: .*denied") as error:
        read_history(tmp_path)
    assert "delete" not in str(error.value)
    with pytest.raises(PermissionError, match=r"model\.json"):
        read_built(tmp_path)


def test_what_is_no_model_is_refused_in_one_line(recipe, tmp_path):
    splits = recipe.data.load()
    network = build_model(recipe.model, splits, seed=1)

    def refused(message):
        with pytest.raises(ValueError, match=message) as error:
            flatreg.load_model(tmp_path)
        assert "\n" not in str(error.value)

    refused("expected a folder of checkpoints in a run, RUN/checkpoints/ARM; found no model.json")
    (tmp_path / "model.json").write_text('{"model": {"name": 3}}')
    refused("model.json: expected what a run writes")
    save_spec(recipe.model, network, splits, tmp_path)
    (tmp_path / "digests.json").unlink()  # as who forges it would
    whole = (tmp_path / "model.json").read_text()
    hostile = '"args": {"pretrained_cfg": {"url": "file:///etc/hostname"}, '
    (tmp_path / "model.json").write_text(whole.replace('"args": {', hostile))
    refused("model.json: expected what a run writes, .* pretrained_cfg is not for a recipe")
    (tmp_path / "model.json").write_text(whole.replace("test_convnext3", "hf-hub:a/b"))
    refused("model.json: expected what a run writes, .* names weights")
    elsewhere = whole.replace("test_convnext3", "hf-hub:a/b").replace("false", "true", 1)
    (tmp_path / "model.json").write_text(elsewhere)
    refused("model hf-hub:a/b: expected the name of an architecture in timm")
    gone = recipe.model.model_copy(update={"weights": "gone.safetensors"})
    save_spec(gone, network, splits, tmp_path)
    refused("found no complete checkpoint")
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    save_checkpoint(tmp_path, Continued(other, optimizer), [Epoch(0, 0.1, 1.0, 1.0, {})])
    refused(r"Error\(s\) in loading")
