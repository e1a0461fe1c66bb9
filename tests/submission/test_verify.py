"""Folders as the challenge has them, hostile ones, and one of ours that is scored again."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import titanlm
from titanlm.cli import main
from titanlm.errors import TitanError
from titanlm.exporters.encoding import ExportRequest
from titanlm.registry import Component
from titanlm.submission import process, rescore
from titanlm.submission.challenge_log import ChallengeLog, read_log
from titanlm.submission.verify import checks, verify

BYTES_PER_TOKEN = 2.43593
"""Of the challenge's validation set with its tokenizer of 1,024 tokens."""
SEEDS_369 = {2024: (1.13189429, 15_825_080, 10_342), 1337: (1.13196492, 15_886_143, 10_352), 42: (1.13444261, 15_892_189, 10_353)}
"""Score, bytes and steps that the logs of pull request 369 end with."""
CODE_369 = 61_147
"""Bytes of the script that ran there; the one in its folder is the baseline's."""


def log_text(seed: int, bpb: float, total: int, steps: int, code: int, source: str = "import torch\n") -> str:
    """A log in the challenge's lines; the source above the run tries to be taken for one."""
    loss = bpb * math.log(2) * BYTES_PER_TOKEN
    lines = [
        f"step:1/2 val_loss:1.0 val_bpb:0.5\nfinal_int8_zlib_roundtrip_exact val_loss:1.00000000 val_bpb:0.50000000\nCode size: 7 bytes\n{source}",
        "=" * 100,
        "Running Python 3.12.3",
        "=" * 100,
        "model_params:27092057",
        "train_batch_tokens:524288 train_seq_len:2048 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000",
        f"seed:{seed}",
        "warmup_step:1/20",
        "step:1/20000 train_loss:6.9318 train_time:120ms step_avg:120.01ms",
        "step:500/20000 val_loss:2.3801 val_bpb:1.4096 train_time:29010ms step_avg:58.02ms",
        f"step:{steps}/20000 val_loss:1.9348 val_bpb:1.1459 train_time:600019ms step_avg:57.96ms",
        f"stopping_early: wallclock_cap train_time:600019ms step:{steps}/20000",
        "peak memory allocated: 14012 MiB reserved: 14400 MiB",
        "ema:applying EMA weights",
        "prune_trial:0.10 artifact:16098168 OVER",
        "Total submission size: 107530913 bytes",
        "Serialized model int6+zstd: 15763933 bytes",
        f"Code size: {code} bytes",
        "Total submission size int6+zstd: 16098168 bytes",
        f"Total submission size int6+zstd: {total} bytes",
        "sliding_eval [ 50.0%] 60568/121136 windows running_bpb=1.133",
        f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:178012ms",
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
    ]
    return "\n".join(lines) + "\n"


def foreign(folder: Path, **changes: Any) -> Path:
    """Like the folder of pull request 369."""
    folder.mkdir(parents=True)
    best = SEEDS_369[2024]
    document = {
        "author": "someone", "github_id": "someone", "name": "11L NTK-RoPE", "blurb": "Eleven layers.", "date": "2026-03-21T00:00:00Z",
        "track": "10min_16mb", "val_loss": round(best[0] * math.log(2) * BYTES_PER_TOKEN, 8), "val_bpb": best[0], "bytes_total": best[1],
        "bytes_code": CODE_369,
    } | changes  # fmt: skip
    (folder / "submission.json").write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    (folder / "README.md").write_text("# A record\n")
    (folder / "train_gpt.py").write_text("x = 1\n".ljust(47_686, "#"))
    for seed, (bpb, total, steps) in SEEDS_369.items():
        (folder / f"train_seed{seed}.log").write_text(log_text(seed, bpb, total, steps, CODE_369))
    return folder


def lines(text: str, state: str) -> list[str]:
    return [line.removeprefix(state).strip() for line in text.splitlines() if line.startswith(f"{state} ")]


