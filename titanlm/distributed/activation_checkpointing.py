"""Trade compute for memory: recompute parts of each block in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Results worth keeping: they cost matrix products to make again. Everything
# else (norms, rotations, activations) is bound by memory and cheap to repeat.
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_mm",
        "aten::max",  # of FP8 operands: a number each, which takes a pass over memory to find again
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_flash_attention_forward",
        "titanlm::flash3_forward",
        "titanlm::flash4_forward",
        "titanlm::product_onto",
        "titanlm::relu2_product",
    }
)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply(blocks: Iterable[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Wrap each block's ``forward`` in place, so that parameter names keep.

    Must come before compile: the compiler then sees the recomputation too.
    """
    if mode == "none":
        return
    keywords: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = _checkpointed(block.forward, keywords)


def _checkpointed(forward: Callable[..., Any], keywords: dict[str, Any]) -> Callable[..., Any]:
    """A plain function, not a partial: the compiler needs a frame of Python to start from."""

    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **keywords)

    return recomputed
