"""wandb, offline: one run over resumes, every step once, and nothing secret leaves."""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

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


def rows(folder: Path) -> list[dict[str, float]]:
    """What `wandb sync` would send, in its order; keys with a leading underscore are wandb's."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
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


def test_resumed_run_is_the_same_run_and_repeats_no_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = logger(run, 0)
    first.log(10, {"loss": 1 / 3})
    first.log(10, {"validation/a/loss": 2.0})
    first.log(20, {"loss": 0.5})
    first.log(30, {"loss": 0.25})
    first.log(30, {"validation/a/loss": 1.5})
    first.log(40, {"loss": 0.125})
    first._run.finish()  # as after a kill: close() was never called, the row of step 40 waits in wandb.json

    second = logger(run, 20)  # the checkpoint was of step 20: 30 was sent and stays, 40 was not and is made again
    for step in (30, 40, 50):
        second.log(step, {"loss": -float(step)})
    second.log(50, {"validation/a/loss": 1.0})
    second.close()

    assert rows(run) == [
        {"step": 10, "loss": 1 / 3, "validation/a/loss": 2.0},
        {"step": 20, "loss": 0.5},
        {"step": 30, "loss": 0.25, "validation/a/loss": 1.5},
        {"step": 40, "loss": -40.0},
        {"step": 50, "loss": -50.0, "validation/a/loss": 1.0},
    ]
    ids = {record.run.run_id for file in run.glob("wandb/offline-run-*/*.wandb") for record in records(file) if record.HasField("run")}
    assert ids == {json.loads((run / "wandb.json").read_text())["id"]}


def test_waiting_row_is_sent_when_the_run_goes_on_after_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = logger(run, 0)
    first.log(10, {"loss": 1.0})
    first.log(20, {"loss": 0.5, "grad_norm": float("inf")})
    first._run.finish()
    second = logger(run, 20)
    second.close()
    assert [(row["step"], row["loss"]) for row in rows(run)] == [(10, 1.0), (20, 0.5)]


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
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    (sent,) = (record.run for record in records(file) if record.HasField("run"))
    values = {item.key: json.loads(item.value_json) for item in sent.config.update}
    assert values["use_cls_token"] is True
    assert values["path"] == "https://***@example.org/x"
    assert values["list"] == [{"a": "***", "b": "x ***"}]
    assert sent.display_name == "run"
    secrets = [CANARY, "hf_canary", "url_canary", "argv_canary", "message_canary", socket.gethostname()]
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


def test_disabled_writes_no_rows(tmp_path: Path) -> None:
    made = logger(tmp_path / "run", 0, mode="disabled")
    made.log(1, {"loss": 1.0})
    made.log(2, {"loss": 1.0})
    made.close()
    assert rows(tmp_path / "run") == []


def test_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: Any = None
    monkeypatch.setitem(sys.modules, "wandb", blocked)
    with pytest.raises(TitanError, match="pip install wandb"):
        Wandb(WandbConfig(), run_dir=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"id": "a", "sent": null, "waiting": null}', '{"id": "a", "sent": 1, "waiting": 5}'])
def test_damaged_state_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run" / "wandb.json").write_text(text)
    with pytest.raises(TitanError, match=r"wandb\.json: damaged.*delete it"):
        Wandb(WandbConfig(), run_dir=tmp_path / "run").start(0)


def test_refused_settings_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TitanError, match="logger 'wandb': .*project"):
        Wandb(WandbConfig(project="a/b"), run_dir=tmp_path / "run").start(0)