# ---------------------------------------------------------------- folders of others
def test_pull_request_369_counts_another_script(tmp_path: Path) -> None:
    text, ok = verify(foreign(tmp_path / "369"))
    assert not ok
    failed = lines(text, "FAIL")
    # That is what is wrong with it: neither submission.json nor the logs count the script that lies there.
    assert [line.split(":")[0] for line in failed] == [f"code of '{where}'" for where in ["submission.json", *sorted(f"train_seed{s}.log" for s in SEEDS_369)]]
    assert all("61,147 bytes are counted, train_gpt.py has 47,686" in line for line in failed)
    passed = "\n".join(lines(text, "ok"))
    assert "val_bpb: 1.13189429 is that of 'train_seed2024.log', the best, not the mean (mean 1.13276727, standard deviation 0.00145" in passed
    assert "'train_seed1337.log': seed 1337, 10,352 steps, 600.0 s, val_loss" in passed
    assert passed.count("2.43593 bytes a token") == 3
    assert "bytes_total: 15,825,080 in submission.json, 15,825,080, 15,886,143, 15,892,189 in the logs" in passed
    assert "no model.titanlm" in lines(text, "not checked")[-1]


def test_a_folder_that_is_right_has_no_failure(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "records" / "track_10min_16mb" / "good", val_bpb=1.1328, val_loss=None, bytes_code=..., blurb=..., track=...)
    (folder / "train_gpt.py").write_text("x = 1\n".ljust(CODE_369, "#"))
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "notes.txt").write_text("nothing\n")
    (folder / "final_model.ptz").write_bytes(b"\x80\x04cos\nsystem\n.")
    text, ok = verify(folder)
    assert ok, text
    assert "1.1328 is the mean of 3 logs" in text
    assert "without blurb, bytes_code" in text
    assert "track: 10 minutes and 16,000,000 bytes\n" in text
    assert any(line.startswith("'notes.txt': no line of a challenge log") for line in lines(text, "not checked"))
    assert any(line.startswith("'final_model.ptz': 14 bytes, 61,161 with the code; not opened") for line in lines(text, "not checked"))
    with open(folder / "final_model.ptz", "r+b") as file:
        file.truncate(15_950_000)
    assert lines(verify(folder)[0], "FAIL") == ["'final_model.ptz': 15,950,000 bytes, 16,011,147 with the code; not opened"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"val_bpb": 1.13}, "val_bpb: 1.13 is neither the mean nor that of a log"),
        ({"val_loss": 1.9}, "val_loss: 1.9 is neither"),
        ({"val_bpb": 0.01}, "submission.json: val_bpb = 0.01 is no plausible score"),
        ({"val_bpb": "1.13"}, "submission.json: val_bpb is a string, not a number"),
        ({"val_bpb": True}, "submission.json: val_bpb is true or false"),
        ({"github_id": ...}, "submission.json: github_id is missing"),
        ({"date": "yesterday"}, "submission.json: date is not ISO 8601"),
        ({"bytes_total": 16_000_001}, "bytes of 'submission.json': 16,000,001 of 16,000,000"),
        ({"bytes_total": 15_000_000}, "bytes_total: 15,000,000 in submission.json, 15,825,080"),
        ({"seeds": 3}, "submission.json: seeds is a whole number, not a list or an object"),
        ({"seed_results": {"42": {"val_bpb": 1.2}}}, "seed '42': val_bpb 1.2 in seed_results, 1.13444261 in its log"),
        ({"seed_results": {"42": []}}, "submission.json: seed_results.42 is a list, not an object"),
    ],
)
def test_what_submission_json_has_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    text, ok = verify(foreign(tmp_path / "folder", **change))
    assert not ok
    assert any(line.startswith(said) for line in lines(text, "FAIL")), text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text, ok = verify(tmp_path / "empty")
    assert not ok
    assert [line.split(":")[0] for line in lines(text, "FAIL")] == ["README.md", "submission.json", "train_gpt.py", "logs"]
    folder = foreign(tmp_path / "folder")
    (folder / "submission.json").rename(folder / "submission_ternary.json")
    (folder / "README.md").write_text("")
    (folder / "train_gpt.py").write_text("def (:\n")
    (folder / "train_seed42.log").write_text("seed:42\nstep:5/10 train_loss:3.0 train_time:10ms step_avg:2.0ms\n")
    failed = lines(verify(folder)[0], "FAIL")
    assert failed[0] == "README.md: empty"
    assert failed[1] == "submission.json: missing; rename 'submission_ternary.json' if that is it"
    assert failed[2].startswith("train_gpt.py: is not Python: SyntaxError")
    assert failed[3].startswith("'train_seed42.log': a log without a final score")
    for missing in ({"folder": tmp_path / "nowhere"}, {"folder": folder, "data": tmp_path / "nowhere"}, {"folder": folder, "tokenizer": tmp_path / "nowhere"}):
        with pytest.raises(TitanError, match=r"nowhere: no such f"):
            list(checks(**missing))


