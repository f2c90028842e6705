"""What the parts of benchmarks/gpu.py share: sizes, tasks, the state, networks."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import TypeAdapter
from side_by_side import Rows
from torch import Tensor, nn

import flatreg
import flatreg.models.cifar  # registers cifar_resnet18
from flatreg.data.files import read_json, write_json
from flatreg.optimizers.methods import METHODS

Row = dict[str, Any]
Late = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is."""

    network: str = "cifar_resnet18"  # of checks and training
    network_args: tuple[tuple[str, Any], ...] = (("act_layer", "silu"),)
    compiler: str = "inductor"
    models: tuple[tuple[str, int], ...] = (("resnet50", 224), ("vit_base_patch16_224", 224))
    classes: int = 1000  # of these
    checked_batch: int = 64
    batch: int = 64  # of speed
    steps: int = 5  # of a sample; LookSAM perturbs on one of five
    warm_up: int = 1  # samples
    rounds: int = 7
    epochs: int = 15
    images: int = 20_000
    training_batch: int = 256
    max_lr: float = 0.2
    ema: float = 0.995
    smoothing: float = 0.1
    attack: str = "standard"
    attacked: int = 1000  # test images
    compared: int = 200  # test images beside the peer


MINIATURE = Size(
    network="test_resnet",
    compiler="aot_eager",
    models=(("test_vit", 32),),
    classes=10,
    checked_batch=16,
    batch=4,
    steps=1,
    warm_up=0,
    rounds=2,
    epochs=2,
    images=64,
    training_batch=32,
    attack="fast",
    attacked=8,
    compared=4,
)


@dataclass(frozen=True)
class Bench:
    """Where everything runs, and with what."""

    size: Size
    device: torch.device
    state: Path
    data: flatreg.data.Splits | None
    libraries: dict[str, Any]

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
        """Mixed precision; nothing for float32."""
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def wait(self) -> None:
        """Until the device is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Let cudnn look for its fastest kernels: of fixed shapes, where the search is made once."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Task:
    """A row to measure: None of `run` says that the time was up before it was whole."""

    part: str
    group: str  # of the rows that one table shows
    name: str
    run: Callable[[Late], Row | None]

    @property
    def key(self) -> str:
        """Of the row in the state."""
        return " / ".join((self.part, self.group, self.name))


class State:
    """The rows that are measured, in a folder; written after every row."""

    def __init__(self, folder: Path, identity: Row) -> None:
        self.path = folder / "rows.json"
        folder.mkdir(parents=True, exist_ok=True)
        found: Row = {"identity": identity, "rows": {}}
        if self.path.exists():
            found = read_json(self.path, TypeAdapter(dict[str, Row]), what="rows of this benchmark")
        for key, now in identity.items():
            before = found.get("identity", {}).get(key, now)
            if before != now:
                raise ValueError(
                    f"{self.path}: its rows are of another {key}: expected {now}, got {before}: "
                    "give another folder by --state, or delete this one"
                )
        self.identity: Row = found.get("identity", {}) | identity
        self.rows: Rows = found.get("rows", {})

    def has(self, task: Task) -> bool:
        """Whether the row was measured; one that ended in an error was not."""
        return "error" not in self.rows.get(task.key, {"error": "missing"})

    def put(self, task: Task, row: Row) -> None:
        """Store a row."""
        self.rows[task.key] = row | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_json(self.path, {"identity": self.identity, "rows": self.rows})


def network(bench: Bench, *, normalized: bool = False) -> nn.Module:
    """The network of checks and training, on the device, in train mode."""
    torch.manual_seed(0)
    with bench.device:  # draws there, which for large networks takes a tenth of the time
        arguments = dict(bench.size.network_args)
        model = timm.create_model(bench.size.network, num_classes=10, **arguments)
    if normalized:
        model = flatreg.with_normalization(model, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    return model.to(bench.device).train()


def batch_of(bench: Bench, batch: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Images in [0,1] and labels on the device."""
    draws = torch.Generator(bench.device).manual_seed(0)
    images = torch.rand((batch, 3, pixels, pixels), generator=draws, device=bench.device)
    return images, torch.arange(batch, device=bench.device) % 10


def wrappers() -> dict[str, Callable[[Any, nn.Module], Any]]:
    """Every wrapper, as a function of a base optimizer and a timm model."""

    def of(method: Any) -> Callable[[Any, nn.Module], Any]:
        reads_model = "model" in inspect.signature(method).parameters
        return lambda base, model: method(base, model) if reads_model else method(base)

    return {method.__name__: of(method) for method in METHODS} | {
        "SAM, head": lambda base, model: flatreg.SAM(base, scope=model.get_classifier()),
        "HeadRelativeSAM": lambda base, m: flatreg.HeadRelativeSAM(base, m.get_classifier()),
    }
