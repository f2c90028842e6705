"""Mutated data sets and odd models: each is read right, or refused in one line, within 5 seconds.

`python benchmarks/fuzz_data.py` runs 150 mutated sets (npz, folders, idx files, CIFAR's pickles)
and 60 odd models, each in a process of its own, and writes the counts to `fuzz_data.json`.
`--only 17` runs one case and prints what came; `--every 5` runs every fifth. The case of a number
is always the same. It ends with status 1 if a case is neither read right nor refused in one line.
"""

from __future__ import annotations

import argparse
import gzip
import os
import pickle
import random
import struct
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from child import outcome
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import datasets

from flatreg import evaluate
from flatreg.attacks import pgd
from flatreg.data.files import write_json
from flatreg.data.image_files import Folder
from flatreg.data.images import Source
from flatreg.data.sources import Array
from flatreg.data.torchvision import Torchvision

SETS, MODELS = 150, 60
SECONDS = 5
MEMORY = 2**34  # bytes of addresses: what asks for more is told so
ONE_LINE = (ValueError, TypeError, RuntimeError, OSError)
Outcome = tuple[str, str]


class Own(Exception):
    """What the model itself raises; it comes out as it is."""


class Forged:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.trace),)


# Data: a set is written, mutated and loaded.


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_npz(root: Path, rng: random.Random) -> Source:
    """An .npz, plain or compressed; one array of the half of them is of another kind."""
    arrays = {"x_train": pixels(8, 6, 6, 3), "y_train": np.arange(8) % 2}
    arrays |= {"x_test": pixels(4, 6, 6, 3, seed=1), "y_test": np.arange(4) % 2}
    if rng.random() < 0.5:
        name = rng.choice(list(arrays))
        arrays[name] = rng.choice(ARRAYS)(arrays[name])
    save = rng.choice([np.savez, np.savez_compressed])
    save(root / "a.npz", **arrays)
    return Array(path=str(root / "a.npz"))


ARRAYS: list[Callable[[np.ndarray[Any, Any]], Any]] = [
    lambda a: a.astype(float),
    lambda a: a.astype(float) / 255,
    lambda a: a.astype(complex),
    lambda a: a.astype(str),
    lambda a: a.astype(bool),
    lambda a: a.astype("M8[s]"),
    lambda a: a.astype(np.float16) / np.float16(255),
    lambda a: a.astype(">i8"),
    lambda a: a.astype(np.uint64) + np.uint64(2**63),
    lambda a: -a.astype(np.int64),
    lambda a: np.full(a.shape, np.nan),
    lambda a: np.asfortranarray(a),
    lambda a: a[:0],
    lambda a: a[..., :0],
    lambda a: a[:-1],
    lambda a: a[0],
    lambda a: a.ravel()[0],
    lambda a: a[..., None],
    lambda a: np.concatenate([a, a], -1),
    lambda a: np.array([None] * len(a), dtype=object),
    lambda a: np.zeros(len(a), [("a", "u1"), ("b", "f4")]),
]


def write_folder(root: Path, rng: random.Random) -> Source:
    """A folder of images in several formats."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            place = root / split / name
            place.mkdir(parents=True)
            for i, suffix in enumerate(("png", "jpg", "bmp", "tif", "webp", "ppm")):
                Image.fromarray(pixels(7, 9, 3, seed=i)).save(place / f"{i}.{suffix}")
    return Folder(path=str(root), size=6, channels=rng.choice([1, 3]))


def write_idx(root: Path, rng: random.Random) -> Source:
    """The four idx files of the MNIST family, gzipped or not."""
    zipped = rng.random() < 0.7
    for split, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        for part, array in (("images-idx3", pixels(count, 6, 6)), ("labels-idx1", labels)):
            content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            content += array.tobytes()
            path = root / f"{split}-{part}-ubyte"
            if zipped:
                path, content = path.with_suffix(".gz"), gzip.compress(content, mtime=0)
            path.write_bytes(content)
    return Torchvision(name="MNIST", root=str(root))


def write_cifar(root: Path, rng: random.Random) -> Source:
    """CIFAR's pickles, forged; torchvision compares their md5 before it loads them."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir()
    for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list):
        batch = {"data": pixels(4, 3072), "labels": [0, 1, 2, 3]}
        forged = Forged(str(root / "trace")) if rng.random() < 0.5 else batch
        (folder / name).write_bytes(pickle.dumps(forged))
    (folder / "batches.meta").write_bytes(pickle.dumps(Forged(str(root / "trace"))))
    return Torchvision(name="CIFAR10", root=str(root))


