"""How many rows fit: the search against trying everything, what is counted against counts by hand, and a run that cannot be told from one by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from titanlm import checkpoint, micro_batch
from titanlm.check import check
from titanlm.config import Train, dump, load, loads
from titanlm.errors import ConfigError, TitanError
from titanlm.micro_batch import SHARE, Probe, divisors, free_bytes, largest, made_up, saved_bytes, to_come
from titanlm.models.layers.rounding import is_rounding
from titanlm.progress import Phase, Phases, Shape
from titanlm.train import Trainer, dry_run
from titanlm.tuned import TUNED

AUTO = "--train.micro_batch_tokens=auto"
CPU = torch.device("cpu")


def run(config_path: Path, *overrides: str) -> Trainer:
    with Trainer(load(config_path, overrides)) as trainer:
        trainer.train()
    return trainer


def metrics(trainer: Trainer) -> list[dict[str, Any]]:
    """But for clocks and memory."""
    rows = [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "bits_per_byte", "lr", "tokens")
    return [{name: value for name, value in row.items() if name in kept or name.startswith(("validation/", "data/"))} for row in rows]


def chosen(trainer: Trainer) -> dict[str, Any]:
    # On a GPU attention is chosen too.
    (value,) = (value for key, value in json.loads((trainer.folder.path / TUNED).read_text())["choices"].items() if key.startswith("micro-batch"))
    return value


def with_free(monkeypatch: pytest.MonkeyPatch, n_bytes: float) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: int(n_bytes))


@pytest.fixture
def two_rows(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two of eight rows fit: memory for two and a half."""
    trainer = run(tiny, "--run.name=measured", "--train.steps=1", "--scheduler=constant", AUTO)
    value = chosen(trainer)
    assert value["rows"] == 8  # all there are
    row = value["bytes_per_token"] * 48
    with_free(monkeypatch, (value["needed_bytes"] - 5.5 * row) / SHARE)
    return tiny


# ---------------------------------------------------------------- the search
@pytest.mark.parametrize("n", [1, 7, 12, 36, 64, 360])
@pytest.mark.parametrize("bends", ["not", "up", "down", "is flat"])
def test_search_finds_what_trying_everything_finds(n: int, bends: str) -> None:
    """Exactly, but where memory bends down (8 rows fill the chunks of a loss): there it may stop short, and never takes too many."""
    curves = {"not": lambda r: 100 + 7 * r, "up": lambda r: 50 + 2 * r * r, "down": lambda r: 500 * min(r, 8) + 60 * r, "is flat": lambda r: 1000}
    legal = divisors(n)
    assert legal == [d for d in range(1, n + 1) if n % d == 0]
    for budget in (0, 99, 107, 400, 1000, 3000, 4000, 7000, 20_000, 10**9):
        for memory in (budget, 2 * budget):  # beyond it a trial fails
            needs = {rows: need if (need := curves[bends](rows)) <= memory else None for rows in legal}
            rows, tried = largest(legal, needs.__getitem__, budget)
            fitting = [rows for rows in legal if curves[bends](rows) <= budget]
            assert rows == max(fitting, default=None) or (bends == "down" and rows in fitting)
            assert all(needs[one] == need for one, need in tried.items())


def test_search_tries_few_on_a_straight_line() -> None:
    tried: list[int] = []
    rows, _ = largest(divisors(720), lambda r: tried.append(r) or 10 + r, 200)  # type: ignore[func-returns-value]
    assert (rows, tried) == (180, [1, 2, 180])


