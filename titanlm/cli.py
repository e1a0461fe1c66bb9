"""The command line: one short function a verb.

How words become arguments is in ``titanlm.cli_parser``; here is what there is.
Nothing heavy is imported before a verb needs it, so ``--help``, ``list`` and
``describe`` answer without torch. Settings are changed by overrides,
``--section.key=value``, which are told from a verb's own options by name.

Exit status: 0 done; 1 a check found something; 2 the input is wrong or a run
cannot go on, said on standard error in one piece; 75 a run was ended because it
hung; 130, 138, 143 interrupted by SIGINT, SIGUSR1, SIGTERM.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from titanlm import __version__
from titanlm.cli_parser import Parser, adder, attempt, count, parse, positive, sha256, step_or_best
from titanlm.errors import ConfigError, PeerError, TitanError
from titanlm.loggers.text import printable
from titanlm.registry import KINDS


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
        _report(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet too
        return 141


def _report(error: TitanError) -> None:
    """Once a host for what every rank finds wrong with its input; of other errors each rank tells its own."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, PeerError) or (isinstance(error, ConfigError) and local_rank != "0"):
        return
    text = printable(str(error))  # it may quote files and configs of strangers
    print(text if rank == "0" else f"rank {rank}: {text}", file=sys.stderr)


# ---------------------------------------------------------------- verbs
def _train(args: argparse.Namespace) -> int:
    from titanlm.config import load

    config = load(args.file, args.overrides)
    if args.restarts and not args.dry_run:
        from titanlm.supervisor import supervise

        command = [sys.executable, "-m", "titanlm", "train", str(args.file), *args.overrides]
        return supervise(Path(config.run.dir) / config.run.name, command, args.restarts)
    from titanlm.train import dry_run, train

    if args.dry_run:
        print(dry_run(config))
        return 0
    return train(config)


def _eval(args: argparse.Namespace) -> None:
    from titanlm.evaluate import evaluate_target

    which = {"overrides": args.overrides, "imports": args.imports, "device": args.device, "averaged": args.averaged, "step": args.step}
    text = evaluate_target(args.target, **which, compiled=args.compile, as_json=args.json)
    if text is not None:
        print(text)


def _export(args: argparse.Namespace) -> None:
    from titanlm.export import export_run
    from titanlm.exported import as_json, describe

    which = {"overrides": args.overrides, "imports": args.imports, "device": args.device, "step": args.step}
    exported = export_run(args.run_dir, **which, output=args.output)
    print(as_json(exported) if args.json else describe(exported))


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
        step=args.step,
    )
    first = next(pieces, "")  # before the prompt is printed: an error comes alone
    shown = printable if sys.stdout.isatty() else str  # a terminal would obey what a model makes up
    print(args.prompt, end="")
    for piece in itertools.chain([first], pieces):
        print(shown(piece), end="", flush=True)
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
            print(printable(str(error)))
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
        print(f"{printable(path)}: {_shown(before)} → {_shown(after)}")
    return int(bool(differences))


def _config_schema(args: argparse.Namespace) -> None:
    import json

    from titanlm.config_schema import json_schema

    _import_outside(args.imports)
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _checkpoint_list(args: argparse.Namespace) -> None:
    from titanlm.checkpoint_commands import listing

    print(listing(args.run_dir, verify=args.verify, as_json=args.json))


def _checkpoint_verify(args: argparse.Namespace) -> int:
    from titanlm.checkpoint_commands import verification

    sound = True
    for line, ok in verification(args.paths, args.expect_sha256):
        print(line, flush=True)
        sound = sound and ok
    return int(not sound)


def _checkpoint_rewind(args: argparse.Namespace) -> None:
    from titanlm.checkpoint_commands import rewind

    print(rewind(args.run_dir, args.step))


def _checkpoint_prune(args: argparse.Namespace) -> None:
    from titanlm.checkpoint_commands import prune

    for line in prune(args.run_dir, keep_last=args.keep_last, keep_every=args.keep_every, dry_run=args.dry_run):
        print(line, flush=True)


