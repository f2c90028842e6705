"""Attacked accuracy between what others proved and what others attacked.

    python benchmarks/verified_bounds.py --weights DIR --data DIR
    python benchmarks/verified_bounds.py                # the table of what is in the JSON

DIRs: complete_verifier/models/sdp and complete_verifier/datasets/sdp in a checkout of
github.com/Verified-Intelligence/alpha-beta-CROWN. It has the CNN-A models of Dathathri et al. 2020
(SDP-FO, arXiv:2010.11645) and the 200 test images of MNIST and of CIFAR-10 on which verifiers are
compared; nothing of it is in this repository. `--cases` takes names of models; a row is stored
after each run, in the place of the one it repeats. `ours` is seed 0, the default of `evaluate`.

No attack can leave less than a verifier proved, on the same images, so that a number below
`verified` is an error here or there. A number above `published` says that another attack is
stronger; up to half a point, one image in 200, is allowed.

Both columns are Table 4 of Zhou et al., Clip-and-Verify (NeurIPS 2025, arXiv:2512.11087):
`verified` is the largest of its six verifiers, `published` its "Upper bound". Configurations for
these models in that repository attack by PGD with 50 restarts. Table 11 counts 84 verified images
where Table 4 has 42.0%: n is 200.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from attacks import Row, Store, fingerprint
from side_by_side import Rows, describe_machine, show
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flatreg

ALLOWED = 0.5  # points above the published attack: one image in 200
# of the models trained on CIFAR-10, in units of [0,1] pixels: (pixel - mean) / std
MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


@dataclass(frozen=True)
class Case:
    """A file of weights, its ball, and percentages of Table 4.

    `verified` are beta-CROWN, GCP-CROWN with MIP cuts, BICCOS, and Clip-and-Verify with each.
    """

    file: str
    images: str
    eps: float
    verified: tuple[float, float, float, float, float, float]
    published: float


CASES = {
    "MNIST CNN-A-Adv": Case(
        "mnist_cnn_a_adv", "mnist", 0.3, (71.0, 71.5, 76.0, 74.0, 73.5, 76.0), 76.5
    ),
    "CIFAR CNN-A-Adv": Case(
        "cifar_cnn_a_adv", "cifar", 2 / 255, (45.5, 48.5, 48.5, 45.5, 48.5, 48.5), 50.0
    ),
    "CIFAR CNN-A-Adv-4": Case(
        "cifar_cnn_a_adv4", "cifar", 2 / 255, (46.5, 48.5, 48.5, 46.5, 48.5, 48.5), 49.5
    ),
    "CIFAR CNN-A-Mix": Case(
        "cifar_cnn_a_mix", "cifar", 2 / 255, (42.0, 47.5, 48.0, 43.0, 47.5, 48.0), 53.0
    ),
    "CIFAR CNN-A-Mix-4": Case(
        "cifar_cnn_a_mix4", "cifar", 2 / 255, (51.0, 55.0, 56.0, 51.0, 55.0, 56.5), 57.5
    ),
}


def cnn_a(channels: int, side: int) -> nn.Sequential:
    """Convolutions of 16 and 32 channels, 4 x 4 with stride 2, then layers of 100 and 10."""
    features = 32 * (side // 4) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def load_model(case: Case, folder: Path) -> nn.Module:
    """Load the weights; the model takes images in [0,1]."""
    network = cnn_a(1, 28) if case.images == "mnist" else cnn_a(3, 32)
    path = folder / f"{case.file}.model"
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().requires_grad_(False)
    if case.images == "mnist":
        return network
    return flatreg.with_normalization(network, mean=MEAN, std=STD)


def load_images(case: Case, folder: Path) -> TensorDataset:
    """Images `(200, channels, side, side)` in [0,1] and their labels, in the order of the files."""
    images, labels = (
        torch.from_numpy(np.load(folder / case.images / f"{name}_sdp.npy", allow_pickle=False))
        for name in "Xy"
    )
    return TensorDataset(images.float().permute(0, 3, 1, 2).contiguous(), labels.long())


def digest(images: Tensor) -> str:
    """Digest of the images: bounds hold for the same images alone."""
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]


def run(name: str, seed: int, args: argparse.Namespace) -> Row:
    """Attack all images of a case."""
    case, before = CASES[name], os.getloadavg()[0]
    model, data = load_model(case, args.weights), load_images(case, args.data)
    result = flatreg.evaluate(
        model,
        data,
        eps=case.eps,
        norm="linf",
        attack=args.preset,
        seed=seed,
        diagnose=False,
        progress=False,
    )
    machine = describe_machine("cpu")
    survivors = [i for i, v in zip(result.indices, result.verdicts, strict=True) if v == -1]
    return {
        "case": name,
        "who": f"seed {seed}",
        "preset": args.preset,
        "n": result.n,
        "norm": "linf",
        "eps": case.eps,
        "seed": seed,
        "weights": fingerprint(model),
        "images": digest(data.tensors[0]),
        "clean": result.clean.count,
        "attacked": result.attacked.count,
        "forwards": result.forwards,
        "backwards": result.backwards,
        "seconds": result.seconds,
        "stages": [[stage.attack, stage.accuracy.count] for stage in result.stages],
        "survivors": survivors,
        "load": [before, machine.pop("load")],
        "machine": machine,
    }


def verdict(ours: float, case: Case) -> str:
    """Whether an attacked accuracy, in percent, lies between the bounds."""
    if ours < max(case.verified):
        return "NO, below a proof"
    return "yes" if ours <= case.published + ALLOWED else "NO, a weaker attack"


def table(store: Store, preset: str) -> Rows:
    """Percentages of what was run; its first seed is judged, the others stand beside it."""
    rows: Rows = {}
    for name, case in CASES.items():
        runs = [row for row in store.rows if row["case"] == name and row["preset"] == preset]
        if not runs:
            continue
        first, *others = sorted(runs, key=lambda row: int(row["seed"]))
        ours, *more = (100 * row["attacked"] / row["n"] for row in (first, *others))
        rows[name] = {
            "eps": f"{case.eps:.2g}",
            "n": first["n"],
            "clean": 100 * first["clean"] / first["n"],
            "beta-CROWN": case.verified[0],
            "GCP-CROWN": case.verified[1],
            "BICCOS": case.verified[2],
            "verified": max(case.verified),
            "published": case.published,
            "ours": ours,
            "between": verdict(ours, case),
            "other seeds": ", ".join(str(number) for number in more),
            "s": round(first["seconds"]),
        }
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of the .model files")
    parser.add_argument("--data", type=Path, help="folder of mnist/ and cifar/, two .npy in each")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE", choices=CASES)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/verified_bounds.json"))
    args = parser.parse_args()
    if (args.weights is None) != (args.data is None):
        parser.error("a run needs both --weights and --data")
    torch.set_num_threads(1)
    store = Store.open(args.output)
    if args.weights is not None:
        for name in args.cases:
            for seed in args.seeds:
                store.put(run(name, seed, args))
    rows = table(store, args.preset)
    columns = list(next(iter(rows.values()), {}))
    show(f"{args.preset}: % of the images", rows, columns)


if __name__ == "__main__":
    main()
