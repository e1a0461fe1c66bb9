"""Checkpoints: a folder that is either whole and verified or not there.

Every rank writes its own part into a temporary folder beside the target, on a
file system that all of them share, flushes every file and tells the size and
sha256 of each. When all have, rank 0 writes ``MANIFEST.json`` last and renames
the folder into place; a kill at any moment leaves the previous checkpoints as
they were. A failure of one rank is one of all, and nothing is published.

A folder counts only when its name is exactly ``step-%08d`` and every byte in it
is accounted for by its manifest, so a flipped bit or a missing file is found
before a tensor is used. Deleting renames first.

    step-00000100/
      config.toml
      state-00000.json              rank 0: the tree of the state, its own part, and where its tensors lie
      state-00001.json              the others: their own part, and where their tensors lie
      model-00000.safetensors       one for each top-level entry of the state of which a rank holds tensors
      own-00000.safetensors         tensors of the rank's own part
      MANIFEST.json

The number of ranks that load need not be that of those that saved. There is no
pickle.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import file_digest
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlm.distributed.world import Peers
from titanlm.errors import CheckpointError
from titanlm.runs import sync_folder
from titanlm.state_tree import DAMAGE, Box, Part, Stored, TensorFiles, join, split
from titanlm.state_tree import fit as fit
from titanlm.tensor_file import write, write_tensors

FORMAT = 2
MAX_JSON_BYTES = 256 << 20
MAX_MANIFEST_BYTES = 64 << 20
HASHING_THREADS = 4
ALONE = Peers()
_NAME = re.compile(r"step-(\d{8})")
_KEY = re.compile(r"[A-Za-z0-9_]+")
_FILE = re.compile(r"[A-Za-z0-9_]+-(\d{5,})\.(?:json|safetensors)|config\.toml")
_MANIFEST, _CONFIG = "MANIFEST.json", "config.toml"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---------------------------------------------------------------- saved
def save(
    root: Path, step: int, state: dict[str, Any], own: dict[str, Any], config_toml: str, *, peers: Peers = ALONE, finite: Sequence[str] = ("model",)
) -> Path:
    """Write ``root/step-%08d`` and return it; one of that step is replaced. Collective.

    ``state`` is the same on every rank but for DTensors, of which each rank
    writes what it holds; ``own`` is this rank's alone. Tensors under the keys
    in ``finite`` must be finite.

    Raises CheckpointError on every rank when one of them cannot write its part;
    whatever was saved before is then untouched.
    """
    return publish(root, step, lambda: split(state, own, peers.rank), config_toml, peers=peers, finite=finite)


def publish(root: Path, step: int, part: Callable[[], Part], config_toml: str, *, peers: Peers = ALONE, finite: Sequence[str] = ("model",)) -> Path:
    """As ``save``, of a state that was taken apart before. Collective."""
    target = root / folder_name(step)
    temporary = root / f".tmp-{target.name}-{os.getpid()}"
    published = False
    files: dict[str, Any] = {}

    def begin() -> list[Any]:
        if peers.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()
        return [temporary.name, step]

    def put_in_place() -> None:
        if peers.rank == 0:
            _require_visible(temporary, files)
            manifest = {"format": FORMAT, "step": step, "world_size": peers.size, "files": files}
            write(temporary / _MANIFEST, [json.dumps(manifest, indent=1).encode()])
            sync_folder(temporary)
            _swap(temporary, target)

    try:
        announced = together(peers, begin)
        if any(number != step for _, number in announced):  # parts of several steps would pass for one checkpoint
            raise CheckpointError(f"the ranks are at different saves: {[number for _, number in announced]}")
        folder = root / announced[0][0]
        for written in together(peers, lambda: _write_part(folder, step, part(), config_toml, peers.rank, finite)):
            files.update(written)
        together(peers, put_in_place)
        published = True
    except Exception as error:  # whatever it is, it must not end one rank alone
        raise CheckpointError(f"{target}: cannot be saved: {error}; earlier checkpoints are untouched") from error
    finally:
        if peers.rank == 0 and not published:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_part(folder: Path, step: int, part: Part, config_toml: str, rank: int, finite: Sequence[str]) -> dict[str, Any]:
    """Write a rank's files; the size and sha256 of each."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}, made by rank 0, is not there; a run folder must lie on a file system that all ranks share")
    by_key: dict[str, dict[str, Any]] = {}
    for path, tensor in part.tensors.items():
        key = path.partition("/")[0]
        if key in finite and isinstance(tensor, Tensor) and not _finite(tensor):
            raise CheckpointError(f"{path} holds values that are not finite")
        by_key.setdefault(key, {})[path] = tensor
    document = {"format": FORMAT, "step": step, "rank": rank, "state": part.state, "own": part.own, "shards": part.shards}
    text = json.dumps(document).encode()
    wrong = [key for key in (part.state or {}) if not _KEY.fullmatch(key) or key == "own"]
    if wrong or len(text) > MAX_JSON_BYTES:
        raise ValueError(f"entries of a state cannot be named {wrong}" if wrong else f"{len(text):,} bytes of JSON are more than a checkpoint may hold")
    try:
        files = {f"{key}-{rank:05}.safetensors": write_tensors(folder / f"{key}-{rank:05}.safetensors", tensors) for key, tensors in by_key.items()}
        files[_part_name(rank)] = write(folder / _part_name(rank), [text])
        if rank == 0:
            files[_CONFIG] = write(folder / _CONFIG, [config_toml.encode()])
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = sum(tensor.nbytes for tensor in part.tensors.values()) + len(text)
        raise CheckpointError(f"{error}; {needed:,} bytes are needed, {shutil.disk_usage(folder).free:,} are free") from error
    return files


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # One pass and no mask, which is as large as the tensor; NaN is passed on.
    return all(bool(torch.isfinite(extreme)) for extreme in real.aminmax())