def _tokenizer_train(args: argparse.Namespace) -> None:
    from titanlm.tokenizers.corpus import counted, training_texts

    chosen = {name: getattr(args, name) for name in _TRAINER_OPTIONS[args.type] if name in args}
    for kind, options in _TRAINER_OPTIONS.items():
        if kind != args.type and (wrong := [option for name, option in options.items() if name in args]):
            raise TitanError(f"{', '.join(wrong)}: for --type {kind}, not {args.type}")

    def texts() -> Iterator[str]:
        return training_texts(args.config, args.overrides, args.input, args.column)

    if args.type == "spm":
        from titanlm.tokenizers.training import train_sentencepiece

        if args.output.is_dir():
            raise TitanError(f"{args.output}: is a folder; --output names the model file to write")
        if args.output.exists() and not args.force:
            raise TitanError(f"{args.output}: exists; --force overwrites it")
        trained = train_sentencepiece(counted(texts()), args.output, args.vocab_size, max_bytes=args.max_bytes, **chosen)
    else:
        from titanlm.tokenizers.superbpe_training import settings, train_superbpe
        from titanlm.tokenizers.vocab_merges import MERGES_FILE, VOCAB_FILE

        if "transition" not in chosen:
            raise TitanError("--transition is missing: how many tokens are learnt within words, before those across spaces, of --vocab-size")
        if args.output.exists() and not args.output.is_dir():
            raise TitanError(f"{args.output}: is a file; --output names the folder for {VOCAB_FILE} and {MERGES_FILE}")
        if not args.force and (there := [name for name in (VOCAB_FILE, MERGES_FILE) if (args.output / name).exists()]):
            raise TitanError(f"{args.output / there[0]}: exists; --force overwrites it")
        trained = train_superbpe(texts, args.output, args.vocab_size, max_bytes=args.max_bytes, **chosen)
        print(settings(trained, chosen["transition"], chosen.get("special_tokens", ())), end="\n\n")
    print(f"{trained.path}: {trained.vocab_size:,} pieces from {trained.n_texts:,} texts, {trained.n_bytes:,} bytes")


_TRAINER_OPTIONS = {
    "spm": {
        "model_type": "--model",
        "symbols": "--symbol",
        "split_by_whitespace": "--split-by-whitespace",
        "whitespace_pieces": "--whitespace-pieces",
        "split_digits": "--split-digits",
        "character_coverage": "--character-coverage",
        "bos_id": "--bos",
        "eos_id": "--eos",
        "pad_id": "--pad",
    },
    "superbpe": {"transition": "--transition", "max_words": "--max-words", "special_tokens": "--special"},
}
"""What only one type of `titanlm tokenizer train` takes: parameters of its trainer and how they are typed."""


def _tokenizer_inspect(args: argparse.Namespace) -> None:
    from titanlm.tokenizers.inspect import inspect

    _import_outside(args.imports)
    print(inspect(args.tokenizer))


def _tokenizer_compare(args: argparse.Namespace) -> None:
    from titanlm.tokenizers.compare import as_json, compare, table

    _import_outside(args.imports)
    rows = compare(args.tokenizers, args.input or (), column=args.column, max_bytes=args.max_bytes)
    print(as_json(rows) if args.json else table(rows))


def _data_state(args: argparse.Namespace) -> None:
    from titanlm.data_state import describe_state, export_state, import_record

    if args.import_file is None:
        if args.run_dir is None:
            raise TitanError("data state: name a run folder, or a record with --import FILE")
        print(describe_state(args.run_dir) if args.output is None else export_state(args.run_dir, args.output))
    elif args.run_dir is not None or args.output is None:
        raise TitanError("data state --import FILE: takes no run folder, and --output FILE says where the state for data.start is written")
    else:
        print(import_record(args.import_file, args.output, args.trust))


def _data_prepare(args: argparse.Namespace) -> int:
    from titanlm.datasets.prepare import prepare, request_of

    _import_outside(args.imports)
    which = {"config": args.config, "overrides": args.overrides, "inputs": args.input or (), "tokenizer": args.tokenizer, "column": args.column}
    how = {name: getattr(args, name) for name in ("split", "shard_tokens", "max_tokens", "prefix", "workers", "force")}
    result = prepare(request_of(args.output, **which, **how))
    print(result.as_json() if args.json else result)
    return 0 if result.finished else 130


