"""benchmarks/step.py, startup.py and alternate.py run; what they time is not looked at, only that it fits together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--model.n_layers=1", "--model.d_model=16", "--model.d_ff=16", "--model.n_heads=2", "--model.n_kv_heads=1"]
SMALL += ["--train.seq_len=16", "--train.global_batch=2", "--train.micro_batch=1"]


def started(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def test_a_step_and_its_kernels() -> None:
    done = started("step", "train_configs/debug.toml", "--warm-up", "1", "--steps", "3", "--profile", "4", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tokens_per_step"], found["steps"], found["overrides"]) == (32, 3, SMALL)
    assert found["tokens_per_s"] * found["step_s"] == pytest.approx(32)
    # One layer: 6 (4·d² · 3/4 + 3·d·ff + V·d) and 12·d·T of attention, of which causal counts half.
    matrices = 6 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 16 + 257 * 16)
    attention = 12 * 16 * 16
    assert found["flops_per_s"] * found["step_s"] / 32 == pytest.approx(matrices + attention)
    assert found["causal_flops_per_s"] * found["step_s"] / 32 == pytest.approx(matrices + attention / 2)
    assert found["peak_flops"] is None
    assert 0 <= found["stall"] <= 1
    times = [seconds for _, seconds in found["kernels"].values()]
    assert times == sorted(times, reverse=True)
    assert any("mm" in name for name in found["kernels"])


@pytest.mark.slow
def test_text_and_what_is_no_override() -> None:
    done = started("step", "train_configs/debug.toml", "--warm-up", "0", "--steps", "2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step +[\d.]+ ms, quartiles [\d.]+ ms apart", done.stdout, re.MULTILINE)
    assert started("step", "train_configs/debug.toml", "--profiles=3").returncode == 2
    wrong = started("step", "train_configs/debug.toml", "--train.seqlen=3")
    assert wrong.returncode == 2
    assert "train.seqlen" in wrong.stderr


@pytest.mark.slow
def test_a_stage_of_a_curriculum() -> None:
    stages = "--curriculum=[{start_step=0,seq_len=8,batch=4},{start_step=2,seq_len=16,batch=1,accumulation=2}]"
    done = started("step", "train_configs/debug.toml", "--warm-up", "0", "--steps", "2", "--stage", "2", *SMALL, stages)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^stage 2, torch .* 32 tokens a step", done.stdout, re.MULTILINE)
    wrong = started("step", "train_configs/debug.toml", "--stage", "3", *SMALL, stages)
    assert (wrong.returncode, wrong.stderr) == (2, "--stage: 3, and the curriculum has 2\n")


def test_two_commands_in_turn(tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text("import sys; print('1 ms'); print(sys.argv[1], 'ms')")
    a, b = (f"{sys.executable} {tmp_path}/says.py {number}" for number in (4, 10))
    done = started("alternate", "--a", a, "--b", b, "--find-a", r"([\d.]+) ms", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    *rounds, last = done.stdout.splitlines()
    assert [line.split(":")[1].split("(")[0].strip() for line in rounds] == ["a 4", "b 10"] * 3
    assert last == "a 4, b 10: b / a = 2.5000, a / b = 0.4000"
    scaled = started("alternate", "--a", a, "--b", b, "--find-a", r"([\d.]+) ms", "--rounds", "1", "--scale-b", "0.1")
    assert scaled.stdout.splitlines()[-1] == "a 4, b 1: b / a = 0.2500, a / b = 4.0000"
    for words, why in (
        (["--find-a", "ms"], "one group"),
        (["--find-a", r"(\d+) s\b"], "printed nothing that"),
        (["--find-a", r"(\d+) ms", "--a", f"{sys.executable} -c 'raise SystemExit(3)'"], "ended with status 3"),
        (["--find-a", r"(\d+) ms", "--a", "no-such-program"], "No such file"),
    ):
        done = started("alternate", "--a", a, "--b", b, *words)
        assert done.returncode
        assert why in done.stderr


@pytest.mark.slow
def test_cold_and_warm_start() -> None:
    done = started("startup", "train_configs/debug.toml", "--json", *SMALL, "--train.compile=block", "--train.device=cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cold"]["compiled"] > 0
    assert found["warm"]["compiled"] == 0
    assert min(found[side][name] for side in ("cold", "warm") for name in ("built_s", "first_step_s", "cache_bytes")) > 0 or not found["warm"]["cache_bytes"]
    assert started("startup", "train_configs/debug.toml", "--rounds", "0").returncode == 2


@pytest.mark.slow
def test_a_start_that_compiles_nothing_or_fails() -> None:
    done = started("startup", "train_configs/debug.toml", *SMALL, "--train.compile=none")
    assert done.returncode
    assert "nothing is compiled: give --train.compile=block" in done.stderr
    done = started("startup", "train_configs/debug.toml", "--train.seqlen=3")
    assert done.returncode
    assert "train.seqlen: unknown key" in done.stderr