def _require_visible(folder: Path, files: dict[str, Any]) -> None:
    """Raise unless rank 0 sees what the others say they wrote."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    for name, described in files.items():
        if sizes.pop(name, None) != described["bytes"]:
            raise CheckpointError(f"{folder / name}{_whose(name)} is not there for rank 0; a run folder must lie on a file system that all ranks share")
    if sizes:
        raise CheckpointError(f"{folder / min(sizes)} was not written by this save")


def _swap(temporary: Path, target: Path) -> None:
    """Rename a finished folder into place. Between two renames an older one has another name, under which ``sweep`` finds it."""
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    sync_folder(target.parent)
    _remove(old)


def together(peers: Peers, work: Callable[[], Any]) -> list[Any]:
    """What every rank's work gave (JSON). One failure is everyone's: a rank that went on alone would wait for the others for ever."""
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    words = failure and (str(failure) if isinstance(failure, CheckpointError | OSError) else f"{type(failure).__name__}: {failure}")
    answers = peers.gather([words, result])
    for rank, (problem, _) in enumerate(answers):
        if problem is not None:
            raise CheckpointError(f"rank {rank}: {problem}" if peers.size > 1 else problem) from failure
    return [answer for _, answer in answers]


# ---------------------------------------------------------------- loaded
@dataclass
class Saved:
    """A checkpoint that was verified."""

    folder: Path
    step: int
    state: dict[str, Any]
    ranks: list[dict[str, Any]]
    """The own part of each rank that saved."""
    config_toml: str


def load(folder: Path, peers: Peers = ALONE) -> Saved:
    """A checkpoint with every tensor whole, on the CPU. Collective.

    Raises CheckpointError naming the first file that is damaged, missing or extra.
    """
    saved = opened(folder, peers)
    saved.state = fit(saved.state)
    return saved


def opened(folder: Path, peers: Peers = ALONE) -> Saved:
    """A checkpoint whose tensors are Stored, to be read as they are needed. Collective.

    Raises CheckpointError as ``load`` does.
    """
    problem = verify(folder, peers)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")
    found: list[Saved] = []
    try:
        together(peers, lambda: found.append(_read(folder)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return found[0]


def _read(folder: Path) -> Saved:
    try:
        manifest = _manifest(folder)
        documents = [_document(folder, rank, manifest["step"]) for rank in range(manifest["world_size"])]
        files = TensorFiles(folder)
        parts = [_boxes(document, rank, manifest["files"]) for rank, document in enumerate(documents)]
        pieces: dict[str, list[Box]] = {}
        for path, box in (item for part in parts for item in part.items()):
            pieces.setdefault(path, []).append(box)
        state = {key: join(tree, key, pieces, files) for key, tree in documents[0]["state"].items()}
        ranks = [fit(join(document["own"], "own", {path: [box] for path, box in part.items()}, files)) for document, part in zip(documents, parts, strict=True)]
        with _regular(folder / _CONFIG) as stream:
            return Saved(folder, manifest["step"], state, ranks, stream.read(MAX_JSON_BYTES).decode())
    except DAMAGE as error:
        raise CheckpointError(f"cannot be read: {error}") from error


def _boxes(document: dict[str, Any], rank: int, files: dict[str, Any]) -> dict[str, Box]:
    """Where what a rank wrote lies in the whole tensors."""
    boxes = {}
    for path, (low, shape) in document["shards"].items():
        file = f"{path.partition('/')[0]}-{rank:05}.safetensors"
        if len(low) != len(shape) or not all(type(n) is int and n >= 0 for n in [*low, *shape]) or file not in files:
            raise ValueError(f"{_part_name(rank)}: {path} has no place or no file")
        boxes[path] = Box(tuple(low), tuple(a + n for a, n in zip(low, shape, strict=True)), file)
    return boxes


def _document(folder: Path, rank: int, step: int) -> dict[str, Any]:
    """The JSON of a rank's part. Raises ValueError when its outer form is wrong."""
    name = _part_name(rank)
    document = _json(folder / name, MAX_JSON_BYTES)
    if (document.get("format"), document.get("step"), document.get("rank")) != (FORMAT, step, rank):
        raise ValueError(f"{name} is of format {document.get('format')}, step {document.get('step')} and rank {document.get('rank')}")
    kinds = {"own": dict, "shards": dict} | ({"state": dict} if rank == 0 else {})
    wrong = [key for key, kind in kinds.items() if not isinstance(document.get(key), kind)]
    if wrong:
        raise ValueError(f"{name}: {', '.join(wrong)} is missing or of another kind")
    return document


