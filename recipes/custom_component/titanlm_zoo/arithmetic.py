"""Sums, differences and products of two numbers: text that needs no download and that a model can get right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from titanlm.constraints import PositiveInt
from titanlm.datasets.documents import TextDocuments
from titanlm.registry import Component, Slot, Tokenizer, register


@dataclass(frozen=True)
class ArithmeticConfig:
    max_operand: PositiveInt = 99
    """Both numbers go from 0 to this."""
    hold_out_every: PositiveInt = 20
    """Of so many pairs of numbers one is for validation and the others for training; at least 2."""
    filter: tuple[Annotated[Component, Slot("filter")], ...] = ()
    """Rows have `text` and `place`."""

    def __post_init__(self) -> None:
        if self.hold_out_every < 2:
            raise ValueError("hold_out_every: 1 leaves nothing to train on; at least 2")


@register("dataset", "arithmetic")
def arithmetic(config: ArithmeticConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int) -> TextDocuments:
    """A document for each pair; order, epochs, streams, filters and resuming are titanlm's."""
    rows = Problems(config, split)
    return TextDocuments(rows, tokenizer=tokenizer, split=split, stream=stream, n_streams=n_streams, seed=seed, filters=config.filter)


class Problems:
    """The pairs of one split, by index."""

    name = "dataset 'arithmetic'"

    def __init__(self, config: ArithmeticConfig, split: str) -> None:
        self._base, self._every, self._train = config.max_operand + 1, config.hold_out_every, split == "train"
        self.fingerprint = f"arithmetic: {self._base} {self._every} {split}"

    def __len__(self) -> int:
        n_held_out = -(-(self._base**2) // self._every)
        return self._base**2 - n_held_out if self._train else n_held_out

    def row(self, index: int) -> Mapping[str, Any]:
        # Pairs 0, k, 2k... are held out; training has those between them.
        pair = index + index // (self._every - 1) + 1 if self._train else index * self._every
        a, b = divmod(pair, self._base)
        return {"text": f"{a} + {b} = {a + b}\n{a} - {b} = {a - b}\n{a} * {b} = {a * b}\n", "place": f"pair {pair}"}