def test_time_counts_in_one_track_only(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "fast")
    log = folder / "train_seed42.log"
    log.write_text(log.read_text().replace("600019ms", "602100ms").replace("178012ms", "700000ms"))
    failed = lines(verify(folder)[0], "FAIL")
    assert "training of 'train_seed42.log': 602.1 s of 600 s" in failed
    assert "evaluation of 'train_seed42.log': 700.0 s of 600 s" in failed
    document = json.loads((folder / "submission.json").read_text()) | {"track": "non-record-unlimited-compute-16mb"}
    (folder / "submission.json").write_text(json.dumps(document))
    assert " s of 600 s" not in verify(folder)[0]
    # Where it was handed in counts more than what it says of itself.
    (tmp_path / "track_10min_16mb").mkdir()
    moved = folder.rename(tmp_path / "track_10min_16mb" / "fast")
    assert "training of 'train_seed42.log': 602.1 s of 600 s" in lines(verify(moved)[0], "FAIL")


# ---------------------------------------------------------------- hostile folders
def test_links_and_devices_are_not_read(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "folder")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"author": "SECRET"}))
    for name in ("submission.json", "train_gpt.py"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    os.mkfifo(folder / "train_pipe.log")
    (folder / "sub").symlink_to(tmp_path, target_is_directory=True)
    text, ok = verify(folder)
    assert not ok
    assert sum("a link or a device" in line for line in lines(text, "FAIL")) == 4
    assert "SECRET" not in text
    assert any(line.startswith("submission.json: missing") for line in lines(text, "FAIL"))


def test_sizes_are_looked_at_before_content(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "folder")
    for name in ("submission.json", "train_gpt.py", "README.md", "train_seed42.log", "model.titanlm"):
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40)  # holes: a terabyte that takes no space
    text, ok = verify(folder)
    assert not ok
    assert sum("1,099,511,627,776 bytes, of which at most" in line for line in lines(text, "FAIL")) == 3
    assert any(line == "model.titanlm: over the limit, so it is not opened" for line in lines(text, "not checked"))


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00junk", b"[" * 200_000, b'{"a":' * 100_000,
     b"[]", b"null", b'{"val_bpb": NaN}', b'{"val_bpb": ' + b"9" * 10_000 + b"}", b'{"val_bpb": 1e999}', b""],
)  # fmt: skip
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = foreign(tmp_path / "folder")
    (folder / "submission.json").write_bytes(content)
    text, ok = verify(folder)
    assert not ok
    assert any(line.startswith("submission.json: ") for line in lines(text, "FAIL"))


@pytest.mark.parametrize("content", [b"(" * 100_000, b"-" * 1_000_000, b"x" + b".a" * 300_000, b"\x00\x01\xff", b"\xff" * 100])
def test_scripts_that_break_the_parser(tmp_path: Path, content: bytes) -> None:
    folder = foreign(tmp_path / "folder")
    (folder / "train_gpt.py").write_bytes(content)
    text, ok = verify(folder)
    assert not ok
    assert any(line.startswith("train_gpt.py: is not Python") for line in lines(text, "FAIL"))


