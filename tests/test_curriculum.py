"""A curriculum: its stages against plain Python, training through them, resuming inside them, and the data that carries over."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from titanlm import checkpoint, cli
from titanlm import train as trainer_module
from titanlm.batch import IGNORE
from titanlm.check import check
from titanlm.config import dump, load, loads
from titanlm.course import flops_left, horizon_of, legs_of, phases_of
from titanlm.curricula.stage import Stage
from titanlm.data import Loader, merge_states
from titanlm.datasets.mixture import Source
from titanlm.distributed.world import World
from titanlm.epochs import epoch_of, read_again
from titanlm.errors import CheckpointError, ConfigError
from titanlm.progress import Phase, Progress
from titanlm.recipe_plan import Layout, _rows, _Training, planned_model
from titanlm.registry import Component, known
from titanlm.stream import streams_of
from titanlm.train import Trainer
from titanlm.tuned import TUNED

STAGES = (
    "--curriculum=[{start_step=0,seq_len=16,batch=6,lr_multiplier=0.5,clip=0.3},"
    "{start_step=3,seq_len=24,batch=2,accumulation=3,lr_multiplier=2.0,rewarmup_steps=2},{start_step=6,batch=4,clip=0.0}]"
)
COMMON = (STAGES, "--train.steps=9", "--validation=[]", "--checkpoint.every=0")


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def train(config: Path, *overrides: str) -> list[float]:
    with Trainer(load(config, overrides)) as trainer:
        trainer.train()
    return losses(trainer.folder.path)


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Bit for bit, but for the wall clock."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
    if isinstance(a, dict | list):
        keys = [key for key in a if key != "elapsed_s"] if isinstance(a, dict) else range(max(len(a), len(b)))
        for key in keys:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert np.array_equal(a, b), path


def phases(config: Path, *overrides: str, ranks: int = 1) -> list[tuple[Any, Phase]]:
    settings = load(config, overrides)
    return list(phases_of(settings, World(size=ranks), horizon_of(settings)).stages)


# ---------------------------------------------------------------- what the stages are
TABLES = {
    "curriculum6": {
        "start_step": (0, 3000, 6000, 10000, 15000, 25000),
        "seq_len": (128, 256, 512, 768, 1024, 2048),
        "batch": (8, 4, 2, 2, 1, 1),
        "accumulation": (32,) * 6,
        "lr_multiplier": (2, 1.5, 1.2, 1, 0.8, 0.5),
        "clip": (1, 0.8, 0.5, 0.4, 0.3, 0.3),
        "rewarmup_steps": (500, 300, 200, 100, 100, 100),
    },
    "curriculum10": {
        "start_step": (0, 2000, 5000, 10000, 20000, 35000, 55000, 80000, 110000, 140000),
        "seq_len": (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048),
        "batch": (8192, 8192, 4096, 2048, 1024, 512, 256, 256, 128, 64),
        "accumulation": (1,) * 10,
        "lr_multiplier": (0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.95, 1, 1, 1),
        "clip": (0.5, 0.5, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1),
        "rewarmup_steps": (0,) * 10,
    },
}
"""Column by column, as published."""


@pytest.mark.parametrize("name", TABLES)
def test_named_curricula_are_what_was_published(name: str) -> None:
    stages = Component.named("curriculum", name).build()
    assert {key: tuple(getattr(stage, key) for stage in stages) for key in TABLES[name]} == TABLES[name]
    assert set(TABLES[name]) == set(Stage.__dataclass_fields__)
    assert name in known("curriculum")


def test_tokens_of_the_named_curricula(tiny: Path) -> None:
    """The sums of the published tables: 98.3 + 98.3 + 131.1 + 245.8 + 327.7 = 901 million, and 30.0 billion."""
    six = legs_of(load(tiny, ["--curriculum=curriculum6", "--train.steps=26_000"]))
    assert [leg.tokens for leg in six] == [98_304_000, 98_304_000, 131_072_000, 245_760_000, 327_680_000, 65_536_000]
    assert sum(leg.tokens for leg in six[:5]) == 901_120_000
    ten = legs_of(load(tiny, ["--curriculum=curriculum10", "--train.steps=200_000"]))
    assert round(sum(leg.tokens for leg in ten) / 1e9, 1) == 30.0
    assert sum(leg.steps for leg in ten) == 200_000
    assert [leg.rows for leg in six] == [256, 128, 64, 64, 32, 32]


def test_a_config_has_tables_names_or_both(tiny: Path) -> None:
    text = tiny.read_text()
    two = tiny.with_name("two.toml")
    two.write_text(text + '[[curriculum]]\nname = "curriculum6"\n[[curriculum]]\nstart_step = 30_000\nseq_len = 4096\n')
    config = load(two, ["--train.steps=40_000", "--curriculum.1.batch=2"])
    assert [leg.seq_len for leg in legs_of(config)] == [128, 256, 512, 768, 1024, 2048, 4096]
    assert legs_of(config)[-1].rows == 2
    assert loads(dump(config)) == config
    two.write_text('curriculum = "curriculum10"\n' + text)
    assert len(legs_of(load(two))) == 10
    assert load(two, ["--curriculum=[]"]) == load(tiny)
    child = tiny.with_name("child.toml")
    child.write_text('extends = "two.toml"\n[[curriculum]]\nstart_step = 0\n')
    (leg,) = legs_of(load(child))
    assert (leg.seq_len, leg.rows, leg.clip, leg.steps, leg.stage.lr_multiplier) == (48, 8, 1.0, 20, 1.0)  # what `train` says


def test_mistakes_of_tables_have_their_line(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + "[[curriculum]]\nstart_step = 0\nseq_length = 8\n[[curriculum]]\nstart_step = -1\nlr_multiplier = 0\n")
    with pytest.raises(ConfigError) as caught:
        load(tiny, ["--curriculum.0.clip=x"])
    found = [problem.partition("tiny.toml:")[2] or problem for problem in caught.value.problems]
    line = tiny.read_text().splitlines().index("[[curriculum]]") + 1
    assert sorted(found) == sorted(
        [
            f"{line + 2}: curriculum.0.seq_length: unknown key of curriculum 'stage'; did you mean 'seq_len'? (keys: {', '.join(Stage.__dataclass_fields__)})",
            f"{line + 4}: curriculum.1.start_step: expected a number greater than or equal to 0, got int -1",
            f"{line + 5}: curriculum.1.lr_multiplier: expected a number greater than 0, got int 0",
            "--curriculum.0.clip: curriculum.0.clip: expected a number, got str 'x'",
        ]
    )


def test_all_mistakes_of_a_curriculum_at_once(tiny: Path) -> None:
    stages = "[{start_step=1,seq_len=64},{start_step=9,seq_len=128},{start_step=9},{start_step=20,batch=3},{start_step=30}]"
    overrides = [f"--curriculum={stages}", "--model.max_positions=100", "--train.micro_batch_tokens=96"]
    assert check(load(tiny, overrides)).problems == [
        "curriculum.0.start_step: 1, and nothing says what comes before; the first stage starts at 0",
        "curriculum.2.start_step: 9 does not come after 9, where the stage before it starts; put stages in order",
        "curriculum.3.start_step: 20 is not before the end of the run; raise train.steps = 20, or end the curriculum with the stage before",
        "curriculum.1.seq_len: rows of 128, and model.max_positions is 100; raise that or shorten the rows",
        "curriculum.1.seq_len: rows of 128 do not fit into passes of train.micro_batch_tokens = 96; raise that",
    ]
    named = check(load(tiny, ["--curriculum=curriculum6", "--train.steps=15_000", "--model.max_positions=1024"])).problems
    assert named == [
        "curriculum.0: stage 5 of 'curriculum6': start_step 15,000 is not before the end of the run; raise train.steps = 15,000, "
        "or end the curriculum with the stage before",
        "curriculum.0: stage 6 of 'curriculum6': seq_len rows of 2,048, and model.max_positions is 1,024; raise that or shorten the rows",
    ]
    assert check(load(tiny, ["--curriculum=[{start_step=0,seq_len=32}]", "--packer={name='sliding',stride=40}"])).problems == [
        "packer.stride: 40 positions between rows of 32 would leave labels out; lower it, or raise seq_len"
    ]


@pytest.mark.parametrize(("given", "said"), [((), "gives nothing"), ((3,), r"gives \(3,\)"), (Stage(start_step=0), r"gives \(Stage\(.*\),\)")])
def test_a_curriculum_of_something_else_is_its_authors_mistake(tiny: Path, monkeypatch: pytest.MonkeyPatch, given: object, said: str) -> None:
    config = load(tiny, ["--curriculum=curriculum6", "--model.d_model=33"])
    monkeypatch.setattr(Component, "build", lambda entry, build=Component.build, **run: given if entry.kind == "curriculum" else build(entry, **run))
    first, *others = check(config).problems
    assert re.match(rf"curriculum\.0: 'curriculum6' {said}, and a curriculum gives a tuple of titanlm\.curricula\.stage\.Stage", first)
    assert any(problem.startswith("model.") for problem in others)


def test_rows_that_divide_badly_are_told(tiny: Path) -> None:
    prime = check(load(tiny, ["--curriculum=[{start_step=0,seq_len=32,batch=1021}]", "--train.micro_batch_tokens=16384"])).warnings
    said = "curriculum.0.batch: 1,021 rows a step are cut into passes of 1, where 512 are allowed; take a number with more divisors"
    assert said in prime
    assert not [
        warning
        for warning in check(load(tiny, ["--curriculum=[{start_step=0,seq_len=32,batch=1024}]", "--train.micro_batch_tokens=16384"])).warnings
        if "divisors" in warning
    ]


def test_rows_that_ranks_cannot_share(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches fit themselves to a rank's rows, so rows alone count; train.micro_batch = 4 would divide none of them."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    common = ["--parallel.strategy=replicate", "--train.steps=30"]
    stages = "--curriculum=[{start_step=0,batch=4},{start_step=5,batch=3,accumulation=2}]"
    assert check(load(tiny, [stages, *common])).problems == [
        "parallel: steps of 4, 6 rows in the stages of the curriculum, and 8 streams of data, cannot be shared out evenly among 4 ranks; 1, 2 ranks can"
    ]
    assert check(load(tiny, [stages.replace("accumulation=2", "accumulation=4"), *common])).problems == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--curriculum=[{start_step=0,batch=4}]"], "train.global_batch: 8 is of no use, for every stage of the curriculum says its own"),
        (["--curriculum=[{start_step=0,clip=0.5}]", "--train.clip=0.25"], "train.clip: 0.25 is of no use, for every stage of the curriculum says its own"),
        (["--curriculum=[{start_step=0},{start_step=9,rewarmup_steps=12}]"], "curriculum.1.rewarmup_steps: 12, and the stage lasts 11 steps"),
        (["--curriculum=[{start_step=0,rewarmup_steps=2}]"], "curriculum.0.rewarmup_steps: multiplies the 3 steps of scheduler.warmup_steps"),
        (["--curriculum=[{start_step=0,seq_len=16},{start_step=5}]"], "train.micro_batch: 4 rows are passes of 64 to 192 tokens in the stages"),
        (
            ["--curriculum=[{start_step=0}]", "--data.n_tokens=3840"],
            "curriculum: 2.00 epochs of data.n_tokens = 3,840: after step 10, what was read is read again",
        ),
    ],
)
def test_what_will_surprise_is_said(tiny: Path, overrides: list[str], said: str) -> None:
    report = check(load(tiny, overrides))
    assert report.problems == []
    assert [warning for warning in report.warnings if warning.startswith(said)] != []
    assert not any(warning.startswith(said) for warning in check(load(tiny, ["--curriculum=[{start_step=0}]"])).warnings)


# ---------------------------------------------------------------- phases
def test_phases_are_the_stages(tiny: Path) -> None:
    assert phases(tiny, *COMMON) == [
        (0, Phase(16, 3, 2, clip=0.3, lr_multiplier=0.5)),
        (3, Phase(24, 3, 2, clip=1.0, lr_multiplier=2.0, rewarmup_steps=2, start_step=3)),
        (6, Phase(48, 4, 1, clip=None)),
    ]
    assert phases(tiny, "--curriculum=[{start_step=0}]") == phases(tiny) == [(0, Phase(48, 4, 2, clip=1.0))]


def test_what_is_left_is_counted_by_the_shapes_of_its_steps(tiny: Path) -> None:
    settings = load(tiny, COMMON)
    by_step = [phases_of(settings, World(), horizon_of(settings)).at(Progress(step=step)) for step in range(settings.train.steps)]
    flops = [phase.rows_per_rank * phase.seq_len * (1000 + phase.seq_len) for phase in by_step]
    for step in range(settings.train.steps + 1):
        assert flops_left(settings, lambda seq_len: 1000.0 + seq_len, step) == sum(flops[step:])


def test_small_batches_are_not_raised_and_large_ones_are_cut(tiny: Path) -> None:
    """Against the loader it was taken from, which made 8 rows of 2 and of 4, and 8,192 rows of 8 one pass."""
    small = "--curriculum=[{start_step=0,batch=2},{start_step=5,batch=4},{start_step=9,batch=1}]"
    assert [(phase.micro_batch, phase.accumulation) for _, phase in phases(tiny, small, "--train.micro_batch=8")] == [(2, 1), (4, 1), (1, 1)]
    ten = ("--curriculum=curriculum10", "--train.steps=200_000", "--train.micro_batch_tokens=16_384")
    cut = [phase for _, phase in phases(tiny, *ten)]
    assert all(phase.micro_batch * phase.seq_len in (16_384, 768 * 16, 1536 * 8) for phase in cut)
    assert [phase.rows_per_rank for phase in cut] == list(TABLES["curriculum10"]["batch"])
    shared = [phase for _, phase in phases(tiny, *ten, ranks=8)]
    assert [phase.rows_per_rank * 8 for phase in shared] == list(TABLES["curriculum10"]["batch"])
    assert all(phase.micro_batch <= one.micro_batch for phase, one in zip(shared, cut, strict=True))


def test_learning_rate_of_every_step_against_plain_python(tiny: Path) -> None:
    config = load(tiny, ["--curriculum=curriculum6", "--train.steps=25_600"])
    planned, table = phases_of(config, World(), horizon_of(config)), TABLES["curriculum6"]
    for step in [*range(0, 25_600, 37), *(start + offset for start in table["start_step"][1:] for offset in (-1, 0, 1, 99, 100, 299, 499))]:
        number = max(index for index, start in enumerate(table["start_step"]) if start <= step)
        rise = (step - table["start_step"][number] + 1) / table["rewarmup_steps"][number]
        phase = planned.at(Progress(step))
        assert phase.lr_factor(Progress(step)) == pytest.approx(table["lr_multiplier"][number] * min(1.0, rise), rel=1e-12)
        assert (phase.seq_len, phase.clip) == (table["seq_len"][number], table["clip"][number])
    assert planned.stages[1][1].lr_factor(Progress(0)) == 1.5 / 300  # primed before it begins: never 0, never negative


@pytest.mark.parametrize("limit", ["", "--train.max_wallclock_s=100"])
@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.7, 0.95])
def test_stages_and_late_rounding_go_together(tiny: Path, share: float, limit: str) -> None:
    """At every step and second the stage is that of the step and rounding that of the share; what may still come is what comes at any later one."""
    config = load(tiny, [*COMMON, '--quantizer=[{name="int6",qat=true}]', f"--qat.start_fraction={share}", *([limit] if limit else [])])
    horizon = horizon_of(config)
    planned = phases_of(config, World(), horizon)
    clocks = [Progress(step, elapsed_s=second) for step in range(10) for second in (range(0, 101, 5) if limit else (0,))]  # to the last validation

    def expected(progress: Progress) -> tuple[int, bool]:
        return (16, 24, 48)[(progress.step >= 3) + (progress.step >= 6)], horizon.fraction(progress) >= share

    found = {progress: planned.at(progress) for progress in clocks}
    assert {progress: (phase.seq_len, dict(phase.switches)["qat"]) for progress, phase in found.items()} == {each: expected(each) for each in clocks}
    for progress in clocks[::7]:
        later = {found[other] for other in clocks if other.step >= progress.step and other.elapsed_s >= progress.elapsed_s}
        assert set(planned.after(progress)) == later


# ---------------------------------------------------------------- training
def test_each_step_has_the_shape_the_rate_and_the_clip_of_its_stage(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update after all passes of a step; the scheduler multiplies the stage's rate and does not take its place; no clip but the stage's."""
    steps: list[dict[str, Any]] = []
    passes: list[tuple[int, ...]] = []
    clips: list[float | None] = []
    clip_gradients = trainer_module.clip_gradients
    monkeypatch.setattr(trainer_module, "clip_gradients", lambda parameters, largest: (clips.append(largest), clip_gradients(parameters, largest))[1])
    with Trainer(load(tiny, [*COMMON, "--train.micro_batch=2"])) as trainer:
        forward, (optimizer,) = trainer.forward, trainer.optimizers
        update = optimizer.step
        trainer.forward = lambda batch: (passes.append(tuple(batch.tokens.shape)), forward(batch))[1]

        def stepped(*arguments: Any, **keywords: Any) -> Any:
            steps.append(
                {
                    "passes": list(passes),
                    "lr": list({float(group["lr"]) for group in optimizer.param_groups}),
                    "clip": clips[-1],
                    "first": not trainer.watchdog._started,
                }
            )
            passes.clear()
            return update(*arguments, **keywords)

        monkeypatch.setattr(optimizer, "step", stepped)
        trainer.train()
    plain = [{"passes": [(2, 16)] * 3, "clip": 0.3}] * 3 + [{"passes": [(2, 24)] * 3, "clip": 1.0}] * 3 + [{"passes": [(2, 48)] * 2, "clip": None}] * 3
    assert [{name: step[name] for name in ("passes", "clip")} for step in steps] == plain
    for t, step in enumerate(steps):
        cosine = (t + 1) / 3 if t < 3 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 3) / 6))
        of_stage = (0.5, 2.0, 1.0)[t // 3] * (0.5 if t == 3 else 1.0)
        assert step["lr"] == [pytest.approx(1e-2 * cosine * of_stage, rel=1e-6)]
    assert [step["first"] for step in steps] == [True, False, False] * 3  # time to compile
    log = (trainer.folder.path / "log.txt").read_text()
    assert "from step 4 on: seq_len 24, clip 1.0, lr_multiplier 2.0, rewarmup_steps 2" in log
    assert "from step 7 on: seq_len 48, accumulation 2, clip None, lr_multiplier 1.0, rewarmup_steps 0" in log
    assert trainer.progress.tokens == 3 * (6 * 16 + 6 * 24 + 4 * 48)


def test_one_stage_as_train_says_is_no_curriculum(tiny: Path) -> None:
    common = ("--train.steps=6", "--validation=[]")
    assert train(tiny, "--run.name=one", "--curriculum=[{start_step=0}]", *common) == train(tiny, "--run.name=none", *common)


@pytest.mark.parametrize(
    ("at", "loading"),
    [(5, []), (6, []), (4, ["--packer=best_fit", "--data.prefetch=0"]), pytest.param(5, ["--data.workers=2"], marks=pytest.mark.slow)],
    ids=["inside", "edge", "best_fit", "workers"],
)
def test_stopped_inside_a_stage_and_resumed_is_bitwise_the_straight_run(tiny: Path, at: int, loading: list[str]) -> None:
    """Rate, clip, average, cursors and packing buffers, from the middle of the second stage and from the edge of the third."""
    straight = train(tiny, "--run.name=straight", *COMMON, *loading)
    with Trainer(load(tiny, ["--run.name=stopped", *COMMON, *loading])) as trainer:
        trainer.watchdog.start()
        for step in range(1, at + 1):
            trainer.train_step()
            trainer._between_steps(step)
        trainer.save(wait=True)
        trainer.watchdog.stop()
    assert train(tiny, "--run.name=stopped", *COMMON, *loading) == straight
    assert len(straight) == 9
    saved = [checkpoint.load(tiny.parent / "runs" / name / "checkpoints" / "step-00000009") for name in ("straight", "stopped")]
    if "--data.workers=2" not in loading:  # with workers a state may be that of some rows before, which are made again
        assert_same(saved[0].ranks, saved[1].ranks)
    assert_same(saved[0].state, saved[1].state)


def test_another_curriculum_is_refused_at_a_resume(tiny: Path) -> None:
    train(tiny, "--run.name=r", *COMMON)
    with pytest.raises(CheckpointError, match=r"curriculum\.1\.seq_len: 24 → 32"):
        train(tiny, "--run.name=r", COMMON[0].replace("seq_len=24", "seq_len=32"), *COMMON[1:], "--train.steps=10")
    assert len(train(tiny, "--run.name=r", *COMMON, "--train.steps=10", "--data.n_tokens=77")) == 10


def test_losses_do_not_depend_on_how_steps_are_cut(tiny: Path) -> None:
    whole = train(tiny, "--run.name=whole", *COMMON, "--train.micro_batch=8")
    assert len(whole) == 9
    for number, cut in enumerate(("micro_batch=1", "micro_batch=2", "micro_batch_tokens=96")):
        assert train(tiny, f"--run.name=cut-{number}", *COMMON, f"--train.{cut}") == pytest.approx(whole, rel=1e-6)


def test_priming_every_stage_changes_nothing(tiny: Path) -> None:
    plain = train(tiny, "--run.name=plain", *COMMON)
    shapes: list[tuple[int, ...]] = []
    with Trainer(load(tiny, ["--run.name=primed", *COMMON, "--train.priming_steps=2"])) as trainer:
        forward = trainer.forward
        trainer.forward = lambda batch: (shapes.append(tuple(batch.tokens.shape)), forward(batch))[1]
        trainer.train()
    assert losses(trainer.folder.path) == plain
    assert shapes[:10] == [(3, 16)] * 4 + [(3, 24)] * 4 + [(4, 48)] * 2  # before the first step
    log = (trainer.folder.path / "log.txt").read_text()
    assert [line for line in ("priming phase 1 of 3: 3 rows of 16", "priming phase 3 of 3: 4 rows of 48") if line not in log] == []


def test_a_probe_finds_the_rows_of_each_length(tiny: Path) -> None:
    """Of two stages of one length the one with more rows is tried; validation goes by the longest rows."""
    auto = ("--train.micro_batch_tokens=auto", "--curriculum=[{start_step=0,seq_len=24,batch=2},{start_step=2,seq_len=24,batch=6},{start_step=4,batch=4}]")
    common = ("--train.steps=6", "--scheduler=constant", *auto)
    with Trainer(load(tiny, ["--run.name=auto", *common])) as trainer:
        assert [(phase.micro_batch, phase.accumulation) for _, phase in trainer.phases.stages] == [(2, 1), (6, 1), (4, 1)]
        assert trainer.validation[0].micro_batch == 4
        trainer.train()
    chosen = json.loads((trainer.folder.path / TUNED).read_text())["choices"]
    assert {key: value["rows"] for key, value in chosen.items()} == {"micro-batch of rows of 24": 6, "micro-batch of rows of 48": 4}
    with Trainer(load(tiny, ["--run.name=auto", *common, "--train.steps=7"])) as again:
        again.train()
    log = (again.folder.path / "log.txt").read_text()
    assert "chosen anew" not in log
    assert log.count("chosen by measurement") == 2


@pytest.mark.slow
def test_nothing_is_compiled_after_priming(tiny: Path) -> None:
    """Three shapes, rounding that sets in inside the second stage, rates of every step: all graphs are made before the first step."""
    torch.compiler.reset()
    counters.clear()
    overrides = ["--quantizer=[{name='int6',qat=true}]", "--qat.start_fraction=0.5", "--train.compile=block", "--train.compile_cache=off"]
    with Trainer(load(tiny, [*COMMON, *overrides, "--train.priming_steps=1", "--train.deterministic=false"])) as trainer:
        assert len(trainer.phases.after(Progress())) == 4
        prime, after = trainer._prime, []

        def primed() -> None:
            prime()
            after.append(int(counters["stats"]["unique_graphs"]))

        trainer._prime = primed  # type: ignore[method-assign]
        trainer.train()
    assert after[0] > 0
    assert int(counters["stats"]["unique_graphs"]) == after[0]
    assert len(losses(trainer.folder.path)) == 9


STOP = """
import os, signal
from titanlm.train import Trainer
between = Trainer._between_steps
def stopping(self, step):
    between(self, step)
    if step == AT and rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
Trainer._between_steps = stopping
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_one_run_over_changing_numbers_of_ranks_inside_its_stages(tiny: Path, zygote: Any) -> None:
    """2 ranks sharded, stopped in the second stage, 1 process, stopped in the third, 2 ranks: the same rows, losses within 1e-6 of one process."""
    common = [*COMMON, "--train.micro_batch=1", "--data.workers=0"]
    zygote.train(tiny, "--run.name=alone", *common).expect(0)
    for at, ranks, strategy in ((4, 2, "fsdp2"), (7, 1, "none"), (99, 2, "replicate")):
        stop = STOP.replace("AT", str(at))
        zygote.train(tiny, "--run.name=moved", f"--parallel.strategy={strategy}", *common, ranks=ranks, before=stop).expect(0 if at == 99 else 143)
    alone, moved = tiny.parent / "runs" / "alone", tiny.parent / "runs" / "moved"
    assert len(losses(moved)) == 9
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-6)
    one, two = (checkpoint.load(folder / "checkpoints" / "step-00000009") for folder in (alone, moved))
    assert_same(*(merge_states([own["data"] for own in saved.ranks]) for saved in (one, two)))


@pytest.mark.gpu
def test_on_a_gpu_stages_are_compiled_before_the_clock_and_cut_to_fit(tiny: Path) -> None:
    """Long and short rows, rows by a probe, bf16, compiled: no graph after priming, and losses of the run in fp32 within bf16's rounding."""
    big = ["--train.device=cuda", "--train.deterministic=false", "--model.d_model=128", "--model.d_ff=256", "--train.seq_len=1024", "--train.compile_cache=off"]
    stages = "--curriculum=[{start_step=0,seq_len=8,batch=4096},{start_step=4,seq_len=128,batch=256,clip=0.5},{start_step=8,batch=16,accumulation=2}]"
    common = [*big, stages, "--train.steps=12", "--validation=[]", "--averager.ramp=true"]
    plain = train(tiny, "--run.name=plain", *common, "--train.micro_batch_tokens=4096")
    torch.compiler.reset()
    counters.clear()
    overrides = ["--train.micro_batch_tokens=auto", "--train.precision=bf16", "--train.compile=block", "--train.priming_steps=2"]
    with Trainer(load(tiny, ["--run.name=compiled", *common, *overrides])) as trainer:
        prime, after = trainer._prime, []
        trainer._prime = lambda: (prime(), after.append(int(counters["stats"]["unique_graphs"])))  # type: ignore[method-assign]
        trainer.train()
    assert int(counters["stats"]["unique_graphs"]) == after[0] > 0
    assert losses(trainer.folder.path) == pytest.approx(plain, rel=0.05)


# ---------------------------------------------------------------- data
def rows_of(config: Any, n_steps: tuple[int, ...], workers: int, resume_after: int) -> tuple[list[Any], list[int]]:
    """(batches of all steps, positions a row) of three stages, stopped and resumed by another loader after so many steps."""
    tokenizer = config.tokenizer.build()
    stages = [Phase(seq_len, 2, 2) for seq_len, n in zip((7, 31, 96), n_steps, strict=True) for _ in range(n)]

    def loader() -> Loader:
        return Loader(streams_of(config, tokenizer, seq_len=96), prefetch=2, workers=workers)

    first, batches = loader(), []
    for phase in stages[:resume_after]:
        batches += first.next(phase).micro_batches
        first.commit()
    state = first.state()
    first.close()
    second = loader()
    second.restore(state)
    for phase in stages[resume_after:]:
        batches += second.next(phase).micro_batches
        second.commit()
    second.close()
    return batches, [phase.seq_len for phase in stages]


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_are_trained_on_in_order_whatever_the_lengths(tiny: Path, workers: int) -> None:
    """One stream, documents end to end: the rows of 7, 31 and 96 positions, one after the other, are the ids of the documents."""
    config = load(tiny, ["--data.n_streams=1"])
    batches, lengths = rows_of(config, (6, 5, 4), workers, resume_after=8)
    assert [batch.tokens.shape[1] for batch in batches] == [seq_len for seq_len in lengths for _ in range(2)]
    found = torch.cat([batch.tokens.flatten() for batch in batches]).tolist()
    dataset = streams_of(config, config.tokenizer.build(), seq_len=96)[0].dataset
    documents: list[int] = []
    while len(documents) < len(found):
        documents += next(dataset).ids.tolist()
    assert found == documents[: len(found)]
    assert len(found) == 4 * (6 * 7 + 5 * 31 + 4 * 96)


def test_packed_documents_are_cut_and_never_dropped(tiny: Path) -> None:
    """best_fit: the labels of each document, in the order of the rows, are its ids after the first, all of them or, of those still under way, the first."""
    config = load(tiny, ["--data.n_streams=1", "--packer={name='best_fit',buffer_rows=4}"])
    batches, _ = rows_of(config, (9, 7, 6), 0, resume_after=12)
    labels: dict[int, list[int]] = defaultdict(list)
    for batch in batches:
        for ids, wanted in zip(batch.document_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True):
            if wanted != IGNORE:
                labels[ids].append(wanted)
    dataset = streams_of(config, config.tokenizer.build(), seq_len=96)[0].dataset
    documents = {document.document_id: document.ids.tolist() for document in (next(dataset) for _ in range(150))}
    assert set(labels) <= set(documents)
    for number, found in labels.items():
        assert found == documents[number][1 : 1 + len(found)]
    whole = [number for number, found in labels.items() if len(found) == len(documents[number]) - 1]
    assert len(whole) > 10
    longest = max(list(documents).index(number) for number in labels)
    missing = sum(len(ids) - 1 - len(labels.get(number, ())) for number, ids in list(documents.items())[: longest + 1])
    assert missing <= 6 * 96  # what waits to be packed, at most buffer_rows and what a document brings


# ---------------------------------------------------------------- plans
def plan(config: Any) -> dict[str, str]:
    rows: dict[str, str] = {}
    name = ""
    for head, text in _rows(_Training(config), World(), None, None):
        name = head or name
        rows[name] = rows[name] + "\n" + text if name in rows else text
    return rows


SIX = ["--curriculum=curriculum6", "--train.steps=30_000", "--model.vocab_size=200_005", "--train.micro_batch_tokens=65_536"]


def test_a_plan_says_tokens_epochs_and_flops_of_each_stage(tiny: Path) -> None:
    """Of a billion tokens, 25,000 steps leave 99 million: some 1,500 steps of the sixth stage."""
    config = load(tiny, [*SIX, "--data.n_tokens=1_000_000_000"])
    rows, model = plan(config), planned_model(config)
    flops = [model.flops_per_token(seq_len) for seq_len in TABLES["curriculum6"]["seq_len"]]
    tokens = [98_304_000, 98_304_000, 131_072_000, 245_760_000, 327_680_000, 327_680_000]
    assert rows["stage 1"].startswith("3,000 steps of 32,768 tokens (256 rows × 128), 98,304,000 tokens, 0.098 epochs, ")
    for number, (each, n) in enumerate(zip(flops, tokens, strict=True), 1):
        assert rows[f"stage {number}"].endswith(f" {n:,} tokens, {n / 1e9:.3f} epochs, {each * n:.3g} FLOPs ({each:,.0f} a token)")
    assert flops == sorted(set(flops))
    total = sum(each * n for each, n in zip(flops, tokens, strict=True))
    assert rows["FLOPs"] == f"{total:.3g} in all (forward and backward)"
    assert rows["tokens"] == "1,228,800,000 in 30,000 steps"
    step = 25_000 + (1_000_000_000 - 901_120_000) // 65_536
    assert rows["epochs"] == (
        "1.229 of data.n_tokens = 1,000,000,000\n"
        f"WARNING: 1.23 epochs of data.n_tokens = 1,000,000,000: after step {step:,}, in stage 6, what was read is read again"
    )
    # Only the steps of the last stage have as many positions as a pass may have.
    whole, chunk = 65_536 * 200_005 * 4 / 2**30, 200_005 * 4 / 2**30
    assert rows["largest pass"].startswith("32 rows × 2,048 on a device; logits of ")
    assert f", of all at once {whole:.3f}, computed" in rows["largest pass"]
    n = int(rows["largest pass"].partition("logits of ")[2].partition(" tokens")[0].replace(",", ""))
    assert f"{n * chunk:.3f} GiB" in rows["largest pass"]


RECIPE = """
description = "stages"
scales = ["small"]

[[stage]]
name = "train"
config = "tiny.toml"
run = ["train", "{config}", "--run.dir={out}"]
output = "{out}/tiny"
"""


def test_a_recipe_plans_the_stages_of_a_run_and_names_their_mistakes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny.with_name("recipe.toml")
    file.write_text(RECIPE, encoding="utf-8")
    common = ["recipe", "plan", str(file), "--device-name", "H200"]
    assert cli.main([*common, STAGES, "--train.steps=9", "--data.n_tokens=500"]) == 0
    out = capsys.readouterr().out
    assert "   stage 2          3 steps of 144 tokens (6 rows × 24), 432 tokens, 0.864 epochs, " in out
    assert "WARNING: 2.59 epochs of data.n_tokens = 500: after step 4, in stage 2, what was read is read again" in out
    assert cli.main([*common, STAGES, "--train.steps=6"]) == 2
    assert "stage 'train': curriculum.2.start_step: 6 is not before the end of the run; raise train.steps = 6" in capsys.readouterr().err
    assert cli.main([*common, "--curriculum=[{start_step=0},{start_step=5},{start_step=5}]"]) == 2
    assert "stage 'train': curriculum.2.start_step: 5 does not come after 5" in capsys.readouterr().err
    assert cli.main([*common, STAGES, "--train.steps=9", "--devices", "4", "--parallel.strategy=fsdp2"]) == 2
    assert "stage 'train': parallel: steps of 6, 4 rows in the stages of the curriculum, and 8 streams" in capsys.readouterr().err


def test_thirty_billion_tokens_are_eleven_epochs(tiny: Path) -> None:
    ten = ["--curriculum=curriculum10", "--train.steps=200_000", "--train.micro_batch_tokens=auto"]
    again = read_again(load(tiny, [*ten, "--data.n_tokens=2_610_000_000"]))
    assert again is not None
    assert again.startswith("11.50 epochs of data.n_tokens = 2,610,000,000: after step 20,")
    ended = read_again(load(tiny, [*ten, "--data.n_tokens=2_610_000_000", "--data.epochs=2"]))
    assert ended is not None
    assert ended.endswith("in stage 6, data.epochs = 2 ends the run")
    assert read_again(load(tiny, [*ten, "--data.n_tokens=2_610_000_000", "--data.epochs=12"])) is None
    # 8,192 rows of 8 in one pass: 26.2 GB of bf16 logits, which a 24 GB card never held; the loss takes a part at a time.
    at_once = plan(load(tiny, ["--curriculum=[{start_step=0,seq_len=8,batch=8192}]", *SIX[2:], "--train.precision=bf16"]))["largest pass"]
    assert at_once.startswith("8,192 rows × 8 on a device; logits of 4,096 tokens ")
    assert f", of all at once {26.2 / 1.073741824:.1f}" in at_once
    assert plan(load(tiny, ten))["epochs"].startswith("unknown: say in data.n_tokens")
    assert "epochs" not in plan(load(tiny))


def test_token_shards_say_how_many_they_hold(tiny: Path) -> None:
    """As many as the loader trains on in one pass, and of a mixture the source that is read through first."""
    out = tiny.parent / "shards"
    assert cli.main(["data", "prepare", "--config", str(tiny), "--output", str(out)]) == 0
    shards = Component.named("dataset", "token_shards", paths=(str(out / "*train*.bin"),))
    config = load(tiny, [f"--dataset={{name='token_shards',paths=['{out}/*train*.bin']}}"])
    epoch = epoch_of(config)
    assert epoch is not None
    stream = streams_of(config, config.tokenizer.build(), seq_len=48, n_streams=1, epochs=1)[0]
    n = sum(len(document.ids) for document in stream.dataset)
    assert epoch.tokens == n
    sources = (Source(name="a", weight=3.0, dataset=shards), Source(name="b", dataset=Component.named("dataset", "text", paths=("x",))))
    mixed = epoch_of(replace(config, dataset=None, data=replace(config.data, source=sources)))
    assert mixed is not None
    assert (mixed.tokens, mixed.of) == (n * 4 / 3, f"the {n:,} tokens of 'a'")
    assert epoch_of(load(tiny)) is None


def test_memory_and_traffic_of_a_plan_are_those_of_the_stage_with_most_passes(tiny: Path) -> None:
    stages = "--curriculum=[{start_step=0,batch=8},{start_step=5,batch=8,accumulation=4},{start_step=9,batch=2}]"
    config = load(tiny, [stages, "--parallel.strategy=fsdp2"])
    assert Layout(config, planned_model(config), World(size=2)).accumulation == 4  # 32 rows, 2 ranks, 4 at once
