from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from titanlm.batch import Batch
from titanlm.errors import TitanError
from titanlm.losses.chunked import LossSums
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.registry import Component
from titanlm.train_module import TrainModule


def make(**loss: object) -> tuple[TrainModule, Batch]:
    model = Decoder(DecoderConfig(n_layers=1, d_model=16, n_heads=2), vocab_size=19, max_seq_len=8)
    model.init_weights(0)
    tokens = torch.randint(19, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    batch = Batch(tokens, labels, torch.arange(8).repeat(2, 1), torch.zeros_like(tokens), torch.ones_like(tokens))
    return TrainModule(model, Component.named("loss", "cross_entropy", **loss).build()), batch


def test_it_gives_sums_and_gradients_of_the_model_and_its_loss() -> None:
    module, batch = make(chunk_tokens=3)
    sums, aux = module(batch)
    assert isinstance(sums, LossSums)
    assert aux == {}
    model = module.model
    total = F.cross_entropy(model.head(model(batch)).flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(sums.loss, total)
    sums.loss.backward()
    theirs = torch.autograd.grad(total, list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)
    assert all(name.startswith("model.") for name, _ in module.named_parameters())


def test_auxiliary_sums_pass_through() -> None:
    module, batch = make()

    class WithAux(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.head = inner, inner.head

        def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self.inner(batch), {"balance": torch.tensor(2.0)}

    sums, aux = TrainModule(WithAux(module.model), module.loss)(batch)
    assert aux["balance"].item() == 2.0
    assert sums.loss.item() == module(batch)[0].loss.item()


def test_another_dtype_than_asked_for_is_an_error() -> None:
    module, batch = make()
    module.compute_dtype = torch.bfloat16
    with pytest.raises(TitanError, match="Decoder computed in float32 where bfloat16 is asked for"):
        module(batch)
    for part in module.modules():
        if hasattr(part, "compute_dtype"):
            part.compute_dtype = torch.bfloat16
    sums, _ = module(batch)
    assert sums.loss.dtype == torch.float32


def test_scoring_reuses_the_training_graph_of_a_compiled_model() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    module, batch = make()
    counter = CompileCounter()
    module.model.compile(backend=counter, dynamic=False)
    module.training_graph_only = True
    module.train()(batch)[0].loss.backward()
    assert counter.frame_count == 1
    with torch.no_grad():
        sums, _ = module.eval()(batch)
    assert counter.frame_count == 1
    assert not sums.loss.requires_grad
