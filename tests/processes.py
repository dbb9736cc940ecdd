"""Several Python processes that work together, as a launcher starts them; none survives the test."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
"""Two workers."""

SECONDS = 120
"""Processes that wait for each other for ever must not stop the tests."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def clean_environment(**more: str) -> dict[str, str]:
    """That of this process without a launcher's variables; one thread for each process."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in launchers and not name.startswith(("HOROVOD_", "TORCHELASTIC_"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)} | more


def run_workers(count: int, code: str, *arguments: object) -> list[str]:
    """Runs Python code in `count` processes with torchrun's variables; what each has printed."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=clean_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        done = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, done, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in done]


def run(*command: object, seconds: float = 180) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process tree that does not outlive the test."""
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err
