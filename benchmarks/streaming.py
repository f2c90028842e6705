"""Streamed images beside timm's own loader: throughput, memory and time to the first step.

    python benchmarks/streaming.py SCRATCH [images=20000] [rounds=12] [batches=6] [workers=1]

Makes JPEGs of about 224 pixels in SCRATCH/train/CLASS and SCRATCH/test/CLASS, where there are none,
and writes `streaming.json` beside this script. The throughput is paired: in every round each of the
two loaders decodes the same number of batches, the one that is first alternates, and the ratio of
the round is that of its two times, by the clock and by the processor time of the workers. The
machine may be shared: by the clock even ratios scatter, by processor time they scatter less. The
memory is the peak resident size of a process that trains `test_resnet` for a few steps, without its
workers, and that of the largest worker.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE, BATCH, CLASSES = 224, 32, 20
AUGMENT = {"scale": [0.35, 1.0], "flip": True, "auto_augment": "rand-m9-mstd0.5"}


def make_images(scratch, count):
    """Smooth random pictures with noise: about 20 kB each, as photographs of this size have."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("test", count // 100)):
        for index in range(number):
            file = scratch / split / f"class{index % CLASSES:02d}" / f"{index:06d}.jpg"
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            size = tuple(int(side) for side in rng.integers(200, 250, 2))
            smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            noise = Image.effect_noise(size, 40).convert("RGB")
            Image.blend(smooth, noise, 0.2).save(file, quality=90)


def seconds(loader, batches):
    """Wall-clock of `batches` batches after the first, and processor time of the workers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fetched = iter(loader)
    next(fetched)
    since = time.perf_counter()
    for _ in range(batches):
        next(fetched)
    spent = time.perf_counter() - since
    fetched._shutdown_workers()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, sum(after[:2]) - sum(before[:2])


def ours(scratch, workers):
    """The loader of a recipe's training."""
    from flatreg.data import Folder
    from flatreg.run.recipe_sections import Augment

    images = Folder(path=str(scratch), size=SIZE, workers=workers).load().train
    changed = images.augmented(Augment(**AUGMENT).transforms())
    return changed.loader(BATCH, count=len(images), generator=torch.Generator().manual_seed(0))


def timms(scratch, workers):
    """The loader that timm makes of the same settings."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("folder", root=str(scratch), split="train")
    loader = create_loader(
        dataset,
        SIZE,
        BATCH,
        is_training=True,
        scale=AUGMENT["scale"],
        auto_augment=AUGMENT["auto_augment"],
        hflip=0.5,
        color_jitter=None,
        mean=(0.5, 0.5, 0.5),
        num_workers=workers,
        device=torch.device("cpu"),
    )
    return loader.loader  # uint8, before it normalises in the process of the training


def throughput(scratch, rounds, batches, workers):
    """Time of timm's loader over ours, one a round: above 1 ours is faster."""
    wall, processor = [], []
    for number in range(rounds):
        makers = [("flatreg", ours), ("timm", timms)][:: 1 if number % 2 else -1]
        spent = {name: seconds(make(scratch, workers), batches) for name, make in makers}
        for ratios, ours_s, timms_s in zip((wall, processor), *spent.values(), strict=True):
            ratio = timms_s / ours_s
            ratios.append(ratio if makers[0][0] == "flatreg" else 1 / ratio)
        print(f"round {number + 1}: {wall[-1]:.3f}, {processor[-1]:.3f}", flush=True)
    return wall, processor


def summary(ratios):
    """Median and quartiles."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "quartiles": [low, high], "n": len(ratios)}


TRAINING = """
import json, resource, sys, time
since = time.perf_counter()
import torch
from flatreg import load_recipe
from flatreg.run import epoch
from flatreg.run.build import build_training
from flatreg.run.interrupt import Interrupted
from flatreg.run.train import make_accelerator, train
from flatreg.run.trial import build_all
from pathlib import Path
scratch, folder = Path(sys.argv[1]), Path(sys.argv[2])
recipe = load_recipe(folder / "recipe.yaml")
splits = recipe.data.load()
training, = build_all(recipe, splits, folder).values()
built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
real, times, steps = epoch.backward, [], int(sys.argv[3])
class Over(Exception): pass
def backward(*arguments, **keywords):
    loss = real(*arguments, **keywords)
    times.append(time.perf_counter() - since)
    if len(times) == steps:
        raise Over
    return loss
epoch.backward = backward
real_batches, waits = epoch._batches, []
def batches(loader, sofar):
    for batch in real_batches(loader, sofar):
        waits.append(sofar.waiting_seconds)
        yield batch
epoch._batches = batches
try:
    train(training, folder / "out", make_accelerator())
except Over:
    pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del training, splits
import gc; gc.collect()
import multiprocessing
for worker in multiprocessing.active_children():
    worker.kill(); worker.join()
largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({
    "first_step_s": times[0],
    "waiting_share": (waits[-1] - waits[0]) / (times[-1] - times[0]),
    "peak_rss_before_training_gib": built / 2**20,
    "peak_rss_gib": peak / 2**20,
    "largest_worker_rss_gib": largest / 2**20,
}))
"""


def training(scratch, workers, steps):
    """A process that trains for some steps: its peak, and the time to its first step."""
    folder = scratch / "run"
    folder.mkdir(exist_ok=True)
    recipe = {
        "data": {"kind": "folder", "path": str(scratch), "size": SIZE, "workers": workers},
        "augment": AUGMENT,
        "model": {"name": "test_resnet", "mean": [0.5], "std": [0.5]},
        "optimizer": {"lr": 1e-3},
        "epochs": 1,
        "batch_size": BATCH,
        "evaluation": {"eps": 0.01, "samples": 8, "attack": "fast"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-c", TRAINING, str(scratch), str(folder), str(steps)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main(scratch, images=20_000, rounds=12, batches=6, workers=1):
    """Measure, and write the result."""
    make_images(scratch, images)
    result = {
        "images": images,
        "training": training(scratch, workers, steps=4),
        "workers": workers,
        "batch_size": BATCH,
    }
    print(result, flush=True)
    wall, processor = throughput(scratch, rounds, batches, workers)
    result["throughput_beside_timm"] = summary(wall)
    result["processor_time_of_timm_over_ours"] = summary(processor)
    result["batches_a_round"] = batches
    result["augment"] = AUGMENT
    text = json.dumps(result, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[2:])
    main(Path(sys.argv[1]), **{key: int(value) for key, value in options.items()})