WRITERS = (write_npz, write_npz, write_folder, write_folder, write_idx, write_cifar)


def flip(path: Path, rng: random.Random) -> None:
    """Turn one bit, or several."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 5])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Keep the first part."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def clear(path: Path, rng: random.Random) -> None:
    """Zeros in a range."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = rng.randrange(start, len(content) + 1)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def grow(path: Path, rng: random.Random) -> None:
    """Random bytes at the end, or in the middle."""
    content = path.read_bytes()
    at = rng.choice([len(content), rng.randrange(len(content))])
    path.write_bytes(content[:at] + rng.randbytes(rng.randrange(1, 99)) + content[at:])


def other(path: Path, rng: random.Random) -> None:
    """Something else in its place."""
    path.unlink()
    rng.choice(
        [
            lambda: path.write_bytes(b""),
            lambda: path.write_bytes(rng.randbytes(500)),
            lambda: path.write_text("no image\n" * 9, encoding="utf-8"),
            lambda: os.mkfifo(path),
            lambda: path.mkdir(),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to(path.parent),
            lambda: path.symlink_to("nowhere"),
            lambda: path.write_bytes(pickle.dumps({"a": 1})),
            lambda: None,
        ]
    )()


MUTATIONS = (flip, flip, flip, cut, clear, grow, other)


def contents(source: Source) -> list[Tensor]:
    """Images and labels of training and test."""
    splits = source.load()
    return [tensor for part in (splits.train, splits.test) for tensor in vars(part).values()]


def try_set(number: int, root: Path) -> Outcome:
    """Write the set of a number, mutate a file of it, load it."""
    rng = random.Random(number)
    source, before = WRITERS[number % len(WRITERS)](root, rng), None
    with suppress(ValueError):
        before = contents(source)
    path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    about, checked = path.relative_to(root), path.suffix in (".npz", ".gz")
    if not (isinstance(source, Array) and before is None):  # an array of another kind is enough
        mutation = rng.choice(MUTATIONS)
        mutation(path, rng)
        about = f"{mutation.__name__} {about}"
    try:
        found = contents(source)
    except Exception:
        if (root / "trace").exists():
            return "executed", str(about)
        raise
    if (root / "trace").exists():
        return "executed", str(about)
    for images, labels in (found[:2], found[2:]):
        if not (len(images) == len(labels) and images.ndim == 4 and labels.dtype == torch.int64):
            return "wrong", f"{about}: {images.shape} {labels.shape}"
        unit = images.dtype == torch.uint8 or bool(((images >= 0) & (images <= 1)).all())
        if not unit or not 0 <= int(labels.min()) <= int(labels.max()):
            return "wrong", f"{about}: other values"
    # These have checksums: what is read is what was written.
    if checked and before and not all(map(torch.equal, found, before)):
        return "wrong", f"{about}: other numbers than were written"
    return "read", str(about)


# Models: `forward(net, x)` of a module around a linear network; it may do anything.

Forward = Callable[[nn.Module, Tensor], Any]


