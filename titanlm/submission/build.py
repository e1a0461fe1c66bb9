"""``titanlm submission build RUN…``: from finished runs of several seeds to the folder that the challenge wants.

    README.md             what it is, its scores and how to repeat them
    submission.json       the same for programs
    requirements.txt      packages that train_gpt.py imports, as installed here
    train_gpt.py          all of the code that is counted (``bundle``)
    train_seed<SEED>.log  a run each
    model.titanlm         the artifact of the best seed
    loss.png              training loss

Every run is exported and scored anew here, by the code that is handed in and
within what it leaves of the limit; a fitter chooses for each seed by itself. A
log is the run's own where it has one (logger ``golf``), else it is made of
metrics.jsonl and environment.json; the sizes and scores at its end are those of
the file written now.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from titanlm import checkpoint
from titanlm.config import RunConfig, diff, loads
from titanlm.course import horizon_of
from titanlm.device import choose_device
from titanlm.distributed.world import Peers
from titanlm.errors import TitanError
from titanlm.evaluate import Scores
from titanlm.loggers.golf import RULE, Golf, GolfConfig, final_lines
from titanlm.registry import Component
from titanlm.submission import metadata
from titanlm.submission.bundle import Bundle, bundle
from titanlm.submission.entry import ARTIFACT, export, score_artifact
from titanlm.submission.metadata import Record, Score, SeedResult, Submission
from titanlm.submission.readme import readme
from titanlm.targets import find_checkpoint

_OWN = frozenset({"train.seed", "run.name", "run.dir"})
"""Settings in which the runs of a submission may differ, next to those of ``_HERE``."""
_AFTER = ("export.", "fitter", "quantizer", "validation")
"""Settings that may be changed after training, unless training rounded weights."""
_HERE = ("logger", "checkpoint.", "profile.", "train.device", "train.threads", "train.sample_", "parallel.", "data.workers", "data.prefetch")
"""Settings that change nothing about the result."""


@dataclass(frozen=True)
class About:
    """What only the author knows."""

    author: str
    github_id: str
    name: str
    blurb: str = ""
    track: str = "non_record_16mb"
    hardware: str = ""
    """Empty: as the best run's environment.json has it."""
    record: Record | None = None
    date: str = ""
    """ISO 8601; empty: today."""


@dataclass(frozen=True)
class _Run:
    folder: Path
    config: RunConfig
    steps: int
    elapsed_s: float

    @property
    def seed(self) -> int:
        return self.config.train.seed


def build(
    runs: Sequence[Path],
    output: Path,
    about: About,
    *,
    form: Literal["readable", "compressed"] = "compressed",
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> str:
    """Write the folder ``output``, which must not exist or be empty; the text to print.

    ``overrides`` change how the runs are exported and scored, not how they were
    trained. Raises TitanError when they do, when the runs are not of one config
    and different seeds, when one has no end, and whatever an export raises.
    """
    if not output.name or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise TitanError(f"{output}: exists; name a new folder for the submission")
    opened = [_open(run, overrides) for run in runs]
    _require_alike(opened)
    code = bundle(_submitted(opened[0].config), form)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as made:
        folder = Path(made) / output.name
        folder.mkdir()
        script = folder / "train_gpt.py"
        script.write_bytes(code.content)
        results = [_result(run, folder, script, device, overrides) for run in opened]
        environment = _read_json(opened[0].folder / "environment.json")
        submission = Submission(
            name=about.name, author=about.author, github_id=about.github_id, blurb=about.blurb, date=about.date or date.today().isoformat(),
            track=about.track, hardware=about.hardware or _hardware(environment), pytorch_version=str(environment.get("torch", "")),
            bytes_code=code.n_bytes, results=tuple(results), record=about.record,
        )  # fmt: skip
        os.replace(folder / f"{submission.best.seed}.titanlm", folder / ARTIFACT)
        for other in folder.glob("*.titanlm"):
            if other.name != ARTIFACT:
                other.unlink()
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements(code, opened[0].config)), encoding="utf-8")
        (folder / "submission.json").write_text(metadata.dump(metadata.metadata(submission)), encoding="utf-8")
        (folder / "README.md").write_text(readme(submission), encoding="utf-8")
        plot({run.seed: list(_metrics(run.folder)) for run in opened}, folder / "loss.png")
        try:
            os.replace(folder, output)  # in place of an empty one, too
        except OSError as error:
            raise TitanError(f"{output}: cannot be made ({error.strerror}); name a folder that is not there and that nobody else writes") from error
    bits = submission.bits
    spread = f", standard deviation {bits.sd:.5f}" if bits.sd is not None else ""
    return f"{output}: {bits.mean:.5f} bits per byte over {bits.n} seeds{spread}; {submission.bytes_total:,} bytes, of them {code.n_bytes:,} code"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is an exit like others, so that temporary folders go. Handlers are the main thread's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- runs
