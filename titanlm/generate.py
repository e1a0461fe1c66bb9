"""Text from a model, token by token.

A model that offers ``new_cache`` is run on one new token at a time; any other
is run on the whole text again for each token, which is right but slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titanlm.batch import IGNORE, Batch
from titanlm.errors import TitanError


def choose(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Sample an id from (V,) logits; temperature 0 takes the largest.

    top_k keeps the k largest, top_p the smallest set of probability ≥ p
    (Holtzman et al., 2020); both may be given.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu() / temperature
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
    """Ids after ``ids`` (not empty), until ``eos_id`` or ``max_tokens``. The model is put into eval mode meanwhile."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # A compiled model would compile anew for every length of text.
    stance = torch.compiler.set_stance("force_eager")
    try:
        cache = model.new_cache(1, len(ids) + max_tokens, device) if hasattr(model, "new_cache") else None
        text = list(ids)
        pending = list(ids)
        for _ in range(max_tokens):
            with stance:
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
    finally:
        model.train(was_training)


def continue_text(model: Any, tokenizer: Any, prompt: str, *, max_tokens: int, **sampling: Any) -> Iterator[str]:
    """Pieces of text after ``prompt``; a character split over tokens comes out whole."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*start, *np.asarray(tokenizer.encode(prompt)).tolist()]
    if not ids:
        raise TitanError("nothing to start from: this tokenizer has no start-of-document id, so give a --prompt")
    shown, written = "", []
    for token in continue_ids(model, ids, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, max_tokens=max_tokens, **sampling):
        written.append(token)
        text = tokenizer.decode(written)
        # The replacement character at the end may be the first bytes of a character still to come.
        if text.endswith("\ufffd") and len(written) < max_tokens:
            continue
        yield text[len(shown) :]
        shown = text


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
) -> Iterator[str]:
    """Open a run, checkpoint or artifact and continue a prompt, piece by piece."""
    from titanlm.targets import open_target

    if max_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise TitanError("--max-tokens and --top-k must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    opened = open_target(target, imports=imports, device=device)
    yield from continue_text(
        opened.module.model, opened.tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
