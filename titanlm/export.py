"""Finalize: from the last checkpoint of a run to an artifact that has been read back and scored.

The order is fixed: averaged weights, adapters merged, calibrated, fitted to the
limit, encoded, written, read back from disk, scored. The scores before and after
stand side by side, because a quantizer's cost is only visible that way; those
before are of unrounded weights, also where training rounded them. What
counts against the limit stands below them, by kind of tensor.
"""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from titanlm import checkpoint
from titanlm.calibration import hessians
from titanlm.check import artifact_warnings, build_model, quantizer_claims
from titanlm.config import Export, RunConfig, Validation, dump, loads
from titanlm.device import choose_device
from titanlm.errors import ArtifactError, ConfigError, TitanError
from titanlm.evaluate import Scores, ValidationSet, score
from titanlm.exported import Exported
from titanlm.exporters.encoding import Candidate, Encoded, ExportRequest
from titanlm.targets import find_checkpoint, import_outside, materialise, require_tokenizer, use_average
from titanlm.weights import unique_names

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode_tensors(config: RunConfig, model: Any, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Encoded | Tensor]:
    """Each tensor by the quantizer that claims and takes it; the others as ``export.dtype``.

    A quantizer without an export side leaves its tensors to ``export.dtype``.
    ``moments`` are those of ``calibrate``, by name.
    Raises ConfigError when a pattern has no effect, ArtifactError when a value
    is too large for the dtype.
    """
    claims = quantizer_claims(config, model)
    if claims.problems:
        raise ConfigError([f"quantizer.{problem}" for problem in claims.problems], "export")
    encoded: dict[str, Encoded | Tensor] = {}
    built = [entry.build() for entry in config.quantizer]
    claimed = dict.fromkeys(tensors, None) | {
        name: quantizer for quantizer, names in zip(built, claims.claimed, strict=True) if hasattr(quantizer, "encode") for name in names
    }
    for name, tensor in tensors.items():
        quantizer = claimed[name]
        if quantizer is not None and _takes(quantizer, tensor):
            try:
                encoded[name] = quantizer.encode_calibrated(tensor, moments[name]) if name in moments else quantizer.encode(tensor)
            except TitanError as error:  # it knows the numbers, not whose they are
                raise type(error)(f"tensor {name!r}: {error}") from error
        else:
            encoded[name] = _cast(name, tensor, config.export.dtype)
    return encoded


def _takes(quantizer: Any, tensor: Tensor) -> bool:
    return bool(quantizer.takes(tensor)) if hasattr(quantizer, "takes") else True


