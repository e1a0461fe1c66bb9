"""Two commands in turn, A B A B, and the ratio of a number that both print.

    python benchmarks/alternate.py \\
        --a "python benchmarks/step.py train_configs/debug.toml --warm-up 3 --steps 20 --json" --find-a '"step_s": ([0-9.e-]+)' \\
        --b "python benchmarks/step.py train_configs/debug.toml --warm-up 3 --steps 20 --json --train.threads=2"

The number is the first group of the last match of a regular expression in what
the command prints, on either stream. What else the machine does then falls on
both, and what the first of a pair warms up is told by the rounds.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import time


def run(command: str, pattern: str, timeout_s: float) -> tuple[float, float]:
    """The number a command prints last, and the seconds it took. Raises SystemExit naming what is missing."""
    started = time.perf_counter()
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"{command}: {error}") from None
    said = done.stdout + done.stderr
    found = re.findall(pattern, said)
    if done.returncode or not found:
        why = f"ended with status {done.returncode}" if done.returncode else f"printed nothing that {pattern!r} finds"
        raise SystemExit(f"{command}: {why}\n{said[-2000:]}")
    return float(found[-1]), time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", required=True, metavar="COMMAND")
    parser.add_argument("--b", required=True, metavar="COMMAND")
    parser.add_argument("--find-a", required=True, metavar="REGEX", help="with one group, a number")
    parser.add_argument("--find-b", metavar="REGEX", help="default: as --find-a")
    parser.add_argument("--scale-a", type=float, default=1.0, metavar="X", help="what a's number is multiplied by, where units differ (default: %(default)s)")
    parser.add_argument("--scale-b", type=float, default=1.0, metavar="X", help="the same for b's")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="times each is run (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds a command may take (default: %(default)s)")
    options = parser.parse_args()
    patterns = {"a": options.find_a, "b": options.find_b or options.find_a}
    for side, pattern in patterns.items():
        if re.compile(pattern).groups != 1:
            parser.error(f"--find-{side}: {pattern!r} must have one group")
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    numbers: dict[str, list[float]] = {"a": [], "b": []}
    for number in range(1, options.rounds + 1):
        for side, own in numbers.items():
            found, taken_s = run(getattr(options, side), patterns[side], options.timeout)
            value = found * (options.scale_a if side == "a" else options.scale_b)
            own.append(value)
            print(f"round {number} of {options.rounds}: {side} {value:g} ({taken_s:.1f} s)", flush=True)
    a, b = (statistics.median(own) for own in numbers.values())
    print(f"a {a:g}, b {b:g}: b / a = {b / a:.4f}, a / b = {a / b:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
