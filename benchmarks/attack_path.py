"""Does kappa rise until the label flips, and decrease beyond?

    python benchmarks/attack_path.py --checkpoints CHECKPOINTS --images cifar10.npz --run RUN \
        --figure docs/figures/attack_path.png

Follows PGD on the margin (40 steps of 1/20 eps, from the image itself) on a plain ResNet-20 and on
an adversarially trained arm of a finished run of `flatreg run`, and prints for each, over the
paths that flip: the median of kappa as it is and at median clean confidence 0.9, at the clean
image, at its highest, at the flip and at the end; how often it peaks next to the flip; and how
often it ends below what it was at the flip.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from attacked_models import cifar_resnet, npz_images, trained
from side_by_side import show
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flatreg import load_recipe
from flatreg.attacks import pgd
from flatreg.evaluation import AttackPath, attack_path
from flatreg.report.figures.report import path_figure
from flatreg.report.figures.style import save

CONFIDENCE, STEPS = 0.9, 40


def follow(model: nn.Module, data: TensorDataset, eps: float, samples: int) -> AttackPath:
    """Path of the first `samples` images that `model` classifies right."""
    inputs, labels = data.tensors
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) for x in inputs.split(250)]) == labels
    rows = right.nonzero().flatten()[:samples]
    attack = partial(pgd, steps=STEPS, step_size=2 / STEPS)
    return attack_path(
        model,
        inputs[rows],
        labels[rows],
        eps=eps,
        attack=attack,
        matched=CONFIDENCE,
        batch_size=64,
    )


def numbers(path: AttackPath, kappa: Tensor | None) -> dict[str, float | int]:
    """Medians over the paths that flip, and how many do as theory expects, in percent."""
    if kappa is None:
        return {}
    flipped = (path.flip > 0).nonzero().flatten()
    flip, kappa = path.flip[flipped], kappa[:, flipped]
    at_flip, before = (kappa[f, torch.arange(len(flip))] for f in (flip, flip - 1))
    top = torch.maximum(at_flip, before)
    peak = kappa.argmax(0) - flip
    return {
        "n": len(flipped),
        "clean": float(kappa[0].median()),
        "before the flip": float(before.median()),
        "at the flip": float(at_flip.median()),
        "end": float(kappa[-1].median()),
        "lowest beyond": float(_lowest_beyond(kappa, flip).median()),
        "rises to the flip %": 100 * float((top > kappa[0]).double().mean()),
        "falls to the end %": 100 * float((kappa[-1] < top).double().mean()),
        "ends below clean %": 100 * float((kappa[-1] < kappa[0]).double().mean()),
        "peak from the flip": float(peak.double().median()),
        "peak within 2 steps %": 100 * float((peak.abs() <= 2).double().mean()),
    }


def _lowest_beyond(kappa: Tensor, flip: Tensor) -> Tensor:
    """Least value from the flip on."""
    beyond = torch.arange(len(kappa))[:, None] >= flip
    return torch.where(beyond, kappa, torch.inf).amin(0)


def main() -> None:
    """Follow both models, print the numbers, draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of resnet20")
    parser.add_argument("--images", type=Path, required=True, help=".npz with x_test and y_test")
    parser.add_argument("--run", type=Path, required=True, help="of flatreg run, on CIFAR-10")
    parser.add_argument("--arm", default="nfgsm", help="adversarially trained arm of the run")
    parser.add_argument("--grey-levels", type=int, default=16, help="eps of the arm, times 255")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--figure", type=Path, required=True)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    resnet, images = cifar_resnet(20, settings.checkpoints), npz_images(settings.images)
    name = load_recipe(settings.run / "recipe.yaml").model.name
    paths = {
        "ResNet-20, Linf 2/255": follow(resnet, images, 2 / 255, settings.samples),
        f"{name}, {settings.arm}, Linf {settings.grey_levels}/255": follow(
            *trained(settings.run, settings.arm), settings.grey_levels / 255, settings.samples
        ),
    }
    rows = {}
    for name, path in paths.items():
        rows[f"{name}, kappa"] = numbers(path, path.relative_flatness)
        rows[f"{name}, matched"] = numbers(path, path.matched_relative_flatness)
        rows[f"{name}, confidence"] = numbers(path, path.confidence)
    show("Along the attack", rows, list(next(iter(rows.values()))))
    save(path_figure(paths), settings.figure)


if __name__ == "__main__":
    main()