def calibrate(config: RunConfig, module: Any, tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Second moments, by name, of what the matrices of calibrated quantizers meet on ``export.calibration_tokens`` of the training data.

    Raises DataError when the training data cannot be read any more.
    """
    parameters, names = dict(module.model.named_parameters()), []
    for entry, own in zip(config.quantizer, quantizer_claims(config, module.model).claimed, strict=True):
        quantizer = entry.build()
        if getattr(quantizer, "calibrated", False):
            names += [name for name in own if _takes(quantizer, parameters[name])]
    if not names:
        return {}
    windows = Validation(name="calibration", split="train", max_tokens=config.export.calibration_tokens)
    return hessians(module, names, (batch.to(device) for batch in ValidationSet.build(windows, config, tokenizer).batches()))


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(EXPORT_DTYPES[dtype])
    if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise ArtifactError(f'tensor {name!r} reaches {float(tensor.abs().max()):.3g}, too large for export.dtype = {dtype!r}; use "bfloat16" or "float32"')
    return cast


def export_run(
    run: Path,
    *,
    step: int | Literal["best"] | None = None,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    device: str = "auto",
    scored: bool = True,
) -> Exported:
    """Export a run's checkpoint.

    ``overrides`` change the stored config, so other quantizers or limits can be
    tried on a finished run. Without ``scored`` the file is written and read
    back only. Raises ArtifactError when the limit is exceeded, ConfigError when
    `export.code` names a file that is not there.
    """
    import_outside(imports)
    chosen = choose_device(device)
    folder = find_checkpoint(run, step).absolute()
    saved = checkpoint.load(folder)
    state = saved.state
    config = loads(saved.config_toml, f"{folder}/config.toml", overrides)
    if config.fitter is not None and config.export.max_bytes is None:
        raise ConfigError([f"fitter: {config.fitter.name!r} fits an artifact to export.max_bytes, which is not set"], "export")
    for warning in artifact_warnings(config):
        print(f"WARNING: {warning}", file=sys.stderr)
    try:
        code_bytes = sum(path.stat().st_size for path in code_files(config.export))
    except ValueError as error:
        raise ConfigError([f"export.code: {error}"], "export") from error
    fitter = None if config.fitter is None else config.fitter.build(max_bytes=config.export.max_bytes)
    tokenizer = config.tokenizer.build()
    require_tokenizer(tokenizer, state["fingerprints"]["tokenizer"], str(folder))
    # A checkpoint that was copied elsewhere has no run folder; its artifact goes beside it.
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent

    module = materialise(config, tokenizer, state["model"], chosen, str(folder))
    # Before the first score, which may take long: the package of a codec may be missing.
    exporter = config.export.exporter.build(model=module.model, tokenizer=tokenizer, run_dir=run_dir)
    entries = config.validation if scored else ()
    rows = [("raw", score_all(module, config, entries, tokenizer, chosen))]
    if config.averager is not None and state["averagers"]:
        use_average(config, module.model, state["averagers"][0])
        rows.append(("averaged", score_all(module, config, entries, tokenizer, chosen)))
    tensors, plain = merged_weights(config, module.model, tokenizer)

    request = ExportRequest(
        path=output or run_dir / "artifact.titanlm",
        config_toml=dump(plain),
        max_bytes=config.export.max_bytes,
        tokenizer=config.export.tokenizer,
        tokenizer_files=tokenizer.files(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        code_bytes=code_bytes,
        count_tokenizer=config.export.count_tokenizer,
    )
    shape = build_model(plain, tokenizer)
    merged = module if config.adapter is None else materialise(plain, tokenizer, tensors, chosen, "merged weights")
    began = time.perf_counter()
    moments = calibrate(plain, merged, tokenizer, chosen)
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)  # what is queued is part of it
    calibration_s = time.perf_counter() - began

    def handed_over(candidate: Candidate) -> tuple[dict[str, Encoded | Tensor], ExportRequest]:
        own = replace(plain, quantizer=candidate.quantizers)
        return encode_tensors(own, shape, candidate.tensors, moments), replace(request, config_toml=dump(own))

    candidate = Candidate(tensors, plain.quantizer)
    if fitter is not None:
        candidate = fitter.fit(candidate, lambda one: exporter.size_bytes(*handed_over(one)))
    encoded, request = handed_over(candidate)
    report = exporter.write(encoded, request)
    # From the file, not from memory: the score is of what was handed over.
    read_back = materialise(plain, tokenizer, exporter.read(report.path), chosen, str(report.path))
    rows.append(("after round trip", score_all(read_back, config, entries, tokenizer, chosen)))
    sets = tuple(entry.name for entry in entries)
    return Exported(report, request, encoded, shape.parameter_roles(), sets, tuple(rows), candidate.chosen, calibration_s if moments else None)


def code_files(export: Export) -> list[Path]:
    """The files that `export.code` names, each once, however often it is named; ValueError for an entry that names none."""
    found: dict[Path, None] = {}
    for entry in export.code:
        pattern = os.path.expanduser(entry)
        # A name that has brackets in it is a name first.
        names = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not names:
            raise ValueError(f"{entry!r} names no file (looked in {os.getcwd()}); name the files that a submission ships, or []")
        found |= dict.fromkeys(Path(name).resolve() for name in names)
    return list(found)


def merged_weights(config: RunConfig, model: Any, tokenizer: Any) -> tuple[dict[str, Tensor], RunConfig]:
    """The weights with adapters folded in, on the CPU, and the config without them."""
    if model.adapter is not None:
        model.adapter.merge()
    plain = replace(config, adapter=None)
    names = unique_names(build_model(plain, tokenizer))
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    missing = [name for name in names if name not in own]
    if missing:
        raise ConfigError([f"adapter: merge() left the model without {', '.join(missing)}"], "export")
    return {name: own[name].detach().to("cpu", copy=True) for name in names}, plain


def score_all(module: Any, config: RunConfig, entries: Sequence[Validation], tokenizer: Any, device: torch.device) -> tuple[Scores, ...]:
    return tuple(score(module, ValidationSet.build(entry, config, tokenizer), device) for entry in entries)
