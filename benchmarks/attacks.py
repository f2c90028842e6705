"""Strength and cost of the standard cascade beside pyautoattack's `standard`.

    python benchmarks/attacks.py --peer --ours --checkpoints DIR --cifar NPZ \
        --runs digits=RUN cifar=RUN pairs=RUN vit=RUN fashion=RUN
    python benchmarks/attacks.py                # the tables of what is in the JSON

`--peer`, `--ours` and `--paired` take names of cases, none for all; a row is stored after each run,
in the place of the one it repeats. Passes are samples, counted inside the model, whoever calls it;
a unit is a forward, a backward counts as two. Runs are those of recipes/quickstart.yaml (digits),
recipes/cifar10_small.yaml (cifar), `attacked_models.RECIPES` (pairs, vit: `python
benchmarks/attacked_models.py FOLDER` writes them), and recipes/finetune_efficientnet.yaml on
Fashion-MNIST (fashion).

`--presets without-giving-up` and its like are `standard` with one idea off: see `ABLATIONS`.
`--seed` is of the random starts; the images stay the same.

A   Strength: correct samples left. Ours may leave no more than the peer in any case. "only" counts
    the samples that one of the two alone fools.
B   Cost: units, and how many times ours the peer spends. Targets: 30 where the peer leaves nobody,
    6 where it leaves more than half of the correct samples, else 2. Seconds have a ratio only where
    `--paired` took both in turns on the same machine.
C   Yield: how many samples each stage of ours fooled, and how many it was given.
D   Seeds: verdicts that another seed of the random starts turns.
E   Ablation: samples left and units, each idea off; sums over the cases that all of them ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attacked_models import cifar_resnet, imagenet_classifier, npz_images, trained
from side_by_side import Rows, describe_machine, show
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks import Attack, apgd, race, square
from flatreg.attacks.cascade import PRESETS as CASCADES
from flatreg.data.files import write_whole
from flatreg.data.loading import subset

SEED = 0
PRESETS = ("standard", "standard-full", "fast")
_FIRST, _SECOND, _, _LAST = CASCADES["standard"]
_EVERYWHERE = {"linf": ((9, 10, 1e9), (4, 30, 1e9)), "l2": ((9, 15, 1e9), (3, 60, 1e9))}
_BY_LOGIT = {"linf": ((4, 40, 1.15),), "l2": ((3, 75, 1.2),)}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model ("resnet20", or an arm of a run as "digits/nfgsm"), a ball, and how many images."""

    model: str
    norm: str
    eps: float
    samples: int = 200


def ablations(norm: str) -> dict[str, tuple[Attack, ...]]:
    """`standard` with one idea off; the balls are Linf and L2."""
    everywhere, by_logit = _EVERYWHERE[norm], _BY_LOGIT[norm]
    return {
        "without-second": (_FIRST, race, _LAST),
        "without-race": (_FIRST, _SECOND, _LAST),
        "without-giving-up": (_FIRST, _SECOND, partial(race, heats=everywhere), _LAST),
        "without-ranking": (_FIRST, _SECOND, partial(race, heats=by_logit), _LAST),
        "without-long-search": (_FIRST, _SECOND, partial(race, fmn=(1, 1), apgd=(1, 1)), _LAST),
        "without-spot-check": (_FIRST, _SECOND, race, partial(square, queries=2500)),
        "without-any-of-them": (  # in the manner of the cascade before: all classes, everyone
            _FIRST,
            _SECOND,
            partial(apgd, loss="dlr", targets=9, steps=100),
            partial(square, queries=2500),
        ),
    }


ABLATIONS = tuple(ablations("linf"))

