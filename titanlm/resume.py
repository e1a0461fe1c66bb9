"""Whether a config may go on from the checkpoints of its run folder, and from which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titanlm import checkpoint
from titanlm.config import RunConfig, diff, loads
from titanlm.errors import CheckpointError

RESUMABLE = ("train.steps", "train.log_every", "train.validate_every", "train.sample_", "train.gc_every")
RESUMABLE_DATA = ("data.prefetch", "data.workers", "data.epochs", "data.on_error", "data.start")
RESUMABLE_SECTIONS = ("run.", "checkpoint.", "validation", "export.", "logger", "profile", "fitter", "imports")
"""Settings that may change on resume, because the steps that follow do not depend on them (or, as train.steps, are meant to)."""
RESUMABLE_ROUNDING = ("train.threads", "train.micro_batch", "train.activation_checkpointing", "train.compile", "loss.chunk_tokens")
"""Those that change the steps that follow by rounding alone; they are the remedies for a lack of memory."""


Earlier = tuple[Path, dict[str, Any]]
"""A checkpoint's folder and its state."""


def find_earlier(config: RunConfig, root: Path) -> Earlier | None:
    """The newest valid checkpoint below ``root``, if there is one.

    Raises CheckpointError when the config may not go on from it.
    """
    folder = checkpoint.latest(root)
    if folder is None:
        if checkpoint.steps(root):
            raise CheckpointError(f"{root}: no checkpoint in it is sound; move the run folder away or choose another run.name to start anew")
        return None
    if config.checkpoint.resume == "never":
        raise CheckpointError(f"{folder.parent.parent} holds checkpoints and checkpoint.resume is 'never'; choose another run.name")
    state, stored = checkpoint.load(folder)
    require_same_run(loads(stored, f"{folder}/config.toml"), config, folder)
    return folder, state


def require_same_run(stored: RunConfig, config: RunConfig, folder: Path) -> None:
    """Raise CheckpointError with the settings that differ and may not on resume."""
    free: tuple[str, ...] = (*RESUMABLE, *RESUMABLE_DATA, *RESUMABLE_SECTIONS, *RESUMABLE_ROUNDING)
    if not any(hasattr(quantizer.build(), "prepare") for quantizer in (*stored.quantizer, *config.quantizer)):
        free += ("quantizer",)  # none has a part in training
    changed = [f"{path}: {before!r} → {after!r}" for path, before, after in diff(stored, config) if not path.startswith(free)]
    if changed:
        raise CheckpointError(f"{folder} was saved with other settings; go back to them or choose another run.name:\n  " + "\n  ".join(changed))