# ---------------------------------------------------------------- what is counted
def test_saved_bytes_of_a_network_by_hand() -> None:
    """Per row: the input of each matrix product (16 and 32 numbers), and what tanh keeps, which is its output and so the second input again."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    for rows in (1, 5):
        with saved_bytes(model) as count:
            model(torch.ones(rows, 16)).sum().backward()
        assert count() == 4 * rows * (16 + 32)


def test_made_up_rows_are_rows() -> None:
    batch = made_up(3, 10, 50, 2, document_mask=True)
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == batch.document_ids.shape == (3, 10)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4] * 2] * 3
    assert batch.document_ids[:, 0].tolist() == [0, 2, 4]
    assert (batch.document_ids[:, 5:] == batch.document_ids[:, :1] + 1).all()
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < 50
    assert [tensor.dtype for tensor in (batch.tokens, batch.labels, batch.positions, batch.target_bytes)] == [torch.int64] * 2 + [torch.int32] * 2


@pytest.mark.parametrize("more", [[], ['--optimizer=[{name="muon",params=["@matrix"],ns_dtype="fp32"},{name="adamw"}]']], ids=["adamw", "muon"])
def test_what_is_to_come_is_what_comes(tiny: Path, more: list[str]) -> None:
    """Moments as the optimizers have them after a step; with priming, a copy of weights, average and moments besides."""
    config = load(tiny, [*more, "--train.steps=1", "--scheduler=constant", "--validation=[]"])
    with Trainer(config) as trainer:
        trainer.train_step()
        state = [value for optimizer in trainer.optimizers for each in optimizer.state.values() for value in each.values()]
        moments = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.ndim)
        weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
        primed = load(tiny, [*more, "--train.priming_steps=2"])
        model = check(config).model
        assert to_come(config, model, trainer.world) == moments
        assert to_come(primed, model, trainer.world) == 2 * moments + 2 * weights


def test_free_memory_of_the_host_is_some_of_it() -> None:
    import os

    assert 0 < free_bytes(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- a run
@pytest.mark.slow
def test_a_run_is_bit_for_bit_that_with_the_number_given_by_hand(two_rows: Path) -> None:
    probed = run(two_rows, "--run.name=auto", AUTO, "--train.validate_every=5")
    by_hand = run(two_rows, "--run.name=hand", "--train.micro_batch=2", "--train.validate_every=5")
    assert chosen(probed)["rows"] == 2
    assert metrics(probed) == metrics(by_hand)
    assert any(name.startswith("validation/") for row in metrics(probed) for name in row)
    a, b = (checkpoint.load(trainer.folder.path / "checkpoints" / "step-00000020") for trainer in (probed, by_hand))
    for state in (a.state, b.state):
        state["progress"].pop("elapsed_s")
    assert repr([a.state, a.ranks]) == repr([b.state, b.ranks])
    tensors = [dict(checkpoint_tensors([saved.state, saved.ranks])) for saved in (a, b)]
    assert tensors[0].keys() == tensors[1].keys()
    assert len(tensors[0]) > 50
    assert all(torch.equal(tensors[0][path], tensors[1][path]) for path in tensors[0])


def checkpoint_tensors(tree: Any, path: str = "") -> Any:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from checkpoint_tensors(value, f"{path}/{key}")


def test_generators_buffers_and_switches_are_as_they_were(two_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that draws and counts, in a run whose weights are rounded later on: trials round, the first step does not."""
    from titanlm.models.decoder import Decoder

    forward = Decoder.forward
    rounded: list[bool] = []
    before: list[torch.Tensor] = []  # what lay in the memory: a model that has no use for the buffer does not initialise it

    def counting(model: Any, *args: Any, **kwargs: Any) -> Any:
        rounded.append(any(is_rounding(module) for module in model.modules()))
        before.append(model.seen.clone())
        model.seen.copy_(torch.rand(()))
        return forward(model, *args, **kwargs)

    late = ['--quantizer=[{name="int6",qat=true}]', "--qat.start_fraction=0.5", "--validation=[]"]
    with Trainer(load(two_rows, ["--run.name=before", "--train.micro_batch=2", *late])) as trainer:
        drawn = torch.get_rng_state()
    monkeypatch.setattr(Decoder, "forward", counting)
    monkeypatch.setattr(Decoder, "__init__", counted(Decoder.__init__))
    with Trainer(load(two_rows, ["--run.name=after", AUTO, *late])) as trainer:
        assert len(rounded) >= 4
        assert all(rounded)
        assert torch.equal(trainer.model.seen.view(torch.int32), before[0].view(torch.int32))
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        assert all(not optimizer.state for optimizer in trainer.optimizers)
        assert trainer.loader.state()["row"] == 0
        rounded.clear()
        trainer.train_step()
        assert not any(rounded)
        assert len(rounded) == 4


def counted(init: Any) -> Any:
    def __init__(model: Any, *args: Any, **kwargs: Any) -> None:
        init(model, *args, **kwargs)
        model.register_buffer("seen", torch.zeros(()))

    return __init__


