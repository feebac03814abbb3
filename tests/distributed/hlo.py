"""What a compiled program exchanges between devices, read from its HLO."""

from __future__ import annotations

import re

import jax
import numpy as np

_NAMES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all"
_COLLECTIVE = re.compile(rf" = (?P<result>\(.*?\)|\S+) (?P<op>{_NAMES})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")


def collectives(program: jax.stages.Compiled) -> list[tuple[str, int]]:
    """(name, bytes of the result on one device) of every collective, sorted; a loop's body counts once.

    Of a collective that starts and ends apart, the start's result holds operand and result; the result is the last.
    """
    found = []
    for line in program.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            sizes = [_bytes(*array.groups()) for array in _ARRAY.finditer(match["result"])]
            found.append((match["op"], sizes[-1] if match["start"] else sum(sizes)))
    return sorted(found)


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return bits // 8 * int(np.prod([int(size) for size in shape.split(",") if size], dtype=int))
