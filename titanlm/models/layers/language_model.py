"""What every model of this package has: an embedding, blocks and a head that may share the embedding's matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from titanlm.models.layers.attention import keep_block_masks_outside_graphs
from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.head import Head


class LanguageModel(nn.Module):
    """Keeps a tied head tied, whatever replaces parameters; subclasses set the three parts."""

    embedding: Embedding
    blocks: nn.ModuleList
    head: Head

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda model, _: model.head.tie(model.embedding))  # for assign=True

    def require_params(self, expected: int | None) -> None:
        """Raises ValueError when the parameters are more than 2 % off what the user believes them to be."""
        n_params = sum(parameter.numel() for parameter in self.parameters())
        if expected is not None and abs(n_params - expected) > 0.02 * expected:
            raise ValueError(f"expect_params: {expected:,}, but the settings make {n_params:,} parameters ({n_params / expected - 1:+.1%})")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``nn.Module.compile``, in place."""
        keep_block_masks_outside_graphs()
        super().compile(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        # to(), to_empty() and the like may put a new Parameter into every module that holds a shared one.
        super()._apply(fn, recurse)
        self.head.tie(self.embedding)
        return self
