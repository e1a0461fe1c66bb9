"""`titanlm data download`: data sets of the Hugging Face Hub, and the shards of Parameter Golf.

Which files make up a config and a split is told by where they lie, as the Hub
itself guesses it: ``CONFIG/SPLIT-*.parquet``, ``data/SPLIT-*.parquet``,
``data/CONFIG/SPLIT*``, ``CONFIG/SPLIT/*.parquet``. A data set whose card
declares something else needs ``--include``.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from titanlm.datasets.opening import remedy_for
from titanlm.datasets.remote import Folder, Remote
from titanlm.errors import DataError, TitanError
from titanlm.loggers.text import printable
from titanlm.registry import did_you_mean

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl"}
"""What reads a file, by its end."""
GOLF = {variant: f"hf://datasets/{owner}/parameter-golf" for variant, owner in (("sp1024", "willdepueoai"), ("sp4096", "kevclark"), ("sp8192", "kevclark"))}
"""Where the shards of a variant are; the number is the size of the vocabulary."""
_BY_HAND = "fetch them by other means and decompress them"
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_NUMBERS = re.compile(r"[-_.]?\d+([-_]of[-_]\d+.*)?$")
_LISTED = 4


def download(
    repo: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str = "main",
    include: str | None = None,
    output: Path | None = None,
    max_files: int | None = None,
    source: str | None = None,
) -> str:
    """Fetch one config and split (``train``) of a Hub data set; what was done and the TOML lines to paste.

    ``include`` picks by a glob on the names; config and split then only count
    when they are given. ``source`` is the address of the files in place of the
    Hub's.

    Raises DataError when nothing matches, when the data set cannot be reached
    and when a file does not come whole.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise TitanError(f"{repo}: is no name of a data set on the Hub (OWNER/NAME)")
    # A slash in a revision would begin a file name.
    folder = Folder(source or f"hf://datasets/{repo}@{revision.replace('/', '%2F')}")
    there = folder.list()
    files = [file for file in there if _kind(file.name)]
    if not files and (packed := next((file for file in there if remedy_for(file.name)), None)):
        raise DataError(f"{folder.shown}: there is no file of {', '.join(KINDS)} in it; {printable(packed.name)} and the like are not read: {_BY_HAND}")
    if include is not None:
        files = [file for file in files if fnmatch.fnmatchcase(file.name, include)] or _none(folder, f"no data file matches {include!r}", files)
    else:
        split = split or "train"
    if config is not None or split is not None:
        files = _of(files, config, split, folder)
    kinds = sorted({_kind(file.name) for file in files})
    if len(kinds) > 1:
        raise DataError(f"{folder.shown}: has these rows as {' and as '.join(kinds)}; choose with --include, such as --include '*.parquet'")
    n_found = len(files)
    files = files[:max_files]
    output = output or Path("data") / repo.rpartition("/")[2]
    fetched = folder.fetch(files, output)
    left = [f"{n_found - len(files):,} of {n_found:,} files were left out (--max-files)"] if len(files) < n_found else []
    return "\n".join([f"{output}: {fetched}", *left, "", "[dataset]", f'name = "{kinds[0]}"', f"paths = {_paths(output, files)}"])


def download_golf(*, variant: str = "sp1024", train_shards: int = 80, output: Path | None = None, source: str | None = None) -> str:
    """Fetch the first shards for training, all for validation, and the tokenizer; what was done and the TOML lines to paste.

    Raises TitanError for a variant that does not exist, DataError when its
    files are not there, cannot be reached or do not come whole.
    """
    if variant not in GOLF:
        raise TitanError(f"--variant {variant}: there is none of this name{did_you_mean(variant, GOLF)} (variants: {', '.join(GOLF)})")
    vocab = variant.removeprefix("sp")
    shard = re.compile(rf"(?:.*/)?(datasets/fineweb10B_{variant}/fineweb_(train|val)_\d{{6}}\.bin)")
    model = re.compile(rf"(?:.*/)?(tokenizers/fineweb_{vocab}_bpe\.(?:model|vocab))")
    folder = Folder(source or GOLF[variant])
    train: list[Remote] = []
    validation: list[Remote] = []
    tokenizer: list[Remote] = []
    for file in folder.list():
        if match := shard.fullmatch(file.name):
            (train if match[2] == "train" else validation).append(Remote(match[1], file.path, file.size_bytes))
        elif match := model.fullmatch(file.name):
            tokenizer.append(Remote(match[1], file.path, file.size_bytes))
    n_there = len(train)
    train = train[:train_shards]
    for what, found in (("training shard", train or not train_shards), ("validation shard", validation), ("tokenizer model", tokenizer)):
        if not found:
            raise DataError(f"{folder.shown}: has no {what} of {variant}; it should have files such as datasets/fineweb10B_{variant}/fineweb_val_000000.bin")
    output = output or Path("data") / "parameter-golf"
    fetched = folder.fetch([*tokenizer, *validation, *train], output)
    fewer = [f"only {n_there:,} training shards are there, {train_shards:,} were asked for"] if n_there < train_shards else []
    lines = [
        "[tokenizer]",
        'name = "sentencepiece"',
        f"path = {_quoted(output / 'tokenizers' / f'fineweb_{vocab}_bpe.model')}",
        "add_eos = false  # documents of these shards begin with BOS and have no EOS",
        "",
        "[dataset]",
        'name = "token_shards"',
        f"paths = {_paths(output, train)}",
        f"validation_paths = {_paths(output, validation)}",
    ]
    return "\n".join([f"{output}: {fetched}", f"{len(train):,} shards for training, {len(validation):,} for validation", *fewer, "", *lines])