@pytest.mark.slow
def test_resume_goes_by_what_was_chosen(two_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("--run.name=r", AUTO, "--scheduler=constant")
    run(two_rows, *short, "--train.steps=3")
    trials: list[int] = []
    trial = Probe._trial

    def noted(probe: Probe, rows: int, seq_len: int) -> int | None:
        trials.append(rows)
        return trial(probe, rows, seq_len)

    monkeypatch.setattr(Probe, "_trial", noted)
    with_free(monkeypatch, 1e12)  # now all would fit
    again = run(two_rows, *short, "--train.steps=5")
    assert trials == []
    assert [phase.micro_batch for _, phase in again.phases.stages] == [2]
    # What bears on memory has changed, and then a number that no longer divides a rank's rows, as with another number of ranks.
    other = run(two_rows, *short, "--train.steps=6", "--train.activation_checkpointing=full")
    assert trials[-1] == 8
    assert "chosen anew, because activation_checkpointing was 'none'" in (other.folder.path / "log.txt").read_text()
    stored = json.loads((other.folder.path / TUNED).read_text())
    (value,) = stored["choices"].values()
    value["rows"] = 3
    (other.folder.path / TUNED).write_text(json.dumps(stored))
    trials.clear()
    run(two_rows, *short, "--train.steps=7", "--train.activation_checkpointing=full")
    assert trials[-1] == 8
    assert "chosen anew, because 3 rows do not divide the 8 of a rank" in (other.folder.path / "log.txt").read_text()


def test_a_start_says_what_it_is_trying_while_it_does(two_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the log and on the terminal before the trial, under the run's first line."""
    trial, seen = Probe._trial, list[tuple[int, str, str]]()

    def looked(probe: Probe, rows: int, seq_len: int) -> int | None:
        told = (two_rows.parent / "runs" / "told" / "log.txt").read_text()
        seen.append((rows, told, capsys.readouterr().out))
        return trial(probe, rows, seq_len)

    monkeypatch.setattr(Probe, "_trial", looked)
    with Trainer(load(two_rows, ["--run.name=told", AUTO])):
        pass
    assert [rows for rows, *_ in seen] == [1, 2]
    lines = seen[-1][1].splitlines()
    assert [line for line in lines if "WARNING" not in line] == [
        lines[0], "trying micro-batches of 1 row of 48", "trying micro-batches of 2 rows of 48",
    ]  # fmt: skip
    assert "parameters, fp32 on cpu; documents" in lines[0]
    assert [out.splitlines()[-1] for *_, out in seen] == lines[-2:]


def test_out_of_memory_lowers_the_bound(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanlm.train_module import TrainModule

    forward, tried = TrainModule.forward, []

    def bounded(module: Any, batch: Any) -> Any:
        tried.append(len(batch.tokens))
        if len(batch.tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(module, batch)

    monkeypatch.setattr(TrainModule, "forward", bounded)
    trainer = run(tiny, AUTO, "--train.steps=2", "--scheduler=constant", "--validation.0.micro_batch=1")
    assert {phase.micro_batch for _, phase in trainer.phases.stages} == {2}
    assert 8 in tried
    monkeypatch.setattr(TrainModule, "forward", lambda module, batch: bounded(module, made_up(3, 48, 257, 1, document_mask=True)))
    with pytest.raises(TitanError, match=r"room for not one row of 48: .* 1 row took out of memory; use train\.activation_checkpointing"):
        Trainer(load(tiny, [AUTO, "--run.name=none"]))


def test_too_little_memory_names_the_remedies(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 1000)
    with pytest.raises(TitanError, match=r"room for not one row of 48: 0\.00 GiB are free.*train\.micro_batch = 1"):
        Trainer(load(tiny, [AUTO]))


def test_each_row_length_has_rows_of_its_own(two_rows: Path) -> None:
    """Phases of other shapes: twice the positions, half the rows; what divides evenly among twelve."""
    with Trainer(load(two_rows, [AUTO, "--data.prefetch=0"])) as trainer:
        probe = Probe(
            config=trainer.config, model=trainer.model, forward=trainer.forward, strategy=trainer.strategy, device=CPU, peers=trainer.peers,
            vocab_size=257, n_sources=1, to_come_bytes=to_come(trainer.config, check(trainer.config).model, trainer.world), compiled=False,
        )  # fmt: skip
        phases = Phases([(0, Phase(24, 1, 12)), (5, Phase(48, 1, 8)), (9, Phase(96, 1, 4))])
        rows = probe.rows(trainer.choices.tuned, phases)
        assert rows == {Shape(12, 24): 4, Shape(8, 48): 2, Shape(4, 96): 1}
        assert [(phase.micro_batch, phase.accumulation) for _, phase in phases.cut(rows).stages] == [(4, 3), (2, 4), (1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "model"])
def test_compiled_code_of_the_trials_is_forgotten(two_rows: Path, mode: str) -> None:
    """The compiler makes code for varying sizes once it has seen two. So training compiles as many graphs as without trials, and computes the same."""
    common = (f"--train.compile={mode}", "--train.steps=4", "--scheduler=constant", "--train.validate_every=2", "--train.compile_cache=off")

    def trained(*overrides: str) -> tuple[Trainer, int]:
        torch.compiler.reset()
        with Trainer(load(two_rows, [*common, *overrides])) as trainer:
            before = counters["stats"]["unique_graphs"]
            trainer.train()
        return trainer, counters["stats"]["unique_graphs"] - before

    probed, n_graphs = trained("--run.name=auto", AUTO)
    rows = chosen(probed)["rows"]
    assert 0 < rows < 8
    by_hand, expected = trained("--run.name=hand", f"--train.micro_batch={rows}")
    assert n_graphs == expected > 0
    assert metrics(probed) == metrics(by_hand)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "fsdp2"])
def test_all_ranks_take_what_the_smallest_has_room_for(tiny: Path, zygote: Any, strategy: str) -> None:
    """Rank 1 has room for less than two rows of four; losses are those of one row given by hand, to the last bit."""
    common = (f"--parallel.strategy={strategy}", "--train.steps=4", "--scheduler=constant")
    room = "from titanlm import micro_batch\nmicro_batch.free_bytes = lambda device: 2 * (1 << 40, FREE)[rank]"
    zygote.train(tiny, "--run.name=whole", AUTO, *common, ranks=2, before=room.replace("FREE", "1 << 40")).expect(0)
    root = tiny.parent / "runs"
    (value,) = json.loads((root / "whole" / TUNED).read_text())["choices"].values()
    assert value["rows"] == 4
    free = int((value["needed_bytes"] - 2.5 * 48 * value["bytes_per_token"]) / SHARE)
    launched = zygote.train(tiny, "--run.name=auto", AUTO, *common, ranks=2, before=room.replace("FREE", str(free))).expect(0)
    assert ["trying micro-batches of 1 row of 48" in launched.output(rank) for rank in (0, 1)] == [True, False]
    zygote.train(tiny, "--run.name=hand", "--train.micro_batch=1", *common, ranks=2).expect(0)
    (value,) = json.loads((root / "auto" / TUNED).read_text())["choices"].values()
    assert value["rows"] == 1
    found = [[row["loss"] for row in map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines()) if "loss" in row] for name in ("auto", "hand")]
    assert len(found[0]) == 4
    assert found[0] == found[1]


@pytest.mark.gpu
def test_on_a_gpu_the_prediction_holds(tiny: Path) -> None:
    """The peak of steps with the rows that were chosen stays within what the probe said they need, and the budget."""
    big = ["--train.device=cuda", "--train.deterministic=false", "--train.seq_len=512", "--model.d_model=256", "--model.d_ff=1024", "--train.global_batch=64"]
    for more in ([], ["--train.compile=block", "--train.precision=bf16"]):
        with Trainer(load(tiny, [*big, *more, AUTO, f"--run.name=gpu-{len(more)}", "--validation=[]"])) as trainer:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                trainer.train_step()
            peak = torch.cuda.max_memory_allocated() - held
            value = chosen(trainer)
            assert value["rows"] == 64
            assert 0.5 < peak / value["needed_bytes"] < 1.1
            assert value["needed_bytes"] <= SHARE * value["free_bytes"]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["none", "replicate"])
