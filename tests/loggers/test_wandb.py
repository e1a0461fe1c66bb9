"""wandb, offline: one run over resumes, every step once, and nothing secret leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import titanlm
from titanlm.errors import TitanError
from titanlm.loggers.wandb import Wandb, WandbConfig

CANARY = "c0ffee" * 6 + "c0fe"  # has the shape of an API key


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), f"network: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def records(path: Path) -> list[Any]:
    """The protocol buffers of a .wandb file: LevelDB's log format (7-byte headers in blocks of 32 KiB) after 7 bytes of magic."""
    from wandb.proto import wandb_internal_pb2 as protocol

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = protocol.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def stored(folder: Path) -> list[Any]:
    """The records of every finished start of a run, oldest first; waits for wandb's own process, which writes behind us."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 30
        while not any(record.HasField("exit") for record in records(file)):
            assert time.monotonic() < deadline, f"{file} is not finished"
            time.sleep(0.02)
        found += records(file)
    return found


def rows(folder: Path) -> list[dict[str, float]]:
    """What `wandb sync` would send, in its order; keys with a leading underscore are wandb's."""
    found = []
    for record in stored(folder):
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({"step": row["_step"], **{key: value for key, value in row.items() if not key.startswith("_")}})
    return found


def logger(folder: Path, step: int, **settings: Any) -> Wandb:
    if list(folder.glob("wandb/offline-run-*")):
        time.sleep(1.05 - time.time() % 1)  # wandb names folders by the second
    made = Wandb(WandbConfig(**settings), run_dir=folder)
    made.message("before the start")
    made.start(step)
    return made


KILLED = """
import os, signal, sys
from pathlib import Path
from titanlm.loggers.wandb import Wandb, WandbConfig
logger = Wandb(WandbConfig(), run_dir=Path(sys.argv[1]))
logger.start(0)
for step in range(1, 31):
    logger.log(step, {"loss": 1 / step})
    if step % 10 == 0:
        logger.log(step, {"validation/a/loss": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_goes_on_as_the_same_run_without_gap_or_repeat(tmp_path: Path) -> None:
    run = tmp_path / "run"
    variables = {**os.environ, "PYTHONPATH": str(Path(titanlm.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(run)], env=variables, timeout=120)
    assert done.returncode == -signal.SIGKILL
    with open(run / "wandb.jsonl", "a") as journal:
        journal.write('{"step": 31, "met')
    second = logger(run, 20)  # the checkpoint was of step 20
    for step in (21, 22):
        second.log(step, {"loss": -float(step)})
    second.close()
    third = logger(run, 22)  # after a clean end
    third.log(23, {"loss": -23.0})
    third.log(23, {"validation/a/loss": 1.0})
    third.close()

    expected = [{"step": step, "loss": 1 / step} for step in range(1, 21)] + [{"step": step, "loss": -float(step)} for step in (21, 22, 23)]
    expected[9]["validation/a/loss"], expected[19]["validation/a/loss"], expected[22]["validation/a/loss"] = 10.0, 20.0, 1.0
    assert rows(run) == expected
    ids = {record.run.run_id for record in stored(run) if record.HasField("run")}
    assert ids == {json.loads((run / "wandb.json").read_text())["id"]}


def test_steps_of_a_clean_end_are_not_sent_again_by_a_run_that_was_wound_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, last in ((0, 3), (1, 5)):
        made = logger(run, step)
        for at in range(step + 1, last + 1):
            made.log(at, {"loss": float(at)})
        made.close()
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]


def test_unfinished_rows_that_were_synced_by_hand_are_not_sent_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = logger(run, 0)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "grad_norm": float("inf")})
    first._send()
    first._run.finish()  # close() was never called
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    file.with_name(file.name + ".synced").touch()
    second = logger(run, 2)
    for step in (3, 4):
        second.log(step, {"loss": -float(step)})
    second.close()
    assert [(row["step"], row["loss"]) for row in rows(run)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0)]


def test_nothing_outside_the_run_is_deleted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "offline-run-x").mkdir()
    (run / "wandb").mkdir()
    (run / "wandb.json").write_text('{"id": "a", "sent": -1, "unfinished": "../../offline-run-x"}')
    logger(run, 0).close()
    assert (tmp_path / "offline-run-x").is_dir()


def test_nothing_secret_is_stored_or_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("HF_TOKEN", "hf_canary_in_environment")
    monkeypatch.setattr(sys, "argv", ["train", "--token=argv_canary"])
    config = f'use_cls_token = true\npath = "https://me:url_canary@example.org/x"\nlist = [{{ a = "{CANARY}", b = "x hf_canary_in_environment" }}]\n'
    (run / "config.toml").write_text(config)
    made = logger(run, 0)
    made.message("message_canary")
    made.log(1, {"loss": 1.0})
    made.close()
    (sent,) = (record.run for record in stored(run) if record.HasField("run"))
    values = {item.key: json.loads(item.value_json) for item in sent.config.update}
    assert values["use_cls_token"] is True
    assert values["path"] == "https://***@example.org/x"
    assert values["list"] == [{"a": "***", "b": "x ***"}]
    assert sent.display_name == "run"
    assert not sent.host
    # A short host name may turn up by chance among the bytes of a checksum.
    host = [socket.gethostname()] if len(socket.gethostname()) > 5 else []
    secrets = [CANARY, "hf_canary", "url_canary", "argv_canary", "message_canary", *host]
    for path in run.rglob("*"):
        if path.is_file() and path.name != "config.toml":
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], path


def test_online_without_a_key_is_an_error_not_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(TitanError, match=r"WANDB_API_KEY.*offline"):
        Wandb(WandbConfig(mode="online"), run_dir=tmp_path / "run")


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    made = logger(tmp_path / "run", 0, mode="disabled")
    made.log(1, {"loss": 1.0})
    made.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: Any = None
    monkeypatch.setitem(sys.modules, "wandb", blocked)
    with pytest.raises(TitanError, match="pip install wandb"):
        Wandb(WandbConfig(), run_dir=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"id": "a", "sent": null, "unfinished": ""}'])
def test_damaged_state_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run" / "wandb.json").write_text(text)
    with pytest.raises(TitanError, match=r"wandb\.json: damaged.*delete it"):
        Wandb(WandbConfig(), run_dir=tmp_path / "run").start(0)


def test_refused_settings_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TitanError, match="logger 'wandb': .*project"):
        Wandb(WandbConfig(project="a/b"), run_dir=tmp_path / "run").start(0)
