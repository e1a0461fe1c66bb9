"""Where a run stands in its data: shown, handed on, taken up.

Two forms are written to JSON. The *exact* one is the loader's state, packing
buffers included. The *record* is what others keep beside a model, as
hunmin-13B-A2B does:

    {"global_step": 2000, "consumed_samples": 32110000, "consumed_shards": 3211,
     "rows_per_shard": 10000, "seed": 42}

It knows whole shards in the order of their names and nothing of packing, so
what is taken up from it is approximate, and said to be. Its counts are often
wrong (they may count packed rows, or steps of another phase); when they
contradict one another a run starts from them only after the user has said
which to trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from titanlm import checkpoint
from titanlm.config import RunConfig, loads, to_tables
from titanlm.data import merge_states
from titanlm.errors import DataError
from titanlm.runs import write_atomic
from titanlm.stream import Stream, streams_of

MAX_BYTES = 1 << 30
RECORD = ("global_step", "consumed_samples", "consumed_shards", "rows_per_shard", "seed")


# ---------------------------------------------------------------- shown
def describe_state(run: Path) -> str:
    """The data state of a run's newest checkpoint, for people."""
    folder, state, config = _of_run(run)
    data = state["data"]
    record = record_of(state, config)
    lines = [
        f"{folder}",
        f"  step              {record['global_step']:,}, {state['progress']['tokens']:,} tokens",
        f"  rows handed out   {data['row']:,} of {data['n_streams']} streams, seed {record['seed']}",
        f"  rows read         {record['consumed_samples']:,}, {record['consumed_shards']:,} shards to their end",
    ]
    for index, source in enumerate(config.sources):
        states = [_of_source(stream["dataset"], index) for stream in data["streams"].values()]
        lines.append(f"  {source.label}")
        if "tokens" in next(iter(data["streams"].values()))["dataset"]:
            mixed = [stream["dataset"] for stream in data["streams"].values()]
            lines.append(f"    documents {sum(one['documents'][index] for one in mixed):,}, tokens {sum(one['tokens'][index] for one in mixed):,}")
        lines += [f"    {line}" for line in _source_lines(states)]
    waiting = sum(len(array) for stream in data["streams"].values() for array in _arrays(stream["packer"]))
    lines.append(f"  packing buffers   {waiting:,} numbers, saved with the state")
    return "\n".join(lines)


