import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file, save_model

from flatreg.attacks.pgd import pgd
from flatreg.data.image_files import Timm
from flatreg.data.loading import subset
from flatreg.evaluation.geometry.sharded import MeasureSettings
from flatreg.report.card import read_card
from flatreg.report.rows import read_report
from flatreg.run.brought import as_trained, check_unseen
from flatreg.run.build import build_model
from flatreg.run.checkpoints import Continued, Epoch, save_checkpoint, save_spec
from flatreg.run.cli import main
from flatreg.run.export import export
from flatreg.run.recipe import dump_recipe, load_recipe
from flatreg.run.recipe_sections import EvaluationSettings
from flatreg.run.target import load_target, validated
from flatreg.threat import to_unit_range

RECIPE = """
data: {kind: digits}
model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}
optimizer: {lr: 3.0e-3}
epochs: 2
evaluation: {eps: 0.05}
"""
SMALL = ["samples=20", "probed=2", "num_probes=2", "rank=4"]
TIMM = ["--data", "digits", "eps=8/255", "mean=[0.5]", "std=[0.5]", "args={kernel_sizes: 3}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one arm, cut short after one of two epochs: its folder and its model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "small.yaml")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    splits = recipe.data.load()
    model = build_model(recipe.model, splits, seed=recipe.seed)
    save_spec(recipe.model, model, splits, folder / "checkpoints/plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = [Epoch(0, 0.1, 1.0, 0.5, {"CrossEntropy": 0.5})]
    save_checkpoint(folder / "checkpoints/plain", Continued(model, optimizer), history)
    return folder, model


def test_the_card_of_an_arm_is_written_and_printed(run, capsys):
    folder, model = run
    assert main(["measure", str(folder / "checkpoints/plain"), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\n")[:-2])) <= 100
    assert "KAPPA" in printed and "trained for 1 of 2 epochs" in printed
    card = read_card(folder / "geometry/plain")
    assert (card.n, card.probed, card.eps, card.data) == (20, 2, 0.05, "digits (test)")
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert card.model == f"test_convnext3, {folder.name}/plain" and card.refused == {}
    assert card.curvature.on.dimension == 4
    names = {path.name for path in (folder / "geometry/plain").iterdir()}
    parts = ("kappa", "layers", "curvature", "bounds")
    figures = {f"card_{part}.{form}" for part in parts for form in ("png", "svg", "pdf")}
    assert names - {".lock"} == {"card.json", "card.md"} | figures
    assert "card_bounds.png" in (folder / "geometry/plain/card.md").read_text()


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_an_arm_is_measured_in_the_norm_of_its_run(run, tmp_path, capsys, eps):
    folder, model = run
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    l2 = RECIPE.replace("{eps: 0.05}", f"{{eps: {eps}, norm: l2, attack: fast}}")
    (tmp_path / "recipe.yaml").write_text(l2)
    arm = tmp_path / "checkpoints/plain"
    assert main(["measure", str(arm), "samples=60", "parts=[kappa]", "rank=0"]) == 0
    card = read_card(tmp_path / "geometry/plain")
    assert (card.norm, card.eps) == ("l2", eps)
    assert f"L2 eps {eps:g}" in capsys.readouterr().out
    images = load_recipe(tmp_path / "recipe.yaml").data.load().test
    rows = subset(range(len(images)), 60, 0)
    x, y = to_unit_range(images.images[rows]), images.labels[rows]
    model.eval()
    right = model(x).argmax(1) == y
    found = pgd(model, x[right], y[right], eps=eps, norm="l2")
    assert card.kappa.by_outcome.right.n == int(right.sum()) > 0
    assert card.kappa.by_outcome.attacked.n == int(found.fooled.sum())
    linf = ["measure", str(arm), "samples=60", "parts=[kappa]", "rank=0", f"output={tmp_path}"]
    assert main([*linf, "norm=linf", "eps=0.1"]) == 0 and read_card(tmp_path).norm == "linf"
    assert main([*linf, "norm=linf"]) == 2
    assert f"norm=linf: needs eps=, the run's {eps:g} is in l2" in capsys.readouterr().err


def test_a_timm_model_with_weights_is_measured(run, tmp_path, capsys):
    _, model = run
    save_model(model, str(tmp_path / "whole.safetensors"))
    save_model(model.model, str(tmp_path / "bare.safetensors"))
    cards = []
    for name in ("whole", "bare"):
        out = tmp_path / name
        command = ["measure", "test_convnext3", *TIMM, *SMALL, "parts=[kappa]", f"output={out}"]
        assert main([*command, f"weights={tmp_path / name}.safetensors"]) == 0
        cards.append(read_card(out))
        assert {p.name for p in out.iterdir()} - {".lock"} == {
            "card.json",
            "card.md",
            "card_kappa.png",
            "card_kappa.svg",
            "card_kappa.pdf",
        }
    assert cards[0].kappa == cards[1].kappa and cards[0].layers is None
    assert not any("random" in note for note in cards[0].notes)
    assert cards[0].eps == 8 / 255
    weights = load_target("test_convnext3", "digits", [*TIMM[2:], "seed=1"], MeasureSettings)
    assert "weights are random" in weights.notes[0]


def test_arrays_are_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 32, 32), np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "tiny.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    settings = [*TIMM[2:], "split=train"]
    target = load_target("test_convnext3", str(tmp_path / "tiny.npz"), settings, MeasureSettings)
    assert target.data_name == "tiny (train)" and target.splits.num_classes == 3
    assert target.model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["test_convnext3", "eps=0.1"],
            "a timm model needs --data DATA and eps=8/255; DATA is digits, FILE.npz, FOLDER",
        ),
        (["test_convnext3", "--data", "digits"], "needs eps="),
        (["test_convnext3", "--data", "digits", "eps=8"], "8 grey levels of 255 write 8/255"),
        (["no_such_net", *TIMM], "Unknown model"),
        (["test_convnext3", "--data", "none.npz", "eps=0.1"], "found none at none.npz"),
        (["test_convnext3", *TIMM, "sample=3"], "no setting sample: expected one of eps, norm, "),
        (["test_convnext3", *TIMM, "sampels=3"], "; did you mean samples?"),
        (
            ["test_convnext3", *TIMM, "split=tset"],
            "split: Input should be 'train', 'validation' or",
        ),
        (
            ["test_convnext3", *TIMM, "args={checkpoint_path: x}"],
            "checkpoint_path is not for a rec",
        ),
        (
            ["test_convnext3", *TIMM, "args={pretrained_cfg: {url: 'file:///x'}}"],
            "pretrained_cfg is",
        ),
        (
            ["s3:a/b", *TIMM],
            "expected the name of a timm architecture, hf-hub:OWNER/MODEL or local-",
        ),
        (
            ["hf-hub:a/b", *TIMM, "pretrained=false"],
            "hf-hub:a/b names weights: add `pretrained: tr",
        ),
        (["local-dir:/tmp/none", *TIMM], "there is no config.json, and pickled weights are not"),
        (["test_convnext3", *TIMM, "samples=few"], "samples: "),
        (["test_convnext3", *TIMM, "rank=5000"], "rank must be at most"),
        (["test_convnext3", *TIMM, "size=16"], "does not take images of shape (1, 16, 16)"),
        (["test_convnext3", *TIMM, "split=validation"], "there are no such images"),
        (["test_convnext3", *TIMM, "parts=[kapa]"], "parts.0: "),
        (["test_convnext3", *TIMM, "nonsense"], "expected key=value, got 'nonsense'"),
        (["test_convnext3", *TIMM, "weights=none.safetensors"], "found none at none.safetensors"),
        (["test_convnext3", *TIMM, "weights_key=ema"], "weights_key: expected weights beside it"),
        (["test_convnext3", *TIMM, "norm=l3"], "norm: "),
        (["RUN", "mean=[0.5]", "std=[0.5]"], "the recipe of the run says what the model is"),
        (["RUN/.."], "expected an arm, RUN/ARM or RUN/checkpoints/ARM: ARM is one of"),
        (["RUN/../none", *TIMM], "there is no such folder of checkpoints"),
        (["RUN", "norm=l3"], "norm: "),
        (["test_convnext3", "--data", "digits", "eps=0.1"], "has 3 channels, the images have 1"),
    ],
)
def test_mistakes_are_one_line(run, capsys, arguments, message):
    arm = str(run[0] / "checkpoints/plain")
    arguments = [arguments[0].replace("RUN", arm), *arguments[1:]]
    assert main(["measure", *arguments, "output=/nonexistent"]) == 2
    printed = capsys.readouterr()
    error = printed.err.strip().split("\r")[-1]
    assert message in error and "\n" not in error and printed.out == ""


