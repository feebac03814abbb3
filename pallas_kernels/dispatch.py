"""Which form of an operation runs: XLA's, or one of the Pallas forms.

An operation has one form per implementation, each in a file of its own beside the others. To add a form,
write that file, with a function called like the operation, and name it in the operation's ``Operation``
table: one line. A form that cannot serve a call here (wrong device, a head_dim it was not written for) raises
``NotImplementedError`` with the reason, and the next form is tried. Nothing else is caught: a bad argument
stays an error.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels.errors import ArgumentError

# The order in which forms are tried when the caller names none: the most special first, the one that runs
# anywhere last.
IMPLEMENTATIONS = ("mosaic_gpu", "triton", "mosaic_tpu", "xla")

Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and the modules that hold its forms.

    Attributes:
        name: what the operation, and the function in each module, is called.
        forms: implementation -> module, imported when it is first tried.
        by_name_only: implementations that are not tried where the caller names none.
    """

    name: str
    forms: Mapping[str, str]
    by_name_only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for implementation in self.forms:
            _check_name(implementation)

    def __call__(self, implementation: Implementation, *args: Any, **kwargs: Any) -> Any:
        """Call the first form that does not raise ``NotImplementedError``.

        Raises:
            ArgumentError: an implementation that nobody has heard of.
            NotImplementedError: none of those asked for is possible here; says why for each.
        """
        reasons = []
        for candidate in self._candidates(implementation):
            try:
                return self._form(candidate)(*args, **kwargs)
            except NotImplementedError as error:
                reasons.append((candidate, error))
        listed = "; ".join(f"{candidate!r}: {error}" for candidate, error in reasons)
        raise NotImplementedError(f"{self.name} cannot run as asked here: {listed}") from reasons[-1][1]

    def _candidates(self, implementation: Implementation) -> tuple[str, ...]:
        if implementation is None:
            return tuple(name for name in IMPLEMENTATIONS if name in self.forms and name not in self.by_name_only)
        candidates = tuple(implementation) if isinstance(implementation, (list, tuple)) else (implementation,)
        if not candidates:
            raise ArgumentError(f"implementation: got {implementation!r}, want one or more of {list(IMPLEMENTATIONS)}")
        for candidate in candidates:
            _check_name(candidate)
        return candidates

    def _form(self, implementation: str) -> Callable[..., Any]:
        if implementation not in self.forms:
            raise NotImplementedError(f"there is no such form; there are {list(self.forms)}")
        return getattr(importlib.import_module(self.forms[implementation]), self.name)


def _check_name(implementation: Any) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ArgumentError(f"implementation: got {implementation!r}, want one of {list(IMPLEMENTATIONS)} or None")
