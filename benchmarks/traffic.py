"""The traffic that benchmarks of tables and allocation share: lengths of prompts and of answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PROMPT_MEDIAN, OUTPUT_MEDIAN, SIGMA, LONGEST = 512, 256, 1.0, 131_072


class Traffic(NamedTuple):
    """Tokens of each request, i64[n] each."""

    prompts: np.ndarray
    outputs: np.ndarray

    def in_flight(self, seed: int) -> np.ndarray:
        """i64[n]: tokens that each request holds at a random moment of its answer."""
        rng = np.random.default_rng(seed)
        return self.prompts + (rng.random(len(self.outputs)) * self.outputs).astype(np.int64)


def lengths(number: int, seed: int, longest: int = LONGEST) -> Traffic:
    """Log-normal, prompts of median 512 and answers of median 256, sigma 1.0; cut so that both make ``longest``."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(PROMPT_MEDIAN), SIGMA, number), 1, longest - 1).astype(np.int64)
    outputs = np.clip(rng.lognormal(np.log(OUTPUT_MEDIAN), SIGMA, number), 1, longest - prompts).astype(np.int64)
    return Traffic(prompts, outputs)