def test_on_a_gpu_without_memory_fewer_rows_are_taken(tiny: Path, strategy: str, zygote: Any) -> None:
    """The allocator is forbidden what `mem_get_info` says is free, so a trial fails as it does where another process took the memory meanwhile."""
    code = f"""
import json, torch
from titanlm.config import load
from titanlm.train import Trainer
big = ["--train.device=cuda", "--train.deterministic=false", "--train.seq_len=512", "--model.d_model=256", "--model.d_ff=1024", "--train.global_batch=64"]
big += ["--validation=[]", "--parallel.strategy={strategy}"]
def rows(name, *more):
    with Trainer(load({str(tiny)!r}, [*big, "--run.name=" + name, *more])) as trainer:
        trainer.train_step()
        trainer.train_step()
        torch.cuda.synchronize()
        return trainer.phase.micro_batch, torch.cuda.max_memory_reserved()
by_hand, needed = rows("hand", "--train.micro_batch=64")
torch.cuda.empty_cache()
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(0.7 * needed / total)
print(json.dumps([by_hand, rows("auto", "{AUTO}")[0]]))
"""
    by_hand, found = json.loads(zygote.run(code, ranks=1).expect(0).output(0).splitlines()[-1])
    assert by_hand == 64
    assert found in (8, 16, 32)


