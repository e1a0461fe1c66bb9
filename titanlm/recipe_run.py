"""`titanlm recipe run`: the stages of a recipe one after the other, each a process of its own.

What is finished is written down in ``recipe.json`` of the recipe's folder after
every stage. A stage is passed over when its command and its resolved config are
those it was finished with and its output is there; at the first that is not,
the record of it and of all after it goes, and they run. Stages of one ``each`` do
not follow from one another, so a seed is no reason to train the next one again.
What a stage finds of its own earlier output is its business: training resumes,
`data prepare` goes on, `tokenizer train` wants --force, and `submission build`
wants its folder moved away.

A stage cannot take this process with it, and what it holds in memory is gone
when it ends. A signal is passed on once; the stage saves, and the record stays
as it was.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from titanlm.config import to_tables
from titanlm.distributed.world import World
from titanlm.errors import ConfigError, TitanError
from titanlm.loggers.text import printable
from titanlm.recipe import ScaledRecipe, Stage
from titanlm.registry import did_you_mean
from titanlm.runs import Lock, write_atomic
from titanlm.supervisor import noted_signals, run_child

MANIFEST = "recipe.json"
LOCK = ".recipe.lock"
"""Not that of a run, whose folder this may be too."""
DATA_VERBS = ("data", "tokenizer")
DATA_SECTIONS = ("imports", "data", "dataset", "tokenizer")
"""All that these verbs read of a config: another learning rate is no reason to tokenise again."""


class Manifest:
    """What of a recipe is finished, as its folder says.

    Raises TitanError when that cannot be read, or is of another recipe or scale.
    """

    def __init__(self, scaled: ScaledRecipe) -> None:
        self.path = scaled.out / MANIFEST
        self._about = {"recipe": scaled.recipe.name, "scale": scaled.scale}
        self.stages: dict[str, dict[str, Any]] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            about, self.stages = {key: stored[key] for key in self._about}, {name: dict(stage) for name, stage in stored["stages"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TitanError(f"{self.path}: cannot be read ({error}); delete it, and all stages run again") from error
        if about != self._about:
            raise TitanError(f"{scaled.out}: holds recipe {about['recipe']} at scale {about['scale']}; choose another --output")

    def forget(self, names: list[str]) -> None:
        """Stages that are about to run again."""
        for name in names:
            self.stages.pop(name, None)
        self._write()

    def finish(self, stage: Stage, config: str, seconds: float) -> None:
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.stages[stage.name] = {"command": list(stage.words), "config": config, "output": stage.output, "finished": finished, "seconds": round(seconds, 1)}
        self._write()

    def _write(self) -> None:
        write_atomic(self.path, json.dumps({**self._about, "stages": self.stages}, indent=1) + "\n")


def digests(scaled: ScaledRecipe) -> dict[str, str]:
    """Stage → sha256 of what it reads of its resolved config, empty without one. Raises ConfigError with the mistakes of all."""
    configs = scaled.configs()
    found = {}
    for stage in scaled.stages:
        found[stage.name] = ""
        if stage.name in configs:
            tables = to_tables(configs[stage.name])
            read = {key: tables.get(key) for key in DATA_SECTIONS} if stage.words[0] in DATA_VERBS else tables
            found[stage.name] = hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()
    return found


def reasons(scaled: ScaledRecipe, manifest: Manifest, configs: dict[str, str], again_from: str | None) -> Iterator[tuple[Stage, str]]:
    """Each stage and why it runs; empty: it is finished. Raises TitanError when there is no stage ``again_from``."""
    names = list(dict.fromkeys(name for stage in scaled.stages for name in (stage.of, stage.name)))
    if again_from is not None and again_from not in names:
        raise TitanError(f"--from {again_from}: no such stage at scale {scaled.scale}{did_you_mean(again_from, names)} (stages: {', '.join(names)})")
    first: Stage | None = None
    for stage in scaled.stages:
        done = manifest.stages.get(stage.name)
        if first is not None and first.of != stage.of:
            yield stage, f"{first.name} runs before it"
            continue
        why = ""
        if again_from in (stage.of, stage.name):
            why = "--from"
        elif done is None:
            why = "not finished yet"
        elif done.get("command") != list(stage.words):
            why = "its command changed"
        elif done.get("config") != configs[stage.name]:
            why = "its config changed"
        elif stage.output and not Path(stage.output).exists():
            why = f"{stage.output} is gone"
        first = first or (stage if why else None)
        yield stage, why


def dry_run(scaled: ScaledRecipe, *, again_from: str | None = None) -> str:
    """A line for each stage: whether it would run and why, and its command."""
    lines = []
    for stage, why in reasons(scaled, Manifest(scaled), digests(scaled), again_from):
        lines += [f"{stage.name}: {f'runs, {why}' if why else 'finished'}", f"  {stage.command}"]
    return "\n".join(lines)


def run(scaled: ScaledRecipe, *, again_from: str | None = None, n_processes: int = 1) -> int:
    """Run what is not finished; the exit status of the stage that failed or was interrupted, 0 when all is done.

    Raises TitanError for mistakes, before anything runs, when another process
    runs in the folder, and when a stage ends well without its output.
    """
    configs = digests(scaled)
    list(reasons(scaled, Manifest(scaled), configs, again_from))  # what is wrong is said before a folder is made
    _require_ranks(scaled, n_processes)
    lock = _locked(scaled.out)
    try:
        return _run(scaled, configs, again_from, n_processes)
    finally:
        lock.release()


def _require_ranks(scaled: ScaledRecipe, n_processes: int) -> None:
    """Raises ConfigError when a stage that comes after a long download could not train with so many processes."""
    from titanlm.check import parallel_problems  # brings torch

    loaded, world = scaled.configs(), World(0, n_processes, 0, n_processes)
    trained = [loaded[stage.name] for stage in scaled.stages if stage.trains and stage.name in loaded]
    if problems := [problem for config in trained for problem in parallel_problems(config, world)]:
        raise ConfigError(list(dict.fromkeys(problems)), f"{scaled.recipe.path} --nproc {n_processes}")


def _locked(out: Path) -> Lock:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Lock(out / LOCK)
    except TitanError as error:
        raise TitanError(f"{error} (here a recipe's: wait for it or choose another --output)") from error
    except OSError as error:
        raise TitanError(f"{error.filename or out}: cannot be written ({error.strerror}); choose another --output") from error


def _run(scaled: ScaledRecipe, configs: dict[str, str], again_from: str | None, n_processes: int) -> int:
    manifest = Manifest(scaled)
    stages = list(reasons(scaled, manifest, configs, again_from))
    began = time.monotonic()
    with noted_signals() as received:
        for index, (stage, why) in enumerate(stages):
            here = f"[{index + 1}/{len(stages)}] {stage.name}"
            if not why:
                _say(f"{here}: finished before")
                continue
            there_before = bool(stage.output) and Path(stage.output).exists()
            manifest.forget([later.name for later, runs in stages[index:] if runs])
            _say(f"{here}: {stage.command}")
            start = time.monotonic()
            command, instead = _process(stage, n_processes)
            status, interrupted = run_child(command, received, instead)
            seconds = time.monotonic() - start
            if status:
                goes_on = "; the same command goes on here" if interrupted else ""
                again = f"\n  {stage.output} is of an earlier run; move it away to begin it anew" if there_before and not interrupted else ""
                _say(f"{here}: {'interrupted' if interrupted else f'failed with status {status}'} after {_time(seconds)}{goes_on}{again}")
                return status
            if stage.output and not Path(stage.output).exists():
                raise TitanError(f"{scaled.recipe.path}: stage {stage.name!r} ended well, but its output {stage.output} is not there; does `run` write it?")
            manifest.finish(stage, configs[stage.name], seconds)
            _say(f"{here}: done in {_time(seconds)}")
            if late := interrupted or next(iter(received), 0):  # it came too late for the stage
                return 128 + late
    _say(f"{scaled.recipe.name} {scaled.scale}: done in {_time(time.monotonic() - began)}; {scaled.out / MANIFEST} says what there is")
    return 0


def _process(stage: Stage, n_processes: int) -> tuple[list[str], dict[int, int]]:
    """The command, and what it gets in place of signals that it would not hand on."""
    if stage.trains and n_processes > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}", "-m", "titanlm.train"]
        # At SIGUSR1 torchrun ends without a word to its ranks.
        return [sys.executable, "-m", *launcher, *stage.words[1:]], {signal.SIGUSR1: signal.SIGTERM}
    return [sys.executable, "-m", "titanlm", *stage.words], {}


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _say(text: str) -> None:
    print(printable(text), flush=True)
