"""Weights of another run, checkpoint, artifact or safetensors file as the start of a new phase.

Only weights are taken: optimizer, data and step begin anew. (To go on from a
run as it stood is ``resume``, another thing.) Nothing is taken in part and
nothing is guessed: every tensor of the model is found in the source or named
in ``skip``, every stored tensor is used or named in ``skip``, and what does not
fit is listed all at once before anything is changed.

Two differences are mended, because they come with a new phase and have one
right answer. A head of its own where the source tied it to the embedding starts
as a copy of the embedding. And with ``grow`` a larger vocabulary keeps the rows
of the old ids; that those ids still mean the same is for the user to know, so
how the tokenizers differ is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from titanlm.errors import CheckpointError, TitanError
from titanlm.registry import PYDANTIC_CONFIG, did_you_mean

if TYPE_CHECKING:  # the config imports this module: torch, and what needs the config, come when weights are read
    from torch import Tensor

KEY = "checkpoint.initial_load"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class InitialLoad:
    """Where the first weights come from."""

    path: str
    """A run folder, a checkpoint folder, an artifact, a .safetensors file or a folder of them."""
    step: int | str | None = None  # checked below: a union of narrower types would be refused once for each
    """Of a run folder: the checkpoint of this step, or the one that `checkpoint.best` kept; unset: the newest."""
    weights: Literal["auto", "raw", "averaged"] = "auto"
    """Of a checkpoint; auto: averaged where it has them."""
    rename: dict[str, str] = field(default_factory=dict)
    """Stored name → name in the model; each * stands for any text and carries it over. The first that matches counts."""
    grow: Literal["none", "init", "mean"] = "none"
    """When the vocabulary is another. none: refuse; else old ids keep their rows, and new ids get a fresh draw (init) or the mean of the old rows (mean)."""
    skip: tuple[str, ...] = ()
    """Globs over names: tensors of the model that keep their fresh values, and stored tensors that are left out."""

    def __post_init__(self) -> None:
        problems = []
        if self.step not in (None, "best") and not (isinstance(self.step, int) and self.step > 0):
            problems.append(f"step: {self.step!r} is no step; expected a number above 0 or 'best'")
        problems += [
            f"rename: {pattern!r} → {name!r}: as many * on the right as on the left, so that each is carried over"
            for pattern, name in self.rename.items()
            if pattern.count("*") != name.count("*")
        ]
        if problems:
            raise ValueError("\n".join(problems))


InitialLoad.__pydantic_config__ = PYDANTIC_CONFIG  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Stored:
    """What a source holds."""

    source: str
    tensors: Mapping[str, Tensor]
    tokenizer: str | None = None
    """Fingerprint; None where the source does not say."""
    config_toml: str | None = None


def initial_weights(settings: InitialLoad, model: Any, *, tokenizer: str, fresh: Callable[[str], Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Whole CPU tensors for every parameter and stored buffer of the model, and what is to be told about them, a line each.

    ``tokenizer`` is the fingerprint of the run's own, ``fresh`` gives the whole
    fresh value of a tensor by name. The model is not changed and may be on any
    device, sharded or on none.

    Raises CheckpointError with every difference, TitanError when the source
    cannot be opened.
    """
    from titanlm.check import all_roles
    from titanlm.weights import unique_names

    stored = _read(settings)
    everything = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    own = {name: everything[name] for name in unique_names(model)}
    fitting = _Fitting(settings, own, all_roles(model), fresh)
    fitting.compare_tokenizers(stored.tokenizer, tokenizer)
    fitting.compare_settings(stored.config_toml, getattr(model, "config", None))
    fitting.fill(fitting.renamed(stored.tensors, everything.keys()))
    if fitting.problems:
        raise CheckpointError("\n  ".join([f"{KEY}: {stored.source} does not fit the model:", *fitting.problems]))
    return fitting.weights, [f"initial weights from {stored.source}", *fitting.report]