def _data_inspect(args: argparse.Namespace) -> int:
    _import_outside(args.imports)
    common = {"tokenizer": args.tokenizer, "column": args.column, "max_rows": args.rows, "as_json": args.json, "overrides": args.overrides}
    if args.overlap:
        from titanlm.datasets.overlap import overlap

        text, found = overlap(args.targets, **common)
        print(text)
        return int(found)
    from titanlm.datasets.inspect import inspect

    for text in inspect(args.targets, n_samples=args.samples, **common):
        print(text, flush=True)
    return 0


def _data_download(args: argparse.Namespace) -> None:
    from titanlm.datasets.download import download, download_golf

    common = {"output": args.output, "source": args.source}
    if args.repo == "golf":
        print(download_golf(variant=args.variant, train_shards=args.train_shards, **common))
        return
    which = {"config": args.config, "split": args.split, "revision": args.revision, "include": args.include, "max_files": args.max_files}
    print(download(args.repo, **which, **common))


def _recipe_list(args: argparse.Namespace) -> None:
    from titanlm.recipe import listing

    print(printable(listing()))


def _recipe_plan(args: argparse.Namespace) -> None:
    from titanlm.recipe import open_recipe
    from titanlm.recipe_plan import plan

    scaled = open_recipe(args.name).at(args.scale, args.output, args.overrides)
    print(printable(plan(scaled, n_devices=args.devices, device_name=args.device_name)))


def _recipe_run(args: argparse.Namespace) -> int:
    from titanlm.recipe import open_recipe
    from titanlm.recipe_run import dry_run, run

    scaled = open_recipe(args.name).at(args.scale, args.output, args.overrides)
    if args.dry_run:
        print(printable(dry_run(scaled, again_from=args.again_from)))
        return 0
    return run(scaled, again_from=args.again_from, n_processes=args.nproc)


def _submission_build(args: argparse.Namespace) -> None:
    from titanlm.submission.build import About, build
    from titanlm.submission.metadata import Record

    try:
        record = None if args.record is None else Record(args.record[0], float(args.record[1]))
    except ValueError:
        raise TitanError(f"--record: {args.record[1]!r} is no number; it is the mean val_loss of the record's seeds, in nats per token") from None
    about = About(
        author=args.author,
        github_id=args.github_id,
        name=args.name,
        blurb=args.blurb,
        track=args.track,
        hardware=args.hardware,
        record=record,
    )
    print(build(args.runs, args.output, about, form="readable" if args.readable else "compressed", device=args.device, overrides=args.overrides))


def _submission_verify(args: argparse.Namespace) -> int:
    from titanlm.submission.verify import checks, tally

    found = []
    for check in checks(args.folder, max_tokens=args.max_tokens, data=args.data, tokenizer=args.tokenizer):
        print(printable(str(check)), flush=True)
        found.append(check)
    print(tally(found))
    return int(any(check.state == "FAIL" for check in found))


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


# ---------------------------------------------------------------- arguments
def _parse(words: Sequence[str]) -> argparse.Namespace:
    return parse(_build_parser(), words)


def arguments_of(words: Sequence[str]) -> argparse.Namespace | str:
    """What a command line asks for, or what is wrong with it."""
    return attempt(_build_parser(), words)


