"""The golf model with everything on, and its clock, on several ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

GOLF = (
    '--model={name="golf",n_layers=3,d_model=32,n_heads=4,n_kv_heads=2,d_ff=64,exclusive_last=1,smear_gate="masked",bigram_buckets=64,bigram_dim=8,'
    'rope={reference_tokens=32},init="orthogonal",output="mup"}',
    '--optimizer=[{name="adamw",params=["@embedding"],lr=0.01},'
    '{name="muon",params=["@matrix"],lr=0.01,weight_decay=0.1,ns_dtype="fp32",momentum_schedule={name="ramp",start_factor=0.9,steps=10}},'
    '{name="adamw",params=["*"],lr=0.01}]',
    '--quantizer=[{name="int5",params=["blocks.*.feed_forward.*"],qat=true},{name="int8",params=["@matrix","@embedding"],qat=true}]',
    "--qat.start_fraction=0.5",
    '--scheduler={name="warmdown",warmdown_fraction=0.5}',
    '--averager={name="swa",start_fraction=0.25,every=2}',
    '--validation=[{max_tokens=2000,seq_len=64,packer={name="sliding",stride=16}}]',
    "--train.micro_batch=1",
    "--train.steps=8",
    "--train.priming_steps=1",
)


def logged(run: Path, name: str) -> list[float]:
    return [row[name] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, ("--parallel.strategy=replicate",)),
        (4, ("--parallel.strategy=replicate",)),
        (2, ("--parallel.strategy=fsdp2",)),
        (4, ("--parallel.strategy=fsdp2",)),
        (4, ("--parallel.strategy=hsdp", "--parallel.shards=2")),
    ],
    ids=lambda value: value[0].rpartition("=")[2] if isinstance(value, tuple) else str(value),
)
def test_several_ranks_train_what_one_does(tiny: Path, zygote: Any, ranks: int, strategy: tuple[str, ...]) -> None:
    zygote.train(tiny, "--run.name=one", *GOLF).expect(0)
    zygote.train(tiny, "--run.name=several", *GOLF, *strategy, ranks=ranks).expect(0)
    one, several = tiny.parent / "runs" / "one", tiny.parent / "runs" / "several"
    for name in ("loss", "validation/validation/bits_per_byte", "validation/validation/averaged_bits_per_byte"):
        a, b = logged(one, name), logged(several, name)
        assert len(a) == len(b) > 0
        assert all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a, b, strict=True)), name


def test_ranks_end_together_when_the_seconds_are_over(tiny: Path, zygote: Any) -> None:
    overrides = ("--train.max_wallclock_s=0.3", "--train.steps=100000", '--scheduler={name="warmdown",warmdown_fraction=0.5}', "--checkpoint.every=0")
    zygote.train(tiny, "--run.name=timed", "--parallel.strategy=replicate", *overrides, ranks=2).expect(0)
    (folder,) = (tiny.parent / "runs" / "timed" / "checkpoints").glob("step-*")
    steps = int(folder.name.removeprefix("step-"))
    assert 0 < steps < 100_000
    assert logged(tiny.parent / "runs" / "timed", "step")[-1] == steps


@pytest.mark.slow
def test_eval_shares_out_the_batches(tiny: Path, zygote: Any) -> None:
    zygote.train(tiny, "--run.name=one", *GOLF).expect(0)
    command = ["-m", "titanlm", "eval", str(tiny.parent / "runs" / "one"), "--json"]
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=True)
    shared = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command], capture_output=True, text=True, timeout=300
    )
    assert shared.returncode == 0, shared.stderr
    a, b = json.loads(alone.stdout)["validation"]["validation"], json.loads(shared.stdout)["validation"]["validation"]
    compiled = subprocess.run([sys.executable, *command, "--compile", "--train.compile=block"], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(compiled.stdout)["validation"]["validation"]["loss"] == pytest.approx(a["loss"], rel=1e-5)
    refused = subprocess.run([sys.executable, *command, "--compile"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "say how with --train.compile=block" in refused.stderr
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    assert (b["tokens"], b["bytes"]) == (a["tokens"], a["bytes"])