class _Fitting:
    """Stored tensors put to a model's names, shapes and dtypes; collects what does not fit and what is worth telling."""

    def __init__(self, settings: InitialLoad, own: Mapping[str, Tensor], roles: Mapping[str, str], fresh: Callable[[str], Tensor]) -> None:
        self._settings, self._own, self._roles, self._fresh = settings, own, roles, fresh
        self.weights: dict[str, Tensor] = {}
        self.problems: list[str] = []
        self.report: list[str] = []
        self._casts: dict[str, list[str]] = {}

    def compare_tokenizers(self, saved: str | None, now: str) -> None:
        """Rows of the embedding mean ids: they are of use only to the tokenizer they were trained with."""
        from titanlm.tokenizers.fingerprint import difference

        if all(self._skipped(name) for name in self._own if self._counts_ids(name)):
            return
        if saved is None:
            self.report.append("it does not say which tokenizer it was made with; the ids must mean the same here")
        elif lines := difference(saved, now):
            if self._settings.grow == "none":
                remedy = 'use its tokenizer; or, if old ids mean the same, set grow = "init" or "mean"; or give embedding and head to skip'
                self.problems.append("\n    ".join([f"tokenizer: made with another one; {remedy}", *lines]))
            else:
                self.report.append("\n  ".join(["WARNING: made with another tokenizer; old ids must mean the same in both:", *lines]))

    def compare_settings(self, config_toml: str | None, config: Any) -> None:
        """Shapes do not tell of other head counts or rotary bases, with which the same weights compute something else."""
        from titanlm.config import to_tables
        from titanlm.config_sources import parse

        saved = {} if config_toml is None else parse(config_toml, "the source's config", {}).get("model")
        if not isinstance(saved, dict) or not saved or not is_dataclass(config):
            return
        now = to_tables(config)
        pairs = {key: [json.dumps(table[key]) if key in table else "not set" for table in (saved, now)] for key in [*now, *saved] if key != "name"}
        changed = [f"{key} {before} → {after}" for key, (before, after) in pairs.items() if before != after]
        if changed:
            self.report.append(f"model settings are others than the source's: {', '.join(changed)}")

    def renamed(self, stored: Mapping[str, Tensor], known: Iterable[str]) -> dict[str, Tensor]:
        """The stored tensors that are to be used, under the model's names."""
        rename, skip = self._settings.rename, self._settings.skip
        patterns = {pattern: re.compile("(.*)".join(map(re.escape, pattern.split("*"))), re.DOTALL) for pattern in rename}
        origin: dict[str, str] = {}
        left_out: list[str] = []
        names = {*self._own, *stored}
        for name in stored:
            match, target = next(((match, rename[pattern]) for pattern in rename if (match := patterns[pattern].fullmatch(name))), (None, name))
            new = target if match is None else "".join(part for pair in zip(target.split("*"), [*match.groups(), ""]) for part in pair)
            names.add(new)
            said = name if new == name else f"{name} (renamed {new})"
            if self._skipped(name) or self._skipped(new):
                left_out.append(said)
            elif new in origin:
                self.problems.append(f"{new}: both {origin[new]} and {name} would be it; rename or skip one")
            elif new in self._own:
                origin[new] = name
            elif new in known:
                self.problems.append(f"{said}: the model ties it to another tensor and has none of its own; skip it to leave the stored one out")
            else:
                self.problems.append(f"{said}: not part of the model; rename or skip it")
        for pattern in rename:
            if not any(patterns[pattern].fullmatch(name) for name in stored):
                self.problems.append(f"rename: {pattern!r} matches no stored tensor{did_you_mean(pattern, stored)}")
        for pattern in skip:
            if not any(fnmatchcase(name, pattern) for name in names):
                self.problems.append(f"skip: {pattern!r} matches nothing{did_you_mean(pattern, names)}")
        self._tell("left out", left_out)
        return {new: stored[name] for new, name in origin.items()}

    def fill(self, stored: Mapping[str, Tensor]) -> None:
        """``weights`` of every own tensor."""
        for name, own in self._own.items():
            if self._skipped(name):
                self.weights[name] = self._fresh(name)
            elif name in stored:
                self._take(name, own, stored[name])
            elif (embedding := self._tied_to(name, stored)) is not None:
                self.report.append(f"{name}: a copy of {embedding}, to which the source ties it")
                self._take(name, own, stored[embedding].clone())
            else:
                self.problems.append(f"{name}: missing; rename the stored tensor that is meant, or skip it to keep fresh values")
        for dtypes, names in self._casts.items():
            self._tell(f"cast from {dtypes}", names)
        self._tell("fresh", [name for name in self._own if self._skipped(name)])

    def _take(self, name: str, own: Tensor, stored: Tensor) -> None:
        grows = self._counts_ids(name) and stored.ndim == own.ndim and stored.shape[1:] == own.shape[1:] and len(stored) < len(own)
        if stored.shape != own.shape and not (grows and self._settings.grow != "none"):
            remedy = '; grow = "init" or "mean" adds rows' if grows else ""
            self.problems.append(f"{name}: shape {list(stored.shape)}, the model has {list(own.shape)}{remedy}")
            return
        if stored.is_floating_point() != own.is_floating_point():  # whole numbers without their scale are no weights
            self.problems.append(f"{name}: {_dtype(stored)}, which is no {_dtype(own)} as the model has it")
            return
        if stored.dtype != own.dtype:
            self._casts.setdefault(f"{_dtype(stored)} to {_dtype(own)}", []).append(name)
        self.weights[name] = self._grown(name, own, stored.to(own.dtype)) if grows else stored.to(own.dtype)

    def _grown(self, name: str, own: Tensor, stored: Tensor) -> Tensor:
        import torch

        n = len(stored)
        if self._settings.grow == "init":
            new, how = self._fresh(name)[n:].to(own.dtype), "new ones fresh"
        else:
            new, how = stored.float().mean(0, keepdim=True).to(own.dtype).expand(len(own) - n, *own.shape[1:]), "new ones the mean of the old"
        self.report.append(f"{name}: {n:,} → {len(own):,} rows, {how}")
        return torch.cat([stored, new])

    def _tied_to(self, name: str, stored: Mapping[str, Tensor]) -> str | None:
        """The one whole embedding that serves as the head where no head is stored."""
        if self._roles.get(name) != "head":
            return None
        shape = self._own[name].shape
        found = [other for other in stored if self._roles.get(other) == "embedding" and self._own[other].shape == shape]
        return found[0] if len(found) == 1 else None

    def _counts_ids(self, name: str) -> bool:
        """Whether its rows are one for each id."""
        return self._roles.get(name) in ("embedding", "head")

    def _skipped(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._settings.skip)

    def _tell(self, what: str, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            self.report.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---------------------------------------------------------------- sources
def _read(settings: InitialLoad) -> _Stored:
    """Raises CheckpointError when there is nothing at the path that holds weights."""
    path = Path(settings.path).expanduser()
    if (path / "checkpoints").is_dir() or re.fullmatch(r"step-\d{8}", path.name):
        return _of_checkpoint(path, settings)
    if settings.step is not None:
        raise CheckpointError(f"{KEY}.step: {path} is no run folder, so there is nothing to choose from; leave it out")
    if settings.weights != "auto":
        raise CheckpointError(f"{KEY}.weights: {path} is no run or checkpoint and holds one set of weights; leave it out")
    if path.is_dir():
        if files := sorted(path.glob("*.safetensors")):
            return _Stored(str(path), _of_files(files))
    elif path.is_file():
        return _Stored(str(path), _of_files([path])) if path.suffix == ".safetensors" else _of_artifact(path)
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    wanted = "a run folder, a checkpoint folder, an artifact, a .safetensors file or a folder of them"
    what = "a folder without weights" if path.is_dir() else f"not there{did_you_mean(path.name, beside)}"
    raise CheckpointError(f"{KEY}.path: {path} is {what}; expected {wanted}")


def _of_checkpoint(path: Path, settings: InitialLoad) -> _Stored:
    from titanlm import checkpoint
    from titanlm.targets import find_checkpoint

    if settings.step is not None and not (path / "checkpoints").is_dir():
        raise CheckpointError(f"{KEY}.step: {path} is one checkpoint already; leave it out, or name the run folder")
    folder = find_checkpoint(path, settings.step)  # type: ignore[arg-type]  # of strings only "best" is let through
    saved = checkpoint.opened(folder)  # of which only the weights are read
    averagers = saved.state.get("averagers", [])
    if settings.weights == "averaged" and not averagers:
        raise CheckpointError(f'{KEY}.weights: {folder} has no averaged weights, its run had no averager; use "raw"')
    averaged = bool(averagers) and settings.weights != "raw"
    weights = checkpoint.fit(saved.state["model"])
    if averaged:
        weights = _averaged(weights, checkpoint.fit(averagers[0]), saved.config_toml, folder)
    return _Stored(f"{folder} ({'averaged' if averaged else 'raw'})", weights, saved.state.get("fingerprints", {}).get("tokenizer"), saved.config_toml)


def _averaged(weights: dict[str, Tensor], averager: Any, config_toml: str, folder: Path) -> dict[str, Tensor]:
    """Only the averager knows what its state means, and it works on a model."""
    from titanlm.check import build_model
    from titanlm.config import loads
    from titanlm.targets import use_average
    from titanlm.weights import load_weights, unique_names

    try:
        config = loads(config_toml, f"{folder}/config.toml")
        model = build_model(config, config.tokenizer.build())
    except (TitanError, ValueError) as error:
        remedy = f'{KEY}.weights = "raw" takes those that were trained'
        raise CheckpointError(f"{folder}: the averaged weights need its model, which cannot be built: {error}\n{remedy}") from error
    model.to_empty(device="cpu")
    load_weights(model, weights, str(folder))
    use_average(config, model, averager)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensors[name].detach() for name in unique_names(model)}


def _of_artifact(path: Path) -> _Stored:
    from titanlm.exporters.artifact import read_artifact
    from titanlm.exporters.encoding import decode_tensors

    artifact = read_artifact(path)
    return _Stored(str(path), decode_tensors(artifact.tensors), artifact.tokenizer_fingerprint, artifact.config_toml)


def _of_files(files: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    twice: dict[str, Path] = {}
    for file in files:
        try:
            loaded = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{KEY}.path: {file} cannot be read: {error}; copy it again") from error
        twice |= dict.fromkeys(loaded.keys() & tensors.keys(), file)
        tensors |= loaded
    if twice:
        listed = "\n  ".join(f"{name}: again in {file}" for name, file in sorted(twice.items()))
        raise CheckpointError(f"{KEY}.path: tensors are stored twice; keep the files of one model only:\n  {listed}")
    return tensors
