"""``submission build``: a folder that ``submission verify`` finds nothing wrong with, and runs that cannot become one."""

import json
import signal
from pathlib import Path

import pytest

from titanlm.cli import main
from titanlm.config import load
from titanlm.errors import TitanError
from titanlm.exporters.artifact import inspect
from titanlm.loggers.golf import RULE
from titanlm.submission.build import About, build
from titanlm.submission.metadata import Record
from titanlm.submission.verify import verify
from titanlm.train import Trainer

ABOUT = About("An Author", "author", "A small one", "Made by a test.", record=Record("#369", 1.9))


def trained(config: Path, name: str, *overrides: str) -> Path:
    with Trainer(load(config, [f"--run.name={name}", "--train.steps=4", "--checkpoint.every=0", *overrides])) as trainer:
        trainer.train()
        return trainer.folder.path


def test_two_seeds_become_a_folder_that_verifies(tiny, tmp_path):
    limit = ("--export.max_bytes=200000", '--quantizer=[{name="int6"}]', '--fitter={name="prune_ladder",fractions=[0.1],above_elements=100}')
    runs = [trained(tiny, "a", *limit), trained(tiny, "b", *limit, "--train.seed=7", "--data.workers=1", '--logger=["golf", "jsonl"]')]
    output = tmp_path / "submission"
    told = build(runs, output, ABOUT)
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "loss.png", "model.titanlm", "requirements.txt", "submission.json", "train_gpt.py", "train_seed42.log", "train_seed7.log",
    ]  # fmt: skip
    text, ok = verify(output)
    assert ok, text

    document = json.loads((output / "submission.json").read_text())
    code, artifact = ((output / name).stat().st_size for name in ("train_gpt.py", "model.titanlm"))
    assert (document["bytes_code"], document["bytes_total"]) == (code, code + artifact)
    assert code + artifact <= 200_000
    assert [result["prune_fraction"] for result in document["seed_results"].values()] == [0.1, 0.1]
    assert "| prune fraction |" in (output / "README.md").read_text()
    assert "validation = []" not in inspect(output / "model.titanlm").config  # so that `titanlm eval` knows what to score it on
    scores = {seed: result["val_bpb"] for seed, result in document["seed_results"].items()}
    assert document["val_bpb"] == pytest.approx(sum(scores.values()) / 2, abs=1e-8)
    assert document["seed_results"][min(scores, key=scores.__getitem__)]["artifact_bytes"] == artifact
    assert f"{code + artifact:,} bytes, of them {code:,} code" in told

    script = (output / "train_gpt.py").read_text(encoding="latin-1")
    logs = [(output / f"train_seed{seed}.log").read_text(encoding="utf-8") for seed in (42, 7)]
    for log in logs:
        assert log.startswith(script)
        assert log.count(RULE) == 2
        assert log.splitlines().count("selected_prune_frac:0.1") == 1
    # One is the run's own, the other made of its metrics; of the same step they say the same.
    assert "made of metrics.jsonl" in logs[0]
    assert "made of metrics.jsonl" not in logs[1]
    assert "parameters, fp32 on cpu" in logs[1]
    for log, run in zip(logs, runs, strict=True):
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line.split()[1] for line in log.splitlines() if "train_loss" in line and line.startswith("step:")] == [
            f"train_loss:{record['loss']:.4f}" for record in metrics if "loss" in record
        ]
    packages = {line.partition("==")[0] for line in (output / "requirements.txt").read_text().split()}
    assert {"torch", "numpy", "pydantic", "zstandard"} <= packages
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_was_settled_after_training(tiny, tmp_path):
    run = trained(tiny, "a", "--export.max_bytes=1000", '--logger=["golf", "jsonl"]')
    build([run], tmp_path / "s", ABOUT, overrides=["--export.max_bytes=200_000", '--quantizer=[{name="int8"}]'])
    text, ok = verify(tmp_path / "s")
    assert ok, text
    assert 'name = "int8"' in inspect(tmp_path / "s" / "model.titanlm").config
    for changed in ("--model.d_ff=32", '--quantizer=[{name="int8",qat=true}]'):
        with pytest.raises(TitanError, match=r"(model\.d_ff|quantizer\S*): .* was trained with .* would train another model"):
            build([run], tmp_path / "t", ABOUT, overrides=[changed])


def test_runs_that_cannot_become_a_submission(tiny, tmp_path):
    run = trained(tiny, "a")
    other = trained(tiny, "b", "--train.seed=7", "--model.d_ff=32")
    unfinished = trained(tiny, "c", "--train.seed=8")
    with pytest.raises(TitanError, match=r"model\.d_ff is 32, and 64 in .*nothing but the seed"):
        build([run, other], tmp_path / "s", ABOUT)
    with pytest.raises(TitanError, match="more than one run has seed 42"):
        build([run, run], tmp_path / "s", ABOUT)
    with pytest.raises(TitanError, match="not a run folder"):
        build([tmp_path], tmp_path / "s", ABOUT)
    with pytest.raises(TitanError, match="exists; name a new folder"):
        build([run], run, ABOUT)
    (unfinished / "metrics.jsonl").unlink()
    with pytest.raises(TitanError, match=r"metrics\.jsonl: No such file.*logger 'jsonl'"):
        build([unfinished], tmp_path / "s", ABOUT)
    assert not (tmp_path / "s").exists()
    assert not list(tmp_path.glob(".s-*"))


def test_a_run_that_was_stopped_is_no_result(tiny, tmp_path, monkeypatch):
    config = load(tiny, ["--run.name=stopped", "--train.steps=4"])
    with Trainer(config) as trainer:
        trainer.train_step()
        trainer.save(wait=True)
    with pytest.raises(TitanError, match="step 1 of 4; train it to the end"):
        build([tmp_path / "runs" / "stopped"], tmp_path / "s", ABOUT)


@pytest.mark.slow
def test_what_happens_meanwhile_leaves_nothing(tiny, tmp_path, monkeypatch):
    run = trained(tiny, "a")
    output = tmp_path / "s"
    monkeypatch.setattr("titanlm.submission.build.plot", lambda metrics, path: (output / "somebody's").mkdir(parents=True))
    with pytest.raises(TitanError, match="cannot be made .*name a folder that is not there"):
        build([run], output, ABOUT)
    assert [path.name for path in output.iterdir()] == ["somebody's"]
    monkeypatch.setattr("titanlm.submission.build.plot", lambda metrics, path: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        build([run], tmp_path / "t", ABOUT)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "t").exists()
    assert not [*tmp_path.glob(".s-*"), *tmp_path.glob(".t-*")]
    with pytest.raises(TitanError, match="exists; name a new folder"):
        build([run], Path(), ABOUT)


@pytest.mark.slow
def test_over_the_limit_nothing_is_written(tiny, tmp_path, capsys):
    run = trained(tiny, "a", "--export.max_bytes=110000")
    words = ["submission", "build", str(run), "--output", str(tmp_path / "s"), "--name", "N", "--author", "A", "--github-id", "a"]
    assert main([*words, "--record", "#1", "much"]) == 2
    assert "--record: 'much' is no number" in capsys.readouterr().err
    assert main(words) == 2
    assert "over" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
