"""What a start of a run looks at before it trains: the config, the run's folder and its checkpoints, the first weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from titanlm import checkpoint
from titanlm.check import Report, check
from titanlm.checkpoint_copy import RemoteCopies
from titanlm.config import RunConfig
from titanlm.distributed.slices import whole
from titanlm.distributed.world import Peers, World
from titanlm.environment import requirements
from titanlm.errors import CheckpointError, ConfigError, TitanError
from titanlm.loggers.text import printable
from titanlm.metrics import GIB
from titanlm.runs import RunFolder
from titanlm.tokenizers.fingerprint import difference
from titanlm.weights import load_weights


def preflight(config: RunConfig) -> Report:
    """Check a config; print warnings, raise ConfigError with every problem."""
    report = check(config, network=True)
    problems = report.problems + requirements(config)
    if problems:
        raise ConfigError(problems, config.run.name or "config")
    if World.from_environment().local_rank == 0:
        for warning in report.warnings:
            print(printable(f"WARNING: {warning}"), file=sys.stderr)
    return report


def open_folder(config: RunConfig, peers: Peers) -> RunFolder:
    """The run's folder, locked by rank 0. Raises TitanError on every rank when a rank cannot use it."""
    path = Path(config.run.dir) / config.run.name
    folder = peers.first(lambda: RunFolder.open(Path(config.run.dir), config.run.name))

    def seen() -> RunFolder:
        if not path.is_dir():
            raise TitanError(f"run.dir: rank 0 made {path}, but rank {peers.rank} does not see it; all hosts of a run need one shared file system")
        return RunFolder(path)

    try:
        return peers.agree(lambda: folder or seen())
    except BaseException:
        if folder is not None:
            folder.close()
        raise


def prepare_checkpoints(root: Path, copies: RemoteCopies | None) -> None:
    """Clear away what a kill left behind, and fetch the newest copy where it is newer than what is here."""
    checkpoint.sweep(root)
    if copies is None:
        return
    here = checkpoint.latest(root)
    step = -1 if here is None else int(here.name.removeprefix("step-"))
    newest = copies.newest(than_step=step)
    if newest is not None:
        copies.fetch(newest, root, than_step=step)


def wind_back(root: Path, step: int, copies: RemoteCopies | None) -> None:
    """What was saved after this step counts no more."""
    checkpoint.set_aside(root, step)
    if copies is not None:
        copies.wind_back(step)


def room_for_checkpoints(keep_last: int, checkpoint_bytes: int, root: Path) -> list[str]:
    """A warning now rather than a full disk at hour nine."""
    needed = (keep_last + 1) * checkpoint_bytes
    free = shutil.disk_usage(root).free
    if free >= needed:
        return []
    kept = f"checkpoint.keep_last = {keep_last} and one being written take about {needed / GIB:.1f} GiB"
    return [f"WARNING: {root}: {free / GIB:.1f} GiB are free, and {kept}"]


def load_initial(config: RunConfig, model: Any, tokenizer: Any, peers: Peers) -> list[str]:
    """Weights of another run, checkpoint or artifact into a fresh model; what is to be told of them."""
    from titanlm.initial_load import initial_weights

    settings = config.checkpoint.initial_load
    assert settings is not None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    # Gathered now, if at all: a rank that cannot read the source must not leave the others in the middle of it.
    fresh = {name: whole(tensor) for name, tensor in tensors.items()} if settings.skip or settings.grow == "init" else {}
    weights, notes = peers.agree(lambda: initial_weights(settings, model, tokenizer=tokenizer.fingerprint, fresh=fresh.__getitem__))
    load_weights(model, weights, settings.path)
    return notes


def require_same_data(now: dict[str, str], saved: dict[str, str], folder: Path) -> None:
    """Raise CheckpointError with the difference when a resumed run would read other data, or the same as other tokens."""
    changed = [what for what, value in now.items() if saved.get(what) != value]
    if changed:
        details = difference(saved["tokenizer"], now["tokenizer"]) if "tokenizer" in changed else []
        lines = "".join(f"\n  {line}" for line in details)
        raise CheckpointError(f"{folder}: the {' and the '.join(changed)} changed since it was saved; a resumed run would read other data{lines}")
