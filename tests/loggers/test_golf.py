"""The logger ``golf``: its lines, read back by the parser that ``submission verify`` uses on anyone's logs."""

import io
import json
import math
from pathlib import Path

import pytest
import tomli_w

from titanlm.errors import TitanError
from titanlm.loggers.golf import RULE, Golf, GolfConfig
from titanlm.submission.challenge_log import read_log

ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "cuda": "13.0", "cpus": 2, "gpus": [{"name": "H100", "memory_gib": 79.6}],
               "world_size": 8, "n_parameters": 27_092_057}  # fmt: skip


def run_folder(path: Path, **train) -> Path:
    tables = {
        "model": {"name": "golf", "n_heads": 8, "n_kv_heads": 4, "tie_embeddings": True},
        "optimizer": [{"lr": 0.035, "params": ["@embedding"]}, {"lr": 0.025, "params": ["@matrix"]}, {"lr": 0.025, "params": ["@gain"]}],
        "train": {"seed": 1337, "steps": 20_000, "global_batch": 256, "micro_batch": 32, "seq_len": 2048, "priming_steps": 20, **train},
        "validation": [{"name": "fineweb"}, {"name": "sliding"}],
    }
    path.mkdir(exist_ok=True)
    (path / "config.toml").write_text(tomli_w.dumps(tables))
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return path


def logged(folder: Path, steps: list[int], start: int = 0, **config) -> str:
    logger = Golf(GolfConfig(**config), run_dir=folder)
    logger.start(start)
    for step in steps:
        logger.log(step, {"loss": 8 / math.sqrt(step), "elapsed_s": 0.058 * step, "memory_gib": 13.7, "lr": 0.1})
    logger.close()
    return (folder / "train_seed1337.log").read_text()


def test_lines_are_the_challenges(tmp_path):
    logger = Golf(GolfConfig(), run_dir=run_folder(tmp_path / "run", max_wallclock_s=600.0))
    logger.start(0)
    logger.log(10_352, {"loss": 1.93, "elapsed_s": 600.019, "memory_gib": 14_012 / 1024, "reserved_gib": 14_200 / 1024})
    scores = {"fineweb/loss": 1.9341, "fineweb/bits_per_byte": 1.1455, "fineweb/averaged_loss": 1.93, "fineweb/averaged_bits_per_byte": 1.14}
    logger.log(10_352, {f"validation/{name}": value for name, value in (scores | {"sliding/loss": 1.91, "sliding/bits_per_byte": 1.132}).items()})
    logger.close()
    lines = (tmp_path / "run" / "train_seed1337.log").read_text().splitlines()
    assert lines == [
        "Running Python 3.11.7",
        "Running PyTorch 2.13.0",
        "1 x H100, 79.6 GiB, CUDA 13.0",
        "=" * 100,
        "model_params:27092057",
        "world_size:8 grad_accum_steps:1",
        "attention_mode:gqa num_heads:8 num_kv_heads:4",
        "tie_embeddings:True embed_lr:0.035 matrix_lr:0.025 scalar_lr:0.025",
        "train_batch_tokens:524288 train_seq_len:2048 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000",
        "seed:1337",
        "step:10352/20000 train_loss:1.9300 train_time:600019ms step_avg:57.96ms",
        "stopping_early: wallclock_cap train_time:600019ms step:10352/20000",
        "peak memory allocated: 14012 MiB reserved: 14200 MiB",
        "step:10352/20000 val_loss:1.9341 val_bpb:1.1455 train_time:600019ms step_avg:57.96ms",
        "step:10352/20000 val_loss:1.9300 val_bpb:1.1400 train_time:600019ms step_avg:57.96ms weights:averaged",
        "step:10352/20000 val_loss:1.9100 val_bpb:1.1320 train_time:600019ms step_avg:57.96ms set:sliding",
    ]
    told = read_log(io.BytesIO("\n".join(lines).encode()))
    assert (told.seed, told.steps, told.train_time_ms, told.step_avg_ms) == (1337, 10_352, 600_019, 57.96)


