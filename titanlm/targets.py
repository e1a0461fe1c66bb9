"""Open what a user points at: a run folder, a checkpoint folder or an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from titanlm import checkpoint
from titanlm.best import Best
from titanlm.check import Report, build_model
from titanlm.config import RunConfig, loads
from titanlm.config_sources import import_modules
from titanlm.course import horizon_of, phases_of
from titanlm.device import choose_device
from titanlm.distributed.world import World
from titanlm.errors import CheckpointError, ConfigError, TitanError
from titanlm.progress import Progress, enter
from titanlm.registry import did_you_mean
from titanlm.tokenizers.fingerprint import difference
from titanlm.weights import initialise, load_weights, unique_names


@dataclass
class Target:
    """A model ready to be scored or sampled from."""

    config: RunConfig
    tokenizer: Any
    module: Any
    """A TrainModule in eval mode."""
    device: torch.device
    source: str
    weights: str
    """"raw", "averaged" or "artifact"."""


def import_outside(modules: Sequence[str]) -> None:
    """Import modules the user named, so that their components can be looked up.

    Stored configs never import by themselves: they may come from others.
    Raises ConfigError naming each that cannot be found.
    """
    import_modules(list(modules), {("imports", index): f"--import {module}" for index, module in enumerate(modules)}, "command line")


def find_checkpoint(path: Path, step: int | Literal["best"] | None = None) -> Path:
    """The checkpoint that a run folder, a checkpoint folder and a step mean; "best" is the one that `checkpoint.best` kept.

    Raises CheckpointError naming what is there instead.
    """
    root = path / "checkpoints"
    if not root.is_dir():
        if path.name.startswith("step-") and path.is_dir():
            if step is not None:
                raise CheckpointError(f"{path}: this is one checkpoint already; leave out --step, or name the run folder")
            return path
        raise CheckpointError(f"{path}: not a run folder (no checkpoints in it), a checkpoint folder or an artifact file")
    if step == "best":
        step = Best.stored(path).step
        if step is None:
            raise CheckpointError(f"{path}: no best checkpoint is marked; a run marks it with checkpoint.best = METRIC")
    if step is not None:
        folder = root / f"step-{step:08d}"
        if not folder.is_dir():
            there = ", ".join(str(number) for number, _ in checkpoint.steps(root)) or "none"
            raise CheckpointError(f"{path}: no checkpoint of step {step} (there: {there})")
        return folder
    found = checkpoint.latest(root)
    if found is None:
        raise CheckpointError(f"{path}: no valid checkpoint in it yet")
    return found


def materialise(config: RunConfig, tokenizer: Any, weights: dict[str, Any], device: torch.device, source: str) -> Any:
    """A TrainModule in eval mode with the given weights on a device.

    Raises ConfigError when overrides make a model that cannot be, CheckpointError
    when the weights are of another one.
    """
    from titanlm.precision import set_precision
    from titanlm.train_module import TrainModule

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    report = Report()
    model = report.attempt("model", lambda: build_model(config, tokenizer))
    if model is None:
        raise ConfigError(report.problems, source)
    model.to_empty(device=device)
    initialise(model, config.train.seed)  # for what is not stored: buffers that are computed
    load_weights(model, weights, source)
    module = TrainModule(model, config.loss.build()).eval()
    set_precision(module, config.train.precision)
    return module


def open_target(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    device: str = "auto",
    averaged: bool | None = None,
    step: int | Literal["best"] | None = None,
) -> Target:
    """Open a run folder, a checkpoint folder or an artifact file; ``step`` as in ``find_checkpoint``.

    Raises TitanError when it is none of them, is damaged, or was made with
    another tokenizer than the one found now.
    """
    import_outside(imports)
    chosen = choose_device(device, World.from_environment().local_rank)
    if path.is_file():
        if step is not None:
            raise TitanError(f"{path}: an artifact holds one set of weights; leave out --step")
        if averaged is not None:
            raise TitanError(f"{path}: an artifact holds one set of weights; leave out --averaged and --raw")
        return _open_artifact(path, overrides, chosen)
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TitanError(f"{path}: no such run folder, checkpoint folder or artifact file{did_you_mean(path.name, beside)}")
    folder = find_checkpoint(path, step)
    saved = checkpoint.load(folder)
    state = saved.state
    config = loads(saved.config_toml, f"{folder}/config.toml", overrides)
    tokenizer = config.tokenizer.build()
    require_tokenizer(tokenizer, state["fingerprints"]["tokenizer"], str(folder))
    weights, label = state["model"], "raw"
    if averaged and not state["averagers"]:
        raise TitanError(f"{folder}: the run has no averager, so there are no averaged weights")
    module = materialise(config, tokenizer, weights, chosen, str(folder))
    if state["averagers"] and averaged is not False and config.averager is not None:
        use_average(config, module.model, state["averagers"][0])
        label = "averaged"
    # What is scored and sampled is what the next step would train: in a phase of quantization-aware training with rounded weights.
    enter(phases_of(config, World(), horizon_of(config)).at(Progress(**state["progress"])), module.model)
    return Target(config, tokenizer, module, chosen, str(folder), label)


def use_average(config: RunConfig, model: Any, state: dict[str, Any]) -> None:
    """Put the averaged weights into the model for good; the averager itself knows what its state means."""
    assert config.averager is not None
    averager = config.averager.build(model=model, horizon=horizon_of(config))
    averager.load_state_dict(state)
    with averager.swap():
        average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    load_weights(model, {name: average[name] for name in unique_names(model)}, "averaged weights")


def require_tokenizer(tokenizer: Any, fingerprint: str, source: str) -> None:
    """Raise TitanError, with what differs, when text would get other ids than in training."""
    if lines := difference(fingerprint, tokenizer.fingerprint):
        what = "made with another tokenizer than the one found now (fingerprints differ); its scores would mean nothing"
        raise TitanError("\n  ".join([f"{source}: {what}", *lines]))


def _open_artifact(path: Path, overrides: Sequence[str], device: torch.device) -> Target:
    from dataclasses import replace

    from titanlm.exporters.artifact import read_artifact
    from titanlm.exporters.encoding import decode_tensors
    from titanlm.tokenizers.rebuild import rebuild

    artifact = read_artifact(path)
    # The adapter was merged before the artifact was written.
    config = replace(loads(artifact.config_toml, str(path), overrides), adapter=None)
    tokenizer = rebuild(config.tokenizer, artifact.tokenizer_files)
    require_tokenizer(tokenizer, artifact.tokenizer_fingerprint, str(path))
    module = materialise(config, tokenizer, decode_tensors(artifact.tensors), device, str(path))
    return Target(config, tokenizer, module, device, str(path), "artifact")
