"""How much training data there is, and when a run has read it once: counted from what is known without a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from titanlm.config import RunConfig
from titanlm.course import legs_of
from titanlm.errors import TitanError


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data, or over the source of a mixture that is read through first."""

    tokens: float
    """That the run has trained on by then; of a mixture those of all sources."""
    of: str
    """What is read, and how large it is."""


def epoch_of(config: RunConfig) -> Epoch | None:
    """None where nobody knows how large the data is.

    `data.n_tokens` is believed. Else the settings of a dataset may have
    ``n_training_tokens()``, which reads no more than headers.
    """
    if config.data.n_tokens is not None:
        return Epoch(config.data.n_tokens, f"data.n_tokens = {config.data.n_tokens:,}")
    whole, found = sum(source.weight for source in config.sources), []
    for source in config.sources:
        try:
            n_tokens = getattr(source.dataset.config, "n_training_tokens", lambda: None)()
        except (TitanError, OSError):  # not there yet, or damaged, which whoever reads it will say
            n_tokens = None
        if n_tokens is not None:
            found.append(Epoch(n_tokens * whole / source.weight, f"the {n_tokens:,} tokens of {source.label!r}"))
    return min(found, key=lambda epoch: epoch.tokens, default=None)


def read_again(config: RunConfig) -> str | None:
    """When the data has been read as often as it is to be, once unless `data.epochs` says more, if that is before the run ends."""
    epoch, legs, limit = epoch_of(config), legs_of(config), config.data.epochs or 1
    ends = list(accumulate(leg.tokens for leg in legs))
    if epoch is None or ends[-1] <= limit * epoch.tokens:
        return None
    number = next(number for number, end in enumerate(ends) if limit * epoch.tokens < end)
    leg, before = legs[number], [0, *ends][number]
    step = leg.stage.start_step + int((limit * epoch.tokens - before) // leg.step_tokens)
    where = f"step {step:,}" + (f", in stage {number + 1}" if len(legs) > 1 else "")
    then = f"data.epochs = {limit} ends the run" if config.data.epochs else "what was read is read again"
    return f"{ends[-1] / epoch.tokens:.2f} epochs of {epoch.of}: after {where}, {then}"
