"""What the tests of optimizers over several ranks share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANK = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from titanlm.distributed.process_group import connected
from titanlm.distributed.slices import whole
from titanlm.distributed.world import World
from titanlm.patterns import NamedParam
from titanlm.registry import Component

class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES])

    def forward(self, step):
        generator = torch.Generator().manual_seed(step)
        return sum((torch.randn(p.shape, generator=generator) * torch.sin(p)).sum() for p in self.all)

def built(name, model, **settings):
    named = [NamedParam(name, parameter, "matrix") for name, parameter in model.named_parameters()]
    return Component.named("optimizer", name, **settings).build(named_params=named)

def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()  # equal on all ranks, so the average over ranks is each one's
        optimizer.step()
    return [whole(p) for p in model.parameters()]

def ranks():
    return connected(World.from_environment(), torch.device("cpu"), timeout_s=60, init_timeout_s=60)
"""


@pytest.fixture
def on_ranks(zygote: Any) -> Callable[..., Any]:
    """``zygote.run`` of code that finds the above; it says ``SHAPES`` before it makes ``Parameters``."""

    def run(code: str, **options: Any) -> Any:
        return zygote.run(RANK + code, **options)

    return run


@pytest.fixture
def resumed_on_other_ranks(tiny: Path, zygote: Any) -> Callable[..., tuple[list[float], list[float]]]:
    """Losses of ten steps: seven on two ranks, a checkpoint, the rest on four; and of one process."""

    def losses(name: str) -> list[float]:
        rows = map(json.loads, (tiny.parent / "runs" / name / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    def run(how: str, *overrides: str) -> tuple[list[float], list[float]]:
        common = ["--train.micro_batch=1", "--scheduler=constant", "--validation=[]", *overrides]
        zygote.train(tiny, "--run.name=alone", "--train.steps=10", *common).expect(0)
        several = [*common, "--run.name=several", f"--parallel.strategy={how}"]
        zygote.train(tiny, *several, "--train.steps=7", ranks=2).expect(0)
        zygote.train(tiny, *several, "--train.steps=10", ranks=4).expect(0)
        resumed, alone = losses("several"), losses("alone")
        assert len(resumed) == len(alone) == 10
        return resumed, alone

    return run
