"""Whether a config may go on from the checkpoints of its run folder, and from which."""

from __future__ import annotations

from pathlib import Path

from titanlm import checkpoint
from titanlm.checkpoint import Saved
from titanlm.config import RunConfig, diff, loads
from titanlm.distributed.world import Peers
from titanlm.errors import CheckpointError

RESUMABLE = (
    *("train.steps", "train.max_wallclock_s", "train.priming_steps", "train.log_every", "train.validate_every", "train.sample_"),
    *("train.gc_every", "train.on_nonfinite", "train.max_skipped"),
)
RESUMABLE_DATA = ("data.prefetch", "data.workers", "data.epochs", "data.on_error", "data.n_tokens", "data.start")
RESUMABLE_SECTIONS = ("run.", "checkpoint.", "validation", "export.", "logger", "profile", "fitter", "imports", "spike.")
"""Settings that may change on resume, because the steps that follow do not depend on them (or, as train.steps, are meant to)."""
RESUMABLE_ROUNDING = (
    *("train.threads", "train.micro_batch", "train.activation_checkpointing", "train.compile", "train.kernels"),
    *("loss.chunk_tokens", "parallel."),
)
"""Those that change the steps that follow by rounding alone; they are the remedies for a lack of memory, or of machines."""


WEIGHTS = ("progress", "fingerprints", "model", "averagers")
"""What a checkpoint of weights alone holds."""
STATE = (*WEIGHTS, "optimizers", "interval", "source_tokens", "guard", "spikes", "rollbacks")
OWN_STATE = ("data", "rng")
"""What a checkpoint must hold, and of every rank, for a run to go on as if it had not stopped."""


def find_earlier(config: RunConfig, root: Path, peers: Peers | None = None) -> Saved | None:
    """The newest valid checkpoint below ``root``, verified and open, if there is one; every rank finds the same.

    Raises CheckpointError when the config may not go on from it.
    """
    peers = Peers() if peers is None else peers
    folder = checkpoint.latest(root, peers)
    if folder is None:
        if checkpoint.steps(root):
            raise CheckpointError(f"{root}: no checkpoint in it is sound; move the run folder away or choose another run.name to start anew")
        return None
    if config.checkpoint.resume == "never":
        raise CheckpointError(f"{folder.parent.parent} holds checkpoints and checkpoint.resume is 'never'; choose another run.name")
    saved = checkpoint.opened(folder, peers)
    require_same_run(loads(saved.config_toml, f"{folder}/config.toml"), config, folder)
    if "optimizers" not in saved.state:
        remedy = f"start another run with --checkpoint.initial_load.path={folder}"
        raise CheckpointError(f"{folder}: holds weights alone (checkpoint.save_only_model), from which nothing can be resumed; {remedy}")
    if missing := [name for name in STATE if name not in saved.state]:
        raise CheckpointError(f"{folder}: lacks the state of {', '.join(missing)}, without which a run does not go on as it was")
    if missing := [f"rank {rank}: {name}" for rank, own in enumerate(saved.ranks) for name in OWN_STATE if name not in own]:
        raise CheckpointError(f"{folder}: lacks the own state of {', '.join(missing)}, without which a run does not go on as it was")
    return saved


def require_same_run(stored: RunConfig, config: RunConfig, folder: Path) -> None:
    """Raise CheckpointError with the settings that differ and may not on resume."""
    free: tuple[str, ...] = (*RESUMABLE, *RESUMABLE_DATA, *RESUMABLE_SECTIONS, *RESUMABLE_ROUNDING)
    allowed = config.checkpoint.allow_changes
    if not any(hasattr(quantizer.build(), "prepare") for quantizer in (*stored.quantizer, *config.quantizer)):
        free += ("quantizer",)  # none has a part in training
    changed = [
        f"{path}: {before!r} → {after!r}"
        for path, before, after in diff(stored, config)
        if not path.startswith(free) and not any(f"{path}.".startswith(f"{name}.") for name in allowed)
    ]
    if changed:
        remedy = "go back to them, choose another run.name, or name them in checkpoint.allow_changes if the run may go on otherwise than it began"
        raise CheckpointError(f"{folder} was saved with other settings; {remedy}:\n  " + "\n  ".join(changed))
