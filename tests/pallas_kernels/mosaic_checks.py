"""The comparisons of ``form_checks`` for Mosaic TPU forms, or broken copies of them, interpreted.

The interpreter is the strict one, where no other is asked for: a copy that nobody waited for has not happened, an
access out of range raises. The other one does a copy when it is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret_pallas
from tests.pallas_kernels import failed_callbacks, form_checks
from tests.pallas_kernels.form_checks import Form

STRICT = pltpu.InterpretParams()


@contextmanager
def interpreted(mode: Any = STRICT) -> Iterator[None]:
    """Under an interpreter, by default the strict one, whose memory is cleared after."""
    try:
        with failed_callbacks.kept_inside(), interpret_pallas(mode):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def _interpreted(check: Callable[[Form, Any], None]) -> Callable[..., None]:
    def checked(form: Form, case: Any, mode: Any = STRICT) -> None:
        with interpreted(mode):
            check(form, case)

    return checked


check_gather = _interpreted(form_checks.check_gather)
check_copy = _interpreted(form_checks.check_copy)
check_write = _interpreted(form_checks.check_write)
check_merge = _interpreted(form_checks.check_merge)
check_attention = _interpreted(form_checks.check_attention)


def check_nan(form: Form) -> None:
    with interpreted():
        form_checks.check_nan(form)
