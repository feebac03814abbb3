"""One side of a handoff in a process of its own, for tests and ``scripts/kill_handoff.py``.

python -m tests.serving.handoff_process prefill TOKEN           prints its address and serves
python -m tests.serving.handoff_process decode TOKEN ADDRESS    asks without end; prints "ready" after the first answers
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import numpy as np

from pyagent_kv_jax import KVCacheManager
from pyagent_kv_jax.distributed.handoff.control_channel import Timeouts
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import serve
from pyagent_kv_jax.serving.handoff import DecodeInstance, LoadOptions, PrefillServer, RemoteLink
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.scheduler import SchedulerStats
from tests.serving.serving_models import CONFIG, VOCAB, small_model

SIZES = EngineConfig(max_num_seqs=4, token_budget=32)
TIMEOUTS = Timeouts(heartbeat=0.5, peer_timeout=5.0, connect=60.0)
OPTIONS = LoadOptions(seconds=60.0, chunk_bytes=4096, window=2)  # a block or two at a time: many moments
ANSWER = SamplingParams(max_tokens=4, ignore_eos=True)
NAME, TOKEN = "small", "a token for tests alone"
NUM_BLOCKS = 48
_ROOT = pathlib.Path(__file__).parents[2]


def make_engine() -> Engine:
    cache = CONFIG.kv_cache_config(num_blocks=NUM_BLOCKS, block_size=8, max_num_reqs=8, max_model_len=96)
    return Engine(small_model(), KVCacheManager(cache), SIZES)


_shared = functools.cache(lambda side: make_engine())


def shared_engine(side: str) -> Engine:
    """One a side and process, compiled once; its cache is empty and its counts begin anew."""
    engine: Engine = _shared(side)
    assert not engine.has_unfinished
    engine.backend.reset_prefix_cache()
    engine.scheduler.stats = SchedulerStats()
    return engine


def alone(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Answers of an idle engine that computes all of it itself."""
    assert not engine.has_unfinished
    engine.backend.reset_prefix_cache()
    return [result.token_ids for result in serve(engine, prompts, ANSWER)]


def new_prompts(rng: np.random.Generator, count: int = 3) -> list[list[int]]:
    return [rng.integers(0, VOCAB - 1, int(length)).tolist() for length in rng.integers(30, 80, count)]


def connected(engine: Engine, address: str, token: str = TOKEN, **options: object) -> DecodeInstance:
    link = RemoteLink(address, token, engine, timeouts=TIMEOUTS)
    return DecodeInstance(engine, link, NAME, **{"options": OPTIONS, **options})


@contextlib.contextmanager
def process(*arguments: str, cache_dir: str | os.PathLike | None = None) -> Iterator[subprocess.Popen]:
    """A child, killed at the end; what it compiles is kept in ``cache_dir`` for the next one."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if cache_dir is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.handoff_process", *arguments],
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def process_to_kill(*arguments: str, cache_dir: pathlib.Path) -> Iterator[tuple[subprocess.Popen, Callable[[], None]]]:
    """A child that reads what is in ``cache_dir`` and writes elsewhere: killed in between, it leaves half a file.

    Gives the child, and a function that keeps what it has compiled, to be called while it compiles nothing.
    """
    with tempfile.TemporaryDirectory() as own:
        shutil.copytree(cache_dir, own, dirs_exist_ok=True)

        def keep() -> None:
            shutil.copytree(own, cache_dir, dirs_exist_ok=True)

        with process(*arguments, cache_dir=own) as child:
            yield child, keep


def first_line(child: subprocess.Popen, seconds: float = 120.0) -> str:
    """What it says first, which it must do within so many seconds."""
    lines: list[str] = []
    assert child.stdout is not None
    reading = threading.Thread(target=lambda out=child.stdout: lines.append(out.readline().strip()), daemon=True)
    reading.start()
    reading.join(seconds)
    assert lines, f"the child says nothing for {seconds} s"
    assert lines[0], "the child has ended"
    return lines[0]


def main() -> None:
    # Whoever started it is gone once stdin ends; then it must not live on.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    engine = make_engine()
    if sys.argv[1] == "prefill":
        server = PrefillServer(engine, NAME, sys.argv[2], timeouts=TIMEOUTS)
        print(server.address, flush=True)
        server.serve()
    else:
        decode = connected(engine, sys.argv[3], sys.argv[2])
        rng = np.random.default_rng(0)
        decode.generate(new_prompts(rng), ANSWER)
        print("ready", flush=True)
        while True:
            decode.generate(new_prompts(rng), ANSWER)


if __name__ == "__main__":
    main()