@pytest.mark.parametrize(
    ("raw", "place"), [({"eps": True}, "eps"), ({"eps": 0.1, "curve": [0.2, True]}, "curve.1")]
)
def test_true_is_no_radius(raw, place):
    with pytest.raises(ValueError, match=f"^{place}: expected a number, got true or false$"):
        validated(EvaluationSettings, raw)
    assert validated(EvaluationSettings, {"eps": 0.1, "bfloat16": True}).bfloat16


def test_the_split_that_was_trained_on_is_no_test_split():
    source = Timm(name="folder", root="set", size=8, train_split="first", test_split="second")
    check_unseen(source, replace(source, workers=1), "test")
    with pytest.raises(ValueError, match="other images for test than for training, got first"):
        check_unseen(source, replace(source, test_split="first"), "test")
    check_unseen(source, replace(source, root="another", test_split="first"), "test")


@pytest.mark.parametrize(
    ("verb", "changes", "line"),
    [
        ("evaluate", ["data.test=0.5"], "data.test: expected 0.2, as in the training, got 0.5: "),
        ("evaluate", ["--data", "digits", "data.test=0.5"], "data.test: expected 0.2"),
        ("measure", ["data.test=0.5"], "data.test: expected 0.2"),
        ("measure", ["split=validation", "data.validation=0.4"], "data.validation: expected 0.3"),
        ("measure", ["split=validation", "data.limit=500"], "data.limit: expected None"),
        ("measure", ["split=validation", "--data", "digits"], "data.validation: expected 0.3"),
    ],
)
def test_images_that_were_trained_on_are_not_counted_as_test_images(
    run, tmp_path, capsys, verb, changes, line
):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    recipe = RECIPE.replace("digits", "digits, validation: 0.3") + "arm: plain"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main([verb, str(tmp_path / "checkpoints/plain"), *changes]) == 2
    told = capsys.readouterr().err.strip()
    assert line in told and "\n" not in told
    source = load_recipe(tmp_path / "recipe.yaml", ["data.test=0.5"]).data
    assert as_trained([tmp_path / "checkpoints/plain"], source, "digits", {})["test"] == 0.5


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    wrong = f"weights={tmp_path / 'other.safetensors'}"
    assert main(["measure", "test_convnext3", *TIMM, wrong]) == 2
    error = capsys.readouterr().err.strip()
    assert "other.safetensors is of another model: " in error and "\n" not in error


