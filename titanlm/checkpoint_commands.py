"""``titanlm checkpoint list | verify | prune | rewind``: what a run has kept, whether it is sound, less of it, and back to one of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli

from titanlm import checkpoint
from titanlm.best import Best
from titanlm.checkpoint_copy import RemoteCopies
from titanlm.datasets.files import is_url
from titanlm.errors import CheckpointError
from titanlm.runs import Lock

_MANIFEST = "MANIFEST.json"


# ---------------------------------------------------------------- list
@dataclass(frozen=True)
class Row:
    """One checkpoint of a run."""

    step: int
    n_bytes: int
    saved_at: str
    """UTC, as the file system says; "" without a manifest."""
    ranks: int | None
    """That wrote it; None where that cannot be read."""
    tokens: int | None
    """Trained on until then; None where that cannot be read."""
    problem: str | None
    best: bool
    newest: bool
    """The newest sound one, which a resumed run takes up."""


def listing(run: str, *, verify: bool = False, as_json: bool = False) -> str:
    """The checkpoints of a run, or the copies of them behind a URL, a line each or as one line of JSON.

    Whether one is sound is told from its manifest and the sizes of its files,
    with ``verify`` from every byte. Raises CheckpointError where there is none.
    """
    rows = _copies(run, verify) if is_url(run) else _rows(Path(run), verify)
    return json.dumps([asdict(row) for row in rows]) if as_json else _table(rows)


def _rows(run: Path, verify: bool) -> list[Row]:
    folders = _of_run(run)
    best = Best.stored(run).step
    problems = {step: checkpoint.verify(folder) if verify else glance(folder) for step, folder in folders}
    newest = max((step for step, problem in problems.items() if problem is None), default=None)
    rows = []
    for step, folder in folders:
        manifest = folder / _MANIFEST
        saved_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.stat().st_mtime)) if manifest.is_file() else ""
        ranks, tokens = _number(_read(manifest), "world_size"), _number(_read(folder / "state-00000.json"), "state", "progress", "tokens")
        rows.append(Row(step, _size(folder), saved_at, ranks, tokens, problems[step], step == best, step == newest))
    return rows


def _copies(url: str, verify: bool) -> list[Row]:
    copies = RemoteCopies(url)
    if verify:
        raise CheckpointError(f"{copies.shown}: --verify would fetch every byte; copy a checkpoint folder here and use `titanlm checkpoint verify`")
    found = [(step, manifest, sizes, _differs(step, manifest, sizes)) for step, manifest, sizes in copies.contents()]
    if not found:
        raise CheckpointError(f"{copies.shown}: no copy of a checkpoint in it")
    newest = max((step for step, _, _, problem in found if problem is None), default=None)
    return [
        Row(step, sum(sizes.values()), "", _number(manifest, "world_size"), None, problem, best=False, newest=step == newest)
        for step, manifest, sizes, problem in found
    ]


def _table(rows: Sequence[Row]) -> str:
    cells = [("step", "size", "saved at", "ranks", "tokens", "")]
    for row in rows:
        marks = [mark for mark, holds in (("best", row.best), ("newest", row.newest)) if holds]
        said = ", ".join(marks) if row.problem is None else "; ".join([*marks, row.problem])
        cells.append((f"{row.step:,}", _bytes(row.n_bytes), row.saved_at or "-", _count(row.ranks), _count(row.tokens), said))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip() for line in cells]
    return "\n".join(lines)


def glance(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as its manifest and the sizes of its files tell, or None. No content is read."""
    return _differs(int(folder.name[-8:]), _read(folder / _MANIFEST), {file.name: file.lstat().st_size for file in folder.iterdir()})


def _differs(step: int, manifest: bytes | None, sizes: Mapping[str, int]) -> str | None:
    if manifest is None:
        return f"{_MANIFEST} is missing: the save was not finished"
    try:
        document = json.loads(manifest)
        expected = {str(name): int(file["bytes"]) for name, file in document["files"].items()}
        if document["step"] != step:
            return f"{_MANIFEST} is of step {document['step']}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_MANIFEST} cannot be read: {error!r}"
    present = {name: size for name, size in sizes.items() if name != _MANIFEST}
    for name in sorted(present.keys() ^ expected.keys()):
        return f"{name} is {'not in the manifest' if name in present else 'missing'}"
    for name, n_bytes in expected.items():
        if present[name] != n_bytes:
            return f"{name} has {present[name]:,} bytes, {n_bytes:,} by the manifest"
    return None


# ---------------------------------------------------------------- verify
def verification(paths: Sequence[Path], expect_sha256: str | None = None) -> Iterator[tuple[str, bool]]:
    """A line for each checkpoint of runs and checkpoint folders, and whether it is sound; every byte is read.

    A manifest vouches for its files, but whoever changes a file can change the
    manifest too. ``expect_sha256``, kept elsewhere, vouches for the manifest.
    Raises CheckpointError for a path without checkpoints, before anything is read.
    """
    folders = [folder for path in paths for folder in _meant(path)]
    if expect_sha256 is not None and len(folders) != 1:
        raise CheckpointError(f"--expect-sha256 is the hash of one checkpoint's manifest, and {len(folders)} are meant; name one checkpoint folder")
    for folder in folders:
        problem = checkpoint.verify(folder)
        if problem is None:
            sha256 = hashlib.sha256((folder / _MANIFEST).read_bytes()).hexdigest()
            if expect_sha256 is not None and sha256 != expect_sha256:
                problem = f"the sha256 of {_MANIFEST} is {sha256}, expected {expect_sha256}: it is another checkpoint or was tampered with"
        yield (f"{folder}: ok, manifest sha256 {sha256}", True) if problem is None else (f"{folder}: {problem}", False)