def place(name: str, split: str | None = None) -> tuple[str, str]:
    """(config, split) of a file by its name; "" is the config of files without one, and what names no split is for training.

    ``split`` is a name that is taken for one even if it is unusual.
    """
    *folders, file = PurePosixPath(name).parts
    known = (*_SPLITS, split)
    head = file[: -len(_end(file))]
    bare = _NUMBERS.sub("", head)
    if folders[:1] == ["data"]:
        del folders[0]
    if folders and folders[-1] in known:
        return "/".join(folders[:-1]), folders[-1]
    word = re.split(r"[-.]", bare)[-1]  # c4-train.00000-of-01024
    if bare in known or word in known:
        return "/".join(folders), bare if bare in known else word
    if bare and re.search(r"\d[-_]of[-_]\d", head):  # train_sft-00000-of-00003
        return "/".join(folders), bare
    return "/".join(folders), "train"


def _of(files: Sequence[Remote], config: str | None, split: str | None, folder: Folder) -> list[Remote]:
    """The files of a config and a split; without a config the only one, or that of the usual name."""
    places = {file: place(file.name, split) for file in files}
    configs = dict.fromkeys(own for own, of in places.values() if split in (None, of))
    if config is None:
        config = next((name for name in ("", "default") if name in configs), next(iter(configs), ""))
        if len(configs) > 1 and config not in ("", "default"):
            _none(folder, "it has several configs, so name one with --config", files, split)
    names = {own for own in configs if config in (own, own.replace("/", "-"))}
    chosen = [file for file, (own, of) in places.items() if own in names and split in (None, of)]
    return chosen or _none(folder, f"nothing is in config {config or 'default'!r}, split {split!r}", files, split)


def _none(folder: Folder, what: str, files: Sequence[Remote], split: str | None = None) -> NoReturn:
    """Says what there is instead."""
    if not files:
        raise DataError(f"{folder.shown}: there is no file of {', '.join(KINDS)} in it")
    splits: dict[str, dict[str, None]] = {}
    for file in files:
        config, own = place(file.name, split)
        splits.setdefault(config or "(none)", {})[own] = None
    visible = [f"{config}: {', '.join(names)}" for config, names in splits.items()]
    more = [f"… and {len(visible) - 40} more"] if len(visible) > 40 else []
    lines = "\n".join(f"  {line}" for line in [*visible[:40], *more])
    raise DataError(f"{folder.shown}: {what}; --include picks files by a glob, such as --include {files[0].name!r}. Configs and their splits:\n{lines}")


def _end(name: str) -> str:
    """The end that says what reads a file; "" for other files."""
    return max((end for end in KINDS if name.endswith(end)), key=len, default="")


def _kind(name: str) -> str:
    return KINDS.get(_end(name), "")


def _paths(output: Path, files: Sequence[Remote]) -> str:
    """A TOML list: few files by name, many by a glob that matches no other file that is there."""
    paths = [output / file.name for file in files]
    if len(paths) > _LISTED:
        head = re.sub(r"\d+$", "", os.path.commonprefix([str(path) for path in paths]))
        pattern = f"{head}*{_end(files[0].name) or '.bin'}"
        # A glob's own signs in a name would not stand for themselves.
        if Path(head).parent == paths[0].parent and not re.search(r"[*?\[]", head) and {*paths} == {*Path(head).parent.glob(Path(pattern).name)}:
            return f"[{_quoted(pattern)}]"
    return f"[{', '.join(_quoted(path) for path in paths)}]"


def _quoted(path: Path | str) -> str:
    return json.dumps(printable(str(path)), ensure_ascii=False)