def verify(folder: Path, peers: Peers = ALONE) -> str | None:
    """What is wrong with a checkpoint folder, or None; the ranks share the work and all get the same answer. Collective."""
    try:
        problem = _wrong(folder, peers)
    except CheckpointError as error:
        problem = str(error)
    except DAMAGE as error:
        problem = f"cannot be read: {error}"
    return next((answer for answer in peers.gather(problem) if answer is not None), None)


def _wrong(folder: Path, peers: Peers) -> str | None:
    listed = _complete(folder)
    # Longest first, so that each rank gets a share of the long ones.
    names = sorted(listed, key=lambda name: (-listed[name]["bytes"], name))[peers.rank :: peers.size]

    def damaged(name: str) -> bool:
        with _regular(folder / name) as stream:
            return file_digest(stream, "sha256").hexdigest() != listed[name]["sha256"]

    with ThreadPoolExecutor(HASHING_THREADS) as hashers:
        answers = zip(names, hashers.map(damaged, names), strict=True)
        return next((f"{name}{_whose(name)} is damaged: its sha256 is not that of the manifest" for name, bad in answers if bad), None)


def _complete(folder: Path) -> dict[str, Any]:
    """The manifest's files. Raises CheckpointError when they are not all there, in their sizes, and alone."""
    listed = _manifest(folder)["files"]
    present = {file.name for file in folder.iterdir()} - {_MANIFEST}
    for name in sorted(present ^ listed.keys()):
        raise CheckpointError(f"{name}{_whose(name)} is {'not in the manifest' if name in present else 'missing'}")
    for name, described in listed.items():
        found = (folder / name).lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{name}{_whose(name)} is not a file")
        if found.st_size != described["bytes"]:
            raise CheckpointError(f"{name}{_whose(name)} is damaged: {found.st_size:,} bytes, {described['bytes']:,} in the manifest")
    return listed


def _manifest(folder: Path) -> dict[str, Any]:
    """A manifest that says what this version needs. Raises CheckpointError."""
    match = _NAME.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        raise CheckpointError("not a checkpoint folder (step-00000123)")
    try:
        manifest = _json(folder / _MANIFEST, MAX_MANIFEST_BYTES)
        version, step, size, files = (manifest.get(key) for key in ("format", "step", "world_size", "files"))
        if type(version) is int and version != FORMAT:
            age = "an earlier" if version < FORMAT else "a later"
            raise CheckpointError(f"written by {age} titanlm (format {version}); this version reads format {FORMAT}")
        if version != FORMAT or type(step) is not int or type(size) is not int or size < 1 or not isinstance(files, dict):
            raise ValueError("format, step, world_size or files is missing or of another kind")
        for name, entry in files.items():
            if not _FILE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a file in a checkpoint")
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"size and sha256 of {name} are of another kind")
    except FileNotFoundError:
        raise CheckpointError(f"{_MANIFEST} is missing: the save was not finished") from None
    except DAMAGE as error:
        raise CheckpointError(f"{_MANIFEST} cannot be read: {error}") from error
    if step != int(match[1]):
        raise CheckpointError(f"{_MANIFEST} is of step {step}")
    missing = next((name for name in chain([_CONFIG], map(_part_name, range(size))) if name not in files), None)
    if missing is not None:
        raise CheckpointError(f"{_MANIFEST} does not list {missing}{_whose(missing)}")
    return manifest