def _source_lines(states: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for state in states:
        for name, value in state.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + int(value)
    if counts:
        yield "rows " + ", ".join(f"{name} {value:,}" for name, value in counts.items())
    if all({"taken", "n_shards"} <= state.keys() for state in states):
        n_streams, n_shards = len(states), states[0]["n_shards"]
        epochs = [(number + state["taken"] * n_streams) // n_shards for number, state in enumerate(states)]
        taken = sum(state["taken"] for state in states)
        yield f"shards {taken:,} taken of {n_shards:,}: streams are in epochs {min(epochs)} to {max(epochs)}"
    for reason in dict.fromkeys(reason for state in states for reason in state.get("unreadable", [])):
        yield f"unreadable: {reason}"


def record_of(state: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The record of a checkpoint's state: rows read, and shards read to their end."""
    sources = [
        source for stream in state["data"]["streams"].values() for index in range(len(config.sources)) for source in [_of_source(stream["dataset"], index)]
    ]
    samples = sum(sum(source.get("counts", {}).values()) for source in sources)
    shards = sum(int(source.get("taken", 0)) for source in sources)
    begun = sum(int(source.get("index", 0)) + int(source.get("emitted", 0)) for source in sources)
    return {
        "global_step": state["progress"]["step"],
        "consumed_samples": samples,
        "consumed_shards": shards,
        "rows_per_shard": round((samples - begun) / shards) if shards else 0,
        "seed": config.train.seed,
    }


def export_state(run: Path, output: Path) -> str:
    """Write record and exact state of a run's newest checkpoint; says what was written."""
    folder, state, config = _of_run(run)
    record = record_of(state, config)
    write_atomic(output, json.dumps({**record, "titanlm": {"data": _plain(state["data"]), "fingerprints": state["fingerprints"], "order": order_of(config)}}))
    numbers = ", ".join(f"{name} {value:,}" for name, value in record.items())
    return f'{output}: {numbers}; with the exact state of {folder.name}, for data.start = "{output}"'


# ---------------------------------------------------------------- taken up
def import_record(file: Path, output: Path, trust: Literal["samples", "shards"] | None = None) -> str:
    """Make a record fit for ``data.start``; says what a run would skip.

    Raises DataError when its counts contradict one another and ``trust`` does
    not say which is right.
    """
    stored = _read(file)
    if "titanlm" in stored:
        raise DataError(f'{file}: holds an exact state, which an import would throw away; name it as it is: data.start = "{file}"')
    shards, rows = _skipped(stored, file, trust)
    per_shard = stored["rows_per_shard"]
    fixed = {name: stored[name] for name in RECORD} | {"consumed_shards": shards, "consumed_samples": shards * per_shard + rows, "trusted": trust or "both"}
    write_atomic(output, json.dumps(fixed))
    what = f"{shards:,} whole shards" + (f" and {rows:,} rows of the next" if rows else "")
    return f'{output}: APPROXIMATE: a run with data.start = "{output}" skips {what}, in the order of their names; what others packed or shuffled is not known'


def start_state(config: RunConfig, streams: Sequence[Stream], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """The loader's state that ``data.start`` names.

    Raises DataError when it is of other data, or a record that this data
    cannot be taken up from.
    """
    path = Path(config.data.start).expanduser()
    if path.is_dir():
        folder, state, other = _of_run(path)
        _require_same(state["fingerprints"], fingerprints, order_of(other), config, folder)
        return state["data"]
    stored = _read(path)
    if "titanlm" in stored:
        exact = stored["titanlm"]
        try:
            _require_same(exact["fingerprints"], fingerprints, exact["order"], config, path)
            return _back(exact["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: its exact state is damaged ({error!r}); write it again with `titanlm data state RUN --output`") from error
    shards, rows = _skipped(stored, path, None)
    for stream in streams:
        skip = getattr(stream.dataset, "skip", None)
        if skip is None:
            raise DataError(f"data.start: {path} counts shards and rows, which this dataset cannot skip; name a checkpoint or an exported state")
        skip(shards, rows, stored["rows_per_shard"])
    return {"n_streams": len(streams), "row": 0, "streams": {str(number): stream.state() for number, stream in enumerate(streams)}}


def order_of(config: RunConfig) -> dict[str, Any]:
    """What of a config decides which rows come when, beside the data itself; where the files lie does not."""
    tables = {
        "train.seed": config.train.seed,
        "packer": to_tables(config.packer),
        "sources": [to_tables(replace(source, name=source.label, epochs=0)) for source in config.sources],
    }
    for source in tables["sources"]:
        for key in ("paths", "validation_paths"):
            source["dataset"].pop(key, None)
    return json.loads(json.dumps(tables))


def _require_same(saved: Mapping[str, str], now: Mapping[str, str], order: Mapping[str, Any], config: RunConfig, source: Path) -> None:
    """Raises DataError when a state's places would mean other rows here."""
    changed = [f"the {what} is another" for what in ("dataset", "tokenizer") if saved[what] != now[what]]
    changed += [f"{key}: {order.get(key)!r} → {value!r}" for key, value in order_of(config).items() if order.get(key) != value]
    if changed:
        raise DataError(f"data.start: {source}: its places mean nothing here:\n  " + "\n  ".join(changed))


def _skipped(record: Mapping[str, Any], source: Path, trust: str | None) -> tuple[int, int]:
    """Whole shards, and rows of the next, that a record says are done."""
    wrong = [name for name in RECORD if type(record.get(name)) is not int or record[name] < 0]
    if wrong or not record["rows_per_shard"]:
        raise DataError(f"{source}: {', '.join(wrong) or 'rows_per_shard'} must be there and a whole number that is not negative")
    samples, shards, per_shard = (record[name] for name in ("consumed_samples", "consumed_shards", "rows_per_shard"))
    if samples == shards * per_shard or trust == "shards":
        return shards, 0
    if trust == "samples" or (record.get("trusted") == "samples" and samples // per_shard == shards):
        return samples // per_shard, samples % per_shard
    product = f"{shards:,} shards of {per_shard:,} rows are {shards * per_shard:,} samples"
    remedy = f"say which count is right: titanlm data state --import {source} --trust samples|shards --output FILE"
    raise DataError(f"{source}: its counts contradict one another: {product}, it says {samples:,}; {remedy}")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than any data state")
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a run folder, a checkpoint folder or a data state") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON: {error}") from error
    if not isinstance(stored, dict):
        raise DataError(f"{path}: is no data state: expected a JSON object")
    return stored


def _of_run(run: Path) -> tuple[Path, dict[str, Any], RunConfig]:
    from titanlm.targets import find_checkpoint

    folder = find_checkpoint(run)
    saved = checkpoint.load(folder)
    config = loads(saved.config_toml, f"{folder}/config.toml")
    if not all("data" in own for own in saved.ranks):
        raise DataError(f"{folder}: holds weights alone (checkpoint.save_only_model), and does not say where the data stood")
    state = {**saved.state, "data": merge_states([own["data"] for own in saved.ranks])}
    behind = {number: stream for number, stream in state["data"]["streams"].items() if "replay" in stream}
    if behind:  # saved by a run with workers: some rows before where it stood
        longest = max(stream["replay"]["seq_len"] for stream in behind.values())
        numbers = [int(number) for number in behind]
        for number, stream in zip(behind, streams_of(config, config.tokenizer.build(), seq_len=longest, only=numbers)):
            stream.restore(behind[number])
            state["data"]["streams"][number] = stream.state()
    return folder, state, config


def _of_source(dataset: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """A source's own state inside a stream's."""
    return dataset["sources"][index] if "sources" in dataset else dataset


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)


def _plain(value: Any) -> Any:
    """As JSON keeps it; arrays say their dtype."""
    if isinstance(value, np.ndarray):
        return {"$array": value.tolist(), "dtype": value.dtype.name}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _back(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$array", "dtype"}:
            return np.array(value["$array"], dtype=np.dtype(value["dtype"]))
        return {key: _back(item) for key, item in value.items()}
    return [_back(item) for item in value] if isinstance(value, list) else value
