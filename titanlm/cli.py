"""The command line: one short function a verb.

Nothing heavy is imported before a verb needs it, so ``--help``, ``list`` and
``describe`` answer without torch. Settings are changed by overrides,
``--section.key=value``, which are told from a verb's own options by name.

Exit status: 0 done; 1 a check found something; 2 the input is wrong, said on
standard error in one piece; 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from titanlm import __version__
from titanlm.errors import ConfigError, TitanError
from titanlm.registry import KINDS, Component, did_you_mean

_OVERRIDE = re.compile(r"(--[A-Za-z0-9_.-]+)=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(words)
        status = args.run(args)
        sys.stdout.flush()
        return int(status or 0)
    except SystemExit as exit:  # argparse: --help, --version or a wrong option
        return int(exit.code or 0)
    except TitanError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet too
        return 141


# ---------------------------------------------------------------- verbs
def _train(args: argparse.Namespace) -> int:
    from titanlm.config import load

    config = load(args.file, args.overrides)
    from titanlm.train import dry_run, train

    if args.dry_run:
        print(dry_run(config))
        return 0
    return train(config)


def _eval(args: argparse.Namespace) -> None:
    from titanlm.evaluate import evaluate_target

    print(evaluate_target(args.target, overrides=args.overrides, imports=args.imports, device=args.device, averaged=args.averaged, as_json=args.json))


def _export(args: argparse.Namespace) -> None:
    from titanlm.export import export_run

    print(export_run(args.run_dir, step=args.step, output=args.output, overrides=args.overrides, imports=args.imports, device=args.device))


def _generate(args: argparse.Namespace) -> None:
    from titanlm.generate import generate_text

    pieces = generate_text(
        args.target,
        prompt=args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        device=args.device,
        imports=args.imports,
    )
    first = next(pieces, "")  # before the prompt is printed: an error comes alone
    print(args.prompt, end="")
    for piece in itertools.chain([first], pieces):
        print(piece, end="", flush=True)
    print()


def _list(args: argparse.Namespace) -> None:
    from titanlm.describe import listing

    _import_outside(args.imports)
    print(listing(args.kind))


def _describe(args: argparse.Namespace) -> None:
    from titanlm.describe import describe

    _import_outside(args.imports)
    print(describe(args.kind, args.name))


def _config_check(args: argparse.Namespace) -> int:
    from titanlm.config import load

    failed = False
    for file in args.files:
        try:
            config = load(file, args.overrides)
            from titanlm.check import check  # brings torch, which a config that does not load can do without

            report = check(config)
            if report.problems:
                raise ConfigError(report.problems, str(file))
        except TitanError as error:
            failed = True
            print(error)
            continue
        print(f"{file}: ok")
        for line in [*report.summary.splitlines(), *(f"warning: {warning}" for warning in report.warnings)]:
            print(f"  {line}")
    return int(failed)


def _config_show(args: argparse.Namespace) -> None:
    from titanlm.config import dump, load

    print(dump(load(args.file, args.overrides)), end="")


def _config_diff(args: argparse.Namespace) -> int:
    from titanlm.config import diff, load

    differences = diff(load(args.a, args.overrides), load(args.b, args.overrides))
    for path, before, after in differences:
        print(f"{path}: {_shown(before)} → {_shown(after)}")
    return int(bool(differences))


def _config_schema(args: argparse.Namespace) -> None:
    import json

    from titanlm.config_schema import json_schema

    _import_outside(args.imports)
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _tokenizer_train(args: argparse.Namespace) -> None:
    from titanlm.tokenizers.training import train_sentencepiece

    if Path(args.output).is_dir():
        raise TitanError(f"{args.output}: is a folder; --output names the model file to write")
    if args.output.exists() and not args.force:
        raise TitanError(f"{args.output}: exists; --force overwrites it")
    texts = _counted(_texts(args))
    trained = train_sentencepiece(texts, args.output, args.vocab_size, args.model_type, max_bytes=args.max_bytes)
    print(f"{trained.path}: {trained.vocab_size:,} pieces from {trained.n_texts:,} texts, {trained.n_bytes:,} bytes")


def _env(args: argparse.Namespace) -> int:
    from titanlm.environment import format_report, report, requirements

    print(format_report(report()))
    if args.file is None:
        return 0
    from titanlm.config import load

    missing = requirements(load(args.file, args.overrides))
    for line in missing or ["everything it needs is here"]:
        print(f"{args.file}: {line}")
    return int(bool(missing))


# ---------------------------------------------------------------- parts of verbs
def _import_outside(modules: Sequence[str]) -> None:
    from titanlm.config_sources import import_modules

    import_modules(list(modules), {}, "--import")


def _shown(value: Any) -> str:
    import tomli_w

    return "not set" if value is None else tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _texts(args: argparse.Namespace) -> Iterator[str]:
    """The texts a tokenizer is trained on: of files, of a config's dataset, or of the embedded default."""
    if args.config is not None:
        from titanlm.config import load

        dataset = load(args.config, args.overrides).dataset
    elif args.overrides:
        raise TitanError(f"{args.overrides[0]}: overrides change the config of --config FILE, which is not given")
    elif args.input:
        dataset = Component.named("dataset", "text", paths=tuple(args.input))
    else:
        dataset = Component.named("dataset", "python_stdlib")
    # Texts are read before any tokenizer; bytes stand in for the one that is being made.
    rows = dataset.build(tokenizer=Component.named("tokenizer", "byte").build(), split="train", stream=0, n_streams=1, seed=0)
    if not hasattr(rows, "texts"):
        raise TitanError(f"dataset {dataset.name!r} gives no texts (it has no `texts` method), so no tokenizer can be trained on it")
    return iter(rows.texts())