def _meant(path: Path) -> list[Path]:
    if (path / "checkpoints").is_dir():
        return [folder for _, folder in _of_run(path)]
    if path.is_dir() and path.name.startswith("step-"):
        return [path]
    raise CheckpointError(f"{path}: neither a run folder (no checkpoints in it) nor a checkpoint folder (step-00000123)")


# ---------------------------------------------------------------- prune
def prune(run: Path, *, keep_last: int, keep_every: int | None = None, dry_run: bool = False) -> Iterator[str]:
    """Delete a run's checkpoints beyond the last ``keep_last``, saying which.

    Those at multiples of ``keep_every`` stay, the best does, and so does the
    newest that is sound by every byte. Damaged ones do not count towards those
    kept and are left alone. Raises TitanError while a trainer is in the run,
    CheckpointError when there is none or none is sound, and when the disk refuses.
    """
    _of_run(run)  # before a lock makes a file in what may be no run
    if dry_run:
        yield from _prune(run, keep_last, keep_every, dry_run)
        return
    try:
        lock = Lock(run / ".lock")
    except OSError as error:
        raise CheckpointError(f"{run}: not writable, so nothing can be deleted: {error.strerror}") from error
    try:
        yield from _prune(run, keep_last, keep_every, dry_run)
    finally:
        lock.release()


def _prune(run: Path, keep_last: int, keep_every: int | None, dry_run: bool) -> Iterator[str]:
    folders = _of_run(run)
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run}: no checkpoint is sound, so nothing is deleted; `titanlm checkpoint verify {run}` says what is wrong with them")
    damaged = {folder: problem for _, folder in folders if (problem := glance(folder)) is not None}
    whole = [(step, folder) for step, folder in folders if folder not in damaged]
    best = Best.stored(run).step
    kept = {newest, *(folder for _, folder in whole[-keep_last:])}
    kept |= {folder for step, folder in whole if step == best or (keep_every is not None and step % keep_every == 0)}
    for folder, problem in damaged.items():
        yield f"{folder}: {problem}; left alone"
    going = [folder for _, folder in whole if folder not in kept]
    freed = 0
    for folder in going:
        n_bytes = _size(folder)
        if not dry_run:
            _delete(folder)
        freed += n_bytes
        yield f"{folder}: {_bytes(n_bytes)}{'' if dry_run else ', deleted'}"
    yield f"{len(going):,} checkpoints, {_bytes(freed)} {'would be freed' if dry_run else 'freed'}; {len(folders) - len(going):,} stay"


def _delete(folder: Path) -> None:
    """Out of the way in one rename, so that a half-deleted folder is never taken for a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    try:
        folder.rename(trash)
        shutil.rmtree(trash)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be deleted: {error.strerror}; those named before it are gone") from error


# ---------------------------------------------------------------- parts
def _of_run(run: Path) -> list[tuple[int, Path]]:
    folders = checkpoint.steps(run / "checkpoints")
    if not folders:
        what = "no checkpoint in it yet" if (run / "checkpoints").is_dir() else "not a run folder (no checkpoints in it)"
        raise CheckpointError(f"{run}: {what}")
    return folders


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


def _read(file: Path) -> bytes | None:
    """None when it is not there."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _number(content: bytes | None, *keys: str) -> int | None:
    """A number in JSON that may be of another version, or damaged."""
    try:
        value: Any = json.loads(content or b"")
        for key in keys:
            value = value[key]
        return int(value)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _bytes(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes} B"


# ---------------------------------------------------------------- rewind
def _copied_to(run: Path) -> str:
    """`checkpoint.copy_to` of the run's newest start; its components need not be importable here."""
    try:
        return str(tomli.loads((run / "config.toml").read_text(encoding="utf-8")).get("checkpoint", {}).get("copy_to", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def rewind(run: Path, step: int) -> str:
    """Make a run go on from an earlier checkpoint; later ones are moved aside and can be moved back by hand.

    Raises TitanError while a trainer is in the run, CheckpointError when that
    checkpoint is not there or not sound.
    """
    folder = dict(_of_run(run)).get(step)
    if folder is None:
        there = ", ".join(str(number) for number, _ in _of_run(run))
        raise CheckpointError(f"{run}: no checkpoint of step {step} (there: {there})")
    if (problem := checkpoint.verify(folder)) is not None:
        raise CheckpointError(f"{folder}: {problem}; choose another step")
    try:
        lock = Lock(run / ".lock")
        try:
            moved = checkpoint.set_aside(run / "checkpoints", step)
            if url := _copied_to(run):
                RemoteCopies(url).wind_back(step)  # or the next start would fetch a later one
        finally:
            lock.release()
    except OSError as error:
        raise CheckpointError(f"{run}: not writable, so nothing can be moved: {error.strerror}") from error
    where = f"{len(moved):,} later ones are in {moved[0].parent}" if moved else "there are no later ones"
    return f"{run} goes on from step {step} when it is started again; {where}"
