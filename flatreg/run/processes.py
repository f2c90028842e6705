"""The processes of one launch: they start together, fail together and speak with one voice.

Whatever ends one process ends all: it leaves at once, its peers find the connection closed in their
next collective, and torchrun ends those of its own machine within a tenth of a second.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d

from flatreg.data.files import PARTIAL
from flatreg.data.sharing import alone, gather, rank_and_world
from flatreg.run.interrupt import handled
from flatreg.run.recipe import Recipe

T = TypeVar("T")

# A process that ends while the others start is missed only by those of its own machine.
_JOIN = timedelta(minutes=2)
# An attack takes hours on one process while the others wait for it. A process that ends closes its
# connections: its death is not what this waits for, only that of a machine that loses its power.
_WAIT = timedelta(hours=24)
_SHARED = 15.0  # seconds in which a network file system shows what another machine has written
_STUCK = 20.0  # seconds after a SIGTERM in which a checkpoint is written
_CAUSE = 3.0  # seconds in which the process that failed has said why


def join(**settings: Any) -> Accelerator:
    """Accelerator with these settings; it starts the process group, if there is none.

    The processes are given 2 minutes to meet, and from then on wait 24 hours for one another. A
    group of the caller's keeps its time-out.

    Raises:
        ValueError: several processes were started, and each one works alone.
    """
    own_group = not dist.is_initialized()
    handlers = [InitProcessGroupKwargs(timeout=_JOIN)] if own_group else []
    # SIGTERM ends the process here: Python's own handlers wait for calls that wait for peers.
    with handled(signal.SIG_DFL, [signal.SIGTERM]):
        accelerator = Accelerator(**settings, kwargs_handlers=handlers)
    started, one = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes == 1
    if one and started > 1:
        raise ValueError(
            f"{started} processes were started and each would train by itself, as Accelerate finds "
            "no device for them: for several processes on the CPU set ACCELERATE_USE_CPU=true"
        )
    if own_group and not one:
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(_WAIT)
    return accelerator


def refuse_engines(is_used: Callable[[str], bool]) -> None:
    """Refuse the engines that own parameters, by their names in Accelerate.

    On the CPU Accelerate passes over a configuration for FSDP without a word, and where DeepSpeed
    is not installed its import fails: so the configuration is looked at too.

    Raises:
        ValueError: one of them is used.
    """
    engine = next(filter(is_used, ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")), None)
    if engine is not None:
        raise ValueError(
            f"recipes train in one process or under DDP, Accelerate is configured for {engine}: "
            "choose MULTI_GPU or MULTI_CPU, or use flatreg in a loop of your own"
        )


def warn_of_lost_processes(accelerator: Accelerator) -> None:
    """Warn where `accelerate launch --cpu --num_processes N` started one process without a word.

    Without an MPI hostfile it does (accelerate 1.15), and sets a port that nothing then uses; a
    launcher that does start processes also numbers them.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    numbered = "LOCAL_RANK" in os.environ
    if on_cpu and "MASTER_PORT" in os.environ and not numbered and accelerator.num_processes == 1:
        print(
            "flatreg: accelerate started one process only; for several on the CPU: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m flatreg run ...",
            file=sys.stderr,
        )


def check_batch(recipe: Recipe, processes: int) -> None:
    """Check that `batch_size`, which counts the images of all processes, can be shared out.

    Raises:
        ValueError: its micro-batches cannot be shared out evenly; or, where images are mixed in
            pairs, not in even numbers.
    """
    mixes = recipe.augment.mixes
    parts = recipe.accumulation * processes * (2 if mixes else 1)
    if not recipe.batch_size % parts:
        return
    below = recipe.batch_size // parts * parts
    choices = " or ".join(str(size) for size in (below, below + parts) if size)
    factors = f"accumulation ({recipe.accumulation}) x processes ({processes})"
    factors += " x 2, as images are mixed in pairs" if mixes else ""
    raise ValueError(
        f"batch_size counts the images of all processes: expected a multiple of {factors}, got "
        f"{recipe.batch_size}: write batch_size: {choices}"
    )


