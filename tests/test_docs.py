"""The documentation against the program: commands parse, links lead somewhere, the tree is whole, configs load, examples run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tomli

from titanlm import cli
from titanlm.config import load
from titanlm.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("recipes/*/README.md"))]
CONFIGS = sorted([*ROOT.glob("train_configs/**/*.toml"), *ROOT.glob("recipes/*/*.toml")])
MISTAKEN = ("Mistakes", "In an editor")
"""Sections whose configs are wrong on purpose."""
MINIMAL = {"model": {"name": "decoder"}, "optimizer": [{"name": "adamw"}]}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    heading: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.heading}"


def blocks(page: Path) -> Iterator[Block]:
    heading, language, lines = "", None, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:].strip(), []
            else:
                yield Block(page, heading, language, "\n".join(lines) + "\n")
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")


BLOCKS = [block for page in PAGES for block in blocks(page)]


def only(page: str, language: str, heading: str) -> list[str]:
    return [block.text for block in BLOCKS if block.page.name == page and (block.language, block.heading) == (language, heading)]


# ---------------------------------------------------------------- commands
def written_commands() -> Iterator[tuple[str, str]]:
    """(where, command) of everything a reader could type: lines of blocks, inline code, the heads of configs."""
    for block in BLOCKS:
        for line in block.text.splitlines() if block.language not in ("python", "toml") else ():
            yield str(block), line.removeprefix("$ ")
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", prose):
            yield page.name, code
    for config in CONFIGS:
        for line in config.read_text(encoding="utf-8").splitlines():
            yield config.name, line.removeprefix("#").strip()


def words_of(command: str) -> list[str] | None:
    """What follows ``titanlm``; None for other commands and for output."""
    if match := re.fullmatch(r"(?:\.venv/bin/)?titanlm (.*)", command):
        text = match[1]
    elif match := re.fullmatch(r"(?:torchrun|python3?)(?: --?[\w-]+(?:[ =]\d+)?)*? -m titanlm\.train (.*)", command):
        text = f"train {match[1]}"
    else:
        return None
    words = shlex.split(text, comments=True)
    return words[: words.index(">")] if ">" in words else words


COMMANDS = {(where, command): words for where, command in written_commands() if (words := words_of(command)) is not None}


def is_mention(words: list[str]) -> bool:
    """Whether these are the names of verbs alone, as in "`titanlm train` saves"."""
    parser = cli._build_parser()
    for word in words:
        if word not in parser.verbs:
            return False
        parser = parser.verbs[word]
    return True


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_commands_parse(where: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = COMMANDS[where, command]
    try:
        arguments = cli._parse(words)
    except SystemExit as error:
        if error.code and not is_mention(words):
            pytest.fail(f"{where}: {command}\n{capsys.readouterr().err}")
        return
    files = [word for word in words if word.startswith(("train_configs/", "recipes/"))]
    assert all((ROOT / file).is_file() for file in files), f"{where}: {command}"
    if files and files[0].endswith(".toml"):  # its overrides name settings that exist
        load(ROOT / files[0], arguments.overrides)


def test_commands_are_found() -> None:
    """A pattern that stopped to match would let every command pass."""
    everything = [words for words in COMMANDS.values() if words]
    assert {words[0] for words in everything} >= {"train", "eval", "export", "generate", "list", "describe", "config", "tokenizer", "env"}
    assert len(everything) > 40
    assert any(command.startswith("torchrun") for _, command in COMMANDS)


def test_make_targets_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for where, command in written_commands():
        if match := re.match(r"make ([a-z]+)(?: |$)", command):
            assert match[1] in targets, f"{where}: {command}"
        if match := re.match(r"python (\w+/[\w/]+\.py)", command):  # none of ours lies at the top; those of other projects do
            assert (ROOT / match[1]).is_file(), f"{where}: {command}"


# ---------------------------------------------------------------- links and files
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_named_in_prose_exist(page: Path) -> None:
    folders = ("titanlm/", "docs/", "recipes/", "train_configs/", "tests/", "benchmarks/")
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if name.startswith(folders) and not (ROOT / name).exists()]


def tree() -> dict[str, str]:
    """Path → comment of the tree in the README, folders with a slash at the end."""
    (text,) = only("README.md", "", "Where things are")
    entries: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name]
        entries["".join(above)] = comment.strip()
    return entries


def test_the_tree_is_whole() -> None:
    entries = tree()
    assert not [path for path in entries if not (ROOT / path).exists()], "named and not there"
    explained_below = {folder for folder in entries if folder.endswith("/") and any(path != folder and path.startswith(folder) for path in entries)}
    bare = [path for path, comment in entries.items() if not comment and path not in explained_below]
    assert not bare, "without a comment"
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "titanlm").rglob("*.py") if not path.name.startswith("__")]
    files += [path.relative_to(ROOT).as_posix() for path in (ROOT / "train_configs").glob("*.toml")]
    for file in files:
        folder = f"{Path(file).parent.as_posix()}/"
        spoken_for = folder in entries and not any(path.startswith(folder) for path in entries if path != folder)
        assert file in entries or spoken_for, f"{file} is missing in the tree of README.md"


# ---------------------------------------------------------------- configs
def fragments() -> list[Block]:
    """Those that need no file or package beside them."""
    elsewhere = ("extends", "imports", "[project", "[[stage]]")
    found = [block for block in BLOCKS if block.language == "toml" and block.heading not in MISTAKEN]
    return [block for block in found if not any(word in block.text for word in elsewhere)]


@pytest.mark.parametrize("block", fragments(), ids=str)
def test_configs_load(block: Block, tmp_path: Path) -> None:
    """Complete ones as they are, parts of one together with a minimal config: no key and no value is wrong."""
    import tomli_w

    tables = tomli.loads(block.text)
    file = tmp_path / "block.toml"
    complete = MINIMAL.keys() <= tables.keys()
    file.write_text(block.text if complete else tomli_w.dumps(MINIMAL | tables), encoding="utf-8")
    load(file)


def test_mistakes_are_told_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run = (next(text for text in only("config.md", "toml", "Mistakes") if text.startswith(f"# {name}")) for name in ("base.toml", "run.toml"))
    (tmp_path / "base.toml").write_text(base, encoding="utf-8")
    (tmp_path / "run.toml").write_text(run, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("run.toml", ["--train.seed=x"])
    printed = next(text for text in only("config.md", "", "Mistakes") if "$ titanlm train run.toml" in text)
    said = [line.strip() for line in printed.splitlines()[2:]]
    assert len(said) == len(caught.value.problems)
    for line, problem in zip(said, caught.value.problems, strict=True):
        assert problem.startswith(line.removesuffix("…)").rstrip())


# ---------------------------------------------------------------- components
def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-m", "titanlm", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_component_of_the_readme_trains(tmp_path: Path) -> None:
    heading = "A component of your own"
    (module,), (config,) = only("README.md", "python", heading), only("README.md", "toml", heading)
    assert sum(bool(line.strip()) for line in module.splitlines()) <= 15
    (tmp_path / "triangle.py").write_text(module, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(config, encoding="utf-8")
    (tmp_path / "train_configs").mkdir()
    (tmp_path / "train_configs" / "debug.toml").write_bytes((ROOT / "train_configs" / "debug.toml").read_bytes())
    small = ["--train.steps=3", "--train.seq_len=64", "--train.global_batch=4", "--train.micro_batch=4", "--train.log_every=1", "--validation=[]"]
    run(tmp_path, "train", "mine.toml", "--train.device=cpu", *small)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # u = 1/4, 2/4, 3/4 with the peak at 0.2: the peak rate, 3e-3, times (1 − u) / 0.8.
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx([3e-3 * left / 0.8 for left in (0.75, 0.5, 0.25)])
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "step-00000003").is_dir()


def test_component_of_the_page_is_described_as_it_says(tmp_path: Path) -> None:
    heading = "One of your own"
    (module,) = only("components.md", "python", heading)
    (said,) = only("components.md", "", heading)
    (tmp_path / "sgd_momentum.py").write_text(module, encoding="utf-8")
    command, _, output = said.partition("\n")
    printed = run(tmp_path, *shlex.split(command.removeprefix("$ titanlm ")))
    assert printed.replace(str(tmp_path), "/home/me") == output


def test_python_examples_compile() -> None:
    for block in BLOCKS:
        if block.language == "python":
            compile(block.text, str(block), "exec")
