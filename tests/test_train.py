"""The loop: learning, exact resume, interrupts, non-finite steps, memory, and what must not change anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm import checkpoint
from titanlm.clipping import clip_gradients
from titanlm.config import load
from titanlm.device import choose_device
from titanlm.errors import CheckpointError, ConfigError, NonFiniteError, TitanError
from titanlm.interrupts import Interrupted
from titanlm.progress import Phases
from titanlm.resume import RESUMABLE
from titanlm.train import Trainer


def run(config_path: Path, *overrides: str) -> Trainer:
    with Trainer(load(config_path, overrides)) as trainer:
        trainer.train()
    return trainer


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def state_of(run_dir: Path, step: int = 20) -> dict:
    saved = checkpoint.load(run_dir / "checkpoints" / f"step-{step:08d}")
    return {**saved.state, "ranks": saved.ranks}


def assert_same_state(a: dict, b: dict, path: str = "") -> None:
    """Bit for bit, but for the wall clock."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "elapsed_s":
                assert_same_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif hasattr(a, "dtype"):
        assert a.dtype == b.dtype, path
        assert (a == b).all(), path
    else:
        assert a == b, path


@pytest.fixture
def straight(tiny: Path) -> Path:
    run(tiny, "--run.name=straight")
    return tiny.parent / "runs" / "straight"


def test_loss_falls_and_starts_at_the_uniform(straight: Path) -> None:
    values = losses(straight)
    assert len(values) == 20
    assert values[0] == pytest.approx(torch.log(torch.tensor(257.0)).item(), abs=0.15)
    assert values[-1] < 0.75 * values[0]


