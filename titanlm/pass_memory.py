"""Memory of a forward and backward pass, found by running it on the meta device, where tensors have sizes and no bytes.

Every operator's results are counted as long as somebody holds them, so what
autograd keeps, what operators of the model hand on for a while and the chunks
of the loss are all in the peak, at the places where they meet. What an operator
uses inside itself is not, but for the loss's logsumexp, where logits are large;
nor is what the allocator loses between its blocks.

The pass is uncompiled, and compiled ones hold less: the compiler fuses what is
handed on, and recomputes cheap parts of what is kept. So the peak is an upper
bound where a run compiles: 35.3 GiB, against 27.3 measured, for the golf model
of 27 million parameters in micro-batches of 131,072 positions, and within 1 %
of what was measured where it does not (docs/performance.md). Products in FP8
keep the operands that they keep in bf16; their casts, several times as large,
last as long as a product.

Documents' masks are not counted. They are lists of lengths or of blocks, but for
``model.attention_backend = "sdpa"`` and "math" with ``data.document_mask``.

The alternative is a formula for each kind of model: it has to be kept true by
hand, and a model of somebody else's has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from titanlm.batch import Batch
from titanlm.config import RunConfig
from titanlm.distributed import activation_checkpointing
from titanlm.precision import set_precision
from titanlm.run_choices import begin_quantizers
from titanlm.train_module import TrainModule
from titanlm.tuned import Tuned


class Held(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that operators make, until nobody holds their memory any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        """Bytes."""
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(is_traceable_wrapper_subclass, operands)):
            return NotImplemented  # what is inside, such as a scale and bytes of FP8, comes by next
        results = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.logsumexp.default:  # its exponentials, as large as what it is given
            self.peak = max(self.peak, self.now + operands[0].nbytes)
        given = {operand.untyped_storage()._cdata for operand in operands}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                self._count(result.untyped_storage())
        return results

    def _count(self, memory: torch.UntypedStorage) -> None:
        key, size = memory._cdata, memory.nbytes()
        if key in self._known:
            return

        def let_go(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(memory, let_go)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Untimed:
    """Where a run would time products in FP8 and in bf16: FP8, which takes more memory."""

    def choice(self, key: str, decide: Callable[[], Any]) -> dict[str, float]:
        return {"bf16": 1.0, "float8": 0.0}


def begin_on_meta(config: RunConfig, model: Any, n_tokens: int) -> None:
    """Set the products that a run would on a GPU; ``model`` is on the meta device. Raises ImportError for FP8 without torchao."""
    begin_quantizers(config, model, n_tokens, device=torch.device("meta"), compiled=False, tuned=cast(Tuned, _Untimed()))


def pass_bytes(config: RunConfig, model: Any, rows: int, seq_len: int) -> int:
    """Most bytes that an uncompiled micro-batch of so many rows and positions a row holds beside weights, moments and the gradients of earlier ones.

    ``model`` is on the meta device and not to be used for anything but its
    parameters afterwards. Raises RuntimeError when it computes something that
    needs numbers, ImportError for FP8 without torchao.
    """
    module = TrainModule(model, config.loss.build()).train()
    set_precision(module, config.train.precision)
    begin_on_meta(config, model, rows * seq_len)
    for part in (each for block in model.blocks[:-1] for each in block.modules()):
        part.__dict__.pop("products", None)  # casts come and go, and most is held around the last block; without the others' this is quick
    activation_checkpointing.apply(model.blocks, config.train.activation_checkpointing)
    shape = (rows, seq_len)
    wide, narrow = (torch.empty(shape, dtype=dtype, device="meta") for dtype in (torch.int64, torch.int32))
    batch = Batch(tokens=wide, labels=wide, positions=narrow, document_ids=wide, target_bytes=narrow, document_mask=config.data.document_mask)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype)
    with Held() as held:
        sums, aux = module(batch)
        ((sums.loss + sum(aux.values())) / batch.labels.numel()).backward()
    for parameter in trained:
        parameter.grad = None
    return held.peak
