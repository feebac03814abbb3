"""A mesh of two real processes with two devices each, over Gloo on the loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from pyagent_kv_jax.serving import SamplingParams, generate
from tests.serving.serving_models import ragged_prompts, small_model

DEADLINE = 120  # seconds, on a busy machine


def run() -> list[dict[str, Any]]:
    """What came of each call of ``generate_on_hosts``, on each process."""
    count = 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.serving.generate_on_hosts", str(port)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    children = [
        subprocess.Popen([*command, str(i), str(count)], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(count)
    ]
    end = time.monotonic() + DEADLINE
    try:
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            assert not any(child.poll() for child in children), "a process failed"
            time.sleep(0.1)
        return [json.loads(child.communicate(timeout=1)[0].splitlines()[-1]) for child in children]
    finally:
        for child in children:
            child.kill()  # jax.distributed swallows SIGTERM


ERRORS = {
    "other prompts": ("InvalidArgumentError", "other arguments on other processes"),
    "a token outside": ("InvalidArgumentError", "got token id"),
    "too few rows": ("InvalidArgumentError", "max_num_seqs: got 8"),
    "drift": ("ReplicaDriftError", "['step 4']['tokens']"),
}


def test_two_processes_give_the_tokens_of_one_device_and_the_same_errors() -> None:
    """Both get all answers; samples of one prompt fork, which copies blocks on both; then prompts are in the cache.

    What is wrong is an error on both. One test, for two processes take long to begin.
    """
    said = run()
    sampling = SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3)
    results = generate(small_model(), ragged_prompts(4, longest=40), sampling=sampling, max_num_seqs=8, token_budget=32)
    want = [[answer.token_ids for answer in (result, *result.other_samples)] for result in results]
    assert [(each["first"], each["again"]) for each in said] == [(want, want)] * 2
    for call, (error, message) in ERRORS.items():
        for name, text in (each[call] for each in said):
            assert name == error
            assert message in text, call
