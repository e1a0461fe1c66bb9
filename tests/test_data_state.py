"""`titanlm data state`, `data.start`, the best checkpoint, cadence of validation, the end of the data: through the real command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from titanlm.checkpoint import load as load_checkpoint
from titanlm.checkpoint import steps
from titanlm.cli import main
from titanlm.config import load
from titanlm.data_state import start_state
from titanlm.stream import streams_of
from titanlm.train import Trainer

RECORD = {"global_step": 2000, "consumed_samples": 32110000, "consumed_shards": 3211, "rows_per_shard": 10000, "seed": 42}


@pytest.fixture(autouse=True)
def constant(tiny: Path) -> None:
    """A schedule that does not depend on the number of steps."""
    text = re.sub(r"\[scheduler\]\n.*\n.*\n", "", tiny.read_text())
    tiny.write_text('scheduler = "constant"\n' + text)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def train(config: Path, *overrides: str) -> Path:
    assert main(["train", str(config), *overrides]) == 0
    name = next((word.partition("=")[2] for word in overrides if word.startswith("--run.name=")), "tiny")
    return config.parent / "runs" / name


def documents_read(run: Path) -> list[int]:
    (state,) = load_checkpoint(steps(run / "checkpoints")[-1][1]).ranks
    return [stream["dataset"]["counts"]["documents"] for stream in state["data"]["streams"].values()]


def test_state_is_shown_exported_and_taken_up_exactly(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny, "--train.steps=5", "--validation=[]")
    capsys.readouterr()
    assert main(["data", "state", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "step              5, 1,920 tokens" in shown
    assert f"rows documents {sum(documents_read(run)):,}, empty 0" in shown
    file = tiny.with_name("data_state.json")
    assert main(["data", "state", str(run), "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    read = sum(documents_read(run))
    assert [record[name] for name in RECORD] == [5, read, read, 1, 42]
    # Weights as new, data where the other run stood: the same documents as that run's next ones.
    straight = train(tiny, "--train.steps=9", "--validation=[]", "--run.name=straight")
    for name, start in (("json", file), ("folder", run), ("checkpoint", run / "checkpoints" / "step-00000005")):
        other = train(tiny, "--train.steps=4", "--validation=[]", f"--run.name={name}", f"--data.start={start}")
        assert documents_read(other) == documents_read(straight)


def test_a_record_of_others_is_taken_up_by_whole_shards_and_said_to_be_approximate(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tiny.with_name("theirs.json")
    record.write_text(json.dumps({**RECORD, "consumed_samples": 20, "consumed_shards": 20, "rows_per_shard": 1}))
    start = tiny.with_name("start.json")
    assert main(["data", "state", "--import", str(record), "--output", str(start)]) == 0
    assert "APPROXIMATE" in capsys.readouterr().out
    ordered = ("--dataset.shuffle=false", "--validation=[]", "--train.steps=1", "--data.n_streams=4", "--dataset.validation_fraction=0")
    run = train(tiny, *ordered, f"--data.start={start}")
    (state,) = load_checkpoint(steps(run / "checkpoints")[-1][1]).ranks
    taken = [stream["dataset"] for stream in state["data"]["streams"].values()]
    assert all(one["taken"] - one["counts"]["documents"] == 5 for one in taken)
    assert main(["train", str(tiny), f"--data.start={start}", "--run.name=shuffled"]) == 2
    assert "dataset.shuffle = false" in capsys.readouterr().err


def test_e5_counts_that_contradict_one_another_need_trust(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, start = tiny.with_name("theirs.json"), tiny.with_name("start.json")
    record.write_text(json.dumps({**RECORD, "consumed_samples": 32112000}))
    assert main(["data", "state", "--import", str(record), "--output", str(start)]) == 2
    said = r"3,211 shards of 10,000 rows are 32,110,000 samples, it says 32,112,000; .*--trust samples\|shards"
    assert re.search(said, capsys.readouterr().err)
    assert not start.exists()
    assert main(["train", str(tiny), f"--data.start={record}"]) == 2
    assert "contradict" in capsys.readouterr().err
    for trust, said in (("shards", "skips 3,211 whole shards, in"), ("samples", "skips 3,211 whole shards and 2,000 rows of the next")):
        assert main(["data", "state", "--import", str(record), "--trust", trust, "--output", str(start)]) == 0
        assert said in capsys.readouterr().out
        assert json.loads(start.read_text())["trusted"] == trust


@pytest.mark.parametrize("change", ["", "[]", "{}", {"consumed_samples": -1}, {"seed": "42"}, {"rows_per_shard": 0}])
def test_what_is_no_state_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str], change: str | dict) -> None:
    file = tiny.with_name("bad.json")
    file.write_text(change if isinstance(change, str) else json.dumps({**RECORD, **change}))
    assert main(["train", str(tiny), f"--data.start={file}"]) == 2
    error = capsys.readouterr().err
    assert "bad.json" in error
    assert "Traceback" not in error


def test_a_start_of_other_data_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny, "--train.steps=1", "--validation=[]")
    assert main(["train", str(tiny), f"--data.start={run}", "--run.name=other", "--dataset.validation_fraction=0.2"]) == 2
    assert "the dataset is another" in capsys.readouterr().err
    # The same files read in another order: the places would mean other rows.
    for change, said in (("--train.seed=7", "train.seed: 42 → 7"), ("--dataset.shuffle=false", "'shuffle': False"), ("--packer=none", "'name': 'none'")):
        assert main(["train", str(tiny), f"--data.start={run}", "--run.name=other", change]) == 2
        assert said in capsys.readouterr().err


def test_an_exact_state_is_not_imported_as_a_record(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = train(tiny, "--train.steps=1", "--validation=[]"), tiny.with_name("exact.json")
    assert main(["data", "state", str(run), "--output", str(file)]) == 0
    assert main(["data", "state", "--import", str(file), "--output", str(tiny.with_name("start.json"))]) == 2
    assert "holds an exact state" in capsys.readouterr().err


def test_a_state_saved_by_a_run_with_workers_is_shown_and_handed_on_as_any(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for name, workers in (("alone", 0), ("together", 2)):
        run, file = train(tiny, "--train.steps=5", "--validation=[]", f"--run.name={name}", f"--data.workers={workers}"), tiny.with_name(f"{name}.json")
        capsys.readouterr()
        assert main(["data", "state", str(run)]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert main(["data", "state", str(run), "--output", str(file)]) == 0
        shown.append((lines, json.loads(file.read_text())))
    assert shown[0] == shown[1]


def test_a_record_counts_files_of_parquet_however_they_are_cut(tiny: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(3):
        table = pa.table({"text": [f"file {number} row {row}" for row in range(100)]})
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=10)
    record = tmp_path / "theirs.json"
    record.write_text(json.dumps({**RECORD, "consumed_samples": 200, "consumed_shards": 2, "rows_per_shard": 100}))
    for n_streams in (1, 2, 3, 4, 64):  # files, row groups and ranges of rows
        dataset = f'--dataset={{name="parquet",paths=["{tmp_path}/*.parquet"],shuffle=false}}'
        config = load(tiny, [dataset, "--validation=[]", f"--data.n_streams={n_streams}", f"--data.start={record}", "--data.epochs=1"])
        tokenizer = config.tokenizer.build()
        streams = streams_of(config, tokenizer, seq_len=48)
        state = start_state(config, streams, {})
        for number, stream in enumerate(streams):
            stream.restore(state["streams"][str(number)])
        texts = [tokenizer.decode(document.ids) for stream in streams for document in stream.dataset]
        assert sorted(texts) == sorted(f"file 2 row {row}" for row in range(100))


def test_c19_the_best_checkpoint_survives_rotation_and_resume(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from titanlm import train as module
    from titanlm.evaluate import Scores

    values = iter([3.0, 2.0, 5.0, 4.0, 2.5, 6.0])
    monkeypatch.setattr(module, "score", lambda *_: Scores(loss=next(values), n_tokens=1, n_bytes=1, nll=1.0))
    settings = ["--train.validate_every=2", "--checkpoint.every=1", "--checkpoint.keep_last=1", "--checkpoint.best=validation/validation/loss"]
    text = re.sub(r"\[averager\]\n.*\n.*\n", "", tiny.read_text())
    tiny.write_text(text)
    run = train(tiny, "--train.steps=7", *settings)  # scored after 2, 4, 6 and at the end
    assert [step for step, _ in steps(run / "checkpoints")] == [4, 7]
    assert json.loads((run / "best.json").read_text()).items() >= {"metric": "validation/validation/loss", "value": 2.0, "step": 4}.items()
    run = train(tiny, "--train.steps=9", *settings)
    assert [step for step, _ in steps(run / "checkpoints")] == [4, 9]
    capsys.readouterr()
    monkeypatch.undo()
    assert main(["eval", str(run), "--step", "best"]) == 0
    assert "step-00000004" in capsys.readouterr().out


def test_each_validation_set_has_its_own_cadence(tiny: Path) -> None:
    sets = '--validation=[{name="often",max_tokens=100,every=2},{name="rarely",max_tokens=100,every=3},{name="end",max_tokens=100}]'
    run = train(tiny, "--train.steps=6", sets)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {name: [line["step"] for line in lines if f"validation/{name}/loss" in line] for name in ("often", "rarely", "end")}
    assert scored == {"often": [2, 4, 6], "rarely": [3, 6], "end": [6]}


def test_a_run_ends_with_its_data_and_keeps_what_it_learnt(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny, "--train.steps=500", "--data.epochs=1", "--dataset.max_bytes=40", "--train.global_batch=32", "--train.log_every=10", "--packer=best_fit")
    shown = capsys.readouterr().out
    end = int(re.search(r"as often as `epochs` says: training ends at step (\d+) of 500", shown)[1])
    assert 0 < end < 500
    assert steps(run / "checkpoints")[-1][0] == end
    assert (run / "scored.json").exists()
    config = load(tiny, ["--dataset.max_bytes=40"])
    (stream,) = streams_of(config, config.tokenizer.build(), seq_len=48, n_streams=1, only=(0,))
    assert sum(documents_read(run)) == stream.n_rows
    assert main(["train", str(tiny), "--train.steps=500", "--data.epochs=1", "--dataset.max_bytes=40", "--train.global_batch=32", "--packer=best_fit"]) == 0
    assert steps(run / "checkpoints")[-1][0] == end


def test_losses_and_tokens_of_each_source_are_logged_and_resume_exactly(tiny: Path) -> None:
    text = tiny.read_text()
    dataset = re.search(r"\[dataset\]\n(.*?)\n(?=\[)", text, re.S)
    settings = dataset[1].splitlines()
    table = "[data.source.dataset]\n" + "\n".join(settings)
    synthetic = '[[data.source]]\nname = "noise"\nweight = 1\n[data.source.dataset]\nname = "synthetic"\nmean_tokens = 30\n'
    mixed = f'[[data.source]]\nname = "prose"\nweight = 3\n{table}\n{synthetic}'
    tiny.write_text(text.replace(dataset[0], "").replace("[train]", f"{mixed}\n[train]"))
    with Trainer(load(tiny, ["--run.name=straight"])) as trainer:
        trainer.train()
    with Trainer(load(tiny, ["--train.steps=7", "--data.workers=2"])) as trainer:
        trainer.train()
    with Trainer(load(tiny)) as trainer:
        trainer.train()
        tokens, n_sources = trainer.source_tokens.tolist(), trainer.loader.n_sources
    assert n_sources == 2
    runs = tiny.parent / "runs"
    assert losses(runs / "tiny") == losses(runs / "straight")
    lines = [json.loads(line) for line in (runs / "tiny" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert [last["source/prose/tokens"], last["source/noise/tokens"]] == tokens
    assert last["source/noise/loss"] > last["source/prose/loss"]
    assert last["data/documents"] > 0
    assert last["data/unreadable"] == last["data/passed_over"] == 0
    assert main(["data", "state", str(runs / "tiny")]) == 0


def test_unreadable_rows_are_counted_named_and_may_be_passed_over(tiny: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write_bytes(corpus.read_bytes() + b"\n\nbroken \xff paragraph")
    settings = ["--data.n_streams=1", "--dataset.validation_fraction=0", "--validation=[]", "--train.steps=16"]
    settings += ["--train.seq_len=500", "--model.max_positions=500"]
    capsys.readouterr()
    assert main(["train", str(tiny), *settings, "--run.name=strict"]) == 2
    assert re.search(r'is not UTF-8 .*data\.on_error = "skip"', capsys.readouterr().err)
    run = train(tiny, *settings, "--run.name=strict", "--data.on_error=skip")
    assert " rows of the data could not be read" in capsys.readouterr().out
    assert main(["data", "state", str(run)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"unreadable [1-9]", shown)
    assert re.search(r"unreadable: .*corpus\.txt: byte \d+ is not UTF-8", shown)
