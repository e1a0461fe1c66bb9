"""Second moments of the inputs of matrices, against the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from titanlm.batch import Batch
from titanlm.calibration import hessians
from titanlm.errors import TitanError
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.models.golf import Golf, GolfConfig
from titanlm.models.layers.linear import Linear
from titanlm.models.layers.product import plain_product
from titanlm.precision import set_precision
from titanlm.registry import Component
from titanlm.train_module import TrainModule

VOCAB = 67


def decoder(**settings: object) -> Decoder:
    small = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48, "max_positions": 64, "attention_backend": "sdpa"}
    model = Decoder(DecoderConfig(**{**small, **settings}), vocab_size=VOCAB, max_seq_len=24)  # type: ignore[arg-type]
    model.init_weights(0)
    return model


def golf(**settings: object) -> Golf:
    small = {"n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "bigram_buckets": 40, "bigram_dim": 8, "smear_gate": "recorded"}
    model = Golf(GolfConfig(**{**small, "attention_backend": "sdpa", **settings}), vocab_size=VOCAB, max_seq_len=24)  # type: ignore[arg-type]
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if not parameter.any():  # as after some training, or later layers would be given zeros
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def trained(model: nn.Module, chunk_tokens: int = 16) -> TrainModule:
    return TrainModule(model, Component.named("loss", "cross_entropy", chunk_tokens=chunk_tokens).build())


def batches(n: int = 3, rows: int = 2) -> list[Batch]:
    tokens = torch.randint(VOCAB, (n, rows, 24), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(24).repeat(rows, 1)
    return [Batch(ids, ids.roll(-1, 1), positions, torch.zeros_like(ids), torch.ones_like(ids)) for ids in tokens]


def matrices(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 2]


@torch.no_grad()
def by_hand(model: nn.Module, given: list[Batch], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Every input of every ``Linear``, kept by another forward pass, and the hidden states that the head is given; then one product in float64."""
    inputs: dict[nn.Module, list[Tensor]] = {}

    def forward(self: Linear, x: Tensor) -> Tensor:
        inputs.setdefault(self, []).append(x.flatten(0, -2).double())
        return plain_product(x, self.weight.to(x.dtype))

    with monkeypatch.context() as patched:
        patched.setattr(Linear, "forward", forward)
        hidden = torch.cat([model(batch).flatten(0, 1) for batch in given])
    found = {f"{name}.weight": torch.cat(inputs[module]) for name, module in model.named_modules() if module in inputs}
    if model.head.projection is not None:
        found["embedding.projection"] = hidden.double()
        hidden = plain_product(hidden, model.embedding.projection.to(hidden.dtype))
    found["embedding.weight" if model.head.tied else "head.weight"] = hidden.double()
    return {name: x.T @ x for name, x in found.items()}


MODELS = {
    "golf": (golf, {}, {"bigram.table.weight", "residual_mix", "skips.weight"}),
    "golf with a head of its own": (golf, {"tie_embeddings": False}, {"embedding.weight", "bigram.table.weight", "residual_mix", "skips.weight"}),
    "decoder, tied": (decoder, {"tie_embeddings": True}, set()),
    "decoder with a head of its own": (decoder, {"tie_embeddings": False}, {"embedding.weight"}),
    "decoder, tied and factorised": (decoder, {"tie_embeddings": True, "embedding_rank": 8}, set()),
    "decoder, factorised": (decoder, {"tie_embeddings": False, "embedding_rank": 8}, {"embedding.weight", "embedding.projection"}),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", MODELS)
def test_equals_the_products_of_all_inputs(case: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, settings, left = MODELS[case]
    model = build(**settings)
    module = trained(model)
    set_precision(module, precision)  # type: ignore[arg-type]
    got = hessians(module, matrices(model), batches())
    expected = by_hand(model, batches(), monkeypatch)
    assert got.keys() == expected.keys()
    assert {name for name in matrices(model) if name not in got} == {name for name in matrices(model) if name.endswith(tuple(left))}
    for name, moment in got.items():
        assert moment.dtype == torch.float64
        assert moment.shape == (model.get_parameter(name).shape[-1],) * 2
        torch.testing.assert_close(moment, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()), msg=name)
        assert float(moment.trace()) > 0


@pytest.mark.parametrize("chunk_tokens", [0, 7, 1000])
def test_neither_the_split_into_batches_nor_that_of_the_loss_matters(chunk_tokens: int) -> None:
    whole = batches(1, rows=6)[0]
    split = {name: getattr(whole, name).split([1, 3, 2]) for name in ("tokens", "labels", "positions", "document_ids", "target_bytes")}
    parts = [replace(whole, **{name: pieces[part] for name, pieces in split.items()}) for part in (2, 0, 1)]
    model = golf()
    expected = hessians(trained(model, 0), matrices(model), [whole])
    for name, moment in hessians(trained(model, chunk_tokens), matrices(model), iter(parts)).items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].max()), msg=name)


