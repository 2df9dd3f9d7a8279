"""`python -m inputs --count 20000 --seed 0`: a campaign; its last line is JSON. `--one KIND NUMBER` repeats one."""

import argparse
import json
import sys

from . import try_inputs, try_one

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--count", type=int, default=500)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--one", nargs=2, metavar=("KIND", "NUMBER"))
chosen = parser.parse_args()
if chosen.one:
    try_one(chosen.one[0], chosen.seed, int(chosen.one[1]))
    sys.exit()
wrong: list[tuple[str, str]] = []


def note(kind: str, number: int, what: str) -> None:
    wrong.append((kind, f"{number}: {what}"))
    sys.stdout.write(f"WRONG {kind} {number} (seed {chosen.seed}): {what}\n")
    sys.stdout.flush()  # before a crash


tried = try_inputs(chosen.count, chosen.seed, note)
sys.stdout.write(json.dumps({"tried": tried, "wrong": wrong}) + "\n")
sys.exit(bool(wrong))