def network() -> nn.Sequential:
    """Flatten, a hidden layer, five classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 5))


class Odd(nn.Module):
    """A network with a forward of its own."""

    def __init__(self, forward: Forward, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        """What the case says."""
        return self.own(self.net, x)


def raising(error: BaseException) -> Forward:
    """A forward that raises."""

    def forward(net: nn.Module, x: Tensor) -> Any:
        raise error

    return forward


def in_place(net: nn.Module, x: Tensor) -> Any:
    """It normalises the images that it was given."""
    return net(x.sub_(0.5).mul_(2))


def switching(net: nn.Module, x: Tensor) -> Any:
    """It changes its own mode."""
    net.train(not net.training)
    return net(x)


def without_gradients(net: nn.Module, x: Tensor) -> Any:
    """It computes under `no_grad`."""
    with torch.no_grad():
        return net(x)


def inferring(net: nn.Module, x: Tensor) -> Any:
    """It computes in inference mode."""
    with torch.inference_mode():
        return net(x)


def printing(net: nn.Module, x: Tensor) -> Any:
    """It prints."""
    print("a pass", file=sys.stderr)
    return net(x)


def warning(net: nn.Module, x: Tensor) -> Any:
    """It warns."""
    warnings.warn("odd", stacklevel=1)
    return net(x)


def stateful(net: nn.Module, x: Tensor) -> Any:
    """Its weights change in every pass."""
    with torch.no_grad():
        net[1].weight.mul_(1.001)  # type: ignore[index, union-attr]
    return net(x)


def filled(value: float) -> Callable[[], nn.Module]:
    """A network with one weight of this value."""

    def build() -> nn.Module:
        model = network()
        with torch.no_grad():
            model[1].weight[0, 0] = value
        return model

    return build


def of(forward: Forward) -> Callable[[], nn.Module]:
    """A builder of a model."""
    return lambda: Odd(forward)


CASES: dict[str, Callable[[], Any]] = {
    "plain": network,
    "tuple": of(lambda n, x: (n(x), n(x))),
    "list": of(lambda n, x: [n(x)]),
    "dict": of(lambda n, x: {"logits": n(x)}),
    "None": of(lambda n, x: None),
    "text": of(lambda n, x: "logits"),
    "number": of(lambda n, x: 0.5),
    "numpy": of(lambda n, x: n(x).detach().numpy()),
    "0-d": of(lambda n, x: n(x).sum()),
    "1-d": of(lambda n, x: n(x)[:, 0]),
    "3-d": of(lambda n, x: n(x)[:, :, None]),
    "4-d": of(lambda n, x: x),
    "transposed": of(lambda n, x: n(x).T),
    "one row": of(lambda n, x: n(x)[:1]),
    "a row more": of(lambda n, x: torch.cat([n(x), n(x)[:1]])),
    "squeezed": of(lambda n, x: n(x).squeeze()),
    "one class": of(lambda n, x: n(x)[:, :1]),
    "two classes": of(lambda n, x: n(x)[:, :2]),
    "no class": of(lambda n, x: n(x)[:, :0]),
    "classes by size": of(lambda n, x: n(x)[:, : 2 + len(x) % 4]),
    "nan logits": of(lambda n, x: n(x) * torch.nan),
    "one nan": of(lambda n, x: torch.where(n(x) == n(x).max(), torch.nan, n(x))),
    "infinite": of(lambda n, x: n(x) / 0),
    "one minus infinity": of(lambda n, x: n(x).index_fill(1, torch.tensor([4]), -torch.inf)),
    "huge": of(lambda n, x: n(x) * 1e37),
    "tiny": of(lambda n, x: n(x) * 1e-37),
    "float16": of(lambda n, x: n(x).half()),
    "bfloat16": of(lambda n, x: n(x).bfloat16()),
    "float64": of(lambda n, x: n(x).double()),
    "complex": of(lambda n, x: n(x).to(torch.complex64)),
    "booleans": of(lambda n, x: n(x) > 0),
    "integers": of(lambda n, x: (n(x) * 100).long()),
    "probabilities": of(lambda n, x: n(x).softmax(1)),
    "log-probabilities": of(lambda n, x: n(x).log_softmax(1)),
    "constant": of(lambda n, x: torch.zeros(len(x), 5)),
    "no parameters": lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(5)),
    "frozen": lambda: network().requires_grad_(False),
    "detached": of(lambda n, x: n(x).detach()),
    "no_grad": of(without_gradients),
    "inference mode": of(inferring),
    "in place": of(in_place),
    "switches its mode": of(switching),
    "prints": of(printing),
    "warns": of(warning),
    "random": of(lambda n, x: n(x + 0.1 * torch.randn_like(x))),
    "random of Python": of(lambda n, x: n(x) * random.random()),
    "changes its weights": of(stateful),
    "depends on the batch": of(lambda n, x: n(x - x.mean(0))),
    "rounds": of(lambda n, x: n((x * 4).round() / 4)),
    "sparse": of(lambda n, x: n(x).to_sparse()),
    "expanded": of(lambda n, x: n(x).mean(0, keepdim=True).expand(len(x), 5)),
    "raises": of(raising(Own("no\nidea"))),
    "raises a KeyError": of(raising(KeyError("key"))),
    "two arguments": lambda: nn.Bilinear(36, 36, 5),
    "nan weight": filled(torch.nan),
    "infinite weight": filled(torch.inf),
    "half weights": lambda: network().half(),
    "meta": lambda: network().to("meta"),
    "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
    "no module": lambda: lambda x: x,
}
DETERMINISTIC = {"plain", "two classes", "float64", "log-probabilities", "no parameters", "frozen"}
DETERMINISTIC |= {"prints", "warns", "rounds", "huge", "tiny", "squeezed", "in place"}


def try_model(number: int, root: Path) -> Outcome:
    """Evaluate the model of a number; its clean accuracy is compared with a loop."""
    name = list(CASES)[number]
    model = CASES[name]()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 6, 6, generator=generator)
    y = torch.randint(0, 2, (24,), generator=generator)
    before = x.clone()
    options = dict(eps=0.02, attack=pgd, progress=False, diagnose=number % 2 == 0)
    result = evaluate(model, TensorDataset(x, y), **options)
    if not torch.equal(x, before):
        return "wrong", f"{name}: the images were changed"
    if not 0 <= result.attacked.value <= result.clean.value <= 1:
        return "wrong", f"{name}: {result.attacked.value} of {result.clean.value}"
    if name in DETERMINISTIC:
        with torch.no_grad():
            right = (model.eval()(x.clone()).argmax(1) == y).double().mean()
        if float(right) != result.clean.value:
            return "wrong", f"{name}: {result.clean.value}, a loop finds {float(right)}"
    return "read", name


# Each case in a process of its own.


def attempt(number: int, root: Path) -> Outcome:
    """The outcome of a case, in this process: of its result, or of what it raised."""
    is_set = number < SETS
    name = "" if is_set else list(CASES)[number - SETS]
    try:
        return try_set(number, root) if is_set else try_model(number - SETS, root)
    except Own as error:
        return "the model's own error", repr(error)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if name == "raises a KeyError" and isinstance(error, KeyError):
            return "the model's own error", repr(error)
        if isinstance(error, ONE_LINE) and "\n" not in str(error) and str(error):
            return "refused", text
        return "traceback", f"{text}\n{traceback.format_exc()}"


def run(number: int) -> Outcome:
    """The outcome of a case: read, refused, traceback, wrong, executed, died or hang."""
    return outcome(lambda root: attempt(number, root), seconds=SECONDS, memory=MEMORY)


def main() -> None:
    """Run all cases, print what is wrong, write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=int, help="number of one case")
    parser.add_argument("--every", type=int, default=1, help="run every so many of the cases")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        print(*run(args.only))
        return
    counts = {"sets": Counter[str](), "models": Counter[str]()}
    numbers, bad = range(0, SETS + MODELS, args.every), 0
    for number in numbers:
        kind, text = run(number)
        counts["sets" if number < SETS else "models"][kind] += 1
        if kind not in ("read", "refused", "the model's own error"):
            print(number, kind, text.partition("\n")[0])
            bad += 1
    for what, count in counts.items():
        print(what, dict(count))
    write_json(args.output, {"seconds": SECONDS, **{k: dict(v) for k, v in counts.items()}})

    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
