"""Checking mode: off, not one check is traced; on, every operation that takes ids reports those out of range."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import checking, paged_attention, paged_copy, paged_gather, paged_write
from pallas_kernels.checking import check
from pallas_kernels.interpret import interpret_pallas
from tests.pallas_kernels.mosaic_checks import interpreted

NUM_PAGES, HEADS, BLOCK_SIZE, HEAD_DIM = 6, 2, 8, 128
FORMS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "xla": nullcontext,
    "triton": interpret_pallas,
    "mosaic_tpu": interpreted,
}


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


PAGES = _random(NUM_PAGES, HEADS, BLOCK_SIZE, HEAD_DIM)
GOOD_IDS = np.array([2, -1, 5], np.int32)
NEW, QUERIES = _random(3, HEADS, HEAD_DIM), _random(2, 2 * HEADS, HEAD_DIM)
LENS = np.array([11, 3], np.int32)


def _tables(page: Any) -> jax.Array:
    return jnp.array([[4, 0], [1, -1]], jnp.int32).at[0, 1].set(page)


# Of one id, with the others right: the operation, which argument the id stands in, how many it may name.
OPERATIONS: dict[str, tuple[Callable[..., Any], str, int]] = {
    "gather": (lambda at, form: paged_gather(PAGES, jnp.append(GOOD_IDS, at), implementation=form), "ids", NUM_PAGES),
    "copy-src": (
        lambda at, form: paged_copy(PAGES, jnp.append(GOOD_IDS, at), jnp.array([0, -1, 1, 3]), implementation=form),
        "src",
        NUM_PAGES,
    ),
    "copy-dst": (
        lambda at, form: paged_copy(PAGES, jnp.array([0, -1, 1, 3]), jnp.append(GOOD_IDS, at), implementation=form),
        "dst",
        NUM_PAGES,
    ),
    "write-slots": (
        lambda at, form: paged_write(PAGES, PAGES, NEW, NEW, jnp.array([7, -1, 0]).at[2].set(at), implementation=form),
        "slot_mapping",
        NUM_PAGES * BLOCK_SIZE,
    ),
    "write-runs": (
        lambda at, form: paged_write(PAGES, PAGES, NEW, NEW, jnp.stack([at, 1, 1])[None], implementation=form),
        "slot_mapping",
        NUM_PAGES * BLOCK_SIZE,
    ),
    "attention": (
        lambda at, form: paged_attention(QUERIES, PAGES, PAGES, _tables(at), LENS, implementation=form),
        "block_tables",
        NUM_PAGES,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_ids_out_of_range_are_errors_in_every_form(operation: str, form: str) -> None:
    call, argument, size = OPERATIONS[operation]
    checked = checkify.checkify(jax.jit(lambda at: call(at, form)), errors=checkify.user_checks)
    # A run whose first slot is negative is padding, whatever the number.
    wrong = [size, 2**31 - 1] if operation == "write-runs" else [size, 2**31 - 1, -2, -(2**31)]
    with FORMS[form](), checking():
        for right in (0, size - 1, -1):
            assert checked(jnp.int32(right))[0].get() is None
        for bad in wrong:
            assert f"{argument}: got " in checked(jnp.int32(bad))[0].get()


@pytest.mark.parametrize("form", FORMS)
def test_a_length_that_no_row_holds_is_an_error_in_every_form(form: str) -> None:
    attend = lambda lens: paged_attention(QUERIES, PAGES, PAGES, _tables(0), lens, implementation=form)  # noqa: E731
    checked = checkify.checkify(jax.jit(attend), errors=checkify.user_checks)
    with FORMS[form](), checking():
        assert checked(LENS)[0].get() is None
        assert "kv_lens: got up to 17, want at most the 16" in checked(np.array([3, 17], np.int32))[0].get()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_outside_the_mode_nothing_is_reported_and_nothing_else_touched(operation: str) -> None:
    call, _, size = OPERATIONS[operation]
    checked = checkify.checkify(jax.jit(lambda at: call(at, "xla")), errors=checkify.user_checks)
    for bad in (size, 2**31 - 1, -2):
        error, out = checked(jnp.int32(bad))
        assert error.get() is None
        chex.assert_trees_all_equal(out, checked(jnp.int32(-1))[1])


def _decode(q: Any, k_pages: Any, v_pages: Any, tables: Any, lens: Any, slots: Any) -> Any:
    k_pages, v_pages = paged_write(k_pages, v_pages, q[:, :HEADS], q[:, HEADS:], slots)
    moved = paged_copy((k_pages, v_pages), slots % NUM_PAGES, slots % NUM_PAGES)
    return paged_attention(q, *moved, tables, lens), paged_gather(k_pages, tables[0])


DECODE = (QUERIES, PAGES, PAGES, _tables(-1), LENS, np.array([0, 9], np.int32))


def test_no_check_is_traced_unless_the_mode_is_on() -> None:
    """Of the same jitted function: one that was traced in the mode must not be used outside it, nor inversely."""
    decode = jax.jit(_decode)
    for _ in range(2):
        outside = jax.make_jaxpr(decode)(*DECODE)
        assert "check" not in str(outside)
        assert not outside.effects
        with checking():
            inside = jax.make_jaxpr(decode)(*DECODE)
        # Tables and lengths of attention; ids of gather; both of copy; slots of write.
        assert str(inside).count("check[") >= 6
        assert inside.effects


def test_the_mode_is_part_of_the_cache_key() -> None:
    traced = []

    @jax.jit
    def halve(x: jax.Array) -> jax.Array:
        traced.append(None)
        check(x >= 0, "got {x}, want 0 or more", x=x)
        return x / 2

    checked = checkify.checkify(halve)
    for want_error in (False, True, False, True):
        with checking(want_error):
            assert (checked(jnp.float32(-2.0))[0].get() is not None) == want_error
            assert halve(jnp.float32(-2.0)) == -1.0
    assert len(traced) == 2


@pytest.fixture
def is_checking() -> Callable[[], bool]:
    """Whether a check traced now is reported, read off a function that jit has cached in both modes."""
    checked = checkify.checkify(jax.jit(lambda x: check(x > 0, "not positive")))
    return lambda: checked(jnp.float32(0.0))[0].get() is not None


def test_nests_and_restores(is_checking: Callable[[], bool]) -> None:
    assert not is_checking()
    with checking():
        with checking():
            assert is_checking()
        with checking(False):
            assert not is_checking()
        assert is_checking()
        with pytest.raises(KeyError), checking(False):
            raise KeyError
        assert is_checking()
    assert not is_checking()
    with pytest.raises(KeyError), checking():
        raise KeyError
    assert not is_checking()


def test_of_one_thread_only(is_checking: Callable[[], bool]) -> None:
    entered, seen = threading.Barrier(2, timeout=60), {}

    def other(enabled: bool) -> None:
        with checking(enabled):
            entered.wait()
            seen[enabled] = is_checking()
            entered.wait()
        seen[enabled, "after"] = is_checking()

    thread = threading.Thread(target=other, args=(True,))
    thread.start()
    other(False)
    thread.join()
    assert seen == {True: True, False: False, (True, "after"): False, (False, "after"): False}
    assert not is_checking()


def test_decorates_a_function(is_checking: Callable[[], bool]) -> None:
    for _ in range(2):
        assert checking()(is_checking)()
        assert not is_checking()
