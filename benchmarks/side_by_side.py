"""What benchmarks share: the machine they ran on, memory that is alive, tables."""

from __future__ import annotations

import os
import re
import time
import weakref
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Rows = dict[str, dict[str, Any]]


class Meter(TorchDispatchMode):
    """Bytes above those at entry: their peak in each phase, and those alive at its end."""

    def __init__(self, known: Iterable[Tensor], cuda: bool) -> None:
        super().__init__()
        self.cuda, self.peaks, self.ends = cuda, dict[str, int](), dict[str, int]()
        self._alive = weakref.WeakSet(t.untyped_storage() for t in known)
        self._entry = self._peak = self._now()
        self.mark("entry")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive.update(t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor))
        self._peak = max(self._peak, self._now())
        return out

    def mark(self, phase: str) -> None:
        """End a phase."""
        if self.cuda:
            self._peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.peaks[phase], self.ends[phase] = self._peak - self._entry, self._now() - self._entry
        self._peak = self._now()

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else sum(s.nbytes() for s in self._alive)


def describe_machine(device: str) -> dict[str, Any]:
    """What ran, and on what."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    cpu = re.search(r"model name\s*: (.*)", text)
    return {
        "cpu": cpu[1] if cpu else "unknown",
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "flatreg": version("flatreg"),
    }


def show(title: str, rows: Rows, columns: Sequence[str]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in rows.items():
        cells = ["missing" if "missing" in row else row.get(c, "") for c in columns]
        text = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
        print(f"| {name} | {' | '.join(text)} |", flush=True)
