"""Several ranks train what one process trains, whatever the strategy, and agree where they could differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

KEPT = ("--parallel.reshard_after_forward=false",)
HSDP = "--parallel.strategy=hsdp", "--parallel.shards=2"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if "loss" in row]


def scores(run: Path) -> dict[str, float]:
    return {name: value for row in rows(run) for name, value in row.items() if name.startswith("validation/")}


def close(a: Any, b: Any, rel_tol: float = 1e-6) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=rel_tol) for x, y in zip(a, b, strict=True))


@pytest.fixture
def alone(tiny: Path, zygote: Any) -> Path:
    """One process, as many micro-batches as four ranks have."""
    zygote.train(tiny, "--run.name=alone", "--train.micro_batch=1").expect(0)
    return tiny.parent / "runs" / "alone"


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, ("replicate",)),
        *(
            pytest.param(ranks, how, marks=pytest.mark.slow)
            for ranks, how in ((1, ("fsdp2",)), (2, ("fsdp2",)), (4, ("fsdp2",)), (1, ("replicate",)), (4, ("replicate",)), (4, HSDP))
        ),
    ],
    ids=lambda value: value[0].rpartition("=")[2] if isinstance(value, tuple) else str(value),
)
def test_losses_and_scores_equal_one_process(tiny: Path, zygote: Any, alone: Path, ranks: int, strategy: tuple[str, ...]) -> None:
    """fp32, 1e-6 relative, over 20 steps, with accumulation, clipping, EMA and validation over all ranks."""
    arguments = strategy if len(strategy) > 1 else (f"--parallel.strategy={strategy[0]}",)
    zygote.train(tiny, "--run.name=several", "--train.micro_batch=1", *arguments, ranks=ranks).expect(0)
    several = alone.with_name("several")
    assert close(losses(several), losses(alone))
    assert scores(several).keys() == scores(alone).keys()
    assert close(list(scores(several).values()), list(scores(alone).values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (["--model.tie_embeddings=false"], []),
        (["--model.embedding_rank=8"], []),
        (["--train.precision=bf16"], []),
        ([], ["--train.activation_checkpointing=selective", "--parallel.prefetch_blocks=1", *KEPT]),
        ([], ["--parallel.cpu_offload=true", "--train.activation_checkpointing=full"]),
        (["--train.sample_every=2", "--train.validate_every=1"], []),
    ],
    ids=["untied", "factorised", "bf16", "kept", "offload", "sampling"],
)
def test_sharded_forms_of_the_model_equal_one_process(tiny: Path, zygote: Any, settings: list[str], own: list[str]) -> None:
    common = ["--train.micro_batch=1", "--train.steps=4", "--scheduler=constant", *settings]
    zygote.train(tiny, "--run.name=one", *common).expect(0)
    zygote.train(tiny, "--run.name=two", "--parallel.strategy=fsdp2", *common, *own, ranks=2).expect(0)
    one, two = tiny.parent / "runs" / "one", tiny.parent / "runs" / "two"
    # Sums in another order move the last bit of an fp32 weight, and where that decides how it is rounded its bf16 number moves by 2⁻⁸.
    rel_tol = 1e-5 if "--train.precision=bf16" in settings else 1e-6
    assert close(losses(two), losses(one), rel_tol)
    assert close(list(scores(two).values()), list(scores(one).values()), rel_tol)
    samples = [[line for line in (run / "log.txt").read_text().splitlines() if "sample at" in line] for run in (one, two) if (run / "log.txt").exists()]
    assert all(sample == samples[0] for sample in samples)


@pytest.mark.slow
def test_gathering_in_the_compute_dtype_rounds_as_documented(tiny: Path, zygote: Any) -> None:
    common = ["--train.micro_batch=1", "--train.steps=4", "--scheduler=constant", "--train.precision=bf16"]
    zygote.train(tiny, "--run.name=one", *common).expect(0)
    zygote.train(tiny, "--run.name=two", "--parallel.strategy=fsdp2", "--parallel.gather_dtype=compute", *common, ranks=2).expect(0)
    one, two = losses(tiny.parent / "runs" / "one"), losses(tiny.parent / "runs" / "two")
    assert one != two
    assert all(math.isclose(a, b, rel_tol=2e-3) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
def test_every_rank_starts_from_the_same_weights(tiny: Path, zygote: Any) -> None:
    """Drawn whole from seed and name, then sliced: bitwise those of one process, at every world size, rows that do not divide included."""
    code = f"""
import hashlib, json, sys
from titanlm.config import load
from titanlm.distributed.slices import whole
from titanlm.train import Trainer
name, strategy = "start-WORLD", "STRATEGY"
with Trainer(load({str(tiny)!r}, [f"--run.name={{name}}", f"--parallel.strategy={{strategy}}", "--train.micro_batch=1", "--model.d_ff=66"])) as trainer:
    digest = {{name: hashlib.sha256(whole(parameter).numpy().tobytes()).hexdigest() for name, parameter in trainer.model.named_parameters()}}
    local = sum(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel() for parameter in trainer.model.parameters())