def _build_parser() -> Parser:
    root = Parser(prog="titanlm", description="Train language models from TOML files. `titanlm VERB --help` shows an example.")
    root.add_argument("--version", action="version", version=f"titanlm {__version__}")
    add = adder(root)

    verb = add("train", _train, "train from a config file", "titanlm train train_configs/debug.toml --train.steps=100", overrides=True)
    verb.add_argument("file", metavar="FILE", type=Path, help="config file")
    verb.add_argument("--dry-run", action="store_true", help="build on the meta device, print parameters, FLOPs and memory, and stop")
    verb.add_argument("--restarts", metavar="N", type=count, default=0, help="start again up to so many times when training crashes (default: %(default)s)")

    verb = add("eval", _eval, "score a run, checkpoint or artifact", "titanlm eval runs/debug --validation.0.max_tokens=100000", overrides=True)
    _add_target(verb)
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--averaged", dest="averaged", action="store_true", default=None, help="averaged weights (the default where they exist)")
    which.add_argument("--raw", dest="averaged", action="store_false", help="raw weights")
    verb.add_argument("--compile", action="store_true", help="compile the model first, as train.compile says; pays for long sets")
    verb.add_argument("--json", action="store_true", help="one line of JSON")

    verb = add("export", _export, "write a run's artifact and score it", "titanlm export runs/debug --export.max_bytes=16000000", overrides=True)
    verb.add_argument("run_dir", metavar="RUN", type=Path, help="run folder or checkpoint folder")
    _add_step(verb)
    verb.add_argument("--output", type=Path, help="the file to write (default: artifact.titanlm in the run folder)")
    verb.add_argument("--json", action="store_true", help="one line of JSON")
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

    config = adder(add("config", None, "check, show and compare config files", "titanlm config check train_configs/debug.toml"))
    verb = config("check", _config_check, "find every mistake without touching a device", "titanlm config check *.toml", overrides=True)
    verb.add_argument("files", metavar="FILE", type=Path, nargs="+")
    verb = config("show", _config_show, "print the resolved config, defaults included", "titanlm config show run.toml", overrides=True)
    verb.add_argument("file", metavar="FILE", type=Path)
    verb = config("diff", _config_diff, "list the settings that differ; status 1 if any does", "titanlm config diff a.toml b.toml", overrides=True)
    verb.add_argument("a", metavar="A", type=Path)
    verb.add_argument("b", metavar="B", type=Path)
    verb = config("schema", _config_schema, "print a JSON Schema for editors", "titanlm config schema > titanlm.schema.json")
    _add_imports(verb)

    _add_checkpoint(adder(add("checkpoint", None, "list, verify, prune and rewind the checkpoints of a run", "titanlm checkpoint list runs/debug")))

    tokenizer = adder(add("tokenizer", None, "make, inspect and compare tokenizers", "titanlm tokenizer inspect spm.model"))
    _add_tokenizer_train(tokenizer)
    verb = tokenizer("inspect", _tokenizer_inspect, "say what a tokenizer is and whether text comes back", "titanlm tokenizer inspect spm.model")
    verb.add_argument("tokenizer", metavar="TOKENIZER", help="a tokenizer's file, NAME:FILE, a config (.toml), {settings} or the word byte")
    _add_imports(verb)
    example = "titanlm tokenizer compare spm.model byte --input held_out.parquet"
    verb = tokenizer("compare", _tokenizer_compare, "count the tokens that texts take, tokenizer by tokenizer", example)
    verb.add_argument("tokenizers", metavar="TOKENIZER", nargs="+", help="a tokenizer's file, NAME:FILE, a config (.toml), {settings} or the word byte")
    verb.add_argument("--input", metavar="FILE", nargs="+", help=".parquet, .jsonl or text files (default: 2 MB of the standard library's sources)")
    verb.add_argument("--column", default="text", help="of .parquet and .jsonl files (default: %(default)s)")
    verb.add_argument("--max-bytes", type=int, help="read so many bytes of each file")
    verb.add_argument("--json", action="store_true", help="one line of JSON")
    _add_imports(verb)

    data = adder(add("data", None, "prepare, fetch, inspect and resume data", "titanlm data state runs/debug"))
    verb = data(
        "state",
        _data_state,
        "show where a run stands in its data, hand it on, or take up another's record",
        "titanlm data state runs/debug --output data_state.json\n  titanlm data state --import data_state.json --trust shards --output start.json",
    )
    verb.add_argument("run_dir", metavar="RUN", type=Path, nargs="?", help="run folder or checkpoint folder")
    verb.add_argument("--output", metavar="FILE", type=Path, help="write the state there as JSON, for `data.start` of another run")
    verb.add_argument("--import", dest="import_file", metavar="FILE", type=Path, help="a data_state.json with consumed_samples and consumed_shards")
    verb.add_argument("--trust", choices=["samples", "shards"], help="which of its counts is right, where they contradict one another")

    _add_data_prepare(data)
    _add_data_inspect(data)
    _add_data_download(data)

    _add_recipe(adder(add("recipe", None, "list, plan and run recipes, each a file of stages", "titanlm recipe run golf --scale smoke")))
    example = "titanlm submission verify submission --data DIR --tokenizer FILE"
    _add_submission(adder(add("submission", None, "build and verify Parameter Golf submissions", example)))

    verb = add("env", _env, "report versions and devices; with a config, what it lacks", "titanlm env train_configs/debug.toml", overrides=True)
    verb.add_argument("file", metavar="FILE", type=Path, nargs="?")
    return root


