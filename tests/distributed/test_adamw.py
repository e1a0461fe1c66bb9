"""Compact moments over several ranks: cut with the parameter's rows, scales and all, and read by another number of ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

RANK = """
SHAPES = [(33, 256), (70, 96), (40,)]  # on two ranks 17 rows and 16, or 35 and 35

def optimizer_of(model, form):
    return built("adamw", model, lr=0.05, moments=form)
"""


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
def test_sharded_equals_one_process_to_the_bit(on_ranks: Any, form: str) -> None:
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
    on_ranks(code, ranks=2).expect(0, timeout_s=60)


def test_rows_are_not_cut(on_ranks: Any) -> None:
    code = f"""{RANK}
with ranks():
    model = fully_shard(Parameters(), mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(p.ndim - 1))
    optimizer_of(model, "bf16")
    try:
        optimizer_of(model, "int8")
    except ValueError as error:
        print(error)
"""
    assert "moments: all.0 is sharded within its rows, and blocks of int8 lie there" in on_ranks(code, ranks=2).expect(0).output(1)


# ---------------------------------------------------------------- whole runs
@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_a_run_resumed_on_other_ranks_equals_one_process(resumed_on_other_ranks: Any, how: str) -> None:
    """Sums of gradients differ in their last bits, and then some codes."""
    adamw = '--optimizer=[{name="adamw", lr=1e-2, moments="int8"}]'
    resumed, alone = resumed_on_other_ranks(how, adamw, "--model.d_model=64", "--model.d_ff=66")
    assert all(math.isclose(a, b, rel_tol=2e-3) for a, b in zip(resumed, alone, strict=True)), (resumed, alone)