print(json.dumps([digest, local]))
"""
    found = {}
    for world, strategy in ((1, "none"), (4, "fsdp2"), (2, "replicate")):
        launched = zygote.run(code.replace("WORLD", f"{world}-{strategy}").replace("STRATEGY", strategy), ranks=world).expect(0)
        parts = [json.loads(launched.output(rank).splitlines()[-1]) for rank in range(world)]
        assert all(digest == parts[0][0] for digest, _ in parts)
        found[world, strategy] = parts
    total = found[1, "none"][0][1]
    assert all(parts[0][0] == found[1, "none"][0][0] for parts in found.values())
    assert sum(local for _, local in found[4, "fsdp2"]) == total  # nothing is held twice
    assert max(local for _, local in found[4, "fsdp2"]) < 0.35 * total


def test_c6_numbers_of_ranks_that_do_not_fit_are_refused_with_those_that_do(tiny: Path, zygote: Any) -> None:
    launched = zygote.train(tiny, "--parallel.strategy=fsdp2", ranks=3).expect(2)
    assert "cannot be shared out evenly among 3 ranks; 1, 2 ranks can" in launched.output(0)
    assert launched.output(1) == launched.output(2) == ""  # said once a host


def test_several_processes_need_a_strategy(tiny: Path, zygote: Any) -> None:
    launched = zygote.train(tiny, ranks=2).expect(2)
    assert "parallel.strategy: 'none' trains with one process and there are 2; use 'replicate'" in launched.output(0)
    assert not (tiny.parent / "runs").exists()


def test_a_taken_run_folder_ends_every_rank(tiny: Path, zygote: Any) -> None:
    from titanlm.runs import Lock

    (tiny.parent / "runs" / "tiny").mkdir(parents=True)
    lock = Lock(tiny.parent / "runs" / "tiny" / ".lock")
    launched = zygote.train(tiny, "--parallel.strategy=replicate", ranks=2).expect(2)
    lock.release()
    assert "is training in it" in launched.output(0)
    assert "Traceback" not in launched.output(0) + launched.output(1)


@pytest.mark.slow
def test_d12_the_end_of_unequal_data_is_agreed_on(tiny: Path, zygote: Any) -> None:
    """Three documents for eight streams: most streams never have a row, and the ranks end after the same step."""
    text = tiny.parent / "short.txt"
    text.write_text("\n\n".join("word " * n for n in (400, 30, 5)))
    overrides = [f'--dataset.paths=["{text}"]', "--dataset.validation_fraction=0", "--data.epochs=1", "--validation=[]", "--train.steps=50"]
    overrides += ["--train.micro_batch=1", "--scheduler=constant"]
    zygote.train(tiny, "--run.name=one", *overrides).expect(0)
    zygote.train(tiny, "--run.name=two", "--parallel.strategy=replicate", *overrides, ranks=2).expect(0)
    one, two = losses(tiny.parent / "runs" / "one"), losses(tiny.parent / "runs" / "two")
    assert 1 <= len(one) < 50
    assert len(two) == len(one)
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, two, strict=True))  # 49 steps over the same three documents amplify rounding


def test_an_unreadable_row_of_one_rank_saves_and_ends_all(tiny: Path, zygote: Any) -> None:
    before = """
if rank == 1:
    from titanlm.data import Loader
    from titanlm.errors import DataError
    next_step, calls = Loader.next, []
    def failing(self, phase):
        calls.append(None)
        if len(calls) == 4:
            raise DataError("row 7 cannot be read")
        return next_step(self, phase)
    Loader.next = failing
"""
    launched = zygote.train(tiny, "--parallel.strategy=fsdp2", ranks=2, before=before).expect(2)
    assert "rank 1: row 7 cannot be read" in launched.output(1)
    assert [folder.name for folder in (tiny.parent / "runs" / "tiny" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a9_ranks_that_hear_of_a_failed_save_at_different_steps_go_on_together(tiny: Path, zygote: Any) -> None:
    before = """
from titanlm import checkpoint, saver
write, calls = checkpoint._write_part, []
def failing(*arguments):
    calls.append(None)
    if rank == 1 and len(calls) == 1:
        raise OSError(28, "No space left on device")
    return write(*arguments)
checkpoint._write_part = failing
if rank == 0:
    saver.Saver.poll = lambda self: self.wait() if not self.busy and len(calls) > 3 else None  # late
"""
    arguments = ["--parallel.strategy=fsdp2", "--train.steps=8", "--scheduler=constant", "--checkpoint.every=2", "--validation=[]"]
    launched = zygote.train(tiny, *arguments, ranks=2, before=before).expect(0)
    assert "rank 1: [Errno 28] No space left on device" in launched.output(0)
    steps = sorted(folder.name for folder in (tiny.parent / "runs" / "tiny" / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000006", "step-00000008"]


@pytest.mark.slow
def test_ranks_that_have_nothing_left_to_do_leave(tiny: Path, zygote: Any) -> None:
    """gloo's threads let go of their last tensors with Python's lock, which whoever destroys the group holds while it waits for them."""
    code = f"from titanlm.config import load\nfrom titanlm.train import Trainer\nwith Trainer(load({str(tiny)!r}, OVERRIDES)):\n    pass"
    for number in range(10):
        overrides = [f"--run.name=run-{number}", "--parallel.strategy=replicate"]
        zygote.run(code.replace("OVERRIDES", repr(overrides)), ranks=2).expect(0, timeout_s=30)
