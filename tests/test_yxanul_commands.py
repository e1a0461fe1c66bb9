"""The commands of the recipe's README, in its order, small: each is run as it stands there, with overrides that only change sizes and the device."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from titanlm import checkpoint, cli
from titanlm.tokenizers.superbpe_training import train_superbpe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "recipes" / "yxanul" / "README.md").read_text(encoding="utf-8")
SIZES = (
    *("--model.n_layers=2", "--model.d_model=32", "--model.n_heads=4", "--model.d_ff=64", "--model.embedding_rank=16", "--model.expect_params=9_619_344"),
    *("--model.attention_backend=sdpa", "--train.compile=none", "--train.threads=1", "--train.log_every=1", "--train.micro_batch_tokens=192"),
    *("--curriculum=[{start_step=0,seq_len=24,batch=4,accumulation=2},{start_step=1,seq_len=48,batch=4,accumulation=2,clip=0.5}]", "--train.seq_len=48"),
    *("--loss.chunk_tokens=64", "--data.n_streams=8", "--validation.0.max_tokens=500", "--scheduler.warmup_steps=1"),
)
CANARY = "hf_canary51c8e2"


def commands() -> list[tuple[str, list[str]]]:
    """(what, words after titanlm) of the table, from the column that is ours."""
    table = PAGE.partition("## Commands of the document")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line.strip("| ")) for line in table.splitlines()[2:]]
    return [(what.strip(), shlex.split(command)) for what, _, ours in rows for command in re.findall(r"`titanlm ([^`]+)`", ours)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the document has it: configs, tokenizer, the data in one parquet file, and validation files with the columns of the real ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    (tmp_path / "experimental-pretrain-1b").mkdir()
    (tmp_path / "validation").mkdir()
    sums = {"question": [f"What is {n} and {n + 1}?" for n in range(20)], "answer": [f"{n} + {n + 1} = {2 * n + 1}" for n in range(20)]}
    pq.write_table(pa.table(sums), tmp_path / "validation" / "gsm8k_validation.parquet")
    functions = {"prompt": [f"def f{n}(x):\n" for n in range(20)], "canonical_solution": [f"    return x + {n}\n" for n in range(20)]}
    pq.write_table(pa.table({"task_id": [f"task/{n}" for n in range(20)], **functions}), tmp_path / "validation" / "humaneval_validation.parquet")
    words = ["the", "sun", "and", "the", "sea", "of", "a", "day", "by", "the", "way", "to", "an", "island", "of", "rain"]
    texts = [f"Text {number}: " + " ".join(words[(number * k + k // 3) % 17 % len(words)] for k in range(20)) for number in range(400)]
    columns = {"text": texts, "source": ["web"] * 400, "num_tokens": [40] * 400}
    pq.write_table(pa.table(columns), tmp_path / "experimental-pretrain-1b" / "dataset_1b.parquet")
    train_superbpe(lambda: texts, tmp_path / "tokenizers" / "superbpe_t80k", 300, 280)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    return tmp_path


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_every_command_of_the_table_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: dict[str, str] = {}
    trained = 0
    for what, words in commands():
        if words[0] == "train":
            trained += 1
            words = [*words, *SIZES, "--train.device=cpu", f"--train.steps={2 * trained}"]
        elif words[0] == "env":
            assert cli.main(words) == int(not torch.cuda.is_available())
            assert torch.cuda.is_available() or "train.device: 'cuda' is not available here" in capsys.readouterr().out
            words = [*words, "--train.device=cpu"]
        elif words[0] == "eval":
            words = [*words, "--device", "cpu"]
        assert cli.main(words) == 0, what
        captured = capsys.readouterr()
        said[what] = captured.out + captured.err

    assert list(said) == ["check of the machine", "check of the data", "train", "without FP8", "evaluation only", "resume", "the ten stages"]
    for name in ("torch", "CUDA", "cuDNN", "torchao", "GPU"):
        assert re.search(rf"^{name}\b", said["check of the machine"], re.MULTILINE)
    assert said["check of the machine"].endswith("everything it needs is here\n")
    runs = place / "runs"
    assert "float8: 14 matrices, " in (runs / "yxanul_270m" / "log.txt").read_text(encoding="utf-8")
    assert "float8" not in (runs / "bf16" / "log.txt").read_text(encoding="utf-8")
    assert re.findall(r"^  (\w+): loss", said["evaluation only"], re.MULTILINE) == ["english", "math", "code", "summary"]
    assert "from step 2 on: seq_len 48" in said["train"]
    resumed = losses(runs / "yxanul_270m")
    assert len(resumed) == 6  # two steps, and those up to the sixth of the third command
    assert checkpoint.load(runs / "yxanul_270m" / "checkpoints" / "step-00000006").state["progress"]["step"] == 6
    assert len(losses(runs / "yxanul_270m_ultra")) == 2 * trained
    # TensorBoard, read by its own reader.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "yxanul_270m" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(resumed, rel=1e-6)
    # The token is nowhere.
    assert CANARY not in "".join(said.values())
    assert [path for path in runs.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []


def test_the_check_of_the_machine_counts_what_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["env", "train_configs/yxanul/h100.toml"]) == 1
    assert "h100.toml: train.device: 'cuda' is not available here" in capsys.readouterr().out


def test_the_example_of_an_environment_is_read_by_a_shell(tmp_path: Path) -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE) == [("HF_TOKEN", "")]
    (tmp_path / ".env").write_text(text.replace("HF_TOKEN=", f"HF_TOKEN={CANARY}"), encoding="utf-8")
    assert "`set -a; . ./.env; set +a`" in PAGE
    done = subprocess.run(["sh", "-c", "set -a; . ./.env; set +a; printenv HF_TOKEN"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{CANARY}\n"
    assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
