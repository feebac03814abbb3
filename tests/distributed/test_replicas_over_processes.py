"""Two processes of one mesh allocate alike, and both see it when copies drift apart."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]
_DEADLINE_S = 120


def test_both_processes_see_the_same() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.replica_process", str(process), port],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=_DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()  # jax.distributed swallows SIGTERM
    assert all(process.returncode == 0 for process in processes), outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert first["ids"] == [4, 5, 6, 12, 13, 14, 15, 0, 1]
    assert first["free"] == [2, 1, 4, 0]
    assert "row 3: got a request for 6 blocks, want at most 1: 7 are free on 4 devices" in first["refused"]
    assert "['copy']: got other bits on cpu:" in first["device"]
    assert first["device"].endswith("1 of 9 arrays differ")
    assert "['lens']: got other bits on cpu:" in first["host"]