def test_scripts_are_not_run(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "folder")
    (folder / "train_gpt.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "ast.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")  # a namesake of what the parser imports
    verify(folder)
    assert not (tmp_path / "ran").exists()


def test_names_and_texts_cannot_forge_lines(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "folder", name="n", seed_results={"1\nok  everything": {"val_bpb": 1.0}, "\x1b[2J": []})
    (folder / "a\nok           everything.log").write_text("seed:1\n")
    (folder / "b\x1b[2J\udcff.log").write_text("seed:1\n")
    text, ok = verify(folder)
    assert not ok
    assert not any(line.startswith("ok") and "everything" in line for line in text.splitlines())
    assert text.replace("\n", "").isprintable()
    assert all(line.startswith(("ok ", "FAIL ", "not checked ")) for line in text.splitlines()[:-1])


def test_many_files_are_not_all_read(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "folder")
    for index in range(250):
        (folder / f"{index}.log").write_text("")
    assert any(line.startswith("files: more than 200") for line in lines(verify(folder)[0], "FAIL"))


# ---------------------------------------------------------------- logs
def test_a_log_is_read_after_its_source(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(log_text(7, 1.2, 15_000_000, 9_000, 50_000))
    with open(path, "rb") as file:
        log = read_log(file)
    loss = round(1.2 * math.log(2) * BYTES_PER_TOKEN, 8)
    assert log == ChallengeLog(7, 9_000, 600_019.0, 57.96, 50_000, 15_000_000, "final_int8_zlib_roundtrip_exact", loss, 1.2, 178_012.0)
    assert log.bytes_per_token == pytest.approx(BYTES_PER_TOKEN, rel=1e-7)


def test_what_stands_in_the_source_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(log_text(7, 1.2, 15_000_000, 9_000, 50_000).split("model_params")[0])
    with open(path, "rb") as file:
        assert read_log(file) == ChallengeLog()


@pytest.mark.parametrize(
    ("text", "name", "bpb"),
    [
        ("final_int6_exact val_loss:2.0 val_bpb:1.14\nfinal_sliding_window_exact val_loss:1.9 val_bpb:1.12\n", "final_sliding_window_exact", 1.12),
        ("final_a_exact val_loss:1.9 val_bpb:1.12\nfinal_a val_loss:1.9 val_bpb:1.1\n", "final_a_exact", 1.12),
        ("DIAGNOSTIC post_ema val_loss:2.0 val_bpb:1.3\nquantized_ttt_phased val_loss:1.9 val_bpb:1.061 eval_time:1ms\n", "quantized_ttt_phased", 1.061),
        ("4986/20000 val_loss: 2.8 val_bpb: 1.09\nquantized_sliding_window val_loss:2.79 val_bpb:1.085\n", "quantized_sliding_window", 1.085),
        ("step:5/9 val_loss:2.0 val_bpb:1.3 train_time:1ms step_avg:1ms\n", "", None),
        ("final val_loss:nan val_bpb:nan\nfinal val_loss:-1 val_bpb:-1\nfinal val_loss:1.2.3 val_bpb:1.0\n", "", None),
    ],
)  # fmt: skip
def test_which_line_is_the_score(tmp_path: Path, text: str, name: str, bpb: float | None) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with open(path, "rb") as file:
        log = read_log(file)
    assert (log.score_name, log.val_bpb) == (name, bpb)


def test_lines_of_megabytes_cost_no_more_than_their_reading(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "wb") as file:
        for piece in (b"a " * 4_000_000, b"val_loss:" * 500_000, b"step:" + b"1" * 4_000_000, b"\x00\xff" * 1_000_000):
            file.write(piece + b"\n")
        file.write(b"seed:3\n" + b" " * 5_000 + b"seed:4\n" + b"final_exact val_loss:2.0 val_bpb:1.5" + b" " * 3_000_000 + b"val_bpb:9\n")
    with open(path, "rb") as file:
        log = read_log(file)
    assert (log.seed, log.steps, log.val_bpb) == (3, None, 1.5)


# ---------------------------------------------------------------- folders of ours
SCRIPT = '''
import importlib.metadata, json, os, pathlib, socket, sys
assert sys.argv == ["train_gpt.py", "--eval", "model.titanlm", *sys.argv[3:]], sys.argv
assert __name__ == "__main__" and pathlib.Path(__file__).name == "train_gpt.py"
sys.path.insert(0, REPOSITORY)
refused = []
for attempt in (lambda: __import__("titanlm"), lambda: __import__("titanlm.errors"), lambda: socket.create_connection(("192.0.2.1", 9), 1),
                lambda: socket.getaddrinfo("example.org", 80), lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
                lambda: open(pathlib.Path(os.environ["DATA_PATH"], "fineweb_train_000000.bin")), lambda: os.environ["SECRET_TOKEN"]):
    try:
        attempt()
    except (ImportError, PermissionError, KeyError) as error:
        refused.append(type(error).__name__)
assert refused == ["ModuleNotFoundError"] * 2 + ["PermissionError"] * 4 + ["KeyError"], refused
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), 5).close()
class Carried:
    """What a script carries with it can be imported under the blocked name."""
    def find_spec(self, name, path=None, target=None):
        import importlib.machinery
        return importlib.machinery.ModuleSpec(name, self) if name == "titanlm" else None
    def create_module(self, spec): return None
    def exec_module(self, module): module.carried = True
sys.meta_path.insert(0, Carried())
import titanlm
assert titanlm.carried
assert sorted(os.listdir()) == ["model.titanlm", "train_gpt.py"], os.listdir()
assert os.listdir(os.environ["DATA_PATH"]) == ["fineweb_val_000000.bin"]
assert pathlib.Path(os.environ["DATA_PATH"], "fineweb_val_000000.bin").read_bytes() == b"shard"
assert pathlib.Path(os.environ["TOKENIZER_PATH"]).read_bytes() == b"abc"
print("a line before")
print(json.dumps({"validation": {"plain": {"loss": 2.1, "bits_per_byte": 1.25, "tokens": 1000, "bytes": 2400},
                                 "sliding": {"loss": 2.0, "bits_per_byte": SCORE, "tokens": 1000, "bytes": 2400}}}))
'''  # fmt: skip


def scoring(sliding: float) -> str:
    """A script that looks at its surroundings and prints scores."""
    return SCRIPT.replace("REPOSITORY", repr(str(Path(titanlm.__file__).parents[1]))).replace("SCORE", str(sliding))


def ours(folder: Path, script: str, bpb: float = 1.2) -> tuple[Path, Path, Path]:
    """A folder with an artifact of titanlm; validation shards; a tokenizer."""
    folder.mkdir()
    exporter = Component.named("exporter", "artifact", codec="zlib").build()
    exporter.write({"w": torch.arange(12.0).reshape(3, 4)}, ExportRequest(folder / "model.titanlm", "x = 1\n", None, "beside", {"tok.model": b"abc"}, "fp"))
    (folder / "tok.model").unlink()
    (folder / "train_gpt.py").write_text(script)
    (folder / "README.md").write_text("# Ours\n")
    code = len(script.encode())
    total = code + (folder / "model.titanlm").stat().st_size
    loss = round(bpb * math.log(2) * BYTES_PER_TOKEN, 8)
    document = {
        "author": "a", "github_id": "a", "name": "n", "blurb": "b", "date": "2026-04-01", "val_loss": loss, "val_bpb": bpb, "bytes_total": total,
        "bytes_code": code, "seeds": [1], "seed_results": {"1": {"val_bpb": bpb, "val_loss": loss}},
    }  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(document))
    (folder / "train_seed1.log").write_text(log_text(1, bpb, total, 100, code))
    data = folder.parent / "data"
    data.mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000000.bin", "notes.txt"):
        (data / name).write_bytes(b"shard")
    tokenizer = folder.parent / "another_name.model"
    tokenizer.write_bytes(b"abc")
    return folder, data, tokenizer


def test_ours_is_scored_without_titanlm_network_and_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s")
    folder, data, tokenizer = ours(tmp_path / "ours", scoring(1.2003))
    text, ok = verify(folder, data=data, tokenizer=tokenizer)
    assert ok, text
    assert not lines(text, "not checked")
    passed = lines(text, "ok")
    assert "model.titanlm: 1 tensors (zlib, bytes); checksums are right, its tokenizer's too" in passed
    assert "re-score: without titanlm, network and training data, plain: 1.25000000 bits a byte over 1,000 tokens; " in "\n".join(passed)
    assert "score: 1.20030000 on sliding, 1.20000000 in the log, apart by 3.0e-04 where 0.0005 is allowed" in passed


def test_a_score_that_does_not_come_out_fails(tmp_path: Path) -> None:
    folder, data, tokenizer = ours(tmp_path / "ours", scoring(1.2007))
    text, ok = verify(folder, data=data, tokenizer=tokenizer)
    assert not ok
    assert [line.split(":")[0] for line in lines(text, "FAIL")] == ["score"]


def test_a_slice_is_scored_and_not_compared(tmp_path: Path) -> None:
    script = "import json, sys\nprint(json.dumps({'v': {'loss': 1, 'bits_per_byte': 3.0, 'tokens': int(sys.argv[sys.argv.index('--max-tokens') + 1])}}))\n"
    folder, data, tokenizer = ours(tmp_path / "ours", script)
    text, ok = verify(folder, data=data, tokenizer=tokenizer, max_tokens=4096)
    assert ok, text
    assert "v: 3.00000000 bits a byte over 4,096 tokens" in text
    assert [line.split(":")[0] for line in lines(text, "not checked")] == ["score"]


def test_without_data_nothing_of_ours_runs(tmp_path: Path) -> None:
    folder, _, tokenizer = ours(tmp_path / "ours", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for given in ({}, {"tokenizer": tokenizer}):
        text, ok = verify(folder, **given)
        assert ok, text
        assert lines(text, "not checked")[-1].startswith("re-score: asked for" if given else "model.titanlm: 1 tensors by its header")
    empty = tmp_path / "none"
    empty.mkdir()
    assert lines(verify(folder, data=empty, tokenizer=tokenizer)[0], "FAIL") == [f"re-score: {empty}: no validation shards (*_val_*.bin) in it"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys\nsys.exit('no \\x1b[2J weights')\n", "re-score: train_gpt.py --eval ended with status 1: no \\x1b[2J weights"),
        ("print('{}'); print('[1]'); print('[' * 100000); print('{\"v\": {\"loss\": 1, \"bits_per_byte\": null, \"tokens\": 1}}')\n",
         "re-score: train_gpt.py --eval printed no line"),
        ("import sys\nwhile True: sys.stderr.write('x' * 65536)\n", "re-score: printed more than 1,048,576 bytes"),
        ("import os, time\nos.close(1); os.close(2)\ntime.sleep(60)\n", "re-score: took longer than 1 s"),
    ],
)  # fmt: skip
def test_a_script_that_does_not_score(tmp_path: Path, script: str, said: str) -> None:
    folder, data, tokenizer = ours(tmp_path / "ours", script)
    text, ok = verify(folder, data=data, tokenizer=tokenizer, timeout_s=1)
    assert not ok
    assert [line[: len(said)] for line in lines(text, "FAIL")] == [said]


def test_what_a_script_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    start = f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nopen({str(mark)!r}, 'w').write(str(child.pid))\n"
    folder, data, tokenizer = ours(tmp_path / "ours", f"import subprocess, sys\n{start}")
    assert lines(verify(folder, data=data, tokenizer=tokenizer, timeout_s=1)[0], "FAIL") == ["re-score: took longer than 1 s and was stopped"]
    assert ended(int(mark.read_text()))


def ended(pid: int) -> bool:
    """Whether a process is no more, or waits only for whoever takes on orphans to bury it."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_damage_to_the_artifact_is_found(tmp_path: Path) -> None:
    folder, data, tokenizer = ours(tmp_path / "ours", "raise SystemExit('must not run')\n")
    content = bytearray((folder / "model.titanlm").read_bytes())
    content[-1] ^= 1
    (folder / "model.titanlm").write_bytes(content)
    failed = lines(verify(folder, data=data, tokenizer=tokenizer)[0], "FAIL")
    assert failed == ["model.titanlm: the payload does not match its checksum, so the file is damaged; copy or export it again"]
    tokenizer.write_bytes(b"abd")
    content[-1] ^= 1
    (folder / "model.titanlm").write_bytes(content)
    assert lines(verify(folder, data=data, tokenizer=tokenizer)[0], "FAIL") == [
        "model.titanlm: tokenizer file 'tok.model' does not match its checksum: it is damaged or another tokenizer's"
    ]


def test_sizes_of_ours_are_those_of_the_files(tmp_path: Path) -> None:
    folder, _, _ = ours(tmp_path / "ours", "x = 1\n")
    (folder / "train_gpt.py").write_text("x = 12\n")
    failed = [line.split(":")[0] for line in lines(verify(folder)[0], "FAIL")]
    assert failed == ["bytes_total", "code of 'submission.json'", "code of 'train_seed1.log'"]


def test_an_interrupt_leaves_no_folder_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    mark = tmp_path / "pid"
    folder, data, tokenizer = ours(tmp_path / "ours", f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    # A shell's background job, such as a whole test run, may have been told to ignore Ctrl-C.
    heeding = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = heeding + f"import pathlib\nfrom titanlm.submission.verify import verify\nverify({folder!r}, data={data!r}, tokenizer={tokenizer!r})".replace(
        "PosixPath", "pathlib.Path"
    )
    child = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    assert list((tmp_path / "scratch").iterdir())
    child.send_signal(2)
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not list((tmp_path / "scratch").iterdir())
    assert ended(int(mark.read_text()))


def test_the_environment_has_nothing_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "PYTHONPATH", "LD_PRELOAD"):
        monkeypatch.setenv(name, "x")
    assert set(process.environment(tmp_path)) <= {*process._KEPT_VARIABLES, "HOME", "TMPDIR"}


def test_sets_are_taken_from_either_form() -> None:
    values = {"loss": 1.0, "bits_per_byte": 2.0, "tokens": 3}
    assert rescore._sets({"validation": {"v": values}}) == rescore._sets({"v": values, "target": "x"}) == {"v": values}
    assert rescore._sets([values]) == rescore._sets({"v": {**values, "loss": math.inf}}) == {}


@pytest.mark.slow
def test_what_build_makes_is_verified(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, tokenizer = tmp_path / "shards", tmp_path / "spm.model"
    config = tmp_path / "golf.toml"
    config.write_text(
        f"""
run = {{ name = "seed1", dir = "{tmp_path / "runs"}" }}
tokenizer = {{ name = "sentencepiece", path = "{tokenizer}" }}
[dataset]
name = "token_spans"
span_tokens = 64
paths = ["{shards}/*_train_*.bin"]
validation_paths = ["{shards}/*_val_*.bin"]
[model]
name = "golf"
n_layers = 2
d_model = 32
n_heads = 4
n_kv_heads = 2
[[optimizer]]
name = "adamw"
[data]
n_streams = 4
document_mask = false
[train]
steps = 4
seq_len = 32
global_batch = 8
micro_batch = 4
device = "cpu"
log_every = 1
[[validation]]
name = "plain"
[[validation]]
name = "sliding"
packer = {{ name = "sliding", stride = 16 }}
[export]
max_bytes = 16_000_000
"""
    )
    text = f'--dataset={{ name = "text", paths = ["{corpus}"], unit = "paragraph", validation_fraction = 0.2 }}'
    for words in (
        f"tokenizer train --type spm --vocab-size 300 --pad 0 --bos 1 --eos 2 --input {corpus} --output {tokenizer}".split(),
        ["data", "prepare", "--config", str(config), "--output", str(shards), text],
        ["data", "prepare", "--config", str(config), "--output", str(shards), "--split", "validation", text],
        ["train", str(config)],
        f"submission build {tmp_path}/runs/seed1 --output {tmp_path}/made --name n --author a --github-id a --device cpu".split(),
    ):
        assert main(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["submission", "verify", str(tmp_path / "made"), "--data", str(shards), "--tokenizer", str(tokenizer)]) == 0, capsys.readouterr().out
    found = capsys.readouterr().out
    assert not lines(found, "FAIL")
    assert not lines(found, "not checked")
    assert any(re.match(r"score: (\d\.\d+) on sliding, \1 in the log", line) for line in lines(found, "ok")), found