def _add_checkpoint(checkpoint: Callable[..., Parser]) -> None:
    verb = checkpoint("list", _checkpoint_list, "say which there are, and which is the newest and the best", "titanlm checkpoint list runs/debug")
    verb.add_argument("run_dir", metavar="RUN", help="run folder, or the URL that checkpoint.copy_to names")
    verb.add_argument("--verify", action="store_true", help="read every byte (default: only manifests and sizes of files)")
    verb.add_argument("--json", action="store_true", help="one line of JSON")
    example = "titanlm checkpoint verify runs/debug\n  titanlm checkpoint verify runs/debug/checkpoints/step-00000100 --expect-sha256 HEX"
    verb = checkpoint("verify", _checkpoint_verify, "read every byte and compare it with the manifest; status 1 if any is damaged", example)
    verb.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="run folder (all its checkpoints) or checkpoint folder")
    verb.add_argument("--expect-sha256", metavar="HEX", type=sha256, help="what an earlier `verify` printed of the one checkpoint's manifest; finds tampering")
    example = "titanlm checkpoint rewind runs/debug --step 100"
    verb = checkpoint("rewind", _checkpoint_rewind, "let a run go on from an earlier checkpoint; later ones are moved aside", example)
    verb.add_argument("run_dir", metavar="RUN", type=Path, help="run folder")
    verb.add_argument("--step", type=int, required=True, help="the checkpoint to go on from")
    example = "titanlm checkpoint prune runs/debug --keep-last 2 --keep-every 1000 --dry-run"
    verb = checkpoint("prune", _checkpoint_prune, "delete old checkpoints; the best and the newest sound one always stay", example)
    verb.add_argument("run_dir", metavar="RUN", type=Path, help="run folder in which nothing trains")
    verb.add_argument("--keep-last", metavar="N", type=positive, required=True, help="so many of the newest stay")
    verb.add_argument("--keep-every", metavar="N", type=positive, help="those of steps that are multiples of this stay")
    verb.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")


def _add_tokenizer_train(tokenizer: Callable[..., Parser]) -> None:
    example = "titanlm tokenizer train --type spm --vocab-size 4096 --output spm.model --config run.toml"
    verb = tokenizer("train", _tokenizer_train, "train a tokenizer on text", example, overrides=True)
    verb.add_argument("--type", choices=["spm", "superbpe"], required=True, help="spm: SentencePiece; superbpe: BPE with tokens of several words")
    verb.add_argument("--vocab-size", type=int, required=True, help="pieces, special ids and bytes included")
    verb.add_argument("--output", type=Path, required=True, help="spm: the model file to write; superbpe: the folder for vocab.json and merges.txt")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", type=Path, help="train on the training split of this config's data")
    source.add_argument("--input", metavar="FILE", nargs="+", help="train on these text, .parquet or .jsonl files (default: the standard library's sources)")
    verb.add_argument("--column", default="text", help="of .parquet and .jsonl files (default: %(default)s)")
    verb.add_argument("--max-bytes", type=int, help="read so many bytes of text")
    verb.add_argument("--force", action="store_true", help="overwrite the output")
    # Absent when not given: the trainers have the defaults, and an option of the other type is a mistake.
    choice, unset = argparse.BooleanOptionalAction, argparse.SUPPRESS
    spm = verb.add_argument_group("--type spm")
    spm.add_argument("--model", dest="model_type", choices=["bpe", "unigram"], default=unset, help="default: bpe")
    spm.add_argument("--symbol", dest="symbols", metavar="TEXT", action="append", default=unset, help="a text that is always one piece; may be repeated")
    spm.add_argument("--split-by-whitespace", action=choice, default=unset, help="no piece crosses a space (default: on)")
    spm.add_argument("--whitespace-pieces", action=choice, default=unset, help="pieces may be white space alone, such as indentation (default: on)")
    spm.add_argument("--split-digits", action="store_true", default=unset, help="every digit is a piece")
    spm.add_argument("--character-coverage", type=float, default=unset, help="share of the text's characters that get a piece (default: 0.9995)")
    spm.add_argument("--bos", dest="bos_id", metavar="ID", type=int, default=unset, help="id of <s> (default: 1)")
    spm.add_argument("--eos", dest="eos_id", metavar="ID", type=int, default=unset, help="id of </s> (default: 2)")
    spm.add_argument("--pad", dest="pad_id", metavar="ID", type=int, default=unset, help="id of <pad> (default: none)")
    superbpe = verb.add_argument_group("--type superbpe")
    superbpe.add_argument("--transition", metavar="N", type=int, default=unset, help="tokens learnt within words, bytes included; the rest may cross spaces")
    superbpe.add_argument("--max-words", metavar="N", type=int, default=unset, help="words that a token may have parts of (default: 4)")
    superbpe.add_argument("--special", dest="special_tokens", metavar="NAME", action="append", default=unset, help="one of the last ids; may be repeated")


