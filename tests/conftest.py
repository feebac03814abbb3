"""Eight virtual CPU devices, and how the tests compile: quickly, for most of their time XLA compiles small programs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first one

# XLA's older code generator for CPU makes one LLVM module of a program, in half the time; newer versions have no other.
_QUICK_CODE = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
if jax.__version_info__ < (0, 11) and not any(flag in os.environ.get("XLA_FLAGS", "") for flag in _QUICK_CODE):
    _FLAGS = " ".join(f"--{flag}={value}" for flag, value in _QUICK_CODE.items())
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()  # read when JAX first computes

_OPTION = "jax_disable_most_optimizations"
_COMPILE_BOUND = (
    "batch",
    "cache",
    "distributed",
    "flax",
    "handoff",
    "manager",
    "models",
    "owned",
    "pallas_kernels",
    "pictures",
    "pool",
    "prefix",
    "ring",
    "serving",
    "tables",
    "tests",
)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """LLVM's level 0 on CPU, which leaves memory figures alone; ``JAX_DISABLE_MOST_OPTIMIZATIONS`` overrules it."""
    chosen = request.path.parent.name in _COMPILE_BOUND and _OPTION.upper() not in os.environ
    if not chosen or jax.default_backend() != "cpu":
        yield
        return
    before = jax.config.read(_OPTION)
    jax.config.update(_OPTION, True)
    yield
    jax.config.update(_OPTION, before)


_MAPS = pathlib.Path("/proc/self/maps")
_MANY_MAPS = 16_000


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """XLA maps each kernel of a compiled program into memory by itself, and Linux allows a process 65,530 maps.

    Beyond that a compilation aborts the process.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
