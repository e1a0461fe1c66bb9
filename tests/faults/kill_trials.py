"""Kills with SIGKILL at random moments and looks at what is left; a few trials in the tests, hundreds by hand.

    python tests/faults/kill_trials.py --kind training --trials 100
    python tests/faults/kill_trials.py --kind training --trials 20 --ranks 2 --strategy fsdp2

training: a tiny run is killed once or twice on its way, every rank or one of
them, and started again until it is done. saving: the same, but killed as soon
as the first byte of a save is on disk. resave: 32 MiB are saved under three
steps in turn, over and over, and the process that does it is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from titanlm import checkpoint
from titanlm.errors import CheckpointError

TESTS = Path(__file__).parents[1]
STEPS, EVERY = 30, 5
FIRST_STEP = " tok/s "
COMPARED = re.compile("loss|grad_norm|bits_per_byte|validation/.*|lr.*|tokens|data/.*")
"""Metrics that are the same in every run; the others tell the time."""


def module(path: Path) -> ModuleType:
    """A file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[path.stem] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@dataclass
class Trial:
    """What became of one."""

    survived: bool = True
    """It could be gone on from, and came to its end."""
    unreadable: int = 0
    """Checkpoints of right names that cannot be loaded."""
    lost: int = 0
    """The most steps that one kill has cost."""
    allowed: int = EVERY
    in_save: int = 0
    """Kills that hit a save."""
    differences: list[str] = field(default_factory=list)
    """From what was to be found at the end."""
    story: str = ""

    @property
    def good(self) -> bool:
        return self.survived and not self.unreadable and not self.differences and self.lost <= self.allowed


# ---------------------------------------------------------------- a run
class Training:
    """A tiny run with all that has state, and what it gives undisturbed."""

    def __init__(self, zygote: Any, folder: Path, rng: random.Random, *, ranks: int = 1, strategy: str = "fsdp2", overrides: tuple[str, ...] = ()) -> None:
        self.zygote, self.rng, self.ranks = zygote, rng, ranks
        conftest = module(TESTS / "conftest.py")
        self.config = inspect.unwrap(conftest.tiny)(folder, inspect.unwrap(conftest.corpus)(folder))
        self.runs = folder / "runs"
        self.overrides = [f"--train.steps={STEPS}", f"--checkpoint.every={EVERY}", "--checkpoint.keep_last=3", "--train.validate_every=10", *overrides]
        if ranks > 1:
            self.overrides += [f"--parallel.strategy={strategy}", "--parallel.timeout_s=5", "--parallel.init_timeout_s=15"]
        launched, begin = self.start("reference"), time.monotonic()
        wait_until(lambda: FIRST_STEP in launched.output())
        first = time.monotonic()
        launched.expect(0)
        self.start_s, self.training_s = first - begin, time.monotonic() - first

    def start(self, name: str) -> Any:
        return self.zygote.train(self.config, f"--run.name={name}", *self.overrides, ranks=self.ranks)

    def trial(self, name: str, *, in_save: bool = False, kills: int = 0) -> Trial:
        """Kill a run of this name so often (0: once or twice), let it come to its end and compare it with the undisturbed one."""
        trial, root = Trial(), self.runs / name / "checkpoints"
        for _ in range(kills or self.rng.choice((1, 1, 2))):
            self._kill(trial, name, root, in_save)
        launched = self.start(name)
        try:
            statuses = launched.wait()
        finally:
            _end(launched)
        trial.survived &= statuses == [0] * self.ranks
        if trial.survived:
            trial.differences = run_differences(self.runs / "reference", self.runs / name, STEPS)
        else:
            trial.story += f" statuses {statuses}: {launched.output()[-2000:]}"
        if trial.good:
            shutil.rmtree(self.runs / name)
        return trial

    def _kill(self, trial: Trial, name: str, root: Path, in_save: bool) -> None:
        launched = self.start(name)
        try:
            if in_save:
                self._await_save(root)
            else:
                self._await_moment(launched)
            victims = range(self.ranks) if self.ranks == 1 or self.rng.random() < 0.5 else [self.rng.randrange(self.ranks)]
            for rank in victims:
                launched.kill(rank)
            statuses = launched.wait(40.0)
        finally:
            _end(launched)
        # The others end by themselves: with the message of a lost connection, or by the watchdog.
        trial.survived &= all(status in ((-9, 0) if rank in victims else (2, 75, 0)) for rank, status in enumerate(statuses))
        # As the next start finds them. A save that was under way does not count, so it costs the steps since the one before.
        under_way = any(root.glob(".tmp-*"))
        if root.is_dir():
            checkpoint.sweep(root)
        trial.unreadable += sum(checkpoint.verify(folder) is not None for _, folder in checkpoint.steps(root))
        newest = checkpoint.latest(root)
        reached, kept = last_step(self.runs / name), 0 if newest is None else checkpoint.load(newest).step
        trial.in_save += under_way
        trial.lost, trial.allowed = max(trial.lost, reached - kept), max(trial.allowed, EVERY * (1 + under_way))
        whom = "all" if len(victims) == self.ranks else f"rank {victims[0]}"
        trial.story += f" killed {whom} at {reached}{' in a save' if under_way else ''}, goes on from {kept};"

    def _await_moment(self, launched: Any) -> None:
        """Mostly one between the first step and the end, sometimes one before."""
        if self.rng.random() < 0.15:
            time.sleep(self.rng.uniform(0.0, self.start_s))
            return
        with contextlib.suppress(TimeoutError):  # it was done before and has no steps to make
            wait_until(lambda: FIRST_STEP in launched.output(), self.start_s + 5.0)
        time.sleep(self.rng.uniform(0.0, self.training_s))

    def _await_save(self, root: Path) -> None:
        """Until the first byte of a save, any of those that are still to come."""
        before, seen = {folder.name for folder in root.glob("step-*")}, set[str]()
        wanted = self.rng.randint(1, max(1, STEPS // EVERY - len(before)))

        def wanted_begins() -> bool:
            for folder in root.glob(".tmp-*"):
                if any(file.stat().st_size for file in folder.iterdir()):
                    seen.add(folder.name)
            return len(seen) >= wanted

        with contextlib.suppress(TimeoutError):  # one that went by unseen
            wait_until(wanted_begins, self.start_s + self.training_s)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Raises TimeoutError. What is to be read need not be there yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        time.sleep(0.001)
    raise TimeoutError(f"after {seconds:g} s still not so")


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; a line that the kill has torn does not count."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def metrics(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The lines of metrics.jsonl without the times in them."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], {name: value for name, value in row.items() if COMPARED.fullmatch(name)}) for row in rows]


