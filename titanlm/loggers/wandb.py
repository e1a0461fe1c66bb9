"""Metrics to Weights & Biases.

A run of ours is one run there, however often it is resumed: its id is kept in
``wandb.json`` of the run folder. Nothing there can be taken back, so a step
that was sent is never sent again. A row is sent when the next step is logged,
because training and validation metrics of one step belong in one row; until
then it waits in ``wandb.json``. After a kill the waiting row is sent if the run
goes on after it, and dropped if its step will be trained again.

What leaves the machine is the metrics and the resolved config. The API key is
wandb's own business (``WANDB_API_KEY`` or a saved login); it is not read here.
Command line, host, git remote, package list and terminal output, in which
wandb has carried other people's keys, stay at home.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
        keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
        if config.mode == "online" and not (any(map(os.environ.get, keys)) or wandb.api.api_key):
            raise TitanError("logger 'wandb': no API key; set WANDB_API_KEY in the environment, or mode = \"offline\"")
        self.config, self.run_dir = config, run_dir
        self.state_file = run_dir / "wandb.json"
        self._wandb: Any = wandb
        self._run: Any = None
        self._id = secrets.token_hex(4)
        self._sent = -1
        self._waiting: tuple[int, dict[str, float]] | None = None

    def start(self, step: int) -> None:
        """Raises TitanError when ``wandb.json`` is damaged or wandb refuses the settings."""
        if self.state_file.exists():
            self._restore(step)
        config = self.config
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
        if getattr(self._run, "resumed", False):  # only a server knows; it may have more than a copied run folder
            self._sent = max(self._sent, int(self._run.step) - 1)
        self._save()

    def _restore(self, step: int) -> None:
        try:
            state = json.loads(self.state_file.read_bytes())
            self._id, self._sent, waiting = str(state["id"]), int(state["sent"]), state["waiting"]
            if waiting is not None and waiting["step"] <= step:
                self._waiting = waiting["step"], waiting["metrics"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TitanError(f"{self.state_file}: damaged ({error!r}); delete it to go on as a new run in wandb") from error

    def _save(self) -> None:
        waiting = None if self._waiting is None else {"step": self._waiting[0], "metrics": self._waiting[1]}
        # Not synced: it must outlive this process, and after a power cut at worst a row is sent twice.
        write_atomic(self.state_file, json.dumps({"id": self._id, "sent": self._sent, "waiting": waiting}), sync=False)

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
        if step <= self._sent:
            return
        if self._waiting is not None and self._waiting[0] != step:
            self._send()
        self._waiting = step, {**(self._waiting[1] if self._waiting is not None else {}), **metrics}
        self._save()

    def _send(self) -> None:
        if self._waiting is None:
            return
        step, metrics = self._waiting
        if step > self._sent:
            self._run.log(metrics, step=step, commit=True)
            self._sent = step
        self._waiting = None
        self._save()

    def message(self, text: str) -> None:
        """Texts stay at home; the console logger keeps them in log.txt."""

    def close(self) -> None:
        if self._run is not None:
            self._send()
            self._run.finish()
            self._run = None


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
