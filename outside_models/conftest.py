"""What gemma 3.3.0 lacks to be imported as it comes from PyPI."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):  # not there in the tests of other models
    from kauldron import kd

    if not hasattr(kd.ckpts, "AbstractPartialLoader"):  # its name before kauldron 1.4, by which gemma derives from it
        kd.ckpts.AbstractPartialLoader = kd.ckpts.InitTransform