CASES = {
    "resnet20-8": Case("resnet20", "linf", 8 / 255),
    "resnet20-1.5": Case("resnet20", "linf", 1.5 / 255),
    "resnet20-1.2": Case("resnet20", "linf", 1.2 / 255),
    "resnet20-1": Case("resnet20", "linf", 1 / 255),
    "resnet20-1-500": Case("resnet20", "linf", 1 / 255, 500),
    "resnet20-0.5": Case("resnet20", "linf", 0.5 / 255, 500),
    "resnet20-l2-0.15": Case("resnet20", "l2", 0.15, 500),
    "resnet56-1": Case("resnet56", "linf", 1 / 255),
    "resnet56-1.2": Case("resnet56", "linf", 1.2 / 255),
    "digits-nfgsm-0.2": Case("digits/nfgsm", "linf", 0.2),
    "digits-nfgsm-0.25": Case("digits/nfgsm", "linf", 0.25),
    "digits-flatreg-0.2": Case("digits/margin-bound", "linf", 0.2),
    "digits-flatreg-0.25": Case("digits/margin-bound", "linf", 0.25),
    "digits-nfgsm-l2-1": Case("digits/nfgsm", "l2", 1.0),
    "digits-nfgsm-l1-5": Case("digits/nfgsm", "l1", 5.0),
    "digits-plain-0.2": Case("digits/plain", "linf", 0.2),
    "digits-nfgsm-0.1": Case("digits/nfgsm", "linf", 0.1, 360),  # of 360
    "digits-nfgsm-l2-0.5": Case("digits/nfgsm", "l2", 0.5, 360),
    "cifar-nfgsm-2": Case("cifar/nfgsm", "linf", 2 / 255, 500),
    "cifar-nfgsm-4": Case("cifar/nfgsm", "linf", 4 / 255, 500),
    "cifar-nfgsm-8-500": Case("cifar/nfgsm", "linf", 8 / 255, 500),
    "cifar-nfgsm-8": Case("cifar/nfgsm", "linf", 8 / 255),
    "cifar-nfgsm-l2-1": Case("cifar/nfgsm", "l2", 1.0),
    "pairs-0.06": Case("pairs/flatreg", "linf", 0.06, 500),
    "vit-0.03": Case("vit/flatreg", "linf", 0.03, 60),
    "efficientnet-4": Case("fashion/pgd-rising", "linf", 4 / 255, 100),
    "imagenet-1": Case("imagenet", "linf", 1 / 255, 24),
    "imagenet-0.25": Case("imagenet", "linf", 0.25 / 255, 24),
}


@dataclass(frozen=True)
class Loaded:
    """What both attack: the model and the same samples."""

    case: str
    model: nn.Module
    data: TensorDataset
    indices: list[int]
    device: str

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        images, labels = (tensor[self.indices] for tensor in self.data.tensors)
        return images.contiguous().to(self.device), labels.to(self.device)


@dataclass
class Forwards:
    """Samples that went through a model."""

    forwards: int = 0
    backwards: int = 0

    @property
    def units(self) -> int:
        """A backward is two forwards."""
        return self.forwards + 2 * self.backwards


class Stages(logging.Handler):
    """The accuracies that the peer logs after each of its stages."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.found = n, list[tuple[str, int]]()

    def emit(self, record: logging.LogRecord) -> None:
        """Read one message."""
        match = re.match(r"robust accuracy after (\S+): ([\d.]+)%", record.getMessage())
        if match:
            self.found.append((match[1].lower(), round(float(match[2]) / 100 * self.n)))


@dataclass
class Store:
    """The rows of the JSON file, written after every change."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Read what is there."""
        text = path.read_text(encoding="utf-8") if path.exists() else '{"rows": []}'
        return cls(path, json.loads(text)["rows"])

    def put(self, *rows: Row) -> None:
        """Add rows, each in the place of the one with the same case, attack and size."""
        new = {_key(row) for row in rows}
        self.rows = [row for row in self.rows if _key(row) not in new] + list(rows)
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in self.rows)
        write_whole(self.path, f'{{"rows": [\n{lines}\n]}}\n')

    def find(self, case: str, who: str, preset: str, n: int, seed: int = SEED) -> Row | None:
        """The row, if it was measured."""
        return next((row for row in self.rows if _key(row) == (case, who, preset, n, seed)), None)


def _key(row: Row) -> tuple[str, str, str, int, int]:
    return row["case"], row["who"], row["preset"], row["n"], row.get("seed", SEED)


