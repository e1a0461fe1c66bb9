"""What passes between quantizers, fitters and exporters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from titanlm.errors import ArtifactError, RegistryError
from titanlm.registry import Component, Quantizer, lookup


@dataclass(frozen=True)
class Encoded:
    """A tensor as a quantizer left it.

    ``parts`` are what is stored (for instance int8 ``values`` and fp16
    ``scale``); ``bits`` says for which of them fewer bits than the dtype holds
    are in use, as two's complement. ``quantizer`` and ``settings`` name the
    component that decodes it.
    """

    shape: tuple[int, ...]
    dtype: str
    """Of the tensor that was encoded and will be decoded: "float32", "bfloat16"…"""
    parts: Mapping[str, Tensor]
    bits: Mapping[str, int] = field(default_factory=dict)
    quantizer: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """What an artifact could be made of. A fitter is given one and returns another."""

    tensors: Mapping[str, Tensor]
    """By name, as the model has them."""
    quantizers: tuple[Component, ...] = ()
    """Entries of the config, which encode the tensors; the artifact's config has those that were kept."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """What a fitter settled on, for reports: {"prune_fraction": 0.12}."""


@dataclass(frozen=True)
class ExportRequest:
    """Everything an exporter is told beside the tensors."""

    path: Path
    config_toml: str
    """The resolved config of the run."""
    max_bytes: int | None
    """Limit on code and weights, in bytes; None for no limit."""
    tokenizer: str
    """"embed" | "beside"."""
    tokenizer_files: Mapping[str, bytes]
    tokenizer_fingerprint: str
    code_bytes: int = 0
    """Counted against the limit; 0 when the artifact is read by an installed titanlm."""
    count_tokenizer: bool = True
    """Whether files of a tokenizer beside the artifact count against the limit."""


@dataclass(frozen=True)
class CodecTrial:
    """One way to compress the payload, and what came of it."""

    codec: str
    level: int
    layout: str
    n_bytes: int
    """Of the payload."""
    seconds: float
    """By the clock, while others may have been tried beside it."""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    n_bytes: int
    """Everything that counts against the limit."""
    by_tensor: Mapping[str, int]
    """Stored bytes a tensor before compression."""
    codec: str
    layout: str
    """"bytes" or "packed": how integers below 8 bits were stored."""
    trials: tuple[CodecTrial, ...] = ()
    """What was tried, the smallest first; empty for exporters that do not say."""


def decode_tensors(tensors: Mapping[str, Encoded | Tensor]) -> dict[str, Tensor]:
    """Every tensor in the shape and dtype it had; those that were never encoded are passed on.

    Names and settings of quantizers may come from a stranger's file: settings
    are validated as strictly as a config's. Raises ArtifactError naming the
    tensor and what does not fit.
    """
    quantizers: dict[str, Quantizer] = {}
    decoded = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Encoded):
            try:
                settings = _json(tensor.settings)
                key = f"{tensor.quantizer} {settings}"
                if key not in quantizers:
                    quantizers[key] = _quantizer(tensor.quantizer, settings)
                value = quantizers[key].decode(tensor)
            except (ArtifactError, RegistryError) as error:
                raise ArtifactError(f"tensor {name!r}: {error}") from error
            if tuple(value.shape) != tuple(tensor.shape) or str(value.dtype) != f"torch.{tensor.dtype}":
                wanted = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ArtifactError(f"tensor {name!r}: quantizer {tensor.quantizer!r} gave {value.dtype} {tuple(value.shape)}, not {wanted}")
            decoded[name] = value
        else:
            decoded[name] = tensor
    return decoded


def _json(settings: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(settings), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"settings of its quantizer are no JSON table: {error}") from error


def _quantizer(name: str, settings: str) -> Any:
    """The component that decodes; RegistryError for an unknown one, ArtifactError for settings it does not have."""
    from pydantic import TypeAdapter, ValidationError  # seldom needed by those who import this module

    entry = lookup("quantizer", name)
    try:
        config: Any = TypeAdapter(entry.settings).validate_json(settings)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ArtifactError(f"settings of quantizer {name!r} are not valid: {problems}") from error
    quantizer = entry.factory(config)
    if not hasattr(quantizer, "decode"):
        raise ArtifactError(f"quantizer {name!r} works in training only and decodes nothing")
    return quantizer
