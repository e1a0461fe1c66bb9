"""`titanlm data prepare`: any dataset of texts, tokenised once, as token shards.

Texts are read in order of the data by this process, tokenised in batches by
forked ones and written by this one in the order in which they were read, so
what is written does not depend on how many processes there are. Few batches are
under way at a time: memory does not grow with the data.

A run that is killed goes on from its last whole shard. What is saved after
every shard is small, because the datasets' states are: the state before the
batch that was being written, how many of its documents are done, and how many
tokens of the next one, which the end of a shard may have cut in two. These are
tokenised again, and since texts, tokenizer and settings must be the same (they
are compared), the files come out byte for byte as those of a straight run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.config import FILE_DATASETS, load
from titanlm.datasets.opening import kind_of, remedy_for
from titanlm.datasets.remote import shown
from titanlm.datasets.shard_file import HEADER_BYTES, MANIFEST, SIDECAR, TEMPORARY, ShardWriter, dtype_for, read_manifest, write_manifest
from titanlm.datasets.tokenising import Batch, tokenised
from titanlm.errors import DataError, TitanError
from titanlm.interrupts import Interrupted, Interrupts
from titanlm.registry import Component, Tokenizer, lookup
from titanlm.runs import write_atomic
from titanlm.tokenizers.fingerprint import difference
from titanlm.tokenizers.opening import open_tokenizer

BATCH_BYTES = 1 << 18
"""Characters of a batch, at least, unless it has BATCH_TEXTS texts."""
BATCH_TEXTS = 512
LINE_EVERY_S = 10.0
"""Between lines of progress where there is no terminal."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHORT = {"train": "train", "validation": "val"}
"""Splits as they are called in the names of shards."""


@dataclass(frozen=True)
class Request:
    """What is to be prepared."""

    output: Path
    sources: tuple[tuple[str, Component], ...]
    """Name and dataset, one after the other."""
    tokenizer: Tokenizer
    split: str = "train"
    """What the shards are for."""
    read_split: str = "train"
    """The datasets' split that is read: files named by hand are all of one."""
    shard_tokens: int = 100_000_000
    max_tokens: int | None = None
    """Stop before the document that would exceed it."""
    prefix: str = "tokens"
    on_error: str = "raise"
    workers: int | None = None
    """Processes that tokenise; None: one less than there are cores; 0: this one."""
    force: bool = False
    """Replace what is there."""

    @property
    def name(self) -> str:
        """Of the set of shards, which is what their names begin with."""
        return f"{self.prefix}_{_SHORT[self.split]}"


@dataclass
class Result:
    """What was written, of all runs that it took."""

    output: str
    name: str
    shards: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counted_bytes: int = 0
    """Bytes that the tokens stand for; those of the text, unless the tokenizer changes it."""
    empty: int = 0
    filtered: int = 0
    unreadable: int = 0
    finished: bool = True
    """False: interrupted."""
    fresh: bool = True
    """False: it was there already."""
    seconds: float = 0.0
    """Of this run."""
    megabytes_per_s: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        if not self.finished:
            again = "the same command goes on from there"
            return f"{self.output}: interrupted; {self.shards} whole {_plural(self.shards, 'shard')} with {self.tokens:,} tokens kept, {again}"
        lines = [
            f"{self.output}: {self.shards:,} {_plural(self.shards, 'shard')} {self.name}_*.bin" + ("" if self.fresh else " were there already"),
            f"  documents        {self.documents:,}; passed over: {self.empty:,} empty, {self.filtered:,} filtered, {self.unreadable:,} unreadable",
            f"  tokens           {self.tokens:,}",
            f"  text             {self.text_bytes:,} bytes, {self.bytes_per_token:.4f} a token",
        ]
        if self.counted_bytes != self.text_bytes:
            share = 100 * (self.counted_bytes / self.text_bytes - 1)
            lines.append(f"  counted          {self.counted_bytes:,} bytes by the tokens ({share:+.3f} %): the tokenizer changes text before it cuts it")
        if self.fresh:
            lines.append(f"  time             {self.seconds:.1f} s, {self.megabytes_per_s:.2f} MB/s")
        return "\n".join(lines)

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self) | {"bytes_per_token": self.bytes_per_token})


