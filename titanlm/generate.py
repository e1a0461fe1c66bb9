"""Text from a model, token by token.

A model that offers ``new_cache`` is run on one new token at a time; any other
is run on the whole text again for each token, which is right but slow.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from titanlm.batch import IGNORE, Batch
from titanlm.errors import NonFiniteError, TitanError

MAX_SEED = 2**63 - 1


def choose(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Sample an id from (V,) logits; temperature 0 takes the largest.

    top_k keeps the k largest, top_p the smallest set of probability ≥ p
    (Holtzman et al., 2020); both may be given. Raises NonFiniteError when no
    logit is the largest.
    """
    logits = logits.float().cpu()
    largest = logits.max()
    if not torch.isfinite(largest):
        raise NonFiniteError("the model's logits are not finite: its weights are, or were stored in a dtype too narrow for them (export.dtype)")
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - largest) / temperature  # 0 at most, so that no temperature is too low
    if top_k is not None:
        kept = torch.topk(logits, min(top_k, logits.numel()))
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
    probabilities = torch.softmax(logits, dim=0)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        # What stands before a token decides: the one that crosses p is still kept.
        outside = ordered.cumsum(0) - ordered >= top_p
        probabilities = probabilities.scatter(0, order[outside], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def prompt_batch(ids: Sequence[int], start: int, device: torch.device) -> Batch:
    """One row of one document, whose first token stands at position ``start``."""
    tokens = torch.tensor([list(ids)], device=device)
    return Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        positions=torch.arange(start, start + len(ids), device=device, dtype=torch.int32)[None],
        document_ids=torch.zeros_like(tokens),
        target_bytes=torch.zeros_like(tokens, dtype=torch.int32),
        document_mask=False,
    )


@torch.no_grad()
def continue_ids(
    model: Any,
    ids: Sequence[int],
    *,
    vocab_size: int,
    eos_id: int | None,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Ids after ``ids`` (not empty), until ``eos_id`` or ``max_tokens``. The model is put into eval mode meanwhile.

    A model that says its ``config.max_positions`` is not run past it: the
    text ends there, with a line on stderr. Raises TitanError when ``ids``
    alone are longer.
    """
    longest = getattr(getattr(model, "config", None), "max_positions", None)
    _require_room(len(ids), longest)
    # The last id of all is never run, only chosen.
    room = max_tokens if longest is None else min(max_tokens, longest - len(ids) + 1)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(1, len(ids) + room, device) if hasattr(model, "new_cache") else None
        text = list(ids)
        pending = list(ids)
        for _ in range(room):
            # A compiled model would compile anew for every length of text.
            with torch.compiler.set_stance("force_eager"):
                if cache is None:
                    hidden = model(prompt_batch(text, 0, device))
                else:
                    hidden = model(prompt_batch(pending, len(text) - len(pending), device), cache=cache)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                logits = model.head(hidden[0, -1])[:vocab_size]
            # Ids above the tokenizer's are padding rows of the table, never text.
            following = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if following == eos_id:
                return
            yield following
            text.append(following)
            pending = [following]
        if room < max_tokens:
            print(f"\nstopped: the text has reached model.max_positions = {longest} tokens", file=sys.stderr)
    finally:
        model.train(was_training)


def prompt_ids(tokenizer: Any, prompt: str, longest: int | None = None) -> list[int]:
    """What a model is given to continue ``prompt``. Raises TitanError when that is nothing, or more than ``longest`` ids."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*start, *np.asarray(tokenizer.encode(prompt)).tolist()]
    if not ids:
        raise TitanError("nothing to start from: this tokenizer has no start-of-document id, so give a prompt")
    _require_room(len(ids), longest)
    return ids


def _require_room(n_ids: int, longest: int | None) -> None:
    if longest is not None and n_ids > longest:
        raise TitanError(f"the prompt is {n_ids} tokens long and model.max_positions is {longest}; shorten the prompt")


def continue_text(model: Any, tokenizer: Any, prompt: str, *, max_tokens: int, **sampling: Any) -> Iterator[str]:
    """Pieces of text after ``prompt``; a character split over tokens comes out whole, or not at all when the text ends inside it."""
    ids = prompt_ids(tokenizer, prompt)
    # Decoded together with the prompt: a tokenizer may drop the space before the first word of a text.
    shown = len(tokenizer.decode(ids))
    for token in continue_ids(model, list(ids), vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, max_tokens=max_tokens, **sampling):
        ids.append(token)
        text = tokenizer.decode(ids)
        # Replacement characters at the end may be the first bytes, three at most, of a character still to come.
        held = min(3, len(text) - len(text.rstrip("\ufffd")))
        if len(text) - held > shown:
            yield text[shown : len(text) - held]
            shown = len(text) - held


def generate_text(
    target: Path,
    *,
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
    imports: Sequence[str] = (),
    step: int | Literal["best"] | None = None,
) -> Iterator[str]:
    """Open a run, checkpoint or artifact and continue a prompt, piece by piece."""
    from titanlm.targets import open_target

    if max_tokens < 1 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise TitanError("--max-tokens and --top-k must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    if not 0 <= seed <= MAX_SEED:
        raise TitanError(f"--seed must be from 0 to {MAX_SEED}")
    opened = open_target(target, imports=imports, device=device, step=step)
    yield from continue_text(opened.module.model, opened.tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