def _counted(texts: Iterator[str]) -> Iterator[str]:
    """The same texts, with a live count on a terminal."""
    live = sys.stderr.isatty()
    n_texts = n_bytes = 0
    for text in texts:
        n_texts, n_bytes = n_texts + 1, n_bytes + len(text)
        if live and n_texts % 100 == 0:
            print(f"\rreading: {n_texts:,} texts, {n_bytes / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
        yield text
    print(f"{chr(13) if live else ''}read {n_texts:,} texts, {n_bytes / 1e6:.1f} MB; training", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- arguments
class _Parser(argparse.ArgumentParser):
    """A verb, or a verb that has verbs of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.verbs: dict[str, _Parser] = {}

    @property
    def options(self) -> list[str]:
        return list(self._option_string_actions)


def _parse(words: list[str]) -> argparse.Namespace:
    """The verb's arguments, with its overrides in ``overrides``."""
    root = parser = _build_parser()
    for word in words:
        if not parser.verbs or word.startswith("-"):
            break
        if word not in parser.verbs:
            parser.error(f"no verb {word!r}{did_you_mean(word, parser.verbs)} (verbs: {', '.join(parser.verbs)})")
        parser = parser.verbs[word]
    overrides = []
    if parser.get_default("takes_overrides"):
        # Taken out first: argparse would read an override with a blank in its value as a file name.
        matches = {word: match[1] for word in words if (match := _OVERRIDE.fullmatch(word))}
        overrides = [word for word in words if word in matches and matches[word] not in parser.options]
        words = [word for word in words if word not in overrides]
    args, unknown = root.parse_known_args(words)
    for word in unknown:
        if word.startswith("--"):
            hint = did_you_mean(word.partition("=")[0], parser.options)
            how = "; an override is written --section.key=value, in one word" if parser.get_default("takes_overrides") and not hint else ""
            parser.error(f"no option {word!r}{hint}{how}")
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}")
    args.overrides = overrides
    return args


def _build_parser() -> _Parser:
    root = _Parser(prog="titanlm", description="Train language models from TOML files. `titanlm VERB --help` shows an example.")
    root.add_argument("--version", action="version", version=f"titanlm {__version__}")
    add = _adder(root)

    verb = add("train", _train, "train from a config file", "titanlm train train_configs/debug.toml --train.steps=100", overrides=True)
    verb.add_argument("file", metavar="FILE", type=Path, help="config file")
    verb.add_argument("--dry-run", action="store_true", help="build on the meta device, print parameters, FLOPs and memory, and stop")

    verb = add("eval", _eval, "score a run, checkpoint or artifact", "titanlm eval runs/debug --validation.0.max_tokens=100000", overrides=True)
    _add_target(verb)
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--averaged", dest="averaged", action="store_true", default=None, help="averaged weights (the default where they exist)")
    which.add_argument("--raw", dest="averaged", action="store_false", help="raw weights")
    verb.add_argument("--json", action="store_true", help="one line of JSON")

    verb = add("export", _export, "write a run's artifact and score it", "titanlm export runs/debug --export.max_bytes=16000000", overrides=True)
    verb.add_argument("run_dir", metavar="RUN", type=Path, help="run folder or checkpoint folder")
    verb.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    verb.add_argument("--output", type=Path, help="the file to write (default: artifact.titanlm in the run folder)")
    _add_device(verb)

    verb = add("generate", _generate, "continue a text", "titanlm generate runs/debug --prompt 'def main' --max-tokens 100")
    _add_target(verb)
    verb.add_argument("--prompt", default="", help="the text to continue")
    verb.add_argument("--max-tokens", type=int, default=200, help="stop after so many (default: %(default)s)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    verb.add_argument("--top-k", type=int, help="sample among so many likeliest tokens")
    verb.add_argument("--top-p", type=float, help="sample among the likeliest tokens that make up this probability")
    verb.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")

    verb = add("list", _list, "name the components that a config can choose", "titanlm list optimizer")
    verb.add_argument("kind", metavar="KIND", nargs="?", help=f"one of {', '.join(KINDS)}")
    _add_imports(verb)

    verb = add("describe", _describe, "explain a component and print its settings as TOML", "titanlm describe optimizer adamw")
    verb.add_argument("kind", metavar="KIND")
    verb.add_argument("name", metavar="NAME")
    _add_imports(verb)

    config = _adder(add("config", None, "check, show and compare config files", "titanlm config check train_configs/debug.toml"))
    verb = config("check", _config_check, "find every mistake without touching a device", "titanlm config check *.toml", overrides=True)
    verb.add_argument("files", metavar="FILE", type=Path, nargs="+")
    verb = config("show", _config_show, "print the resolved config, defaults included", "titanlm config show run.toml", overrides=True)
    verb.add_argument("file", metavar="FILE", type=Path)
    verb = config("diff", _config_diff, "list the settings that differ; status 1 if any does", "titanlm config diff a.toml b.toml", overrides=True)
    verb.add_argument("a", metavar="A", type=Path)
    verb.add_argument("b", metavar="B", type=Path)
    verb = config("schema", _config_schema, "print a JSON Schema for editors", "titanlm config schema > titanlm.schema.json")
    _add_imports(verb)

    tokenizer = _adder(add("tokenizer", None, "make tokenizers", "titanlm tokenizer train --type spm --vocab-size 4096 --output spm.model"))
    verb = tokenizer(
        "train",
        _tokenizer_train,
        "train a tokenizer on text",
        "titanlm tokenizer train --type spm --vocab-size 4096 --output spm.model --config run.toml",
        overrides=True,
    )
    verb.add_argument("--type", choices=["spm"], required=True, help="spm: SentencePiece, lossless, with byte fallback")
    verb.add_argument("--vocab-size", type=int, required=True, help="pieces, special ids and bytes included")
    verb.add_argument("--output", type=Path, required=True, help="the model file to write")
    verb.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="default: %(default)s")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", type=Path, help="train on the training split of this config's dataset")
    source.add_argument("--input", metavar="FILE", nargs="+", help="train on these text files (default: the standard library's sources)")
    verb.add_argument("--max-bytes", type=int, help="read so many bytes of text")
    verb.add_argument("--force", action="store_true", help="overwrite the output")

    verb = add("env", _env, "report versions and devices; with a config, what it lacks", "titanlm env train_configs/debug.toml", overrides=True)
    verb.add_argument("file", metavar="FILE", type=Path, nargs="?")
    return root


def _adder(parser: _Parser) -> Callable[..., _Parser]:
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int | None] | None, summary: str, example: str, overrides: bool = False) -> _Parser:
        usage = "\n\n--section.key=value overrides any setting" if overrides else ""
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example:\n  {example}{usage}")
        if run is not None:
            verb.set_defaults(run=run, takes_overrides=overrides)
        parser.verbs[name] = verb
        return verb

    return add


def _add_target(verb: _Parser) -> None:
    verb.add_argument("target", metavar="TARGET", type=Path, help="run folder, checkpoint folder or artifact file")
    _add_device(verb)


def _add_device(verb: _Parser) -> None:
    verb.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    _add_imports(verb)


def _add_imports(verb: _Parser) -> None:
    verb.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help="import a module of outside components")