def request_of(
    output: Path,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    inputs: Sequence[str] = (),
    tokenizer: str | None = None,
    column: str | None = None,
    **settings: Any,
) -> Request:
    """What the command line asks for: the data of a config, or files and a tokenizer; ``settings`` are fields of ``Request``.

    Raises TitanError for what does not go together.
    """
    if config is not None:
        if tokenizer is not None:
            raise TitanError("--tokenizer goes with --input; a config names its own (change it with --tokenizer.name=..., --tokenizer.path=...)")
        run = load(config, overrides)
        sources = tuple((source.label, source.dataset) for source in run.sources)
        return Request(output, sources, run.tokenizer.build(), read_split=settings.get("split", "train"), on_error=run.data.on_error, **settings)
    if overrides:
        raise TitanError(f"{overrides[0]}: overrides change the config of --config FILE, which is not given")
    if not inputs or tokenizer is None:
        raise TitanError("name the data: --config FILE, or --input FILES with --tokenizer TOKENIZER")
    return Request(output, tuple(_datasets(inputs, column)), open_tokenizer(tokenizer)[1], **settings)


def _datasets(inputs: Sequence[str], column: str | None) -> Iterator[tuple[str, Component]]:
    """The files in their order; those in a row that are read alike are one dataset."""
    groups: list[tuple[str, list[str]]] = []
    for path in inputs:
        kind = kind_of(path)
        if kind is None or kind == "token_shards":
            kinds = ", ".join(end for end, name in FILE_DATASETS.items() if name != "token_shards")
            remedy = remedy_for(path) or "for other data name a --config"
            raise TitanError(f"--input {shown(path)}: what it is shows in how its name ends ({kinds}); {remedy}")
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(path)
        else:
            groups.append((kind, [path]))
    for number, (kind, paths) in enumerate(groups):
        settings = {"column": column} if column is not None and kind != "text" else {}
        yield kind if len(groups) == 1 else f"{kind} {number}", Component.named("dataset", kind, paths=tuple(paths), **settings)


def prepare(request: Request) -> Result:
    """Write the shards, or go on writing them; raises TitanError, with what is finished kept."""
    if not _NAME.fullmatch(request.prefix) or SIDECAR in f"{request.name}_":
        raise TitanError(f"--prefix {request.prefix!r}: use up to 100 letters, digits and . _ - (not first: . _ -), without `{SIDECAR}`")
    if request.shard_tokens < 1:
        raise TitanError(f"--shard-tokens {request.shard_tokens}: a shard has at least one token")
    try:
        request.output.mkdir(parents=True, exist_ok=True)
        with _locked(request.output) as lock:
            return _Preparation(request).run(lock)
    except OSError as error:
        raise TitanError(f"{error.filename or request.output}: cannot be written ({error.strerror}); what is finished is kept") from error


# ---------------------------------------------------------------- what is kept
@dataclass
class _Place:
    """Where a preparation stands after a shard."""

    source: int = 0
    dataset: dict[str, Any] | None = None
    """State before the batch that was being written; None: at the beginning."""
    done: int = 0
    """Documents of that batch that are written."""
    written: int = 0
    """Tokens of the next one that are."""
    counts: list[dict[str, int]] = field(default_factory=list)
    """Of the sources that are read to their end."""
    totals: dict[str, int] = field(default_factory=lambda: {"documents": 0, "tokens": 0, "text_bytes": 0, "counted_bytes": 0})
    shards: list[dict[str, Any]] = field(default_factory=list)


