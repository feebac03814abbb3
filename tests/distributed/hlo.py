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

    Of a collective that starts and ends apart, the start's result holds operands, results and, of a permutation on
    TPU, two words of its own; an all-reduce's holds its results alone.
    """
    found = []
    for line in program.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            arrays = [array.groups() for array in _ARRAY.finditer(match["result"])]
            if match["start"] and match["op"] != "all-reduce":
                arrays = [array for array in arrays if array != ("u32", "")]
                arrays = arrays[len(arrays) // 2 :]
            found.append((match["op"], sum(_bytes(*array) for array in arrays)))
    return sorted(found)


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return bits // 8 * int(np.prod([int(size) for size in shape.split(",") if size], dtype=int))
