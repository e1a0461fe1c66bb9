"""Labels are shifted once: streams whose best possible loss is known, through packer, model and loss.

Not shifted, a model would be asked for the token it has just read and fall
below ln V on noise. Shifted twice, it could not learn to copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from titanlm.batch import IGNORE, Batch, Document, stacked
from titanlm.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component
from titanlm.train_module import TrainModule

VOCAB, SEQ_LEN, N_ROWS = 16, 32, 16
LN_V = math.log(VOCAB)
PACKERS = ("concat", "best_fit", "none")


def noise(draw: np.random.Generator) -> np.ndarray:
    return draw.integers(VOCAB, size=draw.integers(8, 50))


def constant(draw: np.random.Generator) -> np.ndarray:
    return np.full(draw.integers(8, 50), 5)


def alternating(draw: np.random.Generator) -> np.ndarray:
    """a b a b...: the next token is the previous one."""
    return np.resize(draw.integers(VOCAB, size=2), draw.integers(8, 50))


def batches(packer_name: str, text: Callable[[np.random.Generator], np.ndarray]) -> Iterator[Batch]:
    """Every document is new, so nothing can be learnt by heart."""
    draw = np.random.default_rng(0)
    packer, number = Component.named("packer", packer_name).build(seq_len=SEQ_LEN), 0
    while True:
        rows = []
        while len(rows) < N_ROWS:
            if (row := packer.pop(SEQ_LEN)) is not None:
                rows.append(row)
                continue
            ids = text(draw).astype(np.int32)
            packer.add(Document(ids, number, len(ids)), mark(np.ones(len(ids), dtype=np.int32)))
            number += 1
        yield Batch.of(finish(stacked(rows), document_mask=True))


def losses(packer_name: str, text: Callable[[np.random.Generator], np.ndarray], steps: int) -> tuple[list[float], list[float]]:
    """The mean loss of each step, on data not trained on yet; and what guessing evenly at the first label of each piece alone would cost."""
    model = Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=2, d_ff=64, attention_backend="sdpa"), vocab_size=VOCAB, max_seq_len=SEQ_LEN)
    model.init_weights(0)
    module = TrainModule(model, CrossEntropy(CrossEntropyConfig()))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, betas=(0.9, 0.95))
    found, floors = [], []
    for batch, _ in zip(batches(packer_name, text), range(steps), strict=False):
        valid = batch.labels != IGNORE
        loss = module(batch)[0].loss / int(valid.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        floors.append(LN_V * int((valid & (batch.positions == 0)).sum()) / int(valid.sum()))
    return found, floors


@pytest.mark.parametrize("packer", PACKERS)
def test_noise_cannot_be_predicted(packer: str) -> None:
    values, _ = losses(packer, noise, 60)
    assert values[0] == pytest.approx(LN_V, abs=0.15)
    assert min(values) > LN_V - 0.05
    assert np.mean(values[-20:]) == pytest.approx(LN_V, abs=0.05)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_constant_is_learnt_to_the_end(packer: str) -> None:
    values, _ = losses(packer, constant, 30)
    assert values[-1] < 0.01


@pytest.mark.parametrize("packer", PACKERS)
def test_copying_the_previous_token_is_learnt_and_nothing_beyond_it(packer: str) -> None:
    values, floors = losses(packer, alternating, 100)
    above = np.array(values) - np.array(floors)
    assert above.min() > -0.05
    assert above[-10:].mean() < 0.4