def _open(run: Path, overrides: Sequence[str]) -> _Run:
    """Raises TitanError when a run has not come to its end, and when it was trained otherwise than ``overrides`` say."""
    folder = find_checkpoint(run)
    saved = checkpoint.load(folder)
    trained = loads(saved.config_toml, f"{folder}/config.toml")
    config = loads(saved.config_toml, f"{folder}/config.toml", overrides)
    rounded = any(getattr(quantizer.config, "qat", False) for one in (trained, config) for quantizer in one.quantizer)
    for path, before, _ in diff(trained, config):
        if not path.startswith(_AFTER) or (rounded and path.startswith("quantizer")):
            raise TitanError(f"{path}: {run} was trained with {before!r}, and train_gpt.py would train another model; what may be changed is export, "
                             "fitter, validation, and quantizer where it had no part in training")  # fmt: skip
    progress = saved.state["progress"]
    limit = horizon_of(config).max_wallclock_s
    if progress["step"] < config.train.steps and not (limit is not None and progress["elapsed_s"] >= limit):
        raise TitanError(f"{run}: its last checkpoint is of step {progress['step']} of {config.train.steps}; train it to the end first")
    return _Run(run, config, progress["step"], progress["elapsed_s"])


def _require_alike(runs: Sequence[_Run]) -> None:
    seeds = [run.seed for run in runs]
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        raise TitanError(f"more than one run has seed {min(twice)}; name a run of each seed")
    first = runs[0]
    for run in runs[1:]:
        for path, before, after in diff(first.config, run.config):
            if path not in _OWN and not path.startswith(_HERE):
                raise TitanError(
                    f"{run.folder}: {path} is {after!r}, and {before!r} in {first.folder}; the runs of a submission differ in nothing but the seed"
                )


def _submitted(config: RunConfig) -> RunConfig:
    """The config that train_gpt.py carries: what a run has for its owner's sake is taken out."""
    return replace(
        config,
        imports=(),
        run=replace(config.run, name="submission", dir="runs"),
        train=replace(config.train, sample_every=0, compile_cache="off"),
        data=replace(config.data, workers=0),
        parallel=replace(config.parallel, strategy="none"),
        checkpoint=replace(config.checkpoint, copy_to="", best="", resume="auto"),
        export=replace(config.export, at_end=False, code=()),
        logger=(Component.named("logger", "golf"), Component.named("logger", "jsonl")),
        profile=None,
    )


def _result(run: _Run, folder: Path, script: Path, device: str, overrides: Sequence[str]) -> SeedResult:
    """Export and score a run, write its log."""
    tokenizer = run.config.tokenizer.build()
    config = replace(run.config, train=replace(run.config.train, device=device))  # type: ignore[arg-type]  # checked by choose_device
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        artifact = Path(scratch) / ARTIFACT
        exported = export(run.folder, artifact, config, script.stat().st_size, overrides)
        begun = time.perf_counter()
        scores = score_artifact(artifact, config, tokenizer, choose_device(device), Peers())
        eval_s = time.perf_counter() - begun
        log = [*_log(run, script, Path(scratch)), *final_lines(exported, script.stat().st_size, config, scores, eval_s)]
        (folder / f"train_seed{run.seed}.log").write_text("\n".join(log) + "\n", encoding="utf-8")
        n_bytes = artifact.stat().st_size
        os.replace(artifact, folder / f"{run.seed}.titanlm")
    step_ms = 1000 * run.elapsed_s / max(1, run.steps)
    return SeedResult(run.seed, run.steps, step_ms, run.elapsed_s, eval_s, n_bytes, _stages(run, scores), exported.chosen)


