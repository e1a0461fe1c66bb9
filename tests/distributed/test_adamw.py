"""Compact moments over several ranks: cut with the parameter's rows, scales and all, and read by another number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

RANK = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from titanlm.distributed.process_group import connected
from titanlm.distributed.slices import whole
from titanlm.distributed.world import World
from titanlm.patterns import NamedParam
from titanlm.registry import Component

SHAPES = [(33, 256), (70, 96), (40,)]  # on two ranks 17 rows and 16, or 35 and 35

class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES])

    def forward(self, step):
        generator = torch.Generator().manual_seed(step)
        return sum((torch.randn(p.shape, generator=generator) * torch.sin(p)).sum() for p in self.all)

def optimizer_of(model, form):
    named = [NamedParam(name, parameter, "matrix") for name, parameter in model.named_parameters()]
    return Component.named("optimizer", "adamw", lr=0.05, moments=form).build(named_params=named)

def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()  # equal on all ranks, so the average over ranks is each one's
        optimizer.step()
    return [whole(p) for p in model.parameters()]

def ranks():
    return connected(World.from_environment(), torch.device("cpu"), timeout_s=60, init_timeout_s=60)
"""


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
def test_sharded_equals_one_process_to_the_bit(zygote: Any, form: str) -> None:
    """Blocks lie within rows, so nothing that is rounded depends on who has the row."""
    code = f"""{RANK}
alone = Parameters()
optimizer = optimizer_of(alone, {form!r})
expected = train(alone, optimizer, range(4))
with ranks():
    model = fully_shard(Parameters(), mesh=init_device_mesh("cpu", (2,)))
    sharded = optimizer_of(model, {form!r})
    got = train(model, sharded, range(4))
    assert all(map(torch.equal, got, expected))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert sharded.state[p].keys() == optimizer.state[q].keys()
        for key, value in optimizer.state[q].items():
            mine = sharded.state[p][key]
            if value.ndim:
                assert mine.shape == value.shape and mine.to_local().shape[0] == p.to_local().shape[0]
                rows = p.to_local().shape[0]
                low = 0 if dist.get_rank() == 0 else p.shape[0] - rows
                assert torch.equal(mine.to_local().view(torch.uint8), value[low : low + rows].view(torch.uint8)), key
"""
    zygote.run(code, ranks=2).expect(0, timeout_s=60)


def test_rows_are_not_cut(zygote: Any) -> None:
    code = f"""{RANK}
with ranks():
    model = fully_shard(Parameters(), mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(p.ndim - 1))
    optimizer_of(model, "bf16")
    try:
        optimizer_of(model, "int8")
    except ValueError as error:
        print(error)
"""
    assert "moments: all.0 is sharded within its rows, and blocks of int8 lie there" in zygote.run(code, ranks=2).expect(0).output(1)


# ---------------------------------------------------------------- whole runs
def losses(run: Path) -> list[float]:
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_a_run_resumed_on_other_ranks_equals_one_process(tiny: Path, zygote: Any, how: str) -> None:
    """Seven steps on two ranks, a checkpoint, the rest on four. Sums of gradients differ in their last bits, and then some codes."""
    adamw = '--optimizer=[{name="adamw", lr=1e-2, moments="int8"}]'
    common = [adamw, "--train.micro_batch=1", "--scheduler=constant", "--validation=[]", "--model.d_model=64", "--model.d_ff=66"]
    zygote.train(tiny, "--run.name=alone", "--train.steps=10", *common).expect(0)
    several = [*common, "--run.name=several", f"--parallel.strategy={how}"]
    zygote.train(tiny, *several, "--train.steps=7", ranks=2).expect(0)
    zygote.train(tiny, *several, "--train.steps=10", ranks=4).expect(0)
    alone, resumed = (losses(tiny.parent / "runs" / name) for name in ("alone", "several"))
    assert len(resumed) == len(alone) == 10
    assert all(math.isclose(a, b, rel_tol=2e-3) for a, b in zip(resumed, alone, strict=True)), (alone, resumed)
