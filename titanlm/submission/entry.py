"""What ``train_gpt.py`` does: train, export, score; or score an artifact again.

The challenge's environment variables change the config:

    SEED                     train.seed
    DATA_PATH                the folder of every .bin file that the config reads
    TOKENIZER_PATH           tokenizer.path
    MAX_WALLCLOCK_SECONDS    train.max_wallclock_s; 0: no limit, train.steps ends the run

The run folder is ``runs/seed<SEED>`` of the working directory, with
``train_seed<SEED>.log`` in it. All ranks train and score; rank 0 exports in
between, from the last checkpoint, and the score is of the file it has written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from titanlm.config import RunConfig, loads
from titanlm.device import choose_device
from titanlm.distributed.compile import compile_module
from titanlm.distributed.process_group import connected
from titanlm.distributed.world import Peers, World
from titanlm.errors import PeerError, TitanError
from titanlm.evaluate import Scores, ValidationSet, score
from titanlm.export import export_run
from titanlm.exported import Exported
from titanlm.exporters.artifact import inspect, read_artifact
from titanlm.exporters.encoding import decode_tensors
from titanlm.interrupts import Interrupted
from titanlm.loggers.golf import final_lines
from titanlm.loggers.text import printable
from titanlm.registry import PYDANTIC_CONFIG, Component
from titanlm.targets import materialise, require_tokenizer
from titanlm.train import Trainer

ARTIFACT = "model.titanlm"


def main(words: Sequence[str], config_toml: str, script: str) -> int:
    """Train, or with ``--eval ARTIFACT [--max-tokens N]`` score; the exit status."""
    # Nobody reads what settings mean here, and before Python 3.13 each class is looked for by parsing the file, which is long.
    PYDANTIC_CONFIG["use_attribute_docstrings"] = False
    try:
        config = adapted(config_toml, os.environ)
        if not words:
            return train_and_score(config, Path(script))
        config = held_out(config)
        match list(words):
            case ["--eval", artifact]:
                return print_scores(config, Path(artifact))
            case ["--eval", artifact, "--max-tokens", number] if number.isdecimal():
                return print_scores(with_max_tokens(config, int(number)), Path(artifact))
        raise TitanError(f"arguments: {' '.join(words)!r} means nothing here; none to train, or --eval ARTIFACT [--max-tokens N]")
    except TitanError as error:
        if not isinstance(error, PeerError):  # the rank that failed says so itself
            print(printable(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # after training, which has its own way to stop
        print("interrupted; started again with the same SEED it goes on from the last checkpoint", file=sys.stderr)
        return 130


# ---------------------------------------------------------------- config
def adapted(config_toml: str, environment: Mapping[str, str]) -> RunConfig:
    """The config as the environment's variables want it. Raises TitanError naming the one that cannot be."""
    config = loads(config_toml, "the embedded config")
    overrides = []
    seed = _number(environment, "SEED", config.train.seed)
    overrides += [f"--train.seed={seed:.0f}", f"--run.name=seed{seed:.0f}", "--run.dir=runs"]
    if path := environment.get("TOKENIZER_PATH"):
        overrides.append(f"--tokenizer.path={json.dumps(path)}")
    if folder := environment.get("DATA_PATH"):
        for place, dataset in datasets_of(config):
            for key in ("paths", "validation_paths"):
                if files := getattr(dataset.config, key, ()):
                    overrides.append(f"--{place}.{key}={json.dumps([str(Path(folder) / Path(file).name) for file in files])}")
    if World.from_environment().size > 1 and config.parallel.strategy == "none":
        overrides.append("--parallel.strategy=replicate")
    limit = _number(environment, "MAX_WALLCLOCK_SECONDS", config.train.max_wallclock_s or 0)
    config = loads(config_toml, "the embedded config", overrides)
    try:
        return replace(config, train=replace(config.train, max_wallclock_s=limit or None))
    except ValueError as error:
        raise TitanError(f"the environment variable MAX_WALLCLOCK_SECONDS is {limit:g}: {error}") from error


def datasets_of(config: RunConfig) -> Iterator[tuple[str, Component]]:
    """(dotted path, dataset) of all that is trained on or scored."""
    if config.dataset is not None:
        yield "dataset", config.dataset
    for index, source in enumerate(config.data.source):
        yield f"data.source.{index}.dataset", source.dataset
    for index, entry in enumerate(config.validation):
        if entry.dataset is not None:
            yield f"validation.{index}.dataset", entry.dataset