def _json(file: Path, largest: int) -> dict[str, Any]:
    """Raises ValueError when it is no JSON object or larger than any honest one."""
    with _regular(file) as stream:
        text = stream.read(largest + 1)
    document = json.loads(text) if len(text) <= largest else None
    if not isinstance(document, dict):
        raise ValueError(f"{file.name} is no JSON object of at most {largest:,} bytes")
    return document


def _regular(file: Path) -> BufferedReader:
    """Open for reading what is neither a link nor a pipe, which would be waited for without end."""
    if not stat.S_ISREG(file.lstat().st_mode):
        raise CheckpointError(f"{file.name} is not a file")
    return open(file, "rb", opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _part_name(rank: int) -> str:
    return f"state-{rank:05}.json"


def _whose(name: str) -> str:
    """Words for which rank's part a file is, in a checkpoint of several."""
    match = _FILE.fullmatch(name)
    return f" (part of rank {int(match[1])})" if match is not None and match[1] else ""


# ---------------------------------------------------------------- the folders of a run
def steps(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step, oldest first, valid or not."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(folder.name)
        if match is not None and folder.is_dir() and not folder.is_symlink():
            found.append((int(match[1]), folder))
    return sorted(found)


def latest(root: Path, peers: Peers = ALONE, *, at_most: int | None = None) -> Path | None:
    """The newest valid checkpoint (up to step ``at_most``), the same on every rank; damaged ones are named on stderr and passed over. Collective."""
    # As rank 0 sees them: a file system may show the others a folder later.
    names = together(peers, lambda: [folder.name for step, folder in steps(root) if at_most is None or step <= at_most] if peers.rank == 0 else None)[0]
    if peers.rank == 0 and root.is_dir():
        _warn_of_look_alikes(root, set(names))
    for name in reversed(names):
        problem = verify(root / name, peers)
        if problem is None:
            return root / name
        if peers.rank == 0:
            print(f"WARNING: {root / name}: {problem}; passed over", file=sys.stderr)
    return None


def _warn_of_look_alikes(root: Path, names: set[str]) -> None:
    others = sorted(path.name for path in root.iterdir() if path.name.casefold().startswith("step") and path.name not in names)
    if others:
        print(f"WARNING: {root}: ignored, since no folder named like step-00000123: {', '.join(map(repr, others[:10]))}", file=sys.stderr)


def rotate(root: Path, keep_last: int, newest: int, best: int | None = None, keep_every: int = 0) -> None:
    """Delete checkpoints of steps up to ``newest``, but not the last ``keep_last`` of them, the ``best``, and those of every ``keep_every`` steps.

    Only complete ones count and are deleted, so folders that are half there
    cannot push out a valid one. Their hashes are not looked at.
    """
    complete = []
    for step, folder in steps(root):
        with suppress(CheckpointError, OSError):
            if step <= newest and _complete(folder):
                complete.append((step, folder))
    for step, folder in complete[: max(0, len(complete) - keep_last)]:
        if step != best and not (keep_every and step % keep_every == 0):
            _remove(folder)


def set_aside(root: Path, step: int) -> list[Path]:
    """Move checkpoints of steps after this one, from which a run is wound back, into a folder of their own; their new places."""
    later = [folder for number, folder in steps(root) if number > step]
    if not later:
        return []
    number = 1
    while (aside := root / f"after-{folder_name(step)}-{number}").exists():
        number += 1
    aside.mkdir()
    moved = [folder.rename(aside / folder.name) for folder in reversed(later)]
    sync_folder(aside)
    sync_folder(root)
    return moved[::-1]


def sweep(root: Path) -> None:
    """Mend what a kill left behind: put back what was about to be replaced, delete the unfinished and the half-deleted.

    Only under the run's lock, for a save under way looks the same.
    """
    for old in sorted(root.glob(".old-step-*")) if root.is_dir() else ():
        target = root / old.name.removeprefix(".old-").rpartition("-")[0]
        if target.exists():
            _remove(old)
        else:
            old.rename(target)
    for pattern in (".tmp-*", ".trash-*") if root.is_dir() else ():
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Out of the way in one rename, so that a half-deleted folder is never taken for a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


# ---------------------------------------------------------------- optimizers
CONFIGURED = ("lr", "weight_decay", "eps", "momentum")
"""What a group has from the config, and every peak of what is scheduled; where that has been changed on purpose, the new value holds."""


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Any]:
    """State under parameter names, and what optimizers keep in their groups (some count steps there)."""
    loose = [key for key in optimizer.state if not isinstance(key, Tensor)]
    if loose:
        raise CheckpointError(f"{type(optimizer).__name__} keeps state under {loose}; only state of parameters and groups can be saved")
    groups = [{key: value for key, value in group.items() if isinstance(value, int | float | Tensor)} for group in optimizer.param_groups]
    return {"params": {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` gave; Stored values are laid out as those that the optimizer has, or else as the parameter is.

    An optimizer may have ``accept(parameter, state)``, which gives what of a
    parameter's saved state it goes on with, after the weights were loaded, and
    ``state_at_once``, true where it is never without state. Raises
    CheckpointError when the state is of other parameters or groups, or of
    another form.
    """
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = state["params"]
    unknown = sorted(saved.keys() - {names[parameter] for parameter in owned})
    if unknown or len(state["groups"]) != len(optimizer.param_groups):
        what = f"of {', '.join(unknown)}" if unknown else f"in {len(state['groups'])} groups"
        raise CheckpointError(f"optimizer state {what} does not belong to this optimizer; did `params` patterns change?")
    own = {parameter: optimizer.state.get(parameter, {}) for parameter in owned}
    accept: Callable[[Tensor, dict[str, Any]], dict[str, Any]] = getattr(optimizer, "accept", lambda _, loaded: loaded)
    values = {}
    for parameter in owned:
        if names[parameter] in saved:
            items = saved[names[parameter]].items()
            values[parameter] = accept(
                parameter, {key: value.like(own[parameter].get(key, parameter)) if isinstance(value, Stored) else value for key, value in items}
            )
    groups = optimizer.state_dict()["param_groups"]
    for group, stored in zip(groups, fit(state["groups"]), strict=True):
        group.update({key: value for key, value in stored.items() if key not in CONFIGURED and not key.startswith("peak_")})
    for parameter in owned if getattr(optimizer, "state_at_once", False) else values:
        _require_form(optimizer, names[parameter], parameter, own[parameter], values.get(parameter, {}))
    if values.keys() == set(owned) and all(own[parameter].keys() == loaded.keys() for parameter, loaded in values.items()):
        # Into what is there: no second copy, and no cast on the way, which would ruin codes of moments.
        for parameter, loaded in values.items():
            for key, value in loaded.items():
                own[parameter][key] = own[parameter][key].copy_(value) if isinstance(value, Tensor) else value
        for group, stored in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in stored.items() if key != "params"})
        return
    # Through load_state_dict, which puts each value where the optimizer wants it (fused Adam: steps on the device).
    numbered = {index: values[parameter] for index, parameter in enumerate(owned) if parameter in values}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    for parameter, loaded in values.items():
        for key, value in loaded.items():
            # It also casts to the parameter's dtype, which would ruin momentum that an optimizer keeps in fewer bits.
            if isinstance(value, Tensor) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(optimizer.state[parameter][key].device)


def _require_form(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Raise CheckpointError when state was kept in another form than the optimizer's: by what it has made, or else, for torch's own, the parameter's dtype."""
    saved = {key: value.dtype for key, value in loaded.items() if isinstance(value, Tensor) and key != "step"}
    if own:
        wanted = {key: value.dtype for key, value in own.items() if isinstance(value, Tensor) and key != "step"}
    elif type(optimizer).__module__.startswith("torch.optim"):
        wanted = dict.fromkeys(saved, parameter.dtype)
    else:
        return
    if saved != wanted:
        before, now = (", ".join(f"{key} {str(dtype).removeprefix('torch.')}" for key, dtype in form.items()) or "nothing" for form in (saved, wanted))
        remedy = "go back to the optimizer's former settings (moments, weight_dtype), or begin a new run from the weights with checkpoint.initial_load"
        raise CheckpointError(f"optimizer state of {name} was saved as {before}, and this optimizer keeps {now}; {remedy}")
