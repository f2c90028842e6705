"""What only a GPU can tell: checks of CUDA, time of steps at 224 pixels, a training on CIFAR-10.

    python benchmarks/gpu.py --data cifar10.npz --davda54 PATH/TO/sam.py
    python benchmarks/gpu.py --parts checks,speed --minutes 9    # call it again, and it goes on
    python benchmarks/gpu.py --miniature --device cuda    # everything tiny: does it run here?

For a machine with one GPU and no network. The result is one JSON. Every row is stored in `--state`
when it is measured, and every epoch of a training: a call goes on where the last one ended, however
it ended. A row that ended in an error is tried again. No numbers of a card are stored yet: all of
it was run in miniature on a CPU alone.

checks      Of SAM and of a penalty (`MarginBound`): float16 with a GradScaler, a scale that
            overflows, bfloat16, channels_last, torch.compile, FSDP2 on one device. The number is
            the distance of the weights after three steps from those of plain float32, relative to
            how far these moved. Of every wrapper: weights that a pass pair does not bring back bit
            by bit. Of every wrapper and penalty: how often a step makes the host wait for the
            device, the largest of the profiler's counts; the first steps read more, on purpose.
speed       A row and the plain step take samples in turns, the first to go another each round. A
            sample is five steps in a row in bfloat16, timed by CUDA events. ratio: median over the
            rounds of the row's time over the plain one's, with its 95% interval. memory, on a GPU
            alone: peak of a step in MiB above what is alive between steps. Peers are davda54/sam,
            if its file is given; SAM written here from its paper (Foret et al., ICLR 2021); and
            pytorch_optimizer, if it is installed. The row `standard` has the seconds of the cascade
            beside pyautoattack's, if that is installed, on the N-FGSM network of `training`; until
            there is one, it is unfinished.
training    CIFAR-10, ResNet-18, Linf 8/255; uint8 images stay on the device; one-cycle, mean of
            the weights, label smoothing; each arm judged by `standard`. The arms run one after the
            other: ratio is the median epoch over that of the plain arm.

Guesses for an H100, not measured: four minutes for `checks`, six for `speed`, eight for `training`
of 20,000 images. TF32 is off, so that float32 is float32.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_bench import MINIATURE, Bench, Late, Row, Size, State, Task, fastest_kernels, network
from gpu_checks import check_tasks
from gpu_speed import measure_cascade, speed_tasks
from optimizers import load_libraries
from penalties import EPS
from pydantic import TypeAdapter
from side_by_side import describe_machine, show
from timm.data.mixup import mixup_target
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import flatreg
from flatreg.data.files import one_line, write_json
from flatreg.measures.estimate import Estimate
from flatreg.threat import to_unit_range

PARTS = ("checks", "speed", "training")
ARMS: dict[str, tuple[Any, Sequence[Any]]] = {
    "plain": (flatreg.CrossEntropy(), []),
    "N-FGSM": (flatreg.NFGSM(eps=EPS), []),
    "MarginBound": (
        flatreg.CrossEntropy(),
        [flatreg.MarginBound(eps=EPS, step=1.0, method="double_backward")],
    ),
    # the default estimator; none was searched for on this data set
    "curvature": (
        flatreg.CrossEntropy(),
        [flatreg.OffManifoldCurvature(eps=EPS, estimator="second_difference")],
    ),
    "PGD-10": (flatreg.PGDAT(eps=EPS, steps=10), []),
}


def train_arm(bench: Bench, name: str, late: Late) -> Row | None:
    """Train an arm from where it was, and judge it; None where the time is up in between."""
    if bench.data is None:
        return None
    size, file = bench.size, bench.state / f"{name}.pt"
    train = bench.data.train
    images, labels = train.images.to(bench.device), train.labels.to(bench.device)
    model = network(bench, normalized=True).to(memory_format=torch.channels_last)
    average = ModelEmaV3(model, decay=size.ema, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    count = len(images) // size.training_batch
    schedule = OneCycleLR(optimizer, size.max_lr, total_steps=size.epochs * count)
    parts: Row = dict(model=model, average=average.module, optimizer=optimizer, schedule=schedule)
    seconds, losses, peak = list[float](), list[float](), 0.0
    if file.exists():
        saved = torch.load(file, map_location=bench.device, weights_only=True)
        for part, thing in parts.items():
            thing.load_state_dict(saved[part])
        seconds, losses, peak = saved["seconds"], saved["losses"], saved["peak"]
    objective = flatreg.Objective(model, *ARMS[name])
    while len(seconds) < size.epochs:
        if late():
            return None
        epoch = len(seconds)
        torch.manual_seed(epoch)  # of every device: an epoch draws the same after a stop
        objective.progress = epoch / size.epochs
        bench.wait()
        begin = time.perf_counter()
        if bench.is_cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        loss = train_epoch(bench, objective, optimizer, schedule, average, (images, labels))
        bench.wait()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {losses[-1]}")
        peak = max(peak, torch.cuda.max_memory_allocated(bench.device) if bench.is_cuda else 0.0)
        ends = {part: thing.state_dict() for part, thing in parts.items()}
        save(file, ends | {"seconds": seconds, "losses": losses, "peak": peak})
    if late():
        return None
    result = flatreg.evaluate(
        average.module.to(memory_format=torch.contiguous_format),
        bench.data.test,
        eps=EPS,
        attack=size.attack,
        samples=min(size.attacked, len(bench.data.test)),
        diagnose=False,
        folder=bench.state / f"evaluation of {name}",
        progress=False,
    )
    return {
        "clean": asdict(result.clean),
        "attacked": asdict(result.attacked),
        "attack": size.attack,
        "seconds": sum(seconds),
        "epochs": seconds,
        "losses": losses,
        "peak": peak / 2**20,
        "seconds of the attack": result.seconds,
    }


@fastest_kernels()
def train_epoch(
    bench: Bench,
    objective: flatreg.Objective,
    optimizer: torch.optim.Optimizer,
    schedule: OneCycleLR,
    average: ModelEmaV3,
    data: tuple[Tensor, Tensor],
) -> Tensor:
    """Train for an epoch, the last part of a batch left out; mean of the loss, on the device."""
    (images, labels), size = data, bench.size
    total = torch.zeros((), device=bench.device)
    order = torch.randperm(len(images), device=bench.device)
    parts = order.split(size.training_batch)[: len(images) // size.training_batch]
    for rows in parts:
        batch = flatreg.data.augment(to_unit_range(images[rows]), crop=4, flip=True)
        batch = batch.contiguous(memory_format=torch.channels_last)
        targets = mixup_target(labels[rows], 10, 1.0, size.smoothing)
        with bench.autocast():
            loss = flatreg.backward(optimizer, objective.bind(batch, targets))
        nn.utils.clip_grad_norm_(objective.model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(objective.model, schedule.last_epoch)
        schedule.step()
        total += loss.total
    return total / len(parts)


def save(file: Path, values: Row) -> None:
    """Replace a checkpoint: whole, or as it was."""
    partial_file = file.with_suffix(".partial")
    torch.save(values, partial_file)
    os.replace(partial_file, file)


def describe(bench: Bench) -> Row:
    """The machine, and what must be the same for rows to stand beside each other."""
    code = hashlib.sha256()
    own = Path(__file__).parent.glob("gpu*.py")
    for file in (*sorted(Path(flatreg.__file__).parent.rglob("*.py")), *sorted(own)):
        code.update(file.read_bytes())
    found = {
        "gpu": torch.cuda.get_device_name(bench.device) if bench.is_cuda else None,
        "driver": driver() if bench.is_cuda else None,
        "cuda": torch.version.cuda if bench.is_cuda else None,
        "torch": torch.__version__,
        "timm": version("timm"),
        "accelerate": version("accelerate"),
        "flatreg": version("flatreg"),
        "code": code.hexdigest()[:16],
        "miniature": bench.size.network == MINIATURE.network,
        **asdict(bench.size),
    }
    if bench.data is not None:
        pixels = hashlib.sha256()
        for split in (bench.data.train, bench.data.test):
            pixels.update(split.images.numpy().tobytes())
        sizes = f"{len(bench.data.train)} + {len(bench.data.test)} images"
        found["data"] = f"{sizes}, {pixels.hexdigest()[:16]}"
    return TypeAdapter(Any).dump_python(found, mode="json")  # as it comes back from the file


def driver() -> str:
    """Version of the card's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return one_line(done.stdout)
    return "unknown"