class _Preparation:
    """One request against what its folder holds."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._folder, self._tokenizer = request.output, request.tokenizer
        self._state_path = self._folder / f"{request.name}.partial.json"
        self._datasets = [_open(label, component, request) for label, component in request.sources]
        self._settings = self._identity()
        self._place = _Place()
        self._writer: ShardWriter | None = None
        self._started = 0  # documents that begin in the present shard
        self._bytes_before = 0

    def run(self, lock: int) -> Result:
        began = time.monotonic()
        manifest = read_manifest(self._folder)
        if self._request.force:
            self._clear(manifest)
        for litter in self._folder.glob(f"{TEMPORARY}{self._request.name}_*"):  # of a killed run
            litter.unlink()
        if (done := manifest.get(self._request.name)) is not None:
            self._require_same(done, self._folder / MANIFEST)
            self._require_whole(done["shards"])
            self._state_path.unlink(missing_ok=True)
            return self._result(done["totals"], done["passed_over"], done["shards"], fresh=False)
        self._resume()
        self._bytes_before = self._place.totals["text_bytes"]
        try:
            with Interrupts() as interrupts:
                finished = self._write(lock, interrupts, began)
        except Interrupted:
            finished = None
        finally:
            if self._writer is not None:
                self._writer.abandon()
        seconds = time.monotonic() - began
        timing = {"seconds": seconds, "megabytes_per_s": (self._place.totals["text_bytes"] - self._bytes_before) / 1e6 / seconds}
        if finished is None:
            whole = {"tokens": sum(shard["tokens"] for shard in self._place.shards)}
            return dataclasses.replace(self._result({}, {}, self._place.shards, fresh=True, **timing), finished=False, **whole)
        manifest = read_manifest(self._folder)  # another set may have been finished meanwhile
        special = {"bos_id": self._tokenizer.bos_id, "eos_id": self._tokenizer.eos_id}
        entry = {"tokenizer": self._tokenizer.fingerprint, **special, "request": self._settings, "totals": self._place.totals, "passed_over": finished}
        write_manifest(self._folder, manifest | {self._request.name: entry | {"shards": self._place.shards}})
        self._state_path.unlink(missing_ok=True)
        return self._result(self._place.totals, finished, self._place.shards, fresh=True, **timing)

    def _result(self, totals: dict[str, Any], passed_over: dict[str, Any], shards: Sequence[Any], **more: Any) -> Result:
        return Result(output=str(self._folder), name=self._request.name, shards=len(shards), **totals, **passed_over, **more)

    # ------------------------------------------------------------ resume
    def _identity(self) -> dict[str, str]:
        """All that decides what is written, but for the tokenizer."""
        request = self._request
        settings = {"split": request.read_split, "shard_tokens": request.shard_tokens, "max_tokens": request.max_tokens, "on_error": request.on_error}
        told = {f"--{name.replace('_', '-')}": repr(value) for name, value in settings.items()}
        for (label, component), dataset in zip(request.sources, self._datasets):
            told[f"dataset of {label}"] = component.name
            values = {one.name: getattr(component.config, one.name) for one in dataclasses.fields(component.config) if one.name != "shuffle"}
            told |= {f"dataset.{name} of {label}": repr(value) for name, value in values.items()}
            told[f"data of {label}"] = dataset.fingerprint
        return told

    def _require_same(self, saved: dict[str, Any], where: Path) -> None:
        before, now = saved.get("request", {}), self._settings
        lines = [f"tokenizer: {line}" for line in difference(str(saved.get("tokenizer")), self._tokenizer.fingerprint)]
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                lines.append(f"{key}: {before.get(key, 'none')} → {now.get(key, 'none')}")
        if lines:
            what = f"{where}: {self._request.name} was begun with other settings or data"
            remedy = "--force begins anew, another --prefix or --output leaves it alone (before → now):"
            raise DataError("\n  ".join([f"{what}; {remedy}", *lines]))

    def _require_whole(self, shards: Sequence[dict[str, Any]]) -> None:
        width = dtype_for(self._tokenizer.vocab_size).itemsize
        for shard in shards:
            path = self._folder / shard["name"]
            if not path.is_file() or path.stat().st_size != HEADER_BYTES + shard["tokens"] * width:
                raise DataError(f"{path}: missing or not as long as it was written; put it back, or prepare all again with --force")

    def _resume(self) -> None:
        try:
            stored = json.loads(self._state_path.read_text(encoding="utf-8"))
            place = _Place(**stored["place"])
        except FileNotFoundError:
            if strangers := self._files():
                raise DataError(f"{strangers[0]}: is in the way, and nothing says what it is; --force replaces it, or choose another --prefix") from None
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._state_path}: cannot be read ({error}); --force begins anew") from error
        self._require_same(stored, self._state_path)
        self._require_whole(place.shards)
        self._place = place
        print(f"{self._folder}: going on after {len(place.shards):,} {_plural(len(place.shards), 'shard')}", file=sys.stderr)

    def _clear(self, manifest: dict[str, Any]) -> None:
        if manifest.pop(self._request.name, None) is not None:
            write_manifest(self._folder, manifest)
        for path in [self._state_path, *self._files()]:
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self._request.name)}_\d{{6,}}\.bin")
        return sorted(path for path in self._folder.iterdir() if name.fullmatch(path.name))

    # ------------------------------------------------------------ writing
    def _write(self, lock: int, interrupts: Interrupts, began: float) -> dict[str, int]:
        """Write all that is left; how many rows of all sources were passed over."""
        place = self._place
        batch: Batch | None = None
        full = False
        with (
            tokenised(self._datasets, self._tokenizer, self._batches(), self._request.workers, lock) as results,
            _Progress(self._datasets, place, began) as progress,
        ):
            for batch, tokens in results:
                interrupts.check()
                place.source, place.dataset, place.done = batch.source, batch.state, 0
                end = 0
                for index, length in enumerate(tokens.lengths.tolist()):
                    end += length
                    if self._request.max_tokens is not None and place.totals["tokens"] + length > self._request.max_tokens:
                        full = True
                        break
                    self._append(tokens.ids[end - length : end])
                    place.totals["documents"] += 1
                    place.totals["tokens"] += length
                    place.totals["text_bytes"] += int(tokens.text_bytes[index])
                    place.totals["counted_bytes"] += int(tokens.counted_bytes[index])
                if full:
                    break
                progress.show()
        if self._writer is not None:
            self._close_shard()
        if not place.shards:
            raise DataError(f"{self._folder}: there is nothing to write: no document" + (f" of at most {self._request.max_tokens:,} tokens" if full else ""))
        if full and batch is not None:  # texts were read ahead: count again up to the last that was written
            self._datasets[batch.source].restore(batch.state)
            for _ in range(place.done):
                self._datasets[batch.source].next_text()
        read = len(self._datasets) if not full else place.source + 1
        counts = [self._counts(number) for number in range(read)]
        return {name: sum(one.get(name, 0) for one in counts) for name in ("empty", "filtered", "unreadable")}

    def _append(self, ids: np.ndarray) -> None:
        """Write a document, into the next shard too if this one ends in it; ``place`` stands behind it afterwards."""
        place = self._place
        at = place.written
        while at < len(ids):
            if self._writer is None:
                path = self._folder / f"{self._request.name}_{len(place.shards):06d}.bin"
                self._writer = ShardWriter(path, dtype_for(self._tokenizer.vocab_size), self._tokenizer.fingerprint)
                self._started = 0
            self._started += at == 0
            part = ids[at : at + self._request.shard_tokens - self._writer.n_tokens]
            self._writer.write(part)
            at += len(part)
            if self._writer.n_tokens == self._request.shard_tokens:
                place.written = at
                self._close_shard()
        place.written = 0
        place.done += 1

    def _close_shard(self) -> None:
        """Finish a shard and save the place, in this order: a shard that is whole and not in the state is written again, the same."""
        assert self._writer is not None
        writer, self._writer = self._writer, None
        try:
            sha256 = writer.close()
        finally:
            writer.abandon()
        place = self._place
        place.shards.append({"name": writer.path.name, "tokens": writer.n_tokens, "documents": self._started, "sha256": sha256})
        place.counts = [self._counts(number) for number in range(place.source)]
        stored = {"tokenizer": self._tokenizer.fingerprint, "request": self._settings, "place": asdict(place)}
        write_atomic(self._state_path, json.dumps(stored))

    def _counts(self, source: int) -> dict[str, int]:
        """What became of the rows of a source that was read to its end, in this run or before it."""
        if source < len(self._place.counts):
            return self._place.counts[source]
        return dict(self._datasets[source].state().get("counts", {}))

    def _batches(self) -> Iterator[Batch]:
        """The texts from the place on; read ahead of what is written."""
        source, state, done = self._place.source, self._place.dataset, self._place.done
        for number in range(source, len(self._datasets)):
            dataset = self._datasets[number]
            if number == source and state is not None:
                dataset.restore(state)
                for _ in range(done):
                    dataset.next_text()
            ended = False
            while not ended:
                before = dataset.state()
                items: list[tuple[dict[str, Any], int]] = []
                size = 0
                while size < BATCH_BYTES and len(items) < BATCH_TEXTS:
                    try:
                        item, document_id = dataset.next_text()
                    except StopIteration:
                        ended = True
                        break
                    items.append((dict(item), document_id))
                    size += len(item["text"])
                if items:
                    yield Batch(number, before, items)


def _open(label: str, component: Component, request: Request) -> Any:
    config = component.config
    if any(one.name == "shuffle" for one in dataclasses.fields(config)):
        config = dataclasses.replace(config, shuffle=False)
    runtime: dict[str, Any] = {"tokenizer": request.tokenizer, "split": request.read_split, "on_error": request.on_error}
    if request.read_split == "train" and "epochs" not in lookup("dataset", component.name).runtime:
        raise TitanError(f"{label}: dataset {component.name!r} knows no end (its factory does not ask for `epochs`), so it cannot be written down")
    dataset = Component("dataset", component.name, config).build(stream=0, n_streams=1, seed=0, epochs=1, **runtime)
    return dataset if hasattr(dataset, "next_text") and hasattr(dataset, "tokenise") else _Ready(dataset)


class _Ready:
    """A dataset of documents that are tokens already, handed through as texts are."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.fingerprint, self.state, self.restore = dataset.fingerprint, dataset.state, dataset.restore
        self.n_rows = getattr(dataset, "n_rows", None)

    def next_text(self) -> tuple[dict[str, Any], int]:
        document = next(self._dataset)
        return {"text": "", "document": document}, document.document_id

    def tokenise(self, item: dict[str, Any], document_id: int) -> Any:
        return item["document"]


