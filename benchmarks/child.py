"""A case of the scripts that mutate input, in a process of its own, with limits."""

import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path


def outcome(
    attempt: Callable[[Path], tuple[str, str]],
    *,
    seconds: float,
    memory: int,
    cpu_seconds: int | None = None,
) -> tuple[str, str]:
    """What `attempt` returns, given a folder; else "hang" or "died", with what is known of it.

    Args:
        attempt: its result can be written as JSON.
        seconds: of wall-clock.
        memory: bytes.
        cpu_seconds: of one core; left out, no limit.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            if cpu_seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with tempfile.TemporaryDirectory() as root, redirect_stdout(io.StringIO()):
                found = attempt(Path(root))
            os.write(writing, json.dumps(found).encode()[:60_000])
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    content, late = b"", False
    while not late:
        late = not select.select([reading], [], [], seconds)[0]
        part = b"" if late else os.read(reading, 2**16)
        if not part:
            break
        content += part
    os.close(reading)
    if late:
        os.killpg(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if late:
        return "hang", f"more than {seconds} s"
    if content:
        kind, text = json.loads(content)
        return kind, text
    if cpu_seconds is not None and status in (signal.SIGKILL, signal.SIGXCPU):
        return "hang", f"more than {cpu_seconds} s of one core"
    return "died", f"status {status}"