def load_data(path: Path | None, size: Size, miniature: bool) -> flatreg.data.Splits | None:
    """CIFAR-10: of an .npz file, or as torchvision has it in a folder; noise for the miniature.

    Raises:
        ValueError: there is no such data, or it is not CIFAR-10.
        OSError: it cannot be read.
    """
    if size.images < size.training_batch:
        raise ValueError(f"--images: expected {size.training_batch} or more, got {size.images}")
    if path is None and not miniature:
        return None
    if path is None:
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (size.images, 3, 32, 32), generator=draws).to(torch.uint8)
        made = flatreg.data.ImageArrays(images, torch.arange(size.images) % 10)
        return flatreg.data.Splits(made, made, made, 10)
    source: Any = flatreg.data.Torchvision(name="CIFAR10", root=str(path), limit=size.images)
    if not path.is_dir():
        source = flatreg.data.Array(path=str(path), limit=size.images)
    splits: flatreg.data.Splits = source.load()
    found = splits.train.images
    if splits.num_classes != 10 or found.shape[1:] != (3, 32, 32) or found.dtype != torch.uint8:
        raise ValueError(
            f"{path}: expected CIFAR-10, 10 classes of uint8 images of (3, 32, 32), got "
            f"{splits.num_classes} of {found.dtype} images of {tuple(found.shape[1:])}"
        )
    if len(found) < size.training_batch:
        raise ValueError(f"{path}: expected {size.training_batch} images or more, got {len(found)}")
    return splits