def test_the_source_comes_first_and_counts_for_nothing(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text("seed = 'seed:99'\n# step:7/7 val_loss:0.1 val_bpb:0.1\n")
    text = logged(run_folder(tmp_path / "run"), [100], source=str(script))
    assert text.startswith(script.read_text())
    assert text.count(RULE) == 2
    assert (read_log(io.BytesIO(text.encode())).seed, read_log(io.BytesIO(text.encode())).steps) == (1337, 100)


def test_a_resumed_run_cuts_later_lines(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text("text = '''\nstep:999/20000 is source, and stays\n'''\n")
    folder = run_folder(tmp_path / "run")
    straight = logged(folder, [100, 200, 300], source=str(script))
    (folder / "train_seed1337.log").write_text(straight + "step:400/20000 train_lo")  # torn by a kill
    resumed = logged(folder, [300], start=200, source=str(script))
    assert resumed.replace("resumed at step 200\n", "") == straight


def test_a_fresh_start_replaces_the_log(tmp_path):
    folder = run_folder(tmp_path / "run")
    assert logged(folder, [100]) == logged(folder, [100])


def test_echo_prints_the_lines_but_not_the_source(tmp_path, capsys):
    (tmp_path / "s.py").write_text("secret = 1\n")
    text = logged(run_folder(tmp_path / "run"), [100], source=str(tmp_path / "s.py"), echo=True)
    assert capsys.readouterr().out == text.partition(f"{RULE}\n")[2]


def test_texts_cannot_forge_lines_of_a_terminal(tmp_path):
    folder = run_folder(tmp_path / "run")
    logger = Golf(GolfConfig(), run_dir=folder)
    logger.message("before the start: nowhere to go")
    logger.start(0)
    logger.message("\x1b[2Jhello")
    logger.close()
    assert (folder / "train_seed1337.log").read_text().splitlines()[-1] == "\\x1b[2Jhello"


def test_what_cannot_be_read_is_named(tmp_path):
    folder = run_folder(tmp_path / "run")
    with pytest.raises(TitanError, match="nowhere.py: No such file"):
        Golf(GolfConfig(source=str(tmp_path / "nowhere.py")), run_dir=folder).start(0)
    (folder / "environment.json").unlink()
    with pytest.raises(TitanError, match=r"environment\.json: No such file.*'golf'"):
        Golf(GolfConfig(), run_dir=folder).start(0)


def test_training_ends_before_the_share_of_calibration(tmp_path):
    folder = run_folder(tmp_path / "run", max_wallclock_s=10.0)
    with open(folder / "config.toml", "a") as file:
        file.write("[export]\ncalibration_reserve_s = 4.0\n")
    text = logged(folder, [100, 104])  # 5.8 and 6.03 s
    assert text.count("stopping_early: wallclock_cap train_time:6032ms step:104/20000\n") == 1
    assert "max_wallclock_seconds:10.000" in text


def test_a_validation_after_a_resume_knows_how_long_training_took(tmp_path):
    folder = run_folder(tmp_path / "run")
    logged(folder, [100, 200, 300])
    logger = Golf(GolfConfig(), run_dir=folder)
    logger.start(200)
    logger.log(200, {"validation/fineweb/loss": 3.0, "validation/fineweb/bits_per_byte": 1.5})
    logger.close()
    assert (folder / "train_seed1337.log").read_text().splitlines()[-1] == "step:200/20000 val_loss:3.0000 val_bpb:1.5000 train_time:11600ms step_avg:58.00ms"


@pytest.mark.parametrize("source", [b"# coding: nowhere\n", b"x = '\xe9'\n"])
def test_a_source_that_is_no_text_is_named(tmp_path, source):
    (tmp_path / "s.py").write_bytes(source)
    with pytest.raises(TitanError, match=r"s\.py: not Python source in the encoding that it names .*logger\.source"):
        Golf(GolfConfig(source=str(tmp_path / "s.py")), run_dir=run_folder(tmp_path / "run")).start(0)