def test_a_folder_without_a_model_is_refused(run, capsys):
    empty = run[0] / "checkpoints/empty"
    empty.mkdir()
    assert main(["measure", str(empty)]) == 2
    assert "RUN/checkpoints/ARM: ARM is one of plain" in capsys.readouterr().err


def test_a_head_for_other_classes_is_not_measured(run, tmp_path, capsys):
    """A training may start from it; a head that was drawn at random has no geometry to tell."""
    _, model = run
    state = {k: t.clone() for k, t in model.model.state_dict().items()}
    for key in ("head.fc.weight", "head.fc.bias"):
        state[key] = state[key][:7].clone()
    save_file(state, tmp_path / "seven.safetensors")
    given = f"weights={tmp_path / 'seven.safetensors'}"
    assert main(["measure", "test_convnext3", *TIMM, given]) == 2
    assert "seven.safetensors has no head for 10 classes" in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path):
    """Makes a run of one arm, of one epoch that did not train it, on data as the settings say."""

    def make(data, where="run"):
        folder = tmp_path / where
        folder.mkdir()
        text = RECIPE.replace("{kind: digits}", data).replace("epochs: 2", "epochs: 1")
        text = text.replace("{eps: 0.05}", "{eps: 0.05, samples: 4, attack: fast}")
        (folder / "recipe.yaml").write_text(text)
        recipe = load_recipe(folder / "recipe.yaml")
        splits, arm = recipe.data.load(), folder / "checkpoints/flatreg"
        model = build_model(recipe.model, splits, seed=recipe.seed)
        save_spec(recipe.model, model, splits, arm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = [Epoch(0, 0.1, 1.0, 0.5, {"CrossEntropy": 0.5})]
        save_checkpoint(arm, Continued(model, optimizer), history)
        return arm

    return make


@pytest.fixture
def pictures(tmp_path):
    """A folder of images of two classes, larger than those of a training on it."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "pictures" / split / name
            place.mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (40, 50), np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "pictures"


def data_of(arm, data, *overrides):
    return load_target(str(arm), data, list(overrides), EvaluationSettings).data


def test_other_data_are_cut_as_those_of_the_training(trained, pictures, tmp_path):
    small = trained("{kind: digits, size: 16}", "small")
    assert data_of(small, "digits")["size"] == 16 and data_of(small, None)["size"] == 16
    assert data_of(small, "digits", "data.size=24")["size"] == 24
    folder = f"kind: folder, path: {pictures}, channels: 1, size: 32"
    memory = trained(f"{{{folder}}}", "memory")
    keys = ("size", "channels", "workers", "crop_pct", "interpolation")
    found = [data_of(memory, str(pictures)), data_of(memory, str(pictures), "data.workers=1")]
    found += [data_of(memory, None, "data.workers=1")]
    expected = [(32, 1, 0, None, None)] + [(32, 1, 1, 1.0, "bilinear")] * 2
    assert [tuple(one[key] for key in keys) for one in found] == expected
    cut = f"{{{folder}, workers: 1, crop_pct: 0.8, interpolation: bicubic}}"
    streamed = trained(cut, "streamed")
    there = data_of(streamed, str(pictures))
    assert (there["crop_pct"], there["interpolation"]) == (0.8, "bicubic") and there["workers"]
    run = tmp_path / "memory"
    assert main(["evaluate", str(run), "data.workers=1", f"output={tmp_path / 'again'}"]) == 0
    again = read_report(tmp_path / "again").recipe["data"]
    assert tuple(again[key] for key in keys) == (32, 1, 1, 1.0, "bilinear")
    assert main(["evaluate", str(run), "--data", str(pictures), f"output={tmp_path / 'o'}"]) == 0
    again = read_report(tmp_path / "o").recipe["data"]
    assert tuple(again[key] for key in keys) == (32, 1, 0, None, None)


@pytest.mark.parametrize("verb", ["evaluate", "measure"])
def test_images_of_another_size_are_refused(trained, tmp_path, capsys, verb):
    arm, rng = trained("{kind: digits, size: 16}"), np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 32, 32), np.uint8), np.arange(30) % 10
    np.savez(tmp_path / "large.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    command = [verb, str(arm), "--data", str(tmp_path / "large.npz"), f"output={tmp_path / 'o'}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "expected images of 1x16x16, as the model was trained on, got 1x32x32" in error
    assert error.count("\n") == 1


def test_a_cut_that_cannot_be_kept_is_refused(trained, pictures, tmp_path, capsys):
    data = f"kind: folder, path: {pictures}, channels: 1, size: 32, workers: 1"
    arm = trained(f"{{{data}}}")
    for place in (arm, arm.parent.parent):
        assert main(["evaluate", str(place), "data.workers=0", f"output={tmp_path / 'o'}"]) == 2
        assert "data.workers=0 does not crop, the training did, to 0.875" in capsys.readouterr().err
    other = trained("{kind: digits, size: 16}", "other")
    shutil.copytree(other, arm.parent / "other")
    source = load_recipe(tmp_path / "run/recipe.yaml").data
    with pytest.raises(ValueError, match=r"trained with size 32, 16: write data\.size="):
        as_trained([arm, arm.parent / "other"], source, "digits", {})


def test_a_stored_model_judges_what_it_was_trained_on(trained, pictures, tmp_path):
    stored = export(trained("{kind: digits, size: 48}", "small"), tmp_path / "digits")
    digits = load_target(f"local-dir:{stored}", "digits", ["eps=0.1"], EvaluationSettings)
    assert digits.images.shape == (1, 48, 48)
    data = f"{{kind: folder, path: {pictures}, channels: 1, size: 32}}"
    stored = export(trained(data), tmp_path / "pets")
    command = (f"local-dir:{stored}", str(pictures), ["eps=0.1", "data.workers=0"])
    assert load_target(*command, EvaluationSettings).images.shape == (1, 32, 32)
    for split in ("train", "test"):
        (pictures / split / "dog").rename(pictures / split / "ant")
    with pytest.raises(
        ValueError, match=r"the 2 classes of the model \(cat, dog\), got 2 \(ant, c"
    ):
        load_target(*command, EvaluationSettings)
