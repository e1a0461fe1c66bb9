"""Metrics in the lines of Parameter Golf's logs (openai/parameter-golf, its baseline train_gpt.py)."""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import tomli

from titanlm.errors import TitanError
from titanlm.loggers.text import printable
from titanlm.registry import register
from titanlm.runs import write_atomic

if TYPE_CHECKING:
    from titanlm.config import RunConfig
    from titanlm.evaluate import Scores
    from titanlm.exported import Exported

RULE = "=" * 100
"""Between the source, the machine and the run."""
_STEP = re.compile(r"(?:step|stopping_early: wallclock_cap train_time:\d+ms step):(\d+)/\d+")
_TIME = re.compile(r"^step:\d+/\d+ .*train_time:(\d+)ms", re.MULTILINE)


@dataclass(frozen=True)
class GolfConfig:
    source: str = ""
    """File whose text begins the log: the script that trains. Empty: the log begins with the versions."""
    echo: bool = False
    """Print the lines too, but for the source."""


@register("logger", "golf")
class Golf:
    """``train_seed<SEED>.log`` in the run folder: the script's source, versions and machine, the settings, a line a log step and a validation.

    Times are milliseconds of training, validation and saving excluded. The
    first validation set has the challenge's line; of the others, and of
    averaged weights, the line says so at its end. A resumed run cuts off the
    lines after the step that it goes on from.
    """

    def __init__(self, config: GolfConfig, *, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self._file: TextIO | None = None
        self._early: list[str] = []
        """Messages from before the log is open."""
        self._time_ms = 0.0
        self._peak_mib = {"memory_gib": 0.0, "reserved_gib": 0.0}
        self._first_set = ""

    def start(self, step: int) -> None:
        """Raises TitanError when the run folder's config.toml or environment.json cannot be read or the log cannot be written."""
        try:
            tables = tomli.loads((self.run_dir / "config.toml").read_text(encoding="utf-8"))
            environment = json.loads((self.run_dir / "environment.json").read_text(encoding="utf-8"))
            train = tables["train"]
            self._steps, self._limit_s = train["steps"], train.get("max_wallclock_s")
            if self._limit_s is not None:
                self._limit_s -= tables.get("export", {}).get("calibration_reserve_s", 0)
            self._first_set = next((entry["name"] for entry in tables["validation"]), "")
            path = self.run_dir / f"train_seed{train['seed']}.log"
            known = path.exists() and step > 0
            if known:
                text = path.read_text(encoding="utf-8")
                if (kept := "".join(_up_to(step, text))) != text:
                    write_atomic(path, kept)
                # What comes next may be a validation, which does not say how long training took.
                self._time_ms = float(next(reversed(_TIME.findall(kept)), 0))
            self._file = open(path, "a" if known else "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if not known and self.config.source:
                self._file.write(f"{_source(self.config.source)}\n{RULE}\n")
            for line in [f"resumed at step {step}"] if known else [*machine(environment), RULE, *settings(tables, environment)]:
                self._line(line)
            for text in self._early:
                self.message(text)
            self._early.clear()
        except OSError as error:
            raise TitanError(f"{error.filename}: {error.strerror}; make it readable and {self.run_dir} writable, or remove the logger 'golf'") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            raise RuntimeError("log before start")
        self._time_ms = 1000 * metrics.get("elapsed_s", self._time_ms / 1000)
        times = f"train_time:{self._time_ms:.0f}ms step_avg:{self._time_ms / max(1, step):.2f}ms"
        if "loss" in metrics:
            self._line(f"step:{step}/{self._steps} train_loss:{metrics['loss']:.4f} {times}")
        for name, weights in dict.fromkeys(_scored(metrics)):
            loss, bpb = (metrics[f"validation/{name}/{weights}{score}"] for score in ("loss", "bits_per_byte"))
            which = f" set:{name}" * (name != self._first_set) + f" weights:{weights.rstrip('_')}" * bool(weights)
            self._line(f"step:{step}/{self._steps} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {times}{which}")
        if "loss" not in metrics:
            return
        self._peak_mib = {name: max(peak, 1024 * metrics.get(name, 0.0)) for name, peak in self._peak_mib.items()}
        stopped = self._limit_s is not None and self._time_ms >= 1000 * self._limit_s and step < self._steps
        if stopped:
            self._line(f"stopping_early: wallclock_cap train_time:{self._time_ms:.0f}ms step:{step}/{self._steps}")
        if stopped or step == self._steps:
            allocated, reserved = self._peak_mib.values()
            self._line(f"peak memory allocated: {allocated:.0f} MiB" + f" reserved: {reserved:.0f} MiB" * bool(reserved))

    def message(self, text: str) -> None:
        if self._file is None:
            self._early.append(text)
        else:
            self._line(printable(text))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, line: str) -> None:
        assert self._file is not None
        self._file.write(f"{line}\n")
        self._file.flush()
        if self.config.echo:
            print(line, flush=True)


def _source(path: str) -> str:
    """In the encoding that its first lines name. Raises TitanError where they name none or another one, OSError where it cannot be opened."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeError) as error:
        raise TitanError(f"{path}: not Python source in the encoding that it names ({error}); correct logger.source, or leave it out") from error


def machine(environment: Mapping[str, Any]) -> Iterator[str]:
    """Versions and devices, out of a run's environment.json; neither host nor user."""
    yield f"Running Python {environment['python']}"
    yield f"Running PyTorch {environment['torch']}"
    gpus = environment["gpus"]
    yield f"{len(gpus)} x {gpus[0]['name']}, {gpus[0]['memory_gib']} GiB, CUDA {environment['cuda']}" if gpus else f"no GPU, {environment['cpus']} CPUs"


def settings(tables: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[str]:
    """What the challenge's logs say of the run before its first step, out of a resolved config and a run's environment.json."""
    train, model, stages = tables["train"], tables.get("model", {}), tables.get("curriculum")
    if "n_parameters" in environment:
        yield f"model_params:{environment['n_parameters']}"
    if "world_size" in environment:
        n = environment["world_size"]
        tokens = train.get("micro_batch_tokens")
        rows = train.get("micro_batch") or (tokens // train["seq_len"] if isinstance(tokens, int) else 0)  # 0: a probe has yet to say
        yield f"world_size:{n}" + (f" grad_accum_steps:{train['global_batch'] // (rows * n)}" if rows and not stages else "")
    if {"n_heads", "n_kv_heads"} <= model.keys():
        n, n_kv = model["n_heads"], model["n_kv_heads"]
        yield f"attention_mode:{'mha' if n == n_kv else 'gqa'} num_heads:{n} num_kv_heads:{n_kv}"
    rates = {role: next((f"{entry['lr']:g}" for entry in tables.get("optimizer", ()) if f"@{role}" in entry["params"]), None) for role in _RATES}
    said = " ".join(f"{_RATES[role]}:{rate}" for role, rate in rates.items() if rate is not None)
    if said:
        yield f"tie_embeddings:{model['tie_embeddings']} {said}" if "tie_embeddings" in model else said
    shape = "" if stages else f"train_batch_tokens:{train['global_batch'] * train['seq_len']} train_seq_len:{train['seq_len']} "
    yield f"{shape}iterations:{train['steps']} warmup_steps:{train['priming_steps']} max_wallclock_seconds:{train.get('max_wallclock_s', 0):.3f}"
    yield f"seed:{train['seed']}"


_RATES = {"embedding": "embed_lr", "matrix": "matrix_lr", "gain": "scalar_lr"}
"""Role of parameters → what the challenge's logs call their learning rate."""


def final_lines(exported: Exported, code_bytes: int, config: RunConfig, scores: Mapping[str, Scores], eval_s: float) -> Iterator[str]:
    """Sizes, what a fitter chose, and the score of the file that is handed in.

    The score is of the config's last validation set; the others have a line
    before. ``final_int8_zlib_roundtrip_exact`` is what the challenge's logs
    call it whatever the bits and the codec.
    """
    model_bytes = exported.report.path.stat().st_size
    label = f"{config.export.exporter.name}+{exported.report.codec}"
    yield f"Serialized model {label}: {model_bytes} bytes"
    yield f"Code size: {code_bytes} bytes"
    yield f"Total submission size {label}: {model_bytes + code_bytes} bytes"
    for name, value in exported.chosen.items():
        yield f"selected_{'prune_frac' if name == 'prune_fraction' else name}:{value:.5g}"
    if exported.calibration_s is not None:
        reserve_s = config.export.calibration_reserve_s
        late = config.train.max_wallclock_s is not None and exported.calibration_s > reserve_s
        over = " OVER: raise export.calibration_reserve_s if the challenge counts it" * late
        yield f"gptq:calibrated tokens:{config.export.calibration_tokens} time:{1000 * exported.calibration_s:.0f}ms reserved:{1000 * reserve_s:.0f}ms{over}"
    for name, one in scores.items():
        yield f"final_eval set:{name} val_loss:{one.loss:.8f} val_bpb:{one.bits_per_byte:.8f} tokens:{one.n_tokens} bytes:{one.n_bytes}"
    last = list(scores.values())[-1]
    yield f"final_int8_zlib_roundtrip val_loss:{last.loss:.4f} val_bpb:{last.bits_per_byte:.4f} eval_time:{1000 * eval_s:.0f}ms"
    yield f"final_int8_zlib_roundtrip_exact val_loss:{last.loss:.8f} val_bpb:{last.bits_per_byte:.8f}"


def _scored(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(set, "" or "averaged_") of the validation metrics, in their order."""
    for key in metrics:
        if key.startswith("validation/") and key.endswith("bits_per_byte"):
            name, _, score = key.removeprefix("validation/").rpartition("/")
            yield name, score.removesuffix("bits_per_byte")


def _up_to(step: int, text: str) -> Iterator[str]:
    """The lines before the first of a later step, behind the source and the machine."""
    begun = False
    for line in io.StringIO(text):  # a source may have letters at which splitlines() splits
        begun = begun or line.startswith("seed:")
        match = _STEP.match(line) if begun else None
        if match is not None and int(match[1]) > step:
            return
        if line.endswith("\n"):  # not torn by a kill
            yield line