def load(name: str, args: argparse.Namespace) -> Loaded:
    """Load the model and the images of a case."""
    model, data = _model(CASES[name].model, args)
    model = model.to(args.device).eval().requires_grad_(False)
    chosen = subset(range(len(data)), CASES[name].samples, SEED)
    return Loaded(name, model, data, chosen, args.device)


def _model(name: str, args: argparse.Namespace) -> tuple[nn.Module, TensorDataset]:
    if name.startswith("resnet"):
        folder, images = _given(args, "checkpoints"), _given(args, "cifar")
        return cifar_resnet(int(name.removeprefix("resnet")), folder), npz_images(images)
    if name == "imagenet":
        return imagenet_classifier(npz_images(_given(args, "cifar")))
    run, arm = name.split("/")
    runs = dict(text.split("=", 1) for text in args.runs)
    if run not in runs:
        raise SystemExit(f"this case needs --runs {run}=FOLDER")
    return trained(Path(runs[run]), arm)


def _given(args: argparse.Namespace, option: str) -> Path:
    path: Path | None = getattr(args, option)
    if path is None:
        raise SystemExit(f"this case needs --{option.replace('_', '-')}")
    return path


@contextmanager
def counted(model: nn.Module) -> Iterator[Forwards]:
    """Count the passes of a model where they happen."""
    passes = Forwards()

    def backward(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        passes.forwards += len(logits)
        if logits.requires_grad:
            logits.register_hook(backward)  # type: ignore[no-untyped-call]

    handle = model.register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()


def run_peer(loaded: Loaded) -> Row:
    """Run pyautoattack's standard version, and score the images it returns."""
    from pyautoattack.autoattack import AutoAttack  # type: ignore[import-untyped]

    (images, labels), case = loaded.samples, CASES[loaded.case]
    stages, logger = Stages(len(images)), logging.getLogger("auto-attack")
    logger.addHandler(stages)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    before = os.getloadavg()[0]
    with counted(loaded.model) as passes:
        attack = AutoAttack(
            loaded.model,
            eps=case.eps,
            norm=case.norm.capitalize(),
            seed=SEED,
            version="standard",
            device=loaded.device,
        )
        started = time.perf_counter()
        found, _ = attack.run_standard_evaluation(images, labels, batch_size=256)
        seconds = time.perf_counter() - started
    logger.removeHandler(stages)
    with torch.no_grad():
        clean = loaded.model(images).argmax(1) == labels
        left = (loaded.model(found).argmax(1) == labels) & clean
    survivors = [i for i, stands in zip(loaded.indices, left.tolist(), strict=True) if stands]
    return _row(
        loaded,
        "peer",
        "standard",
        int(clean.sum()),
        passes,
        seconds,
        survivors,
        stages.found,
        before,
    )


def run_ours(loaded: Loaded, preset: str, seed: int = SEED) -> Row:
    """Run `flatreg.evaluate`, everything but the findings, on the images that the peer attacks."""
    case, before = CASES[loaded.case], os.getloadavg()[0]
    images, labels = (tensor[loaded.indices] for tensor in loaded.data.tensors)
    attack = preset if preset in PRESETS else ablations(case.norm)[preset]
    with counted(loaded.model) as passes:
        started = time.perf_counter()
        result = evaluate(
            loaded.model,
            TensorDataset(images, labels),
            eps=case.eps,
            norm=case.norm,
            attack=attack,
            seed=seed,
            diagnose=False,
            progress=False,
        )
        seconds = time.perf_counter() - started
    survivors = [i for i, v in zip(loaded.indices, result.verdicts, strict=True) if v == -1]
    stages = [(stage.attack, stage.accuracy.count) for stage in result.stages]
    row = _row(
        loaded, "ours", preset, result.clean.count, passes, seconds, survivors, stages, before
    )
    return row | {"seed": seed}


def _row(
    loaded: Loaded,
    who: str,
    preset: str,
    clean: int,
    passes: Forwards,
    seconds: float,
    survivors: Sequence[int],
    stages: Sequence[tuple[str, int]],
    before: float,
) -> Row:
    machine = describe_machine(loaded.device)
    return {
        "case": loaded.case,
        "who": who,
        "preset": preset,
        "n": len(loaded.indices),
        "model": CASES[loaded.case].model,
        "norm": CASES[loaded.case].norm,
        "eps": CASES[loaded.case].eps,
        "weights": fingerprint(loaded.model),
        "clean": clean,
        "attacked": len(survivors),
        "forwards": passes.forwards,
        "backwards": passes.backwards,
        "units": passes.units,
        "seconds": seconds,
        "stages": list(stages),
        "survivors": list(survivors),
        "load": [before, machine.pop("load")],
        "machine": machine,
    }


def fingerprint(model: nn.Module) -> str:
    """Digest of the weights: rows of other weights are not compared."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_pair(loaded: Loaded, rounds: int, peer_first: bool) -> tuple[Row, Row]:
    """Run both in turns, the first to go another each round; seconds are medians."""
    peers, ours = list[Row](), list[Row]()
    run_ours(loaded, "fast")  # whoever goes first must not pay for the warm-up
    for turn in range(rounds):
        if peer_first == (turn % 2 == 0):
            peers.append(run_peer(loaded))
            ours.append(run_ours(loaded, "standard"))
        else:
            ours.append(run_ours(loaded, "standard"))
            peers.append(run_peer(loaded))
    times = {"peer": [row["seconds"] for row in peers], "ours": [row["seconds"] for row in ours]}
    pair = times | {
        "peer_first": peer_first,
        "ratio": statistics.median(p / o for p, o in zip(*times.values(), strict=True)),
    }
    peer, own = (
        rows[-1] | {"seconds": statistics.median(times[who]), "pair": pair}
        for who, rows in (("peer", peers), ("ours", ours))
    )
    return peer, own


def compared(store: Store, case: str, preset: str) -> tuple[Row | None, Row | None]:
    """Rows of the peer and of ours, where they are of the same weights."""
    n = CASES[case].samples
    peer, ours = store.find(case, "peer", "standard", n), store.find(case, "ours", preset, n)
    if peer and ours and peer["weights"] != ours["weights"]:
        raise SystemExit(f"{case}: the peer attacked other weights than ours, run both again")
    return peer, ours


def strength(store: Store) -> Rows:
    """Part A."""
    rows: Rows = {}
    total = {"peer": 0, "standard": 0, "only peer": 0, "only ours": 0}
    for case in CASES:
        peer, ours = compared(store, case, "standard")
        rows[case] = {"peer": peer["attacked"], "clean": peer["clean"]} if peer else {}
        for preset in PRESETS:
            if other := compared(store, case, preset)[1]:
                rows[case] |= {preset: other["attacked"], "clean": other["clean"]}
        if peer and ours:
            theirs, own = set(peer["survivors"]), set(ours["survivors"])
            rows[case] |= {"only peer": len(own - theirs), "only ours": len(theirs - own)}
            above = len(own) - len(theirs)
            rows[case] |= {"above": above, "met": "yes" if above <= 0 else "NO"}
            total = {column: count + rows[case][column] for column, count in total.items()}
    above = total["standard"] - total["peer"]
    both = sum("met" in row for row in rows.values())
    rows[f"sum of the {both} that both ran"] = total | {
        "above": above,
        "met": ("yes" if above <= 0 else "NO") if both else "",
    }
    return {name: row for name, row in rows.items() if row}


def cost(store: Store, preset: str) -> Rows:
    """Part B; the targets are those of `standard`."""
    rows: Rows = {}
    for case in CASES:
        peer, ours = compared(store, case, preset)
        if not (peer and ours):
            continue
        ratio, goal = peer["units"] / ours["units"], target(peer["attacked"] / peer["clean"])
        rows[case] = {
            "left by peer": peer["attacked"],
            "left by ours": ours["attacked"],
            "peer": peer["units"],
            "ours": ours["units"],
            "ratio": ratio,
            "peer s": round(peer["seconds"], 1),
            "ours s": round(ours["seconds"], 1),
            "paired ratio": ours.get("pair", {}).get("ratio", ""),
        }
        if preset == "standard":
            rows[case] |= {"target": goal, "met": "yes" if ratio >= goal else "NO"}
    return rows


def stage_yield(store: Store) -> Rows:
    """Part C, over all cases: a stage is given what the one before left."""
    rows: Rows = {}
    for case in CASES:
        ours = store.find(case, "ours", "standard", CASES[case].samples)
        left = ours["clean"] if ours else 0
        for name, after in ours["stages"] if ours else ():
            row = rows.setdefault(name.split("(")[0], {"given": 0, "fooled": 0})
            row["given"] += left
            row["fooled"] += left - after
            left = after
    return rows


def other_seeds(store: Store) -> Rows:
    """Part D."""
    rows: Rows = {}
    for case in CASES:
        found = [store.find(case, "ours", "standard", CASES[case].samples, seed) for seed in (0, 1)]
        if all(found):
            one, two = (set(row["survivors"]) for row in found if row)
            turned = len(one - two), len(two - one)
            rows[case] = {"left, seed 0": len(one), "seed 1": len(two), "turned": sum(turned)}
    total = {name: sum(row[name] for row in rows.values()) for row in rows.values() for name in row}
    return rows | {f"sum of {len(rows)}": total} if rows else {}


def ablated(store: Store) -> Rows:
    """Part E, over the cases that `standard` and all ablations ran."""
    rows: Rows = {}
    every = ("standard", *ABLATIONS)
    for case in CASES:
        found = [store.find(case, "ours", preset, CASES[case].samples) for preset in every]
        if not all(found):
            continue
        for preset, row in zip(every, found, strict=True):
            sums = rows.setdefault(preset, {"cases": 0, "left": 0, "units": 0})
            values = {"cases": 1, "left": row["attacked"], "units": row["units"]} if row else {}
            rows[preset] = {name: sums[name] + value for name, value in values.items()}
    for row in rows.values():
        row["of standard"] = row["units"] / rows["standard"]["units"]
    return rows


def target(share: float) -> int:
    """How many times our units the peer must spend, by the share of the correct it leaves."""
    return 30 if share == 0 else 6 if share > 0.5 else 2


def tables(store: Store) -> None:
    """Print what is known."""
    columns = ["clean", "peer", "standard", "only peer", "only ours", "above", "met"]
    show("A: correct samples left", strength(store), [*columns, *PRESETS[1:]])
    columns = ["left by peer", "left by ours", "peer", "ours", "ratio", "target", "met"]
    for preset in PRESETS:
        if rows := cost(store, preset):
            show(f"B: {preset}", rows, [*columns, "peer s", "ours s", "paired ratio"])
    for title, rows in (
        ("C: fooled by stage", stage_yield(store)),
        ("D: two seeds", other_seeds(store)),
        ("E: one idea off", ablated(store)),
    ):
        if rows:
            show(title, rows, list(next(iter(rows.values()))))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for who in ("peer", "ours", "paired"):
        parser.add_argument(f"--{who}", nargs="*", metavar="CASE", help="none for all")
    every = (*PRESETS, *ABLATIONS)
    parser.add_argument("--presets", nargs="+", default=["standard"], choices=every)
    parser.add_argument("--seed", type=int, default=SEED, help="of the random starts of ours")
    parser.add_argument("--checkpoints", type=Path, help="folder of the CIFAR ResNets")
    parser.add_argument("--cifar", type=Path, help="npz file of CIFAR-10 test images")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER", help="finished")
    parser.add_argument("--rounds", type=int, default=2, help="of each pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/attacks.json"))
    args = parser.parse_args()
    for name in [*(args.peer or ()), *(args.ours or ()), *(args.paired or ())]:
        if name not in CASES:
            parser.error(f"cases are {', '.join(CASES)}, got {name!r}")
    torch.set_num_threads(args.threads)
    store = Store.open(args.output)
    for name in _chosen(args.peer):
        store.put(run_peer(load(name, args)))
    for name in _chosen(args.ours):
        for preset in args.presets:
            store.put(run_ours(load(name, args), preset, args.seed))
    for turn, name in enumerate(_chosen(args.paired)):
        store.put(*run_pair(load(name, args), args.rounds, peer_first=turn % 2 == 0))
    tables(store)


def _chosen(names: Sequence[str] | None) -> Sequence[str]:
    return () if names is None else names or list(CASES)


if __name__ == "__main__":
    main()