# ---------------------------------------------------------------- the settings
def test_settings_that_exclude_one_another(tiny: Path) -> None:
    assert Train().micro_batch == 8
    assert (Train(micro_batch_tokens=96).micro_batch, Train(micro_batch_tokens=96).rows(48)) == (None, 2)
    assert (Train(micro_batch_tokens="auto").rows(48), Train(micro_batch=3).rows(48)) == (None, 3)
    for config in (load(tiny), load(tiny, [AUTO]), load(tiny, ["--train.micro_batch_tokens=96"])):
        assert loads(dump(config)) == config
    text = tiny.read_text().replace("micro_batch = 4", 'micro_batch = 4\nmicro_batch_tokens = "auto"')
    with pytest.raises(ConfigError, match="'train' holds a value, not a table"):
        load(tiny, ["--train=3", AUTO])
    both = tiny.with_name("both.toml")
    both.write_text(text)
    with pytest.raises(ConfigError, match=r"both\.toml:\d+: train\.micro_batch_tokens: excludes `micro_batch`"):
        load(both)
    # What is laid over takes the other's place, from the command line and from a file.
    assert load(tiny, ["--train.micro_batch=2", AUTO, "--train.micro_batch=1"]).train.rows(48) == 1
    child = tiny.with_name("child.toml")
    child.write_text('extends = "tiny.toml"\n[train]\nmicro_batch_tokens = 192\n')
    assert load(child).train.rows(48) == 4
    assert load(child, ["--train.micro_batch=2"]).train.rows(48) == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("100", "train.micro_batch_tokens: 100 is no multiple of train.seq_len = 48"),
        ("144", "train.micro_batch_tokens: 3 rows do not divide train.global_batch = 8"),
    ],
)
def test_numbers_that_do_not_fit(tiny: Path, value: str, said: str) -> None:
    assert check(load(tiny, [f"--train.micro_batch_tokens={value}"])).problems == [said]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("most", "expected 'auto' or an integer, got str 'most'"),
        ("0", "expected 'auto' or a number greater than 0, got int 0"),
        ("1.5", "expected 'auto' or an integer, got float 1.5"),
        ("true", "expected 'auto' or an integer, got bool True"),
    ],
)
def test_values_that_are_neither(tiny: Path, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny, [f"--train.micro_batch_tokens={value}", "--train.steps=x"])
    assert caught.value.problems == [
        "--train.steps: train.steps: expected an integer, got str 'x'",
        f"--train.micro_batch_tokens: train.micro_batch_tokens: {said}",
    ]


def test_tokens_are_rows(tiny: Path) -> None:
    common = ("--train.steps=3", "--scheduler=constant")
    tokens, rows = run(tiny, "--run.name=t", "--train.micro_batch_tokens=96", *common), run(tiny, "--run.name=r", "--train.micro_batch=2", *common)
    assert metrics(tokens) == metrics(rows)
    assert not (tokens.folder.path / TUNED).exists()


def test_without_a_device_it_is_said_to_be_unknown(tiny: Path) -> None:
    assert "8 rows × 48, micro-batches of as many rows as a probe at the start finds to fit" in dry_run(load(tiny, [AUTO]))
