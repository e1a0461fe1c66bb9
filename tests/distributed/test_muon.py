"""Muon over several ranks does what it does in one process: shared-out banks, uneven and empty shards, the flag, a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

# Banks of four, two, three and one; on four ranks rows do not divide (6, 9, 7), or leave ranks without any (3, 1).
RANK = """
SHAPES = [(6, 8)] * 4 + [(9, 5)] * 2 + [(3, 4)] * 3 + [(1, 7)] + [(7, 7)]
SETTINGS = {}, {"normalise": "rows", "nesterov": False, "coefficients": "polar_express"}
NEUTRAL = dict(lr=0.05, weight_decay=0.1, momentum=0.9)

def optimizer_of(model, **settings):
    return built("muon", model, **{**NEUTRAL, "ns_dtype": "fp32", **settings})

def spread(model, how):
    if how == "replicate":
        return model
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")) if how == "hsdp" else init_device_mesh("cpu", (size,))
    return fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False) if how == "offload" else OffloadPolicy())

def close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), (a.shape, ((a - b).norm() / b.norm()).item())
"""

ALONE = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("ranks", "how"),
    [(4, "fsdp2"), (4, "replicate"), (4, "hsdp"), (2, "fsdp2"), (2, "replicate"), (2, "hsdp"), (1, "fsdp2"), (2, "offload")],
)
def test_equals_one_process(on_ranks: Any, ranks: int, how: str) -> None:
    """Newton-Schulz in fp32, 1e-5 relative after four steps; all ranks have the same to the bit."""
    code = f"""{RANK}
expected = []
for settings in SETTINGS:
    model = Parameters()
    expected.append(train(model, optimizer_of(model, **settings), range(4)))
with ranks():
    for settings, alone in zip(SETTINGS, expected, strict=True):
        model = spread(Parameters(), {how!r})
        optimizer = optimizer_of(model, **settings)
        got = train(model, optimizer, range(4))
        close(got, alone)
        mine = torch.cat([value.flatten() for value in got])
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine)
        assert all(torch.equal(mine, other) for other in theirs)
        for p in model.parameters():
            buffer = optimizer.state[p]["momentum_buffer"]
            assert buffer.shape == p.shape
            assert {how!r} == "replicate" or buffer.to_local().shape == p.to_local().shape
"""
    on_ranks(code, ranks=ranks, env=ALONE if ranks == 1 else None).expect(0, timeout_s=40)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_compiled_equals_one_process(on_ranks: Any, how: str) -> None:
    """With ranks that have nothing of a bank."""
    code = f"""{RANK}
SHAPES[:] = [(6, 8), (6, 8), (1, 7)]
model = Parameters()
alone = train(model, optimizer_of(model, **SETTINGS[1]), range(3))
with ranks():
    model = spread(Parameters(), {how!r})
    optimizer = optimizer_of(model, **SETTINGS[1])
    optimizer.compile_kernels = True
    close(train(model, optimizer, range(3)), alone)
"""
    on_ranks(code, ranks=2).expect(0, timeout_s=120)


@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_no_rank_orthogonalises_more_than_its_share(on_ranks: Any, how: str) -> None:
    """Of banks of 4, 2, 3, 1 and 1 matrices on two ranks: 2 + 1 + 2 + 1 + 1 at most, and each matrix once."""
    code = f"""{RANK}
with ranks():
    model = spread(Parameters(), {how!r})
    optimizer = optimizer_of(model)
    orthogonalise, counts = optimizer.orthogonalise, []
    optimizer.orthogonalise = lambda bank: (counts.append(len(bank)), orthogonalise(bank))[1]
    train(model, optimizer, [0])
    print(sum(counts))
"""
    launched = on_ranks(code, ranks=2).expect(0, timeout_s=40)
    assert [int(launched.output(rank).split()[-1]) for rank in range(2)] == [7, 4]


@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_bf16_travels(on_ranks: Any, how: str) -> None:
    """Rounded to bf16 before it is sent, as in one process before Newton-Schulz; sums inside the products may come in another order."""
    code = f"""{RANK}
model = Parameters()
start = [p.detach().clone() for p in model.parameters()]
alone = train(model, optimizer_of(model, ns_dtype="bf16"), range(2))
with ranks():
    model = spread(Parameters(), {how!r})
    got = train(model, optimizer_of(model, ns_dtype="bf16"), range(2))
close([a - b for a, b in zip(got, start)], [a - b for a, b in zip(alone, start)], 0.02)
"""
    on_ranks(code, ranks=2).expect(0, timeout_s=40)


@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_the_flag_keeps_a_step_out_on_every_rank(on_ranks: Any, how: str) -> None:
    code = f"""{RANK}
def bits(tensors):
    return [(t.to_local() if hasattr(t, "to_local") else t).detach().view(torch.int32).clone() for t in tensors]

with ranks():
    model = spread(Parameters(), {how!r})
    optimizer = optimizer_of(model)
    optimizer.found_inf = torch.zeros(())
    train(model, optimizer, range(2))
    parameters = list(model.parameters())
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    before = bits(parameters + buffers)
    optimizer.found_inf.fill_(1.0)
    for p in parameters:
        p.grad.mul_(float("nan"))
    optimizer.step()
    assert all(map(torch.equal, bits(parameters + buffers), before))
    optimizer.found_inf.zero_()
    got = train(model, optimizer, [2])
model = Parameters()
close(got, train(model, optimizer_of(model), range(3)))
"""
    on_ranks(code, ranks=2).expect(0, timeout_s=40)


def test_only_parameters_cut_by_rows_are_taken(on_ranks: Any) -> None:
    code = f"""{RANK}
with ranks():
    model = fully_shard(Parameters(), mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(1) if p.shape[1] % 2 == 0 else None)
    try:
        optimizer_of(model)
    except ValueError as error:
        print(error)
"""
    assert "params: all.0 is placed as (Shard(dim=1),); muon takes parameters sharded by rows only" in on_ranks(code, ranks=2).expect(0).output(1)


# ---------------------------------------------------------------- whole runs
MUON = '--optimizer=[{name="muon", ns_dtype="fp32", weight_decay=0.1}, {name="adamw", lr=1e-2}]'


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_a_run_resumed_on_other_ranks_equals_one_process(resumed_on_other_ranks: Any, how: str) -> None:
    """Rows of d_ff = 66 do not divide by four."""
    resumed, alone = resumed_on_other_ranks(how, MUON, "--model.d_ff=66")
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(resumed, alone, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "replicate"])
def test_weights_in_halves_are_made_whole_for_several_ranks(tiny: Path, zygote: Any, how: str) -> None:
    common = ["--train.micro_batch=1", "--train.precision=bf16", "--scheduler=constant", "--validation=[]", "--checkpoint.every=3"]
    form = '--optimizer=[{{name="muon", ns_dtype="fp32", weight_dtype="{}"}}, {{name="adamw"}}]'
    found = []
    for name, strategy, ranks in (("one", "none", 1), ("two", how, 2)):
        zygote.train(tiny, f"--run.name={name}", form.format("bf16"), *common, "--train.steps=3").expect(0)
        whole = [form.format("fp32"), '--checkpoint.allow_changes=["optimizer"]', f"--parallel.strategy={strategy}"]
        zygote.train(tiny, f"--run.name={name}", *whole, *common, "--train.steps=6", ranks=ranks).expect(0)
        rows = [json.loads(line) for line in (tiny.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        found.append([row["loss"] for row in rows if "loss" in row])
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-3)
