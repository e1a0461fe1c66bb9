"""What hangs on the clock of a run: priming, the end by seconds, schedules of optimizers, phases by share of the run."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from titanlm import checkpoint
from titanlm.check import check
from titanlm.config import load
from titanlm.course import horizon_of, phases_of, schedules_of
from titanlm.distributed.world import World
from titanlm.errors import TitanError
from titanlm.interrupts import Interrupted
from titanlm.progress import Progress
from titanlm.targets import open_target
from titanlm.train import Trainer

MUON = '--optimizer=[{name="muon",lr=0.02,momentum=0.95,momentum_schedule={name="ramp",start_factor=0.9,steps=10}},{name="adamw",params=["*"],lr=1e-2}]'
QAT = '--quantizer=[{name="int6",qat=true}]'


def run(config: Path, *overrides: str) -> Trainer:
    with Trainer(load(config, overrides)) as trainer:
        trainer.train()
    return trainer


def rows(config: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def losses(config: Path, name: str) -> list[float]:
    return [row["loss"] for row in rows(config, name) if "loss" in row]


def weights(config: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(config.parent / "runs" / name / "checkpoints" / f"step-{step:08d}").state["model"]


# ---------------------------------------------------------------- priming
@pytest.mark.parametrize("settings", [(), (MUON, QAT, "--qat.start_fraction=0.5", "--averager=swa"), ("--data.workers=1",)])
def test_priming_changes_nothing(tiny: Path, settings: tuple[str, ...]) -> None:
    run(tiny, "--run.name=plain", *settings)
    run(tiny, "--run.name=primed", "--train.priming_steps=2", *settings)
    assert losses(tiny, "primed") == losses(tiny, "plain")
    a, b = (checkpoint.load(tiny.parent / "runs" / name / "checkpoints" / "step-00000020") for name in ("plain", "primed"))
    for name in ("model", "averagers", "optimizers", "source_tokens"):
        torch.testing.assert_close(a.state[name], b.state[name], rtol=0, atol=0)
    assert a.state["progress"]["tokens"] == b.state["progress"]["tokens"]


def test_priming_after_a_resume_changes_nothing(tiny: Path) -> None:
    run(tiny, "--run.name=plain", "--train.steps=9", "--scheduler=constant")
    shutil.copytree(tiny.parent / "runs" / "plain", tiny.parent / "runs" / "primed")
    run(tiny, "--run.name=plain", "--scheduler=constant")
    run(tiny, "--run.name=primed", "--scheduler=constant", "--train.priming_steps=3")
    assert losses(tiny, "primed") == losses(tiny, "plain")
    a, b = (checkpoint.load(tiny.parent / "runs" / name / "checkpoints" / "step-00000020") for name in ("plain", "primed"))
    for name in ("model", "averagers", "optimizers", "interval"):
        torch.testing.assert_close(a.state[name], b.state[name], rtol=0, atol=0)
    for name in ("torch", "python"):
        assert str(a.ranks[0]["rng"][name]) == str(b.ranks[0]["rng"][name])
    assert str(a.ranks[0]["data"]) == str(b.ranks[0]["data"])


def test_priming_with_less_data_than_it_asks_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase is run all the same, at the present step, and the data is where it was."""
    overrides = ["--run.name=x", "--train.priming_steps=40", "--data.epochs=1", QAT, "--qat.start_fraction=0.5"]
    overrides += ["--train.global_batch=64", "--train.micro_batch=64"]
    with Trainer(load(tiny, overrides)) as trainer:
        seen = set()
        set_schedules = trainer._set_schedules
        monkeypatch.setattr(trainer, "_set_schedules", lambda phase: (seen.add((trainer.progress.step, phase.switches)), set_schedules(phase)))
        trainer._prime()
        assert seen == {(0, (("qat", False),)), (0, (("qat", True),))}
        assert trainer.loader.state()["row"] == 0


