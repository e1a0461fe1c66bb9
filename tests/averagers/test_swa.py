from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlm.progress import Horizon, Progress
from titanlm.registry import Component


def run(steps: int, dtype: torch.dtype = torch.float32, horizon: Horizon | None = None, step_s: float = 0.0, **settings: object):
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(3, 2).to(dtype)
    averager = Component.named("averager", "swa", **settings).build(model=model, horizon=horizon or Horizon(40))
    history = [model.weight.detach().double().clone()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=generator).to(dtype))
        averager.update(Progress(step=step, elapsed_s=step * step_s))
        history.append(model.weight.detach().double().clone())
    return model, averager, history


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_mean_in_float64(dtype: torch.dtype) -> None:
    _, averager, history = run(40, dtype, start_fraction=0.5, every=3)
    taken = [history[step] for step in (21, 24, 27, 30, 33, 36, 39)]
    assert averager.n == len(taken)
    assert averager.mean["weight"].dtype == torch.float32
    torch.testing.assert_close(averager.mean["weight"].double(), torch.stack(taken).mean(0), rtol=0, atol=3e-6)


def test_begins_by_the_clock_when_that_ends_the_run() -> None:
    _, averager, history = run(10, horizon=Horizon(1000, max_wallclock_s=10.0), step_s=1.0, start_fraction=0.75, every=2)
    torch.testing.assert_close(averager.mean["weight"].double(), (history[8] + history[10]) / 2, rtol=0, atol=1e-6)


def test_before_the_first_sample_the_weights_are_the_models_own() -> None:
    model, averager, _ = run(29, start_fraction=0.75, every=5)
    own = model.weight.detach().clone()
    with averager.swap():
        assert torch.equal(model.weight, own)
    assert averager.state_dict()["n"] == 0
    averager.update(Progress(step=30))
    assert averager.state_dict()["n"] == 1
    assert torch.equal(averager.mean["weight"], own)


def test_swap_and_back() -> None:
    model, averager, _ = run(40, start_fraction=0.5, every=5)
    own = model.weight.detach().clone()
    with averager.swap():
        assert torch.equal(model.weight, averager.mean["weight"])
    assert torch.equal(model.weight, own)
    with pytest.raises(RuntimeError), averager.swap():
        raise RuntimeError
    assert torch.equal(model.weight, own)


def test_state_round_trip_goes_on_equally() -> None:
    model, averager, _ = run(35, start_fraction=0.5, every=5)
    other = Component.named("averager", "swa", start_fraction=0.5, every=5).build(model=model, horizon=Horizon(40))
    state = averager.state_dict()
    other.load_state_dict({"n": state["n"], "mean": {name: mean.clone() for name, mean in state["mean"].items()}})
    for each in (averager, other):
        each.update(Progress(step=40))
    assert other.n == averager.n == 5
    assert torch.equal(other.mean["weight"], averager.mean["weight"])


def test_a_tied_parameter_is_averaged_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert list(Component.named("averager", "swa").build(model=model, horizon=Horizon(4)).mean) == ["embedding.weight"]


def test_sharded_parameters_stay_sharded() -> None:
    """As rank 1 of two that never answer: nothing is sent, so it would hang or fail if it were not element by element."""
    whole = torch.arange(12.0).reshape(4, 3)
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Linear(3, 4, bias=False)
        model.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        averager = Component.named("averager", "swa", start_fraction=0.0, every=1).build(model=model, horizon=Horizon(4))
        for step in (1, 2):
            averager.update(Progress(step))
            with torch.no_grad():
                model.weight.add_(2.0)
        assert isinstance(averager.mean["weight"], DTensor)
        assert torch.equal(averager.mean["weight"].to_local(), whole[2:] + 1.0)
        with averager.swap():
            assert torch.equal(model.weight.to_local(), whole[2:] + 1.0)
        assert torch.equal(model.weight.to_local(), whole[2:] + 4.0)
    finally:
        dist.destroy_process_group()