def check_shared(folder: Path) -> None:
    """Check that every process of the launch finds what the first one writes into `folder`.

    Every process must call.

    Raises:
        ValueError: one does not, within 15 s.
        OSError: the first one cannot write there.
    """
    rank, world = rank_and_world()
    if world == 1:
        return
    token = gather({"token": [f".launch-{uuid4().hex[:12]}{PARTIAL}"]})["token"][0]
    made: list[Path] = []

    def write() -> None:
        if rank == 0:
            made.extend(p for p in (folder, *folder.parents) if not p.exists())
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).touch()

    in_turn(write)
    until = time.monotonic() + _SHARED
    # The names in a folder are asked for: file systems remember for a while what was not there.
    while not (seen := folder.is_dir() and token in os.listdir(folder)):
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    found = gather({"seen": [(seen, socket.gethostname())]})["seen"]
    blind = [number for number, (sees, _) in enumerate(found) if not sees]
    if rank == 0:
        (folder / token).unlink(missing_ok=True)
        for path in made if blind else []:
            with suppress(OSError):
                path.rmdir()
    if blind:
        raise ValueError(
            f"{folder}: process {blind[0]} (on {found[blind[0]][1]}) does not find there what "
            f"process 0 (on {found[0][1]}) writes: choose a folder that all machines share, with "
            "output=DIR"
        )


def in_turn(load: Callable[[], T], *, fetches: bool = False) -> T:
    """What `load` returns, on every process; where it fails on one of them, all fail alike.

    Every process must call. Where `load` `fetches` files, the first process calls it alone; then
    one process of each machine, whose folders may be its own; then the others, which find the files
    there.

    Raises:
        ValueError: `load` failed on some process, with its message.
    """
    rank, world = rank_and_world()
    if world == 1:
        return load()
    turns = [0] * world
    if fetches:
        local = gather({"local": [os.environ.get("LOCAL_RANK", "0")]})["local"]
        turns = [0] + [1 if number == "0" else 2 for number in local[1:]]
    results: list[T] = []
    for turn in sorted(set(turns)):
        cause: Exception | None = None
        if turns[rank] == turn:
            try:
                with alone():  # what shares out its work would wait for those whose turn it is not
                    results.append(load())
            except Exception as error:
                cause = error
        told = None if cause is None else f"{cause}" or repr(cause)
        failed = {n: t for n, t in enumerate(gather({"told": [told]})["told"]) if t is not None}
        if failed:
            first, text = next(iter(failed.items()))
            on_some = len(failed) < turns.count(turn) or turn > 0
            raise ValueError(f"process {first} of {world}: {text}" if on_some else text) from cause
    return results[0]


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` as one of several processes, and leave at once with its status.

    A process that fails must end while its peers wait for it, and gloo's threads may abort one that
    takes its time to end (torch 2.14): nothing is torn down.
    """
    _end_after_sigterm()
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        status = 2 if is_of_lost_peer(error) else 1
        said = one_voice("".join(traceback.format_exception(error)), error)
        if said is not None:
            print(said, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _end_after_sigterm() -> None:
    """End 20 s after a SIGTERM, should the program wait for a peer in a call all the while.

    Python's handlers run between its own instructions; this thread is woken by the signal itself.
    torchrun kills after 30 s.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        time.sleep(_STUCK)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def one_voice(text: str, error: BaseException | None) -> str | None:
    """What this process is to print when it ends by `error`; None where another has said it.

    Of the processes of a machine one prints what all have to say. One that fails because a peer has
    ended repeats on its own machine what that peer said.
    """
    lost, interrupted = is_of_lost_peer(error), isinstance(error, KeyboardInterrupt)
    if lost:
        rank, world = rank_and_world()
        text = (
            f"flatreg: process {rank} of {world}: another process of this launch has ended, killed "
            "or out of memory: the same command continues from the last checkpoint"
        )
    try:
        store = _store()
        if store is None:
            return text
        if lost or interrupted:
            until = time.monotonic() + (_CAUSE if lost else 0.3)
            while not (known := store.check(["cause"])) and time.monotonic() < until:
                time.sleep(0.05)
            text = store.get("cause").decode() if known else text
        else:
            store.compare_set("cause", "", text)
        machine, me = os.environ.get("GROUP_RANK", "0"), uuid4().hex
        about_peer = text.startswith("flatreg: process ") and lost
        key = "lost" if about_peer else hashlib.sha256(text.encode()).hexdigest()[:16]
        first = store.compare_set(f"{machine}/{key}", "", me).decode() == me
    except RuntimeError:  # the store went with the process that held it
        return text
    # Below a progress bar that another process has drawn.
    return (f"\n{text}" if dist.is_initialized() else text) if first else None


def is_of_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a collective whose peer has ended."""
    while error is not None:
        words = str(error).lower()
        network = isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words
        if isinstance(error, RuntimeError) and (network or "connection closed by peer" in words):
            return True
        error = error.__cause__
    return False


def _store() -> Any:
    """Store that all processes of the launch reach: torchrun's, or that of the process group.

    Raises:
        RuntimeError: it cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        brief = timedelta(seconds=5)
        whole: Store = TCPStore(host, port, is_master=False, timeout=brief, wait_for_workers=False)
    elif dist.is_initialized():
        whole = distributed_c10d._get_default_store()
    else:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"flatreg/{attempt}", whole)
