"""Documents packed into a row against each of them alone: every packer, every attention backend.

Two claims. What else is in the row changes not one bit of a document's logits:
such positions get a weight of exactly zero. And the document cut out of the
row, a row of its own, has the same logits up to rounding, and no more than
that: a matrix product of another shape adds in another order, so fp32 differs
in the last bits (up to 7e-6 was seen, on CPU and H100, where logits are about 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from titanlm.batch import IGNORE, Batch, Document, Row, stacked
from titanlm.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.models.layers import attention
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component
from titanlm.train_module import TrainModule

VOCAB, SEQ_LEN = 61, 48
PACKERS = {"concat": {}, "best_fit": {"buffer_rows": 2}, "none": {}}
LENGTHS = (7, 30, 1, 12, 48, 2, 110, 5, 21, 9, 33)
"""Shorter than a row, as long as one, more than two rows long, and of one id."""


def documents(lengths: tuple[int, ...]) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(VOCAB, size=length).astype(np.int32) for length in lengths]


def packed(name: str, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    packer = Component.named("packer", name, **PACKERS[name]).build(seq_len=SEQ_LEN)
    rows: list[Row] = []
    for number, ids in enumerate(documents(lengths)):
        packer.add(Document(ids, number, len(ids)), mark(np.ones(len(ids), dtype=np.int32)))
        while (row := packer.pop(SEQ_LEN)) is not None:
            rows.append(row)
    while (row := packer.flush(SEQ_LEN)) is not None:
        rows.append(row)
    return Batch.of(finish(stacked(rows), document_mask=True))


def segments(batch: Batch) -> Iterator[tuple[int, slice]]:
    """Row and positions of every piece of a document."""
    for number, ids in enumerate(batch.document_ids.tolist()):
        edges = [0, *(at for at in range(1, len(ids)) if ids[at] != ids[at - 1]), len(ids)]
        for start, end in zip(edges, edges[1:], strict=False):
            if ids[start] >= 0:
                yield number, slice(start, end)


def cut_out(batch: Batch, row: int, part: slice) -> Batch:
    return replace(batch, **{field.name: getattr(batch, field.name)[row : row + 1, part] for field in fields(Row)})


def decoder(backend: str, device: str = "cpu") -> Decoder:
    settings = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "qk_norm": "learned"}
    model = Decoder(DecoderConfig(**settings, attention_backend=backend), vocab_size=VOCAB, max_seq_len=SEQ_LEN)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that attention is far from even
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return model.to(device)


@pytest.fixture(params=["sdpa", "math", "flex", pytest.param("cuda:auto", marks=pytest.mark.gpu), pytest.param("cuda:math", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    device, _, backend = request.param.rpartition(":")
    before = torch.get_float32_matmul_precision()
    if device:
        torch.set_float32_matmul_precision("highest")  # TF32 would round to 10 bits, in FlexAttention's kernels too
    elif backend == "flex":
        # Refused on the CPU, where it cannot train. Uncompiled it runs there, without gradients, from the same block mask.
        monkeypatch.setattr(attention, "compiled", lambda function: function)
        monkeypatch.setattr("titanlm.models.decoder.attention_mask", lambda batch, *_: attention._block_mask(batch.document_ids))
    with torch.no_grad():
        yield decoder(backend, device or "cpu")
    torch.set_float32_matmul_precision(before)


def logits_of(model: Decoder, batch: Batch) -> torch.Tensor:
    return model.head(model(batch.to(model.norm.weight.device))).cpu()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packer", PACKERS)
def test_a_packed_document_has_the_logits_it_has_alone(model: Decoder, packer: str) -> None:
    batch = packed(packer)
    together = logits_of(model, batch)
    assert together.abs().mean() > 0.5, "logits too small to compare"
    n_tokens = 0
    for row, part in segments(batch):
        alone = logits_of(model, cut_out(batch, row, part))
        torch.testing.assert_close(together[row, part], alone[0], rtol=0, atol=1e-5)
        n_tokens += alone.shape[1]
    assert n_tokens == int((batch.document_ids >= 0).sum())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packer", PACKERS)
def test_no_bit_of_a_document_depends_on_another(model: Decoder, packer: str) -> None:
    batch = packed(packer)
    before = logits_of(model, batch)
    shared = 0
    for row, part in segments(batch):
        if part == slice(0, SEQ_LEN):
            continue
        outside = torch.ones(SEQ_LEN, dtype=torch.bool)
        outside[part] = False
        tokens = batch.tokens.clone()
        tokens[row, outside] = (tokens[row, outside] + 1) % VOCAB  # all other documents, and the padding
        after = logits_of(model, replace(batch, tokens=tokens))
        assert torch.equal(after[row, part], before[row, part])
        assert not torch.equal(after[row, outside], before[row, outside])
        others = torch.arange(len(tokens)) != row
        assert torch.equal(after[others], before[others])
        shared += 1
    assert shared > 5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packer", PACKERS)
def test_packed_loss_is_the_token_mean_of_the_unpacked(model: Decoder, packer: str) -> None:
    """Of whole documents, where they fit: concat cuts some all the same, and then each piece is a text."""
    lengths = tuple(length for length in LENGTHS if length <= SEQ_LEN)
    batch = packed(packer, lengths)
    device = model.norm.weight.device
    module = TrainModule(model, CrossEntropy(CrossEntropyConfig(chunk_tokens=16)))

    def loss_sum(one: Batch) -> float:
        return module(one.to(device))[0].loss.item()

    n_labels = int((batch.labels != IGNORE).sum())
    assert n_labels == sum(length - 1 for length in lengths)
    if packer == "concat":
        alone = [cut_out(batch, row, part) for row, part in segments(batch)]
    else:
        alone = []
        for number, ids in enumerate(documents(lengths)):
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            labels = torch.cat([tokens[:, 1:], torch.full((1, 1), IGNORE)], 1)
            alone.append(Batch(tokens, labels, torch.arange(len(ids))[None], torch.full_like(tokens, number), torch.ones_like(tokens)))
    unpacked = sum(loss_sum(one) for one in alone) / sum(int((one.labels != IGNORE).sum()) for one in alone)
    assert loss_sum(batch) / n_labels == pytest.approx(unpacked, rel=1e-6)
