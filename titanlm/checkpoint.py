"""Checkpoints: a folder that is either whole and verified or not there.

``save`` writes into a temporary folder beside the target, syncs every file,
writes ``MANIFEST.json`` with the size and sha256 of each one last, and renames
the folder into place; a kill at any moment leaves the previous checkpoints as
they were. A folder counts only when its name is exactly ``step-%08d`` and
every byte in it is accounted for by its manifest, so a flipped bit or a
missing file is found before a tensor is used. Deleting renames first.

A state is a tree of dicts and lists with numbers, strings, None, tensors and
numpy arrays at its leaves. Each top-level entry that holds tensors becomes one
safetensors file; everything else is ``state.json``. There is no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from titanlm.errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "MANIFEST.json"
_TENSOR, _ARRAY = "$tensor", "$array"


def save(root: Path, step: int, state: dict[str, Any], config_toml: str) -> Path:
    """Write ``root/step-%08d`` and return it. A folder of that step is replaced.

    Raises CheckpointError when the disk is full or not writable; whatever was
    saved before is then untouched.
    """
    target = root / f"step-{step:08d}"
    temporary = root / f".tmp-{target.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        tree: dict[str, Any] = {}
        for key, value in state.items():
            tensors: dict[str, Tensor] = {}
            tree[key] = _split(value, key, tensors)
            if tensors:
                save_file(tensors, temporary / f"{key}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "state": tree}), encoding="utf-8")
        (temporary / "config.toml").write_text(config_toml, encoding="utf-8")
        files = sorted(temporary.iterdir())
        manifest = {"format": FORMAT, "step": step, "files": {file.name: _digest(file) for file in files}}
        for file in files:
            _sync(file)
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(temporary / _MANIFEST)
        _sync(temporary)
        replaced = target.with_name(f".trash-{target.name}-{os.getpid()}")
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _sync(root)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot be saved: {error}; earlier checkpoints are untouched") from error
    return target


def load(folder: Path) -> tuple[dict[str, Any], str]:
    """(state, config TOML) of a checkpoint, every file checked against the manifest first.

    Raises CheckpointError naming the first file that is damaged, missing or extra.
    """
    problem = verify(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state = {}
    for key, tree in document["state"].items():
        file = folder / f"{key}.safetensors"
        state[key] = _join(tree, load_file(file) if file.exists() else {})
    return state, (folder / "config.toml").read_text(encoding="utf-8")


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    match = _NAME.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return "not a checkpoint folder (step-00000123)"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        listed = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        if manifest["step"] != int(match[1]):
            return f"{_MANIFEST} is of step {manifest['step']}"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing: the save was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    present = {file.name for file in folder.iterdir()} - {_MANIFEST}
    if {"state.json", "config.toml"} - listed.keys():
        return f"{_MANIFEST} lists no state"
    for name in sorted(present ^ listed.keys()):
        return f"{name} is {'not in the manifest' if name in present else 'missing'}"
    for name, expected in listed.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            return f"{name} is not a file"
        if _digest(file) != expected:
            return f"{name} is damaged: its size or sha256 differs from the manifest"
    return None


def steps(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step, oldest first, valid or not."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(folder.name)
        if match is not None and folder.is_dir() and not folder.is_symlink():
            found.append((int(match[1]), folder))
    return sorted(found)


def latest(root: Path) -> Path | None:
    """The newest valid checkpoint; damaged ones are named on stderr and passed over."""
    for _, folder in reversed(steps(root)):
        problem = verify(folder)
        if problem is None:
            return folder
        print(f"WARNING: {folder}: {problem}; passed over", file=sys.stderr)
    return None


def rotate(root: Path, keep_last: int, newest: int, best: int | None = None) -> None:
    """Delete checkpoints of steps before ``newest`` beyond the last ``keep_last`` complete ones, but not the ``best``.

    Later steps (of a run that was wound back) and folders without a manifest
    do not count towards those kept, so they cannot push out a valid one.
    """
    complete = [folder for step, folder in steps(root) if step <= newest and (folder / _MANIFEST).is_file()]
    for folder in complete[:-keep_last]:
        if best is None or folder.name != f"step-{best:08d}":
            _remove(folder)


def sweep(root: Path) -> None:
    """Delete what a killed save or a killed delete left behind."""
    for folder in root.glob(".tmp-step-*") if root.is_dir() else ():
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(".trash-*") if root.is_dir() else ():
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Out of the way in one rename, so that a half-deleted folder is never taken for a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON tree of a value; its tensors and arrays go into ``tensors`` under their paths."""
    if isinstance(value, Tensor | np.ndarray):
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        # Contiguous and its own: safetensors refuses views into a shared storage.
        tensors[path] = tensor.to("cpu", copy=True).contiguous()
        return {_TENSOR if isinstance(value, Tensor) else _ARRAY: path}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return {"$items": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
        return {key: _split(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved in a checkpoint")


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        if tree.keys() == {_ARRAY}:
            return tensors[tree[_ARRAY]].numpy()
        if tree.keys() == {"$items"}:
            return {key: _join(item, tensors) for key, item in tree["$items"]}
        return {key: _join(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_join(item, tensors) for item in tree]
    return tree


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Any]:
    """State under parameter names, and what optimizers keep in their groups (some count steps there)."""
    loose = [key for key in optimizer.state if not isinstance(key, Tensor)]
    if loose:
        raise CheckpointError(f"{type(optimizer).__name__} keeps state under {loose}; only state of parameters and groups can be saved")
    groups = [{key: value for key, value in group.items() if isinstance(value, int | float | Tensor)} for group in optimizer.param_groups]
    return {"params": {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` gave.

    Raises CheckpointError when the state is of other parameters or groups.
    """
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = state["params"]
    unknown = sorted(saved.keys() - {names[parameter] for parameter in owned})
    if unknown or len(state["groups"]) != len(optimizer.param_groups):
        what = f"of {', '.join(unknown)}" if unknown else f"in {len(state['groups'])} groups"
        raise CheckpointError(f"optimizer state {what} does not belong to this optimizer; did `params` patterns change?")
    numbered = {index: saved[names[parameter]] for index, parameter in enumerate(owned) if names[parameter] in saved}
    groups = optimizer.state_dict()["param_groups"]
    for group, values in zip(groups, state["groups"], strict=True):
        group.update(values)
    # Through load_state_dict, which puts each value where the optimizer wants it (fused Adam: steps on the device).
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    for parameter in owned:
        for key, value in saved.get(names[parameter], {}).items():
            # It also casts to the parameter's dtype, which would ruin integers and 8-bit moments.
            if isinstance(value, Tensor) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(optimizer.state[parameter][key].device)