def _add_data_prepare(data: Callable[..., Parser]) -> None:
    example = "titanlm data prepare --output shards --config run.toml\n  titanlm data prepare --output shards --input corpus.parquet --tokenizer spm.model"
    verb = data("prepare", _data_prepare, "tokenise a dataset once, into token shards (.bin); goes on where it was stopped", example, overrides=True)
    verb.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write to")
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", type=Path, help="the data and the tokenizer of this config; sources one after the other")
    source.add_argument("--input", metavar="FILE", nargs="+", help=".parquet, .jsonl or .txt files")
    verb.add_argument("--tokenizer", metavar="TOKENIZER", help="for --input: a tokenizer's file, NAME:FILE, a config (.toml), {settings} or the word byte")
    verb.add_argument("--column", metavar="NAME", help="for --input: what holds the text of .parquet and .jsonl files (default: text)")
    verb.add_argument("--split", choices=["train", "validation"], default="train", help="of the config's data, and in the shards' names (default: %(default)s)")
    verb.add_argument("--shard-tokens", metavar="N", type=positive, default=100_000_000, help="tokens of a shard (default: %(default)s)")
    verb.add_argument("--max-tokens", metavar="N", type=positive, help="stop before the document that would exceed so many")
    verb.add_argument("--prefix", default="tokens", help="begins the names of the shards (default: %(default)s)")
    verb.add_argument("--workers", metavar="N", type=count, help="processes that tokenise; 0: none but this one (default: one for every core but one)")
    verb.add_argument("--force", action="store_true", help="begin anew, and replace shards of these names")
    verb.add_argument("--json", action="store_true", help="one line of JSON")
    _add_imports(verb)


def _add_data_inspect(data: Callable[..., Parser]) -> None:
    verb = data("inspect", _data_inspect, "say what is in data files or in the data of a config", "titanlm data inspect corpus.parquet", overrides=True)
    verb.add_argument("targets", metavar="TARGET", nargs="+", help="a .parquet, .jsonl, .txt or .bin file, a folder, a glob, or a config (.toml)")
    verb.add_argument(
        "--tokenizer", metavar="TOKENIZER", help="count tokens with it: a file, NAME:FILE, a config, {settings} or byte (default: a config's own)"
    )
    verb.add_argument("--column", metavar="NAME", help="that holds the text of .parquet and .jsonl files")
    verb.add_argument("--rows", metavar="N", type=positive, help="read so many rows of each dataset")
    verb.add_argument("--samples", metavar="K", type=int, default=3, help="texts to show of each dataset, drawn at random (default: %(default)s)")
    verb.add_argument("--overlap", action="store_true", help="count validation texts that training reads too, of a config or TRAIN VALIDATION; status 1 if any")
    verb.add_argument("--json", action="store_true", help="one line of JSON")
    _add_imports(verb)


def _add_data_download(data: Callable[..., Parser]) -> None:
    example = "titanlm data download OWNER/NAME --config default --split train\n  titanlm data download golf --variant sp1024"
    verb = data("download", _data_download, "fetch a data set of the Hugging Face Hub, or the shards of Parameter Golf", example)
    verb.add_argument("repo", metavar="REPO", help="OWNER/NAME on the Hub, or the word golf")
    verb.add_argument("--config", metavar="NAME", help="of the data set (default: the only one)")
    verb.add_argument("--split", metavar="NAME", help="default: train")
    verb.add_argument("--revision", metavar="REV", default="main", help="branch, tag or commit (default: %(default)s)")
    verb.add_argument("--include", metavar="GLOB", help="only files whose names match, whatever config and split they look like")
    verb.add_argument("--max-files", metavar="N", type=positive, help="so many files at most")
    verb.add_argument("--variant", metavar="NAME", default="sp1024", help="golf: sp1024, sp4096 or sp8192 (default: %(default)s)")
    verb.add_argument("--train-shards", metavar="N", type=positive, default=80, help="golf: so many for training, 100 M tokens each (default: %(default)s)")
    verb.add_argument("--output", metavar="DIR", type=Path, help="where files go (default: data/NAME)")
    verb.add_argument("--source", metavar="URL", help="a mirror or local copy to take the files from: anything that fsspec opens")