def plan(bench: Bench, parts: Sequence[str]) -> list[Task]:
    """All rows of the parts, in the order in which they are measured."""
    tasks = check_tasks(bench) if "checks" in parts else []
    tasks += speed_tasks(bench) if "speed" in parts else []
    if "training" in parts:
        tasks += [Task("training", "arms", name, partial(train_arm, bench, name)) for name in ARMS]
    if "speed" in parts:  # last, as it takes a network of the training
        name = "beside pyautoattack" if find_spec("pyautoattack") else "ours alone"
        tasks.append(Task("speed", "standard", name, partial(measure_cascade, bench)))
    return tasks


def attempt(task: Task, late: Late) -> Row | None:
    """The row, or why there is none."""
    try:
        return task.run(late)
    except Exception as error:  # whatever a card does to one row, the others are measured
        return {"ok": False, "error": one_line(f"{type(error).__name__}: {error}")}


def assemble(bench: Bench, state: State, tasks: Sequence[Task]) -> Row:
    """The JSON: all rows that are known, also of parts that this call leaves out."""
    file = getattr(bench.libraries["davda54"], "__file__", None)
    peers = {
        name: version(name) if find_spec(name) else None
        for name in ("pytorch_optimizer", "pyautoattack")
    } | {"davda54_sha256": file and hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    machine = describe_machine(bench.device.type) | state.identity | {"peers": peers}
    result: Row = {"machine": machine, **{part: {} for part in PARTS}}
    for key, row in state.rows.items():
        part, group, name = key.split(" / ")
        result[part].setdefault(group, {})[name] = row
    arms = result["training"].get("arms", {})
    whole = {
        name: statistics.median(row["epochs"]) for name, row in arms.items() if "epochs" in row
    }
    for name in whole if "plain" in whole else ():
        arms[name] = arms[name] | {"ratio": whole[name] / whole["plain"]}
    return result | {"unfinished": [task.key for task in tasks if not state.has(task)]}


def tables(result: Row) -> None:
    """Print all rows."""
    columns = {
        "checks": "ok number expected refused error",
        "speed": "milliseconds ratio memory memory_ratio refused error",
        "training": "clean attacked seconds ratio error",
    }
    for part, names in columns.items():
        for group, rows in result[part].items():
            cells = {name: {k: in_words(v) for k, v in row.items()} for name, row in rows.items()}
            show(f"{part}: {group}", cells, names.split())
    print(f"\nunfinished: {', '.join(result['unfinished']) or 'nothing'}")


def in_words(value: Any) -> Any:
    """An estimate as it is printed."""
    return str(Estimate(**value)) if isinstance(value, dict) and "low" in value else value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--data", type=Path, help="CIFAR-10: an .npz file, or torchvision's folder")
    parser.add_argument(
        "--images", type=int, help="training images of CIFAR-10, 20,000 if left out"
    )
    parser.add_argument("--davda54", type=Path, help="the sam.py of github.com/davda54/sam")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no row starts later")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--miniature", action="store_true", help="everything tiny")
    parser.add_argument("--state", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/gpu.json"))
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    if unknown := sorted({*args.parts} - {*PARTS}):
        raise ValueError(f"--parts: expected some of {','.join(PARTS)}, got {','.join(unknown)}")
    available = torch.cuda.is_available()
    args.device = args.device or ("cuda" if available and not args.miniature else "cpu")
    if args.device == "cuda" and not available:
        raise ValueError("--device cuda: torch finds no GPU: leave it out for the miniature")
    args.miniature = args.miniature or args.device == "cpu"
    if args.davda54 and not args.davda54.is_file():
        raise ValueError(f"--davda54: expected the file sam.py, found none at {args.davda54}")
    if not args.minutes >= 0:
        raise ValueError(f"--minutes: expected 0 or more, got {args.minutes}")
    if "training" in args.parts and args.data is None and not args.miniature:
        raise ValueError("training: give CIFAR-10 by --data, or leave it out by --parts")
    return args


def run(args: argparse.Namespace) -> None:
    """Measure what is missing, until the time is up."""
    late = partial(lambda end: time.monotonic() >= end, time.monotonic() + 60 * args.minutes)
    size = MINIATURE if args.miniature else Size()
    size = replace(size, images=size.images if args.images is None else args.images)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the process group, and of events
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    data = load_data(args.data, size, args.miniature)
    bench = Bench(size, device, args.state, data, load_libraries(args.davda54))
    state, tasks = State(args.state, describe(bench)), plan(bench, args.parts)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if state.has(task):
            continue
        if late():
            break
        row = attempt(task, late)
        if row is not None:
            state.put(task, row)
            write_json(args.output, assemble(bench, state, tasks))
            print(f"{task.key}: {row.get('error', 'done')}", flush=True)
        if bench.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()
    result = assemble(bench, state, tasks)
    write_json(args.output, result)
    tables(result)


def main() -> int:
    """Run from the command line."""
    try:
        run(parse())
    except PackageNotFoundError as error:
        reason = f"{error.name} is not installed: a folder in PYTHONPATH has no version"
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"gpu.py: {one_line(error, 500)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