# ---------------------------------------------------------------- surroundings
class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, datasets: Sequence[Any], place: _Place, began: float) -> None:
        self._datasets, self._place, self._began, self._said = datasets, place, began, began
        self._bytes = place.totals["text_bytes"]
        rows: list[Any] = [getattr(dataset, "n_rows", None) for dataset in datasets]
        self._total = None if None in rows else sum(rows)

    def __enter__(self) -> _Progress:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, unit=" rows", unit_scale=True, disable=not sys.stderr.isatty(), desc="preparing", leave=False, file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self) -> None:
        now = time.monotonic()
        totals, shards = self._place.totals, len(self._place.shards)
        speed = (totals["text_bytes"] - self._bytes) / 1e6 / max(now - self._began, 1e-9)
        said = f"{speed:.1f} MB/s, {totals['tokens']:,} tokens, {shards:,} {_plural(shards, 'shard')}"
        if not self._bar.disable:
            rows = sum(sum(dataset.state().get("counts", {}).values()) for dataset in self._datasets)
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(max(0, rows - self._bar.n))
        elif now - self._said >= LINE_EVERY_S:
            self._said = now
            print(f"preparing: {totals['documents']:,} documents, {totals['text_bytes'] / 1e6:.0f} MB, {said}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder, for one preparation at a time; the lock ends with the process however that dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TitanError(f"{folder}: another `titanlm data prepare` is writing there; wait for it, or choose another --output") from None
        yield descriptor
    finally:
        os.close(descriptor)


def _plural(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"
