"""Kill either side of a handoff between processes at random moments, and check what is left of the other.

    python scripts/kill_handoff.py --kills 20 --seed 0

After each kill: errors or a recompute within the stated deadline, every block back on the surviving side, no wrong
token, and the survivor serves the next requests. Prints a line a kill.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.serving.handoff_kills import DEADLINE, Kill, kill_decode, kill_prefill


def main() -> None:
    """Kill, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of both sides together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as name:
        cache_dir = pathlib.Path(name)
        kills += kill_prefill(arguments.kills // 2, arguments.seed, cache_dir)
        kills += kill_decode(arguments.kills - arguments.kills // 2, arguments.seed, cache_dir)
    for kill in kills:
        print(
            f"{kill.side:8} killed after {kill.after:.3f} s and {kill.fetched:3} blocks: {kill.lost} loads lost, "
            f"noticed after {kill.noticed:.3f} s"
        )
    slowest = max(kill.noticed for kill in kills)
    print(f"{len(kills)} kills, all blocks back, no wrong token; slowest {slowest:.2f} s, stated deadline {DEADLINE} s")
    if slowest > DEADLINE:
        raise SystemExit("the stated deadline was missed")


if __name__ == "__main__":
    main()