def _add_recipe(recipe: Callable[..., Parser]) -> None:
    recipe("list", _recipe_list, "name the recipes in recipes/ and what each is", "titanlm recipe list")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], summary: str, example: str) -> Parser:
        verb = recipe(name, run, summary, f"titanlm recipe {name} {example}", overrides=True)
        verb.add_argument("name", metavar="NAME", help="a recipe's name, its file or its folder")
        verb.add_argument("--scale", metavar="SCALE", help="one of the recipe's scales (default: the first)")
        verb.add_argument("--output", metavar="DIR", type=Path, help="the recipe's folder (default: runs/NAME-SCALE)")
        return verb

    verb = add("plan", _recipe_plan, "say what each stage does and takes, without a device or data", "golf --scale full --devices 8 --device-name H200")
    verb.add_argument("--devices", metavar="N", type=positive, default=1, help="that train stages are shared out over (default: %(default)s)")
    verb.add_argument("--device-name", metavar="NAME", help="whose peak hours are computed from, such as H200 (default: no hours)")
    verb = add("run", _recipe_run, "run the stages that are not finished yet", "golf --scale smoke")
    verb.add_argument("--from", dest="again_from", metavar="STAGE", help="run this stage and all after it again")
    verb.add_argument("--nproc", metavar="N", type=positive, default=1, help="processes of train stages, started by torchrun (default: %(default)s)")
    verb.add_argument("--dry-run", action="store_true", help="say which stages would run, and why, and stop")


def _add_submission(submission: Callable[..., Parser]) -> None:
    example = "titanlm submission build runs/seed1337 runs/seed42 --output submission --name NAME --author NAME --github-id ID"
    verb = submission("build", _submission_build, "make a Parameter Golf submission of finished runs, one a seed", example, overrides=True)
    verb.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders, equal but for the seed")
    verb.add_argument("--output", metavar="DIR", type=Path, required=True, help="the new folder")
    verb.add_argument("--name", required=True, help="what the submission is called")
    verb.add_argument("--author", required=True)
    verb.add_argument("--github-id", metavar="ID", required=True)
    verb.add_argument("--blurb", default="", help="a sentence or two on what is new")
    verb.add_argument("--track", choices=["non_record_16mb", "10min_16mb"], default="non_record_16mb", help="default: %(default)s")
    verb.add_argument("--hardware", default="", help="what the runs trained on (default: as the first run's environment.json has it)")
    verb.add_argument("--record", metavar=("NAME", "VAL_LOSS"), nargs=2, help="a record and the mean val_loss of its seeds, to be tested against")
    verb.add_argument("--readable", action="store_true", help="train_gpt.py as plain text, about eight times as many bytes")
    verb.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="that exports and scores (default: %(default)s)")

    verb = submission("verify", _submission_verify, "check a submission, anyone's; status 1 if something is wrong", "titanlm submission verify submission")
    verb.add_argument("folder", metavar="DIR", type=Path, help="the submission")
    verb.add_argument("--data", metavar="DIR", type=Path, help="folder of validation shards: run its train_gpt.py on them, and compare the score")
    verb.add_argument("--tokenizer", metavar="FILE", type=Path, help="the tokenizer's file, which a submission does not hold")
    verb.add_argument("--max-tokens", metavar="N", type=count, default=0, help="score so many tokens of each validation set (default: all)")


def _add_target(verb: Parser) -> None:
    verb.add_argument("target", metavar="TARGET", type=Path, help="run folder, checkpoint folder or artifact file")
    _add_step(verb)
    _add_device(verb)


def _add_step(verb: Parser) -> None:
    verb.add_argument("--step", type=step_or_best, help="checkpoint of this step, or `best`, which checkpoint.best kept (default: the newest)")


def _add_device(verb: Parser) -> None:
    verb.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    _add_imports(verb)


def _add_imports(verb: Parser) -> None:
    verb.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help="import a module of outside components")