def run_differences(a: Path, b: Path, step: int) -> list[str]:
    """Between two runs that end with this step: losses, scores and the whole state of the last checkpoint, bit for bit but for the time.

    Of the scores before the last ones, those may be missing that a kill has cut short.
    """
    found = [f"metrics: {left} and {right}" for left, right in zip_longest(losses(a), losses(b)) if left != right]
    there, here = scores(a), scores(b)
    found += [f"metrics: {here[at]} and not {there.get(at)}" for at in here if here[at] != there.get(at)]
    found += ["the last scores are missing"] if step not in here else []
    return found + state_differences(a, b, step)


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Of every step, with what else is told of it."""
    return [(step, row) for step, row in metrics(run) if "loss" in row]


def scores(run: Path) -> dict[int, dict[str, float]]:
    """Of the validation set, by step."""
    return {step: row for step, row in metrics(run) if "loss" not in row}


def state_differences(a: Path, b: Path, step: int) -> list[str]:
    saved, other = (checkpoint.load(run / "checkpoints" / checkpoint.folder_name(step)) for run in (a, b))
    for each in (saved, other):
        each.state["progress"].pop("elapsed_s")
    return differences(saved.state, other.state, "state") + differences(saved.ranks, other.ranks, "ranks")


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Paths at which two trees of dicts, lists, tensors and numbers are not bitwise equal."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [path for key in a for path in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [path for index, (x, y) in enumerate(zip(a, b, strict=True)) for path in differences(x, y, f"{at}[{index}]")]
    a, b = (torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in (a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [at]


def _end(launched: Any) -> None:
    for rank in range(len(launched.pids)):
        launched.kill(rank)


# ---------------------------------------------------------------- the same steps, saved again and again
RESAVE = """
import itertools
from pathlib import Path
import torch
from titanlm import checkpoint
for version in itertools.count(FIRST):
    tensors = {f"{number}": torch.full((1 << 20,), float(version)) for number in range(4)}
    state = {"model": tensors, "moments": {name: tensor.clone() for name, tensor in tensors.items()}, "version": version}
    print("begun", version, flush=True)
    checkpoint.save(Path("ROOT"), 10 + version % 3, state, {"version": torch.tensor([version])}, "")
    print("saved", version, flush=True)