def held_out(config: RunConfig) -> RunConfig:
    """The config without its training files where validation has files of its own: a score is taken where there are no others."""

    def cut(dataset: Component) -> Component:
        if not (own := getattr(dataset.config, "validation_paths", ())):
            return dataset
        shards = dataset.name.startswith("token_")  # which do without paths; the others want some, and may be given these
        return replace(dataset, config=replace(dataset.config, paths=() if shards else own))

    return replace(
        config,
        dataset=config.dataset and cut(config.dataset),
        data=replace(config.data, source=tuple(replace(source, dataset=cut(source.dataset)) for source in config.data.source)),
        validation=tuple(replace(entry, dataset=entry.dataset and cut(entry.dataset)) for entry in config.validation),
    )


def with_max_tokens(config: RunConfig, n: int) -> RunConfig:
    """Every validation set cut to its first ``n`` scored positions."""
    return replace(config, validation=tuple(replace(entry, max_tokens=n) for entry in config.validation))


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    try:
        number = float(environment.get(name) or default)
    except ValueError:
        number = -1.0
    if not 0 <= number < 2**63:
        raise TitanError(f"the environment variable {name} is {environment[name]!r}; it must be a number, 0 or more")
    return number


# ---------------------------------------------------------------- training
def train_and_score(config: RunConfig, script: Path) -> int:
    """Train; then rank 0 writes ``model.titanlm`` into the run folder, and all ranks score it."""
    loggers = [replace(entry, config=replace(entry.config, source=str(script), echo=True)) if entry.name == "golf" else entry for entry in config.logger]
    config = replace(config, logger=tuple(loggers))
    try:
        with Trainer(config) as trainer:
            trainer.train()
            artifact = trainer.folder.path / "export" / ARTIFACT
            # Apart, because an export may take longer than ranks wait for one another while training.
            exported = trainer.peers.apart().first(lambda: export(trainer.folder.path, artifact, config, len(script.read_bytes())))
            begun = time.perf_counter()
            scores = score_artifact(artifact, config, trainer.tokenizer, trainer.device, trainer.peers)
            if exported is not None:  # rank 0, which logs
                for line in final_lines(exported, script.stat().st_size, config, scores, time.perf_counter() - begun):
                    trainer.loggers.message(line)
    except Interrupted as interrupted:
        return interrupted.status
    return 0


def export(run: Path, artifact: Path, config: RunConfig, code_bytes: int, changes: Sequence[str] = ()) -> Exported:
    """Write the artifact of a run's last checkpoint, with ``changes`` to its config.

    With the code it keeps to `export.max_bytes`; the tokenizer beside it is not counted.
    """
    overrides = [*changes, "--export.tokenizer=beside", "--export.count_tokenizer=false", "--export.code=[]"]
    if (limit := config.export.max_bytes) is not None:
        left = limit - code_bytes
        if left <= 0:
            raise TitanError(f"export.max_bytes: the code alone has {code_bytes:,} bytes of {limit:,}")
        overrides.append(f"--export.max_bytes={left}")
    return export_run(run, output=artifact, overrides=overrides, device=config.train.device, scored=False)


# ---------------------------------------------------------------- scoring
def score_artifact(path: Path, config: RunConfig, tokenizer: Any, device: torch.device, peers: Peers) -> dict[str, Scores]:
    """Scores of an artifact on the config's validation sets, shared out among the ranks.

    The tokenizer's files need not lie beside the artifact: those of
    ``tokenizer`` are taken, if they are the ones it was made with.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The artifact checks the files beside it by their hashes.
        for name, content in tokenizer.files().items():
            (Path(folder) / name).write_bytes(content)
        copy = Path(folder) / ARTIFACT
        shutil.copyfile(path, copy)
        stored = inspect(copy)
        require_tokenizer(tokenizer, stored.fingerprint, str(path))
        module = materialise(replace(config, adapter=None), tokenizer, decode_tensors(read_artifact(copy).tensors), device, str(path))
    module.requires_grad_(False)
    if config.train.compile != "none":
        compile_module(module, config.train.compile)
    return {entry.name: score(module, ValidationSet.build(entry, config, tokenizer), device, peers=peers) for entry in config.validation}


def print_scores(config: RunConfig, artifact: Path) -> int:
    """One line of JSON, by rank 0: ``{"validation": {set: {"loss", "bits_per_byte", "tokens", "bytes"}}}``."""
    world, parallel = World.from_environment(), config.parallel
    # What was trained on a GPU can be checked without one.
    device = choose_device("cpu" if config.train.device == "cpu" else "auto", world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tokenizer = config.tokenizer.build()
    if world.size == 1:
        scores = score_artifact(artifact, config, tokenizer, device, Peers())
    else:
        with connected(world, device, timeout_s=parallel.timeout_s, init_timeout_s=parallel.init_timeout_s):
            scores = score_artifact(artifact, config, tokenizer, device, Peers(world))
    if world.rank == 0:
        values = {name: {"loss": one.loss, "bits_per_byte": one.bits_per_byte, "tokens": one.n_tokens, "bytes": one.n_bytes} for name, one in scores.items()}
        print(json.dumps({"validation": values}))
    return 0
