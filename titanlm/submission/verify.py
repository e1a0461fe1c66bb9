"""``titanlm submission verify DIR``: is a submission what it says, as far as that can be told from its folder?

Sizes, keys and logs are read in any folder, whoever made it: links are not
followed, sizes are looked at before content, nothing is unpickled, and no code
is run; train_gpt.py is only parsed, by a process of its own. A folder with
an artifact of titanlm (model.titanlm) gets more: the artifact is read, and
with ``data`` and ``tokenizer`` it is scored again by the folder's own
train_gpt.py, alone in a temporary folder, without titanlm, network and
training data (``isolated`` says how far that goes). That runs code out of the
folder, which is why it has to be asked for by naming the data.

The challenge has no such checker; its rules are in the README of
openai/parameter-golf, its log lines in ``challenge_log``.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from titanlm.errors import TitanError
from titanlm.submission import metadata, rescore
from titanlm.submission.challenge_log import ChallengeLog, read_log
from titanlm.submission.folder import ARTIFACT, SCRIPT, Check, Folder
from titanlm.submission.metadata import MAX_BYTES, TIME_LIMIT_S, number
from titanlm.submission.process import environment, run
from titanlm.submission.statistics import summary

TIME_TOLERANCE_S = 2.0
"""A script sees that its time is over after a step."""

_MAX_FILES = 200
_MAX_LOG_BYTES = 16 << 20
_FOREIGN_ARTIFACTS = (".ptz", ".bin", ".pt", ".pth", ".pkl", ".zst", ".br", ".xz", ".lzma", ".safetensors")


def verify(folder: Path, *, max_tokens: int = 0, data: Path | None = None, tokenizer: Path | None = None, timeout_s: float = 3600.0) -> tuple[str, bool]:
    """A line for each check, and whether none failed; arguments and errors are those of ``checks``."""
    found = list(checks(folder, max_tokens=max_tokens, data=data, tokenizer=tokenizer, timeout_s=timeout_s))
    return "\n".join([*map(str, found), tally(found)]), not any(check.state == "FAIL" for check in found)


def tally(found: Sequence[Check]) -> str:
    failed, skipped = (sum(check.state == state for check in found) for state in ("FAIL", "not checked"))
    return f"{len(found)} checks, {failed} failed, {skipped} not made"


def checks(folder: Path, *, max_tokens: int = 0, data: Path | None = None, tokenizer: Path | None = None, timeout_s: float = 3600.0) -> Iterator[Check]:
    """Each check as it is made.

    ``data`` is a folder with validation shards (``*_val_*.bin``), ``tokenizer``
    the tokenizer's file; with both, the artifact is scored on the first
    ``max_tokens`` of each validation set, 0 for all, for ``timeout_s`` at most.
    Raises TitanError when one of the three paths is not there.
    """
    for path, is_there, what in ((folder, folder.is_dir(), "folder"), (data, data is None or data.is_dir(), "folder"),
                                 (tokenizer, tokenizer is None or tokenizer.is_file(), "file")):  # fmt: skip
        if not is_there:
            raise TitanError(f"{path}: no such {what}")
    opened = Folder(folder, {})
    try:
        listed = list(_listing(opened))
    except OSError as error:
        raise TitanError(f"{folder}: cannot be listed: {error.strerror}") from error
    yield from listed
    yield from _readme(opened)
    document = yield from _document(opened)
    yield from _script(opened)
    track, said = _track(opened, document)
    yield Check("ok", "track", said)
    logs = yield from _logs(opened)
    yield from _scores(document, logs)
    yield from _times(logs, track)
    yield from _sizes(opened, document, logs)
    if (yield from rescore.read(opened, tokenizer)):
        yield from rescore.rescore(opened, logs, max_tokens=max_tokens, data=data, tokenizer=tokenizer, timeout_s=timeout_s)


# ---------------------------------------------------------------- files
def _listing(folder: Folder) -> Iterator[Check]:
    """Fills ``sizes``; what is neither a file nor a folder is named and from then on not there."""
    with os.scandir(folder.path) as entries:
        for index, entry in enumerate(entries):
            if index == _MAX_FILES:
                yield Check("FAIL", "files", f"more than {_MAX_FILES}; the rest is not looked at")
                return
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                folder.sizes[entry.name] = status.st_size
            elif stat.S_ISDIR(status.st_mode):
                yield Check("not checked", repr(entry.name), "a folder, which the challenge does not ask for")
            else:
                yield Check("FAIL", repr(entry.name), "a link or a device, of which nothing is read; put a file in its place")


def _readme(folder: Folder) -> Iterator[Check]:
    size = folder.sizes.get("README.md")
    if not size:
        yield Check("FAIL", "README.md", "missing" if size is None else "empty")
    else:
        yield Check("ok", "README.md", f"{size:,} bytes")


def _document(folder: Folder) -> Generator[Check, None, dict[str, Any]]:
    name = "submission.json"
    if name not in folder.sizes:
        others = sorted(other for other in folder.sizes if other.endswith(".json"))
        yield Check("FAIL", name, f"missing{f'; rename {others[0]!r} if that is it' if others else ''}")
        return {}
    try:
        document = metadata.load(folder.read(name))
    except TitanError as error:
        yield Check("FAIL", name, str(error))
        return {}
    problems = metadata.problems(document, complete=folder.is_ours)
    yield from (Check("FAIL", name, problem) for problem in problems)
    if not problems:
        absent = [key for key in metadata.CORE if key not in document]
        without = f"; without {', '.join(absent)}" if absent else ""
        yield Check("ok", name, f"{len(document)} keys, types as usual{without}")
    return document


def _script(folder: Folder) -> Iterator[Check]:
    if SCRIPT not in folder.sizes:
        yield Check("FAIL", SCRIPT, "missing; all counted code belongs in it")
        return
    try:
        source = folder.read(SCRIPT)
        with tempfile.TemporaryDirectory() as scratch:
            # Parsing is what may end in a crash, so it is another process that does it; nothing is run.
            place = Path(scratch)
            (place / SCRIPT).write_bytes(source)
            parse = f"import ast; ast.parse(open({SCRIPT!r}, 'rb').read())"
            ended = run([sys.executable, "-I", "-c", parse], place, environment(place), 60)
    except (TitanError, OSError) as error:
        yield Check("FAIL", SCRIPT, str(error))
        return
    if ended.status:
        yield Check("FAIL", SCRIPT, f"is not Python: {ended.last_words}")
    else:
        yield Check("ok", SCRIPT, f"{len(source):,} bytes, parses")


def _track(folder: Folder, document: Mapping[str, Any]) -> tuple[str, str]:
    """One of ``metadata.TRACKS``, and what there is to say: the folder it lies in counts more than what it says of itself."""
    for where in (folder.path.absolute().parent.name, document.get("track")):
        if isinstance(where, str) and "non_record" in where.replace("-", "_"):
            return "non_record_16mb", f"non-record: {MAX_BYTES:,} bytes, any time"
        if isinstance(where, str) and "10min" in where:
            return "10min_16mb", f"10 minutes and {MAX_BYTES:,} bytes"
    return "10min_16mb", f"10 minutes and {MAX_BYTES:,} bytes, taken for granted since none is stated"


# ---------------------------------------------------------------- logs
def _logs(folder: Folder) -> Generator[Check, None, dict[str, ChallengeLog]]:
    logs: dict[str, ChallengeLog] = {}
    for name in sorted(folder.sizes):
        if not name.endswith((".log", ".txt")) or name == "requirements.txt":
            continue
        try:
            with folder.open(name, _MAX_LOG_BYTES) as file:
                log = read_log(file)
        except TitanError as error:
            yield Check("FAIL", repr(name), str(error))
            continue
        if log == ChallengeLog():
            yield Check("not checked", repr(name), "no line of a challenge log in it")
        elif log.val_bpb is None:
            yield Check("FAIL", repr(name), "a log without a final score (`… val_loss:… val_bpb:…` after training), so the run did not end or did not score")
        else:
            logs[name] = log
            yield Check("ok", repr(name), _told(log))
    if not logs:
        yield Check("FAIL", "logs", "none with a final score; the challenge wants one a seed")
    return logs


def _told(log: ChallengeLog) -> str:
    ratio = log.bytes_per_token
    parts = [
        f"seed {log.seed}" if log.seed is not None else "no seed",
        f"{log.steps:,} steps" if log.steps is not None else "no steps",
        f"{log.train_time_ms / 1000:.1f} s" if log.train_time_ms is not None else "no time",
        f"val_loss {log.val_loss:.8f} val_bpb {log.val_bpb:.8f} ({log.score_name})",
        f"{ratio:.5f} bytes a token" if ratio is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _scores(document: Mapping[str, Any], logs: Mapping[str, ChallengeLog]) -> Iterator[Check]:
    """What submission.json claims against what the logs end with."""
    for key in ("val_bpb", "val_loss"):
        values = {name: value for name, log in logs.items() if (value := getattr(log, key)) is not None}
        claimed = number(document.get(key))
        if claimed is None or not values:
            yield Check("not checked", key, "submission.json has none" if claimed is None else "no log has one")
        else:
            yield _claim(key, claimed, values)
    results = document.get("seed_results")
    for seed, result in results.items() if isinstance(results, dict) else ():
        own = [log for log in logs.values() if str(log.seed) == seed]
        claimed = number(result.get("val_bpb")) if isinstance(result, dict) else None
        if claimed is None or not own:
            yield Check("not checked", f"seed {seed!r}", "no log of it" if not own else "seed_results has no val_bpb of it")
        else:
            right = any(log.val_bpb is not None and _equal(claimed, log.val_bpb) for log in own)
            yield Check("ok" if right else "FAIL", f"seed {seed!r}", f"val_bpb {claimed} in seed_results, {own[0].val_bpb} in its log")


def _claim(key: str, claimed: float, values: Mapping[str, float]) -> Check:
    found = summary(list(values.values()))
    said = f"mean {found.mean:.8f}" + (f", standard deviation {found.sd:.8f}" if found.sd is not None else "") + f", best {min(values.values()):.8f}"
    if len(values) > 1 and _equal(claimed, found.mean):
        return Check("ok", key, f"{claimed} is the mean of {len(values)} logs ({said})")
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        if _equal(claimed, value):
            which = "" if len(values) == 1 else ", the best, not the mean" if value == min(values.values()) else ", neither the best nor the mean"
            return Check("ok", key, f"{claimed} is that of {name!r}{which} ({said})")
    return Check("FAIL", key, f"{claimed} is neither the mean nor that of a log ({said})")


def _equal(claimed: float, value: float) -> bool:
    """To the digits that were written, of which four are the least: a 0 at the end is not in a JSON number."""
    exponent = Decimal(repr(claimed)).as_tuple().exponent
    unit = 10.0 ** min(int(exponent), -4)
    return abs(claimed - value) <= max(unit, 1e-8) * 1.001


def _times(logs: Mapping[str, ChallengeLog], track: str) -> Iterator[Check]:
    for name, log in logs.items() if track == "10min_16mb" else ():
        for what, time_ms in (("training", log.train_time_ms), ("evaluation", log.eval_time_ms)):
            if time_ms is None:
                yield Check("not checked", f"{what} of {name!r}", "the log has no time of it")
            else:
                within = time_ms / 1000 <= TIME_LIMIT_S + TIME_TOLERANCE_S
                yield Check("ok" if within else "FAIL", f"{what} of {name!r}", f"{time_ms / 1000:.1f} s of {TIME_LIMIT_S:.0f} s")


# ---------------------------------------------------------------- sizes
def _sizes(folder: Folder, document: Mapping[str, Any], logs: Mapping[str, ChallengeLog]) -> Iterator[Check]:
    code, artifact = folder.sizes.get(SCRIPT), folder.sizes.get(ARTIFACT)
    together = code + artifact if code is not None and artifact is not None else None
    counted = {
        "submission.json": document.get("bytes_total"),
        **{name: log.total_bytes for name, log in logs.items()},
        f"{SCRIPT} and {ARTIFACT}": together,
    }
    sizes = {where: size for where, size in counted.items() if type(size) is int}
    for where, size in sizes.items():
        yield Check("ok" if size <= MAX_BYTES else "FAIL", f"bytes of {where!r}", f"{size:,} of {MAX_BYTES:,}")
    if not sizes:
        yield Check("not checked", "bytes", "neither submission.json nor a log says how many there are")
    stated = sizes.get("submission.json")
    totals = {log.total_bytes for log in logs.values() if log.total_bytes is not None}
    if stated is not None and totals:
        said = f"{stated:,} in submission.json, {_listed(totals)} in the logs"
        yield Check("ok" if stated in totals else "FAIL", "bytes_total", said)
    if stated is not None and together is not None:
        yield Check("ok" if stated == together else "FAIL", "bytes_total", f"{stated:,} in submission.json, {together:,} in the folder")
    if code is not None:
        yield from _code_size(code, document.get("bytes_code"), logs)
    for name, size in folder.sizes.items():
        if name.endswith(_FOREIGN_ARTIFACTS):
            with_code = size + (code or 0)
            yield Check("not checked" if with_code <= MAX_BYTES else "FAIL", repr(name), f"{size:,} bytes, {with_code:,} with the code; not opened")


def _code_size(code: int, stated: Any, logs: Mapping[str, ChallengeLog]) -> Iterator[Check]:
    """The script in the folder should be the one that ran and was counted."""
    for where, size in {"submission.json": stated, **{name: log.code_bytes for name, log in logs.items()}}.items():
        if type(size) is int:
            why = "" if size == code else ": it is another script, or counted in another form"
            yield Check("ok" if size == code else "FAIL", f"code of {where!r}", f"{size:,} bytes are counted, {SCRIPT} has {code:,}{why}")


def _listed(sizes: set[int]) -> str:
    return ", ".join(f"{size:,}" for size in sorted(sizes))