"""


class Resave:
    """32 MiB in which everything carries the number of the save, under three steps in turn."""

    def __init__(self, zygote: Any, folder: Path, rng: random.Random) -> None:
        self.zygote, self.root, self.rng = zygote, folder / "checkpoints", rng
        self.version = 0
        """The next."""

    def trial(self, name: str) -> Trial:
        trial = Trial()
        code = RESAVE.replace("FIRST", str(self.version)).replace("ROOT", str(self.root))
        launched = self.zygote.run(code)
        try:
            # From the first trial on, all three are there.
            wait_until(lambda: f"saved {self.version + 2}\n" in launched.output())
            time.sleep(self.rng.uniform(0.0, 0.6))
            launched.kill(0)
            trial.survived = launched.wait() == [-9]
        finally:
            _end(launched)
        words = [line.split() for line in launched.output().splitlines()]
        begun, saved = (max(int(version) for word, version in words if word == kind) for kind in ("begun", "saved"))
        before = checkpoint.latest(self.root)
        trial.in_save = int(any(self.root.glob(".[to]*")))
        trial.survived &= before is not None
        checkpoint.sweep(self.root)
        trial.survived &= [step for step, _ in checkpoint.steps(self.root)] == [10, 11, 12]
        for version in range(begun - 2, begun + 1):
            possible = {version, version - 3} if version != saved and version == begun else {version}
            try:
                found = versions(self.root / checkpoint.folder_name(10 + version % 3))
            except CheckpointError:
                trial.unreadable += 1
                continue
            if len(found) != 1 or not found <= possible:
                trial.differences.append(f"{found} in place of one of {possible}")
        self.version = begun + 1 if saved == begun else begun
        trial.story = f" killed {'in' if begun != saved else 'after'} save {begun}"
        return trial


def versions(folder: Path) -> set[int]:
    """All numbers of saves in a checkpoint; one, unless parts of two are mixed."""
    saved = checkpoint.load(folder)
    tensors = [*saved.state["model"].values(), *saved.state["moments"].values(), saved.ranks[0]["version"]]
    return {saved.state["version"], *(int(extreme) for tensor in tensors for extreme in tensor.aminmax())}


# ---------------------------------------------------------------- by hand
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("training", "saving", "resave"), required=True)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="fsdp2", help="of several ranks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, zygote = random.Random(args.seed), module(TESTS / "zygote.py").Zygote()
    done: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="kill-trials-") as folder:
        try:
            if args.kind == "resave":
                trial = Resave(zygote, Path(folder), rng).trial
            else:
                training = Training(zygote, Path(folder), rng, ranks=args.ranks, strategy=args.strategy)
                trial = partial(training.trial, in_save=args.kind == "saving")
            begin = time.monotonic()
            for number in range(1, args.trials + 1):
                done.append(trial(f"trial-{number}"))
                last = done[-1]
                print(f"{number}:{last.story} {'equal' if last.good else f'WRONG: {last}'}", flush=True)
        finally:
            zygote.close()
    survived, equal = sum(trial.survived for trial in done), sum(trial.survived and not trial.differences for trial in done)
    unreadable, lost = sum(trial.unreadable for trial in done), max(trial.lost for trial in done)
    print(f"{60 * len(done) / (time.monotonic() - begin):.1f} trials a minute; {sum(trial.in_save for trial in done)} kills hit a save")
    print(f"a checkpoint every {EVERY} steps; a save under way does not count, so it costs the steps since the one before")
    print(f"survived {survived} of {len(done)}; equal {equal} of {len(done)}; max steps lost {lost}; checkpoints unreadable {unreadable}")
    return 0 if all(trial.good for trial in done) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