def test_killed_after_seven_steps_and_resumed_is_bitwise_equal(tiny: Path, straight: Path) -> None:
    """7 + kill −9 + 13 equals 20: losses, weights, moments, average, RNG, cursors and buffers."""
    script = (
        "import os, signal, sys\n"
        "from titanlm.config import load\n"
        "from titanlm.train import Trainer\n"
        "trainer = Trainer(load(sys.argv[1], ['--run.name=killed']))\n"
        "save = trainer.save\n"
        "trainer.save = lambda: (save(wait=True), os.kill(os.getpid(), signal.SIGKILL))\n"
        "trainer.train()\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tiny)], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    killed = straight.with_name("killed")
    assert [step for step, _ in checkpoint.steps(killed / "checkpoints")] == [7]
    buffers = state_of(killed, 7)["ranks"][0]["data"]["streams"]
    assert any(len(json.dumps(stream["packer"], default=str)) > 20 for stream in buffers.values()), "no packing buffer was in play"
    run(tiny, "--run.name=killed")
    assert losses(killed) == losses(straight)
    assert_same_state(state_of(straight), state_of(killed))


@pytest.mark.slow
def test_five_resumes_in_a_row(tiny: Path, straight: Path) -> None:
    for steps in (3, 4, 5, 9, 20):
        run(tiny, "--run.name=often", f"--train.steps={steps}", "--scheduler=constant")
    run(tiny, "--run.name=once", "--scheduler=constant")
    often, once = straight.with_name("often"), straight.with_name("once")
    assert losses(often) == losses(once)
    assert_same_state(state_of(often)["model"], state_of(once)["model"])


def test_resume_between_log_steps_keeps_the_interval(tiny: Path) -> None:
    run(tiny, "--run.name=a", "--train.log_every=5")
    run(tiny, "--run.name=b", "--train.log_every=5", "--train.steps=7", "--scheduler=constant")
    run(tiny, "--run.name=c", "--train.log_every=5", "--scheduler=constant")
    run(tiny, "--run.name=b", "--train.log_every=5", "--scheduler=constant")
    b, c = tiny.parent / "runs" / "b", tiny.parent / "runs" / "c"
    rows = {row["step"]: row for row in map(json.loads, (b / "metrics.jsonl").read_text().splitlines()) if "loss" in row}
    expected = {row["step"]: row for row in map(json.loads, (c / "metrics.jsonl").read_text().splitlines()) if "loss" in row}
    assert rows[15]["loss"] == expected[15]["loss"]
    assert rows[20]["loss"] == expected[20]["loss"]


def test_accumulation_does_not_change_the_loss(tiny: Path) -> None:
    run(tiny, "--run.name=two", "--train.steps=5", "--train.micro_batch=4")
    run(tiny, "--run.name=one", "--train.steps=5", "--train.micro_batch=8")
    run(tiny, "--run.name=eight", "--train.steps=5", "--train.micro_batch=1")
    root = tiny.parent / "runs"
    assert losses(root / "two") == pytest.approx(losses(root / "one"), rel=1e-5)
    assert losses(root / "eight") == pytest.approx(losses(root / "one"), rel=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_does_not_change_the_loss(tiny: Path, straight: Path, mode: str) -> None:
    run(tiny, f"--run.name={mode}", f"--train.activation_checkpointing={mode}")
    assert losses(straight.with_name(mode)) == losses(straight)


def test_validation_prefetch_and_sampling_do_not_touch_training(tiny: Path, straight: Path) -> None:
    run(tiny, "--run.name=busy", "--train.validate_every=1", "--train.sample_every=3", "--data.prefetch=0", "--checkpoint.every=0")
    assert losses(straight.with_name("busy")) == losses(straight)


def test_bf16_computes_in_bf16_and_keeps_fp32_masters(tiny: Path) -> None:
    trainer = run(tiny, "--run.name=bf16", "--train.precision=bf16")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(value.dtype == torch.float32 for state in trainer.optimizers[0].state.values() for value in state.values())
    batch = trainer.loader  # closed; the dtype of activations is what TrainModule checks at every forward pass
    assert batch is not None
    assert trainer.module.compute_dtype == torch.bfloat16
    values = losses(tiny.parent / "runs" / "bf16")
    assert values[-1] < 0.75 * values[0]


def test_loss_chunks_do_not_change_the_loss(tiny: Path, straight: Path) -> None:
    run(tiny, "--run.name=whole", "--train.steps=5", "--loss.chunk_tokens=0")
    run(tiny, "--run.name=chunks", "--train.steps=5", "--loss.chunk_tokens=50")
    assert losses(straight.with_name("chunks")) == pytest.approx(losses(straight.with_name("whole")), rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_of_accumulation(tiny: Path, straight: Path, number: signal.Signals) -> None:
    """The signal comes between two micro-batches: that step is abandoned, and the resumed run is bitwise the straight one."""
    with Trainer(load(tiny, [f"--run.name={number.name}"])) as trainer:
        forward, calls = trainer.module.forward, []

        def counted(batch):
            calls.append(None)
            if len(calls) == 2 * 9 + 1:  # first micro-batch of the tenth step
                os.kill(os.getpid(), number)
            return forward(batch)

        trainer.module.forward = counted
        with pytest.raises(Interrupted):
            trainer.train()
        assert trainer.progress.step == 9
    run(tiny, f"--run.name={number.name}")
    interrupted = straight.with_name(number.name)
    assert losses(interrupted) == losses(straight)
    assert_same_state(state_of(straight), state_of(interrupted))


@pytest.mark.slow
def test_command_exits_130_on_ctrl_c_and_resumes(tiny: Path) -> None:
    command = [sys.executable, "-m", "titanlm", "train", str(tiny), "--run.name=cli", "--train.steps=100000", "--checkpoint.every=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tiny.parent / "runs" / "cli" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "start again to go on from there" in output
    ((step, _),) = checkpoint.steps(metrics.parent / "checkpoints")
    again = subprocess.run([*command[:-2], f"--train.steps={step + 2}"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"(step {step}," in again.stdout + again.stderr


def test_non_finite_loss_stops_before_the_update(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=poisoned", "--train.log_every=4", "--checkpoint.every=2"])) as trainer:
        forward, calls = trainer.module.forward, []

        def poisoned(batch):
            sums, aux = forward(batch)
            calls.append(None)
            if len(calls) == 2 * 2 + 1:  # in the third step
                weights.update({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
                moments.extend(value.clone() for state in trainer.optimizers[0].state.values() for value in state.values())
                sums = sums._replace(loss=sums.loss * float("nan"))
            return sums, aux

        weights: dict[str, torch.Tensor] = {}
        moments: list[torch.Tensor] = []
        trainer.module.forward = poisoned
        with pytest.raises(NonFiniteError, match=r"step 3: .*Documents of the step: \d"):
            trainer.train()
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        after = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert [step for step, _ in checkpoint.steps(tiny.parent / "runs" / "poisoned" / "checkpoints")] == [2]


def test_out_of_memory_names_the_three_settings(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=oom"])) as trainer:

        def full(batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

        trainer.module.forward = full
        with pytest.raises(TitanError, match=r"(?s)micro_batch.*activation_checkpointing.*chunk_tokens"):
            trainer.train()


def test_cpu_out_of_memory_in_torchs_own_words(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=oom"])) as trainer:
        trainer.module.forward = lambda batch: torch.empty(2**60)
        with pytest.raises(TitanError, match=r"(?s)micro_batch.*activation_checkpointing.*chunk_tokens"):
            trainer.train()


def test_signal_during_validation_ends_it_and_the_next_start_makes_up_for_it(tiny: Path, monkeypatch) -> None:
    import titanlm.evaluate

    rows = titanlm.evaluate.ValidationSet.rows

    def interrupting(entry):
        for index, row in enumerate(rows(entry)):
            if index == entry.micro_batch:
                os.kill(os.getpid(), signal.SIGTERM)
            yield row

    monkeypatch.setattr(titanlm.evaluate.ValidationSet, "rows", interrupting)
    with Trainer(load(tiny, ["--run.name=v", "--train.steps=3", "--scheduler=constant"])) as trainer:
        with pytest.raises(Interrupted):
            trainer.train()
        assert trainer.progress.step == 3
    monkeypatch.undo()
    metrics = tiny.parent / "runs" / "v" / "metrics.jsonl"
    assert "validation" not in metrics.read_text()
    for _ in range(2):
        run(tiny, "--run.name=v", "--train.steps=3", "--scheduler=constant")
        assert metrics.read_text().count("validation/validation/loss") == 1


def test_buffers_counted_in_an_abandoned_step_are_taken_back(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=buffer"])) as trainer:
        buffer = torch.zeros(())
        trainer.model.register_buffer("load", buffer)
        trainer.own_buffers = {"load": buffer}
        trainer._complete()
        forward, calls = trainer.module.forward, []

        def counted(batch):
            buffer.add_(1)
            calls.append(None)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return forward(batch)

        trainer.module.forward = counted
        with pytest.raises(Interrupted):
            trainer.train()
        assert trainer.progress.step == 1
        assert buffer == 2


def test_a_full_disk_in_the_middle_does_not_end_the_run(tiny: Path, monkeypatch, capsys) -> None:
    publish, calls = checkpoint.publish, []

    def full(root, step, *arguments, **keywords):
        calls.append(step)
        if step == 7:
            raise CheckpointError("No space left on device")
        return publish(root, step, *arguments, **keywords)

    monkeypatch.setattr(checkpoint, "publish", full)
    run(tiny, "--run.name=full")
    assert calls == [7, 14, 20]
    assert "training goes on without it" in capsys.readouterr().out


def test_phase_switches_reach_the_modules_that_have_them(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=switch"])) as trainer:
        block = trainer.model.blocks[0]
        block.qat = False
        phase = replace(trainer.phases.stages[0][1], switches=(("qat", True),))
        trainer.phases = Phases([(0, trainer.phases.stages[0][1]), (2, phase)])
        trainer.train_step()
        trainer.train_step()
        assert block.qat is False
        trainer.train_step()
        assert block.qat is True


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_inside_compiled_blocks(tiny: Path, mode: str) -> None:
    """With the compiler's tracing but not its code generation, which takes long on a CPU."""
    with Trainer(load(tiny, [f"--run.name={mode}", f"--train.activation_checkpointing={mode}"])) as trainer:
        torch._dynamo.reset()
        for block in trainer.model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
        trainer.train_step()


def test_changed_settings_on_resume(tiny: Path) -> None:
    run(tiny, "--run.name=x", "--train.steps=3", "--scheduler=constant")
    with pytest.raises(CheckpointError, match=r"(?s)optimizer\.0\.lr: 0\.01 → 0\.5"):
        run(tiny, "--run.name=x", "--optimizer.0.lr=0.5", "--scheduler=constant")
    with pytest.raises(CheckpointError, match=r"resume is 'never'"):
        run(tiny, "--run.name=x", "--checkpoint.resume=never", "--scheduler=constant")
    stored = (tiny.parent / "runs" / "x" / "config.toml").read_text()
    assert "lr = 0.01" in stored, "a refused resume must not replace the run's config"
    assert "train.steps" in RESUMABLE
    run(tiny, "--run.name=x", "--train.steps=4", "--scheduler=constant")
    assert len(losses(tiny.parent / "runs" / "x")) == 4


def test_a8_too_little_room_is_said_at_the_start(tiny: Path, monkeypatch, capsys) -> None:
    import shutil

    usage = shutil.disk_usage(tiny.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    run(tiny, "--run.name=x", "--train.steps=1", "--scheduler=constant", "--checkpoint.every=0", "--validation=[]")
    assert "0.0 GiB are free, and checkpoint.keep_last = 10 and one being written take about" in capsys.readouterr().out


def test_changed_data_on_resume(tiny: Path, corpus: Path) -> None:
    run(tiny, "--run.name=d", "--train.steps=3", "--scheduler=constant")
    corpus.write_text(corpus.read_text() + "\n\none more paragraph")
    with pytest.raises(CheckpointError, match="dataset changed"):
        run(tiny, "--run.name=d", "--scheduler=constant")


def test_damaged_checkpoint_is_passed_over(tiny: Path, straight: Path, capsys) -> None:
    run(tiny, "--run.name=damaged", "--train.steps=14", "--scheduler=constant")
    damaged = straight.with_name("damaged")
    file = damaged / "checkpoints" / "step-00000014" / "model-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run(tiny, "--run.name=damaged", "--scheduler=constant")
    assert "model-00000.safetensors (part of rank 0) is damaged" in capsys.readouterr().err
    run(tiny, "--run.name=sound", "--scheduler=constant")
    assert losses(damaged) == losses(straight.with_name("sound"))


def test_finished_run_says_so(tiny: Path, straight: Path, capsys) -> None:
    run(tiny, "--run.name=straight")
    assert "already at step 20" in capsys.readouterr().out
    assert len(losses(straight)) == 20


def test_profile_window(tiny: Path) -> None:
    run(tiny, "--run.name=p", "--train.steps=5", "--profile.start=2", "--profile.steps=2", "--scheduler=constant")
    trace = tiny.parent / "runs" / "p" / "profile" / "steps-2-3.json"
    assert "traceEvents" in json.loads(trace.read_text())


def test_gradient_norm_before_clipping_and_clipped() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0) == pytest.approx(5.0)
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]), atol=1e-4)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], None) == pytest.approx(5.0)
    assert torch.equal(parameter.grad, torch.tensor([3.0, 4.0]))


def test_more_processes_than_one_are_refused(tiny: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="there are 2; use 'replicate'"):
        Trainer(load(tiny))


def test_absent_cuda_is_an_error() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(TitanError, match="titanlm env"):
            choose_device("cuda")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "mode"), [("fsdp2", "block"), ("fsdp2", "model"), ("replicate", "model")])
def test_compiled_ranks_agree_with_one_process(tiny: Path, zygote: Any, strategy: str, mode: str) -> None:
    common = ["--train.steps=4", "--scheduler=constant", "--train.activation_checkpointing=selective"]
    zygote.train(tiny, "--run.name=one", *common).expect(0)
    zygote.train(tiny, "--run.name=two", f"--parallel.strategy={strategy}", f"--train.compile={mode}", *common, ranks=2).expect(0, timeout_s=280)
    assert losses(tiny.parent / "runs" / "two") == pytest.approx(losses(tiny.parent / "runs" / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "model"])
def test_compiled_losses_agree(tiny: Path, straight: Path, mode: str) -> None:
    run(tiny, f"--run.name={mode}", f"--train.compile={mode}", "--train.steps=5", "--scheduler=constant")
    run(tiny, "--run.name=eager", "--train.steps=5", "--scheduler=constant")
    assert losses(straight.with_name(mode)) == pytest.approx(losses(straight.with_name("eager")), rel=1e-5)


def test_without_a_c_compiler_it_says_so_and_trains(tiny: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("titanlm.distributed.compile.cxx_compiler", lambda: None)
    run(tiny, "--run.name=nocc", "--train.compile=block", "--train.steps=2", "--scheduler=constant")
    assert "training runs uncompiled" in capsys.readouterr().err