def test_a_loss_that_is_not_finite_while_priming_leaves_the_weights(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trainer(load(tiny, ["--run.name=x", "--train.priming_steps=4"])) as trainer:
        initial = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        step, calls = trainer.train_step, itertools.count()

        def train_step() -> None:
            if next(calls) == 2:
                with torch.no_grad():
                    next(iter(trainer.model.parameters())).fill_(torch.nan)
            step()

        monkeypatch.setattr(trainer, "train_step", train_step)
        trainer._prime()
        assert all(torch.equal(parameter, initial[name]) for name, parameter in trainer.model.named_parameters())
        trainer.guard.check()


def test_every_phase_is_primed_and_its_seconds_do_not_count(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with Trainer(load(tiny, ["--run.name=x", "--train.priming_steps=2", QAT, "--qat.start_fraction=0.5"])) as trainer:
        step = trainer.train_step
        monkeypatch.setattr(trainer, "train_step", lambda: (seen.append(trainer.phases.at(trainer.progress).switches), step())[1])
        trainer._prime()
        assert seen == [(("qat", False),)] * 2 + [(("qat", True),)] * 2
        assert trainer.meter.elapsed_s == trainer.progress.elapsed_s == 0.0
        assert trainer.progress == Progress()
        assert [start for start, _ in trainer.phases.stages] == [0, 0.5]


def test_a_signal_while_priming_leaves_the_run_as_it_was(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trainer(load(tiny, ["--run.name=x", "--train.priming_steps=3"])) as trainer:
        initial = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        step, calls = trainer.train_step, itertools.count()

        def train_step() -> None:
            step()
            if next(calls) == 1:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(trainer, "train_step", train_step)
        with pytest.raises(Interrupted):
            trainer.train()
        assert all(torch.equal(parameter, initial[name]) for name, parameter in trainer.model.named_parameters())
    saved = weights(tiny, "x", 0)
    assert all(torch.equal(saved[name], value) for name, value in initial.items())


# ---------------------------------------------------------------- the end by seconds
class Ticking:
    """A clock that gains a second with every look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_run_ends_when_its_seconds_are_over(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "--run.name=timed",
        "--train.max_wallclock_s=1000.0",
        "--train.steps=400",
        "--train.log_every=100",
        '--scheduler={name="warmdown",warmdown_steps=8}',
    ]
    with Trainer(load(tiny, overrides)) as trainer:
        clock = Ticking()
        trainer.meter._clock = lambda: clock() * 50  # 50 s a step
        factors = []
        set_schedules = trainer._set_schedules
        trainer._set_schedules = lambda phase: (set_schedules(phase), factors.append(trainer.optimizers[0].param_groups[0]["lr"] / 1e-2))[0]  # type: ignore[method-assign]
        trainer.train()
        n = trainer.progress.step
    assert 10 <= n <= 20
    assert trainer.progress.elapsed_s >= 1000.0
    assert factors[0] == 1.0
    assert factors[-1] < 0.3
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors))
    said = capsys.readouterr().out
    assert f"1000 s of training are over (train.max_wallclock_s): it ends at step {n} of 400" in said
    assert weights(tiny, "timed", n)
    scored = [row for row in rows(tiny, "timed") if any(key.startswith("validation/") for key in row)]
    assert scored[-1]["step"] == n
    run(tiny, *overrides)
    assert "the 1000 s of train.max_wallclock_s are used up; raise it to go on" in capsys.readouterr().out


# ---------------------------------------------------------------- schedules
def test_momentum_follows_its_schedule_and_is_the_configs_again_after_a_resume(tiny: Path) -> None:
    def momenta(name: str, *overrides: str) -> list[float]:
        seen = []
        with Trainer(load(tiny, [f"--run.name={name}", MUON, "--scheduler=constant", *overrides])) as trainer:
            set_schedules = trainer._set_schedules
            trainer._set_schedules = lambda phase: (set_schedules(phase), seen.append(trainer.optimizers[0].param_groups[0]["momentum"]))[0]  # type: ignore[method-assign]
            trainer.train()
        return seen

    expected = [0.95 * (0.9 + 0.1 * min(1.0, step / 10)) for step in range(20)]
    assert momenta("straight") == pytest.approx(expected, rel=1e-12)
    assert momenta("resumed", "--train.steps=5") + momenta("resumed") == pytest.approx(expected, rel=1e-12)
    a, b = weights(tiny, "straight", 20), weights(tiny, "resumed", 20)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_schedule_that_cannot_be_is_found_before_the_run(tiny: Path) -> None:
    report = check(load(tiny, ['--optimizer=[{name="adamw",weight_decay_schedule={name="constant",warmup_steps=99}}]']))
    assert report.problems == ["optimizer.0.weight_decay_schedule.warmup_steps: warmup_steps 99 exceed train.steps = 20"]


def test_only_settings_that_hold_a_scheduler_are_schedules(tiny: Path) -> None:
    config = load(tiny)
    outside = SimpleNamespace(config=SimpleNamespace(lr=1.0, decay_schedule="cosine", momentum_schedule=config.scheduler, weight_decay_schedule=None))
    assert list(schedules_of(config, outside)) == ["lr", "momentum"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["--train.max_wallclock_s=60.0", "--train.compile=block", "--scheduler=constant"], "compiling counts as training"),
        (["--train.max_wallclock_s=60.0"], "'cosine' goes by train.steps"),
        (["--averager=swa"], "no multiple of 50 steps"),
        (['--scheduler={name="warmdown",warmdown_steps=100}'], "its factor never exceeds 0.2 in 20 steps"),
    ],
)
def test_what_will_surprise_is_said_before(tiny: Path, overrides: list[str], word: str) -> None:
    assert [word in warning for warning in check(load(tiny, overrides)).warnings].count(True) == 1
    assert not any(word in warning for warning in check(load(tiny)).warnings)


# ---------------------------------------------------------------- quantization-aware training
def test_phases_of_quantization_aware_training(tiny: Path) -> None:
    def switches(*overrides: str) -> list[tuple[float, bool]]:
        config = load(tiny, overrides)
        return [(start, dict(phase.switches).get("qat", False)) for start, phase in phases_of(config, World(), horizon_of(config)).stages]

    assert switches("--quantizer=int6") == [(0, False)]
    assert switches(QAT) == [(0, True)]
    assert switches(QAT, "--qat.start_fraction=0.75") == [(0, False), (0.75, True)]
    assert "so no weight is rounded" in check(load(tiny, ["--qat.start_fraction=0.5"])).warnings[0]


def test_late_rounding_changes_the_run_from_its_start_on_and_is_what_is_scored(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny, "--run.name=raw", "--quantizer=int6")
    late = (QAT.replace("int6", "int5"), "--qat.start_fraction=0.5")
    run(tiny, "--run.name=late", *late)
    raw, rounded = losses(tiny, "raw"), losses(tiny, "late")
    assert raw[:10] == rounded[:10]
    assert raw[10] != rounded[10]
    run(tiny, "--run.name=resumed", *late, "--train.steps=20", "--checkpoint.every=13")
    (tiny.parent / "runs" / "resumed" / "checkpoints" / "step-00000020").rename(tiny.parent / "gone")
    run(tiny, "--run.name=resumed", *late, "--checkpoint.every=13")
    assert losses(tiny, "resumed") == rounded
    said = capsys.readouterr().out
    assert said.count("from step 11 on: qat True") == 2  # the run that was resumed behind it has entered nothing anew
    target = open_target(tiny.parent / "runs" / "late", averaged=False)
    assert all(module.qat for module in target.module.modules() if hasattr(module, "qat"))


def test_a_quantizer_without_a_place_in_the_model_is_named(tiny: Path) -> None:
    problems = check(load(tiny, ['--quantizer=[{name="int6",qat=true,params=["*"]}]'])).problems
    assert problems
    assert all("norm" in problem and "does not round its weight in training" in problem for problem in problems)


def test_an_optimizer_without_that_setting_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import titanlm.train as module

    monkeypatch.setattr(module, "schedules_of", lambda config, entry: {"lr": config.scheduler, "tilt": config.scheduler})
    with pytest.raises(TitanError, match="AdamW keeps no 'tilt' in its groups, which tilt_schedule could change"):
        Trainer(load(tiny, ["--run.name=x"]))


def test_samples_are_of_the_phase_that_holds(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=x", QAT, "--qat.start_fraction=0.1", "--validation=[]", "--train.sample_prompt=a"])) as trainer:
        trainer.train_step()
        trainer.train_step()
        rounding = [module for module in trainer.model.modules() if hasattr(module, "qat")]
        assert rounding
        assert not any(module.qat for module in rounding)
        trainer.sample()
        assert all(module.qat for module in rounding)


def test_winding_back_does_not_give_time_back(tiny: Path) -> None:
    with Trainer(load(tiny, ["--run.name=x", "--spike.sigmas=3.0"])) as trainer:
        trainer.meter.start()
        for _ in range(3):
            trainer.train_step()
        trainer.save(wait=True)
        saved = trainer.progress
        for _ in range(3):
            trainer.train_step()
        lost = trainer.progress.elapsed_s
        trainer._roll_back(trainer.progress.step)
        assert trainer.progress.step == saved.step
        assert trainer.progress.elapsed_s == lost > saved.elapsed_s
        assert trainer.meter.elapsed_s >= lost


@pytest.fixture
def eight_graphs() -> Iterator[None]:
    """torch's own limit, put back afterwards: monkeypatch would delete the setting, which hides it from torch."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("eight_graphs")
def test_every_shape_mode_and_phase_of_differing_blocks_gets_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eighteen graphs of one code object, where torch by itself allows eight."""
    from titanlm.batch import Batch
    from titanlm.distributed.compile import compile_module
    from titanlm.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
    from titanlm.models.golf import Golf, GolfConfig
    from titanlm.progress import Phase, enter
    from titanlm.registry import Component
    from titanlm.train_module import TrainModule

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = Golf(GolfConfig(n_layers=5, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, exclusive_last=2), vocab_size=32, max_seq_len=8)
    Component.named("quantizer", "int6", qat=True).build().prepare(model, [name for name, role in model.parameter_roles().items() if role == "matrix"])
    model.init_weights(0)
    module = TrainModule(model, CrossEntropy(CrossEntropyConfig()))
    compile_module(module, "block")

    def loss(seq_len: int) -> torch.Tensor:
        tokens = torch.arange(seq_len).expand(2, -1) % 32
        ones = torch.ones_like(tokens)
        return module(Batch(tokens, ones, torch.arange(seq_len).expand(2, -1), ones, ones, document_mask=False))[0].loss

    for on in (False, True):
        enter(Phase(8, 2, 1, switches=(("qat", on),)), model)
        loss(8).backward()
        with torch.no_grad():
            assert torch.isfinite(loss(12) + loss(16))
