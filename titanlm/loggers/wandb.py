"""Metrics to Weights & Biases.

A run of ours is one run there, however often it is resumed: its id is kept in
``wandb.json`` of the run folder. Nothing that was sent can be taken back, so no
step is sent twice; and wandb writes behind, so what it was given shortly
before a kill is lost. Therefore ``wandb.jsonl`` keeps the rows since the last
clean end. A start after a kill deletes the unfinished offline folder, or asks
the server what it has, and gives wandb again what is missing up to the
restored step; later steps are made again.

What leaves the machine is the metrics and the resolved config. The API key is
taken by wandb from the environment (``WANDB_API_KEY``) and never passes here.
Command line, host, git remote, package list and terminal output, in which
wandb has carried other people's keys, stay at home.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from titanlm.errors import TitanError
from titanlm.registry import register
from titanlm.runs import write_atomic


@dataclass(frozen=True)
class WandbConfig:
    project: str = "titanlm"
    entity: str | None = None
    """Team or user; None: the account's default."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline: into ``RUN/wandb``, sent later with `wandb sync`; no account or network is needed."""
    group: str | None = None
    """Runs shown together."""
    tags: tuple[str, ...] = ()
    notes: str | None = None
    system_metrics: bool = False
    """Let wandb sample the use of GPU, CPU, disk and network."""


@register("logger", "wandb")
class Wandb:
    """Rows of metrics by step; the run is named after the run folder.

    Raises TitanError when the package is missing or, in mode online, there is
    no API key.
    """

    def __init__(self, config: WandbConfig, *, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TitanError("logger 'wandb' needs a package that is not installed; run: pip install wandb") from error
        if config.mode == "online" and not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")):
            # wandb would ask on the terminal, and a run that nobody watches would wait for ever.
            raise TitanError('logger \'wandb\': mode "online" needs WANDB_API_KEY in the environment; without an account use mode = "offline"')
        self.config, self.run_dir = config, run_dir
        self.state_file, self.journal_file = run_dir / "wandb.json", run_dir / "wandb.jsonl"
        self._wandb: Any = wandb
        self._run: Any = None
        self._id = secrets.token_hex(4)
        self._sent = -1
        """Last step that wandb has from earlier starts."""
        self._waiting: tuple[int, dict[str, float]] | None = None
        """Training and validation metrics of a step make one row, sent when the next begins."""
        self._journal: TextIO | None = None

    def start(self, step: int) -> None:
        """Raises TitanError when ``wandb.json`` is damaged or wandb refuses the settings."""
        config = self.config
        if config.mode == "disabled":
            return
        unsent = self._restore(step) if self.state_file.exists() else []
        try:
            self._run = self._wandb.init(
                project=config.project, entity=config.entity, group=config.group, tags=config.tags, notes=config.notes, mode=config.mode,
                id=self._id, resume="allow", name=self.run_dir.resolve().name, dir=str(self.run_dir), reinit="create_new",
                config=self._run_config(), allow_val_change=True,
                settings=self._wandb.Settings(
                    silent=True, console="off", save_code=False, disable_code=True, disable_git=True, host="", program="",
                    x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False, x_disable_stats=not config.system_metrics,
                ),
            )  # fmt: skip
        except (self._wandb.errors.UsageError, ValueError) as error:
            raise TitanError(f"logger 'wandb': {error}") from error
        if self._run.resumed:  # only a server knows
            self._sent = max(self._sent, int(self._run.step) - 1)
        self._save(Path(self._run.dir).parent.name if config.mode == "offline" else "")
        self._journal = open(self.journal_file, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        for row in unsent:
            self._add(*row)

    def _restore(self, step: int) -> list[tuple[int, dict[str, float]]]:
        """The rows up to ``step`` that wandb lost at a kill; the journal holds only them from now on."""
        try:
            state = json.loads(self.state_file.read_bytes())
            self._id, self._sent, unfinished = str(state["id"]), int(state["sent"]), str(state["unfinished"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TitanError(f"{self.state_file}: damaged ({error!r}); delete it to go on as a new run in wandb") from error
        journal = []
        for line in self.journal_file.read_bytes().split(b"\n") if self.journal_file.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by the kill
                row = json.loads(line)
                journal.append((int(row["step"]), dict(row["metrics"])))
        folder = self.run_dir / "wandb" / unfinished
        if any(folder.glob("*.synced")):  # by hand, before this start: it is out
            self._sent = max([self._sent, *(at for at, _ in journal)])
            self._save("")
        unsent = [(at, metrics) for at, metrics in journal if self._sent < at <= step]
        write_atomic(self.journal_file, "".join(_line(*row) for row in unsent))
        if re.fullmatch(r"offline-run-[\w-]+", unfinished) and not any(folder.glob("*.synced")):
            shutil.rmtree(folder, ignore_errors=True)
        return unsent

    def _save(self, unfinished: str) -> None:
        write_atomic(self.state_file, json.dumps({"id": self._id, "sent": self._sent, "unfinished": unfinished}))

    def _run_config(self) -> Any:
        file = self.run_dir / "config.toml"
        if not file.exists():
            return {}
        import tomli

        # Values of secret environment variables and passwords in addresses may have found their way into a config.
        names = [name for name in os.environ if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", name)]
        hidden = {value for name in names if len(value := os.environ[name]) >= 8}
        return _public(tomli.loads(file.read_text(encoding="utf-8")), hidden)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._journal is None or step <= self._sent:
            return
        self._journal.write(_line(step, metrics))
        self._journal.flush()
        self._add(step, metrics)

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._sent:
            return
        if self._waiting is not None and self._waiting[0] != step:
            self._send()
        self._waiting = step, {**(self._waiting[1] if self._waiting is not None else {}), **metrics}

    def _send(self) -> None:
        if self._waiting is not None:
            step, metrics = self._waiting
            self._run.log(metrics, step=step, commit=True)
            self._waiting = None

    def message(self, text: str) -> None:
        """Texts stay at home; the console logger keeps them in log.txt."""

    def close(self) -> None:
        if self._journal is None:
            return
        last = self._waiting[0] if self._waiting is not None else self._sent
        self._send()
        self._run.finish()
        self._sent = last
        self._save("")
        self._journal.close()
        self._journal = None
        self.journal_file.unlink(missing_ok=True)


def _line(step: int, metrics: Mapping[str, float]) -> str:
    return json.dumps({"step": step, "metrics": dict(metrics)}) + "\n"


def _public(value: Any, hidden: set[str]) -> Any:
    """A config without credentials: passwords in addresses and ``hidden`` strings become "***"."""
    if isinstance(value, dict):
        return {key: _public(item, hidden) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, hidden) for item in value]
    if not isinstance(value, str):
        return value
    for secret in hidden:
        value = value.replace(secret, "***")
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", value)