def test_many_positions_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = golf()
    whole = hessians(trained(model), matrices(model), batches())
    monkeypatch.setattr("titanlm.calibration._CHUNK", 5)
    for name, moment in hessians(trained(model), matrices(model), batches()).items():
        torch.testing.assert_close(moment, whole[name], rtol=1e-5, atol=1e-6 * float(whole[name].max()), msg=name)


def test_a_block_that_runs_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(n_layers=3)
    model.blocks[2] = model.blocks[0]
    got, expected = hessians(trained(model), matrices(model), batches()), by_hand(model, batches(), monkeypatch)
    name = "blocks.0.feed_forward.up_proj.weight"
    torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-3)
    assert float(got[name].trace()) == pytest.approx(2 * float(got["blocks.1.feed_forward.up_proj.weight"].trace()), rel=1e-3)  # of normed inputs


def test_only_what_was_asked_for_and_the_model_is_as_it_was() -> None:
    model = golf()
    module = trained(model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes: list[bool] = []

    def watched() -> Iterator[Batch]:
        for batch in batches():
            modes.append(module.training)
            yield batch

    got = hessians(module, ["blocks.1.attention.o_proj.weight", "bigram.table.weight", "bigram.scale"], watched())
    assert list(got) == ["blocks.1.attention.o_proj.weight"]
    assert modes == [False] * 3
    assert module.training
    assert not any(each._forward_pre_hooks for each in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_calibrated_is_named() -> None:
    module = trained(golf())
    with pytest.raises(TitanError, match="calibration: the model has no parameter head.weight, nobody"):
        hessians(module, ["head.weight", "embedding.weight", "nobody"], batches())
    with pytest.raises(TitanError, match="nothing reached blocks.0.attention.q_proj.weight; give a batch or more"):
        hessians(module, ["blocks.0.attention.q_proj.weight"], [])

    def failing() -> Iterator[Batch]:
        yield batches()[0]
        raise TitanError("unreadable")

    with pytest.raises(TitanError, match="unreadable"):
        hessians(module.train(), ["embedding.weight"], failing())
    assert module.training
    assert not any(each._forward_pre_hooks for each in module.modules())


def test_biases_are_no_matrices() -> None:
    model = decoder()
    model.blocks[0].attention.o_proj = nn.Linear(32, 32)
    got = hessians(trained(model), [name for name, _ in model.named_parameters() if name.startswith("blocks.0.attention.o_proj")], batches())
    assert list(got) == ["blocks.0.attention.o_proj.weight"]


@pytest.mark.parametrize("build", [golf, decoder])
def test_every_matrix_that_is_calibrated_has_better_outputs(build) -> None:
    """From the model's own activations to levels: what GPTQ is for. A tied embedding is among them."""
    model = build(tie_embeddings=True)
    quantizer = Component.named("quantizer", "int5", rounding="gptq").build()
    moments = hessians(trained(model), matrices(model), batches(8))
    assert "embedding.weight" in moments
    change = {"nearest": 0.0, "gptq": 0.0}
    for name, moment in moments.items():
        weight, of_this = model.get_parameter(name).detach(), {}
        for how, encoded in (("nearest", quantizer.encode(weight)), ("gptq", quantizer.encode_calibrated(weight, moment))):
            error = (quantizer.decode(encoded) - weight).double()
            of_this[how] = float((error @ moment * error).sum())
            change[how] += of_this[how]
        assert of_this["gptq"] < of_this["nearest"], name
    assert change["gptq"] < 0.85 * change["nearest"]
