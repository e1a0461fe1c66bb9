"""Functions of tensors that the compiler takes as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(schema: str, run: Callable[..., Any], like: Callable[..., Any]) -> Any:
    """``torch.ops.titanlm.NAME`` for a schema ``NAME(arguments) -> results``, computed by ``run``.

    ``like`` gives, from the same arguments, empty tensors of the results' shapes
    and dtypes. Neither may return an argument, or change one.
    """
    name = schema.partition("(")[0]
    torch.library.custom_op(f"titanlm::{name}", run, mutates_args=(), schema=schema.removeprefix(name)).register_fake(like)
    return getattr(torch.ops.titanlm, name)
