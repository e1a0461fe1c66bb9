"""First step of any train config, with nothing compiled before and with the run folder of another run to begin with.

    python benchmarks/startup.py train_configs/decoder_124m.toml --train.global_batch=64
    python benchmarks/startup.py train_configs/debug.toml --train.compile=block --rounds 3

Each start is a process of its own whose TORCHINDUCTOR_CACHE_DIR and
TRITON_CACHE_DIR are empty folders, as on a machine that has compiled nothing. A
cold start measures and compiles, and writes tuned.json and compile_cache.bin; the
warm one after it is given that run folder and no more. Cold and warm take turns, and medians are compared. Seconds are
those of building the trainer, loading the file included, and of its first step
up to the end of the device's work; importing torch comes before and is not
counted, nor are validation, saving and logging, which are off.
`--section.key=value` changes the config.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

QUIET = ["--validation=[]", "--logger=[]", "--checkpoint.every=0", "--train.steps=1_000_000", "--train.priming_steps=0"]


def started(config: str, overrides: list[str]) -> dict[str, float]:
    """What one start took, in this process."""
    import torch

    from titanlm.config import load
    from titanlm.distributed.compile_cache import misses
    from titanlm.train import Trainer

    settings = load(config, overrides)
    begun = time.perf_counter()
    with Trainer(settings) as trainer:
        built = time.perf_counter()
        trainer.train_step()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        done = time.perf_counter()
        if trainer.choices.compile_cache is not None:
            trainer.choices.compile_cache.write()
            size = trainer.choices.compile_cache.path.stat().st_size if trainer.choices.compile_cache.path.exists() else 0
            return {"built_s": built - begun, "first_step_s": done - built, "compiled": misses(), "cache_bytes": size}
    raise SystemExit('nothing is compiled: give --train.compile=block, with train.compile_cache at "run"')


def process(config: str, overrides: list[str]) -> dict[str, float]:
    """What one start took, in a process with empty caches. Raises SystemExit with what it said when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, "--here", config, *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with status {done.returncode}\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(config: str, overrides: list[str], rounds: int) -> dict[str, object]:
    """Medians of cold and warm starts, in turn."""
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as runs:
            common = [*overrides, *QUIET, f"--run.dir={runs}"]
            starts["cold"].append(process(config, [*common, f"--run.name=cold-{number}"]))
            starts["warm"].append(process(config, [*common, f"--run.name=warm-{number}", f"--train.compile_cache={Path(runs) / f'cold-{number}'}"]))
    found: dict[str, object] = {"config": config, "overrides": overrides, "rounds": rounds}
    for side, each in starts.items():
        found[side] = {name: statistics.median(one[name] for one in each) for name in each[0]}
    return found


def lines(found: dict[str, object]) -> Iterator[str]:
    cold, warm = found["cold"], found["warm"]
    assert isinstance(cold, dict)
    assert isinstance(warm, dict)
    yield f"{found['config']} {' '.join(map(str, found['overrides']))}"  # type: ignore[call-overload]
    yield "                 cold s     warm s   warm / cold"
    for name, keys in (("build", ["built_s"]), ("first step", ["first_step_s"]), ("both", ["built_s", "first_step_s"])):
        a, b = (sum(side[key] for key in keys) for side in (cold, warm))
        yield f"{name:<12}{a:>11.2f}{b:>11.2f}{b / a:>14.3f}"
    size_mib = cold["cache_bytes"] / (1 << 20)
    yield f"graphs compiled because no cache had them: {cold['compiled']:.0f} cold, {warm['compiled']:.0f} warm; file of {size_mib:.1f} MiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="train config; --section.key=value changes it")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="cold starts, and as many warm ones (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    wrong = [word for word in rest if not (word.startswith("--") and "=" in word)]
    if wrong or options.rounds < 1:
        parser.error(f"{wrong[0]!r} is no override such as --train.compile=block" if wrong else "--rounds must be 1 or more")
    if options.here:
        print(json.dumps(started(options.config, rest)))
        return 0
    found = compare(options.config, rest, options.rounds)
    print(json.dumps(found) if options.json else "\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
