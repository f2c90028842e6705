"""The recipes that need a GPU, trained in miniature: every setting of theirs, on small images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatreg.run.checkpoints import read_history
from flatreg.run.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """JPEG files of three classes, each of a colour, in the layout of ImageNet."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("n01", "n02", "n03")):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 128, (40, 48, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{n}.JPEG")
    return folder


@pytest.mark.parametrize(
    ("recipe", "model", "settings"),
    [
        ("imagenet_finetune", "test_convnext", []),
        ("imagenet_finetune", "test_resnet", ["model.frozen_statistics=true"]),
        ("vit_finetune", "test_vit", ["model.args={img_size: 32, drop_path_rate: 0.1}"]),
    ],
)
def test_the_recipe_trains_in_miniature(recipe, model, settings, images, tmp_path, capsys):
    """Every arm takes a loss and its gradient; the recipe's own trains and is evaluated."""
    file = str(RECIPES / f"{recipe}.yaml")
    smaller = [
        f"data={{kind: folder, path: {images}, size: 32, workers: 1, validation: 0.25}}",
        *(f"model.name={model}", "model.pretrained=false", *settings),
        *("epochs=1", "batch_size=8", "optimizer.warmup_epochs=0"),
        *("monitor.every=1", "monitor.samples=2"),
        *("evaluation.samples=2", "evaluation.attack=fast", "evaluation.curve=[]"),
    ]
    assert main(["check", file, *smaller]) == 0, capsys.readouterr().err
    if model != "test_resnet":  # that it fits is enough
        run = tmp_path / "run"
        assert main(["run", file, *smaller, "baseline=false", "variants={}", f"output={run}"]) == 0
        (epoch,) = read_history(run / "checkpoints/margin-bound")
        assert set(epoch.parts) == {"CrossEntropy", "MarginBound"} and epoch.monitored is not None
