"""What is trained: a model and its loss, as one module.

It is what is sharded, and the only thing the training step and validation
call, so that head, last norm and tied embedding are gathered once for the
model's forward pass and for the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from titanlm.errors import TitanError
from titanlm.losses.chunked import LossSums, loss_sums

if TYPE_CHECKING:
    from titanlm.batch import Batch
    from titanlm.registry import Loss


class TrainModule(nn.Module):
    """``forward(batch) → (LossSums, aux)``.

    ``compute_dtype`` and ``compile_kernels`` are set by the trainer on every
    module that has them. With ``training_graph_only`` scoring, too, runs the
    model's graph for training: a whole model is then compiled once, and what
    scores is what trained.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.compute_dtype = torch.float32
        self.compile_kernels = False
        self.fuses = True
        """Whether the loss may take kernels of this package, see ``use_kernels``."""
        self.training_graph_only = False

    def forward(self, batch: Batch) -> tuple[LossSums, dict[str, Tensor]]:
        """Sums over the trained labels, by source where data is mixed, and the model's auxiliary sums by name, token-weighted.

        Raises TitanError when the hidden states come in another dtype than
        ``compute_dtype``: a run is never silently fp32, nor silently bf16.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.training_graph_only):
            output = self.model(batch)
        hidden, aux = output if isinstance(output, tuple) else (output, {})
        if not torch.is_grad_enabled():
            hidden = hidden.detach()
        if hidden.dtype != self.compute_dtype:
            raise TitanError(
                f"{type(self.model).__name__} computed in {_short(hidden.dtype)} where {_short(self.compute_dtype)} is asked for; "
                "cast the embedding's output to its compute_dtype and every weight to its input's dtype"
            )
        head = cast(nn.Module, self.model.head)
        n_sources = batch.n_sources
        sources = batch.document_ids % n_sources if n_sources > 1 else None
        how = {"compile_kernels": self.compile_kernels, "fuses": self.fuses}
        return loss_sums(hidden, batch.labels, head, self.loss, sources=sources, n_sources=n_sources, **how), aux


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
