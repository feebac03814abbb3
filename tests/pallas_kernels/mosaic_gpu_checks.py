"""Mosaic GPU kernels in JAX's GPU interpreter, on a CPU: warpgroups are threads, and races between them are found.

The interpreter's threads wait for each other inside XLA's CPU client, which has as many threads as it has cores or
devices: on a small machine ``jax_num_cpu_devices`` must be more than a kernel has warpgroups.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.paged_attention import mosaic_gpu, triton
from pallas_kernels.tuning import forced
from tests.pallas_kernels import failed_callbacks
from tests.pallas_kernels.attention_cases import CASES, AttentionCase
from tests.pallas_kernels.form_checks import QUICKLY, SMALL_TILES, check_attention

_INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret"
# Steps of 16 keys, two in flight, so that short cases have several.
STEPS = {**SMALL_TILES, "prefill_stages": 2}


def _impatient(seconds: float) -> type[threading.Condition]:
    """A wait that nobody ends is an error: a kernel broken on purpose may wait for ever."""

    class Impatient(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            if not super().wait(timeout or seconds):
                raise TimeoutError("a warpgroup waited for a barrier that nobody completed")
            return True

    return Impatient


def _compiled_once() -> Any:
    """``thread_map._run_jaxpr`` of jax before 0.11, which compiles every program of the grid anew, compiling once."""
    programs: dict[int, Any] = {}
    lock = threading.Lock()

    def run(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in programs:
                evaluate = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                programs[id(jaxpr)] = evaluate.lower(consts, *args).compile(compiler_options=QUICKLY), jaxpr
        programs[id(jaxpr)][0](consts, *args)

    return run


@contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch, *, few_rows: int = 0, patience_s: float = 120.0) -> Iterator[None]:
    """Inside, Mosaic GPU kernels are interpreted, and accesses that nothing orders one after another are noticed.

    ``few_rows`` stands for ``triton.FEW_ROWS``: 0, so that all sequences of two queries and more are tiles. A barrier
    not completed for ``patience_s`` seconds is an error.
    """
    pytest.importorskip("absl", reason="jax.experimental.pallas.mosaic_gpu wants absl-py")
    interpreter = importlib.import_module(f"{_INTERPRETER}.interpret_pallas_call")
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr("jax._src.pallas.mosaic.interpret.thread_map._run_jaxpr", _compiled_once())
        impatient = SimpleNamespace(**{**vars(threading), "Condition": _impatient(patience_s)})
        monkeypatch.setattr(f"{_INTERPRETER}.shared_memory.threading", impatient)
    monkeypatch.setattr(triton, "FEW_ROWS", few_rows)
    # Transfers of one TMA thread count as ordered: with many, waiting for one does not pass for waiting for another.
    params = importlib.import_module(f"{_INTERPRETER}.params").InterpretGPUParams(
        detect_races=True, num_tma_threads_per_device=64
    )
    try:
        with failed_callbacks.kept_inside(), interpret_pallas(params), forced("paged_attention", **STEPS):
            yield
    finally:
        interpreter.reset_gpu_interpret_mode_state()


def check(case: AttentionCase, monkeypatch: pytest.MonkeyPatch, form: Any = None) -> None:
    """The form, or a broken copy of it, against float64 and the race detector."""
    with interpreted(monkeypatch, patience_s=15.0 if form else 120.0):
        check_attention(form or mosaic_gpu.paged_attention, case)
        races = importlib.import_module(f"{_INTERPRETER}.interpret_pallas_call").get_races()
        assert not races.races_found, "two warpgroups raced for the same memory"


MIXED: dict[str, Any] = {"kv_lens": (5, 133, 20, 64, 16), "query_lens": (5, 1, 20, 3, 1), "num_padding_tokens": 7}
MORE_CASES = [
    AttentionCase("mosaic-gpu-two-blocks-of-one-head", q_heads=1, kv_heads=1, kv_lens=(150,), query_lens=(130,)),
    AttentionCase("mosaic-gpu-head-dims", head_dim=32, v_head_dim=16, v_storage_head_dim=40, **MIXED),
    AttentionCase("mosaic-gpu-float16", q_dtype="float16", kv_dtype="float16", **MIXED),
    AttentionCase("mosaic-gpu-bfloat16", q_dtype="bfloat16", kv_dtype="bfloat16", stored_as="uint16", **MIXED),
    AttentionCase("mosaic-gpu-pages-of-many-steps", block_size=64, **MIXED),
    AttentionCase("mosaic-gpu-negative-scale", scale=-0.7, sinks=True, **MIXED),
    AttentionCase("mosaic-gpu-scale-of-0", scale=0.0, **MIXED),
    AttentionCase("mosaic-gpu-context-sinks", context_parallel=(2, 1, 4), sinks=True, **MIXED),
    AttentionCase("mosaic-gpu-trimmed", sliding_window=9, positions="trimmed", block_size=32, **MIXED),
    AttentionCase(
        "mosaic-gpu-everything",
        kv_lens=(700, 300),
        query_lens=(70, 1),
        k_scale="head",
        v_scale="head",
        sinks=True,
        logits_soft_cap=2.0,
        sliding_window=50,
        chunk_size=400,
        context_parallel=(2, 1, 8),
        holes=((0, 40),),
        num_padding_tokens=5,
        num_padding_sequences=2,
        storage_head_dim=32,
        v_storage_head_dim=32,
    ),
]
ALL = {case.name: case for case in CASES + MORE_CASES}
# One of each kind; a case takes seconds.
DEFAULT = ["mixed-padding-tokens", "mosaic-gpu-bfloat16"]
MINUTES = [
    *("prefill-two-tiles", "prefill-chunked", "mixed", "mixed-long", "mixed-empty-queries", "only-padding"),
    *("more-queries-than-keys", "no-spare-column", "block-size-128", "heads-6q6kv", "not-causal-long", "window-7"),
    *("window-long-300", "chunk-12", "chunk-and-window", "holes-long", "shuffled-holes", "trimmed-window-long"),
    *("context-3-2-4", "context-shuffled", "soft-cap", "k-scale-head", "v-scale-head", "large-logits"),
    *(case.name for case in MORE_CASES if case.name not in DEFAULT),
]