def _stages(run: _Run, scores: Mapping[str, Scores]) -> dict[str, Score]:
    """Raw, averaged and read-back scores of the first validation set, and the last set's, which counts, where it is another."""
    first = run.config.validation[0].name
    trained: dict[str, Any] = {}
    for record in _metrics(run.folder):
        if record["step"] == run.steps:
            trained |= record
    found = {}
    for stage, prefix in (("raw", ""), ("averaged", "averaged_")):
        loss, bits = (trained.get(f"validation/{first}/{prefix}{name}") for name in ("loss", "bits_per_byte"))
        if loss is not None and bits is not None:
            found[stage] = Score(loss, bits)
    found["after round trip"] = Score(scores[first].loss, scores[first].bits_per_byte)
    last = run.config.validation[-1].name
    if last != first:
        found[last] = Score(scores[last].loss, scores[last].bits_per_byte)
    return found


# ---------------------------------------------------------------- logs
def _log(run: _Run, script: Path, scratch: Path) -> Iterator[str]:
    """The lines of a run up to its end, behind the source of the script."""
    own = run.folder / f"train_seed{run.seed}.log"
    if own.exists():
        text = own.read_text(encoding="utf-8")
    else:
        for name in ("config.toml", "environment.json"):
            shutil.copyfile(run.folder / name, scratch / name)
        logger = Golf(GolfConfig(), run_dir=scratch)
        logger.start(0)
        logger.message("this log was made of metrics.jsonl after the run")
        for record in _metrics(run.folder):
            logger.log(record["step"], {name: value for name, value in record.items() if name != "step" and value is not None})
        logger.close()
        text = (scratch / own.name).read_text(encoding="utf-8")
    lines = _lines(text)
    # With a source in front there are two rules, of which the first ends it.
    if lines.count(RULE) > 1:
        lines = lines[lines.index(RULE) + 1 :]
    with tokenize.open(script) as file:  # as its first line says
        yield from _lines(file.read())
    yield RULE
    for line in lines:
        if line.startswith("Serialized model "):
            return
        yield line


def _lines(text: str) -> list[str]:
    """Parted at line feeds alone: a source may have letters at which splitlines() parts too."""
    return text.removesuffix("\n").split("\n")


def _metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl. Raises TitanError when there is none."""
    path = run / "metrics.jsonl"
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
    except OSError as error:
        raise TitanError(f"{path}: {error.strerror}; a submission needs runs with the logger 'jsonl'") from error
    except ValueError as error:
        raise TitanError(f"{path}: not what the logger 'jsonl' writes: {error}") from error


# ---------------------------------------------------------------- files
def requirements(code: Bundle, config: RunConfig) -> list[str]:
    """``package==version`` of what the script imports beyond the standard library, as installed here."""
    # The codec's package is imported by a name that is put together; with "auto" any of them may be needed.
    codec = getattr(config.export.exporter.config, "codec", "")
    codecs = [package for name, package in (("zstd", "zstandard"), ("brotli", "brotli")) if codec in (name, "auto")]
    owners = importlib.metadata.packages_distributions()
    packages = {owners[name][0] for name in (*code.packages, *codecs) if name in owners and name not in sys.stdlib_module_names}
    return sorted(f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages)


def plot(metrics: Mapping[int, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Training loss by step, a line a seed. Raises TitanError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TitanError("the submission's plot needs a package that is not installed; run: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for seed, records in metrics.items():
        points = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
        axes.plot(*zip(*points), label=f"seed {seed}", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TitanError(f"{path}: cannot be read ({error}); name a run folder as training left it") from error
    return value if isinstance(value, dict) else {}


def _hardware(environment: Mapping[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    return f"{len(gpus)} × {gpus[0]['name']}" if gpus else f"CPU, {environment.get('cpus')} cores"
