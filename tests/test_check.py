"""What a check builds, sums up and calls a problem."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from titanlm.check import Report, build_model, check, optimizer_claims, quantizer_claims, roles_of
from titanlm.config import load
from titanlm.course import horizon_of
from titanlm.errors import ConfigError, DataError, TitanError
from titanlm.run_start import room_for_checkpoints
from titanlm.state_bytes import state_bytes
from titanlm.train import Trainer


def test_a_good_config(tiny: Path) -> None:
    before = sorted(tiny.parent.rglob("*"))
    state = torch.get_rng_state()
    report = check(load(tiny))
    assert report.problems == report.warnings == []
    assert report.tokenizer.vocab_size == 257
    assert all(tensor.is_meta for tensor in (*report.model.parameters(), *report.model.buffers()))
    assert sorted(tiny.parent.rglob("*")) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_summary_counted_by_hand(tiny: Path) -> None:
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # queries, keys and values of 2 heads of 8, output
    feed_forward = 3 * 32 * 64
    norms = 2 * 32 + 2 * 8
    parameters = 257 * 32 + 2 * (attention + feed_forward + norms) + 32
    matrices = 257 * 32 + 2 * (attention + feed_forward)
    flops = 6 * matrices + 12 * 2 * 32 * 48
    assert check(load(tiny)).summary.splitlines() == [
        f"parameters       {parameters:,}",
        f"FLOPs per token  {flops:,} (forward and backward)",
        "tokens per step  384 = 8 rows × 48, 2 micro-batches",
        f"whole run        7,680 tokens, {flops * 7680:.3g} FLOPs",
        f"memory           {parameters * 20 / 2**30:.3f} GiB for weights, gradients, moments and average; activations come on top",
        f"checkpoint       {parameters * 16 / 2**30:.3f} GiB, and 10 are kept",
        "documents        186 train, 14 validation",
    ]


COMPACT = "--optimizer=[{name='adamw',lr=1e-2,moments='int8'}]"
HALVED = "--optimizer=[{name='muon',momentum_dtype='bf16',params=['@matrix']},{name='adamw',moments='bf16'}]"


@pytest.mark.parametrize("overrides", [[], [COMPACT], [HALVED]], ids=["fp32", "int8", "muon, bf16"])
def test_bytes_are_those_of_a_run(tiny: Path, overrides: list[str]) -> None:
    """What is said before it starts, of moments in every form, against a step, and files on disk."""
    config = load(tiny, ["--model.d_model=64", "--model.d_ff=256", "--validation=[]", *overrides])
    report = check(config)
    with Trainer(config) as trainer:
        trainer.train_step()
        trainer.save(wait=True)
        values = [value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()]
        weights, moments = sum(parameter.nbytes for parameter in trainer.trained), sum(value.nbytes for value in values if value.ndim)
        n_steps = sum(value.nbytes for value in values if not value.ndim)
    parts = state_bytes(config, report.model)
    assert parts == {"weights": weights, "moments": parts["moments"], "average": weights}
    assert moments <= parts["moments"] <= moments + n_steps  # which count where they lie beside the parameters
    files = (trainer.checkpoints / "step-00000001").glob("*.safetensors")
    assert report.checkpoint_bytes == sum(parts.values()) == pytest.approx(sum(file.stat().st_size for file in files), rel=0.05)
    assert f"memory           {(sum(parts.values()) + weights) / 2**30:.3f} GiB for weights, gradients, moments" in report.summary
    alone = check(replace(config, checkpoint=replace(config.checkpoint, save_only_model=True)))
    assert alone.checkpoint_bytes == sum(parts.values()) - parts["moments"]


def test_an_optimizer_that_needs_values_counts_with_two_moments(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(optimizer: Any) -> None:
        raise IndexError(f"{float(optimizer.param_groups[0]['params'][0].grad.norm())}")

    monkeypatch.setattr("titanlm.optimizers.adamw.CompactAdamW.step", step)
    config = load(tiny, [COMPACT])
    model = check(config).model
    assert state_bytes(config, model)["moments"] == 8 * sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_warning_of_a_full_disk_goes_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda root: SimpleNamespace(free=3 << 30))
    assert room_for_checkpoints(2, 1 << 30, tmp_path) == []
    (told,) = room_for_checkpoints(2, (1 << 30) + 1, tmp_path)
    assert told == f"WARNING: {tmp_path}: 3.0 GiB are free, and checkpoint.keep_last = 2 and one being written take about 3.0 GiB"


def test_warnings(tiny: Path) -> None:
    report = check(load(tiny, ["--optimizer.0.lr=9e-6", "--train.sample_every=3"]))
    assert report.problems == []
    assert report.warnings == [
        "train.sample_prompt: empty; samples start from an empty document",
        "optimizer.0.lr: 9e-06 is low for pretraining; 1e-4 to 1e-2 is usual",
    ]


def test_one_mistake_hides_no_other(tiny: Path) -> None:
    """A tokenizer that cannot be built leaves no model to look at, but schedules, names and batches are still checked."""
    config = load(
        tiny,
        [
            *('--tokenizer={name="sentencepiece",path="nope"}', "--train.micro_batch=3", "--scheduler.warmup_steps=99"),
            *("--validation=[{},{}]", "--model.n_heads=5"),
        ],
    )
    assert [problem.partition(":")[0] for problem in check(config).problems] == [
        *("train.micro_batch", "tokenizer.path", "scheduler.warmup_steps", "validation"),
    ]


def test_a_model_that_cannot_be_built_is_one_problem(tiny: Path) -> None:
    report = check(load(tiny, ["--model.n_heads=5", "--model.n_kv_heads=1"]))
    assert report.model is None
    assert len(report.problems) == 1


@pytest.mark.parametrize(
    ("path", "error", "problems"),
    [
        ("model", ValueError("n_heads: no\nhead_dim: odd"), ["model.n_heads: no", "model.head_dim: odd"]),
        ("tokenizer", DataError("tokenizer.path: cannot read x"), ["tokenizer.path: cannot read x"]),
        ("validation.1.dataset", DataError("dataset.paths: 'x' is no file"), ["validation.1.dataset.paths: 'x' is no file"]),
        ("validation.1.dataset", DataError("dataset 'text': no rows"), ["validation.1.dataset: dataset 'text': no rows"]),
        ("dataset", OSError(13, "Permission denied", "x"), ["dataset: [Errno 13] Permission denied: 'x'"]),
        ("parallel", TitanError("WORLD_SIZE is 2: one process"), ["parallel: WORLD_SIZE is 2: one process"]),
    ],
)
def test_where_a_problem_is(path: str, error: Exception, problems: list[str]) -> None:
    def fail() -> Any:
        raise error

    report = Report()
    for _ in range(2):  # said once
        assert report.attempt(path, fail) is None
    assert report.problems == problems
    assert report.attempt(path, lambda: 3) == 3


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        Report().attempt("model", lambda: 1 / 0)


def test_claims(tiny: Path) -> None:
    config = load(
        tiny,
        [
            '--optimizer=[{name="adamw",params=["@embedding","*norm*"]},{name="adamw"}]',
            '--quantizer=[{name="int6",params=["blocks.0.*"]},{name="int8"}]',
        ],
    )
    model = build_model(config, config.tokenizer.build())
    names = [name for name, _ in model.named_parameters()]
    assert list(roles_of(model)) == names
    first, second = optimizer_claims(config, model).claimed
    assert set(first) == {name for name in names if "norm" in name or name == "embedding.weight"}
    assert sorted(first + second) == sorted(names)
    six, eight = quantizer_claims(config, model).claimed
    assert set(six) == {name for name in names if name.startswith("blocks.0.")}
    assert set(eight) == {name for name in names if name.endswith("weight") and not name.startswith("blocks.0.") and "norm" not in name}


def test_frozen_parameters_need_no_optimizer(tiny: Path) -> None:
    config = load(tiny)
    model = build_model(config, config.tokenizer.build())
    model.embedding.weight.requires_grad_(False)
    assert "embedding.weight" not in roles_of(model)
    assert "embedding.weight" not in optimizer_claims(config, model).claimed[0]


def test_a_parameter_without_a_role(tiny: Path) -> None:
    config = load(tiny)
    model = build_model(config, config.tokenizer.build())
    model.extra = torch.nn.Parameter(torch.zeros(1))
    model.parameter_roles = lambda: {name: "matrix" for name, _ in model.named_parameters() if name != "extra"}
    with pytest.raises(ValueError, match=r"parameter_roles\(\).* extra"):
        roles_of(model)


def test_no_text_in_the_first_row_is_a_problem(tiny: Path) -> None:
    blank = tiny.with_name("blank.txt")
    blank.write_text(" \n\n \n")
    override = f'--validation.0.dataset={{name="text",paths=["{tiny.with_name("corpus.txt")}"],validation_paths=["{blank}"]}}'
    (problem,) = check(load(tiny, [override])).problems
    assert problem == "validation.0.dataset: no text: every row is empty, unreadable or refused by dataset.filter"


def test_sample_prompts(tiny: Path) -> None:
    overrides = ["--train.sample_every=1", "--model.max_positions=48"]
    assert check(load(tiny, [*overrides, f"--train.sample_prompt={'a' * 47}"])).problems == []
    (problem,) = check(load(tiny, [*overrides, f"--train.sample_prompt={'a' * 48}"])).problems
    assert problem == "train.sample_prompt: the prompt is 49 tokens long and model.max_positions is 48; shorten the prompt"
    assert check(load(tiny, ["--model.max_positions=48", f"--train.sample_prompt={'a' * 48}"])).problems == []  # none are asked for


def test_the_best_checkpoint_goes_by_a_metric_that_exists(tiny: Path) -> None:
    (problem,) = check(load(tiny, ["--checkpoint.best=validation/validation/bit_per_byte"])).problems
    assert problem.startswith(
        "checkpoint.best: no validation set reports 'validation/validation/bit_per_byte'; did you mean 'validation/validation/bits_per_byte'?"
    )
    assert "validation/validation/averaged_loss" in problem
    assert not check(load(tiny, ["--checkpoint.best=validation/validation/averaged_loss"])).problems
    two = "--validation=[{name='a'},{name='b'},{name='c',weight=0}]"
    for metric in ("validation/b/loss", "validation/summary/bits_per_byte", "validation/summary/averaged_perplexity"):
        assert not check(load(tiny, [two, f"--checkpoint.best={metric}"])).problems
    (problem,) = check(load(tiny, [two, "--checkpoint.best=validation/sumary/loss"])).problems
    assert "did you mean 'validation/summary/loss'?" in problem
    (problem,) = check(load(tiny, ["--checkpoint.best=validation/summary/loss"])).problems
    assert "no validation set reports 'validation/summary/loss'" in problem, "there is no summary of one set"


@pytest.mark.parametrize(
    ("best", "validate_every", "every", "late"),
    [
        *(("validation/a/loss", *rest) for rest in ((0, (None, 5), True), (7, (None, 5), False), (7, (0, 5), True), (7, (20, 5), True), (7, (19, 5), False))),
        *(("validation/summary/loss", *rest) for rest in ((5, (None, None), False), (0, (2, 5), False), (3, (None, 7), True), (3, (None, 0), True))),
    ],
)
def test_a_best_that_is_only_known_at_the_end_is_told(tiny: Path, best: str, validate_every: int, every: tuple[int | None, int | None], late: bool) -> None:
    sets = ",".join(f"{{name='{name}'{'' if steps is None else f',every={steps}'}}}" for name, steps in zip("ab", every, strict=True))
    report = check(load(tiny, [f"--checkpoint.best={best}", f"--train.validate_every={validate_every}", f"--validation=[{sets}]"]))
    told = [f"checkpoint.best: {best!r} is known at the end alone, whose step is kept anyway; set train.validate_every or the sets' `every`"]
    assert (report.problems, report.warnings) == ([], told if late else [])


def test_h7_a_check_looks_at_no_url_and_a_run_does(tiny: Path) -> None:
    import fsspec

    data = tiny.with_name("corpus.txt").read_text(encoding="utf-8")
    with fsspec.open("memory://check/corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": paragraph}) + "\n" for paragraph in data.split("\n\n"))
    remote = ['--dataset={name="jsonl",paths=["memory://check/corpus.jsonl"],validation_fraction=0.1}']
    report = check(load(tiny, remote))
    assert not report.problems
    assert [line for line in report.warnings if "not looked at" in line and "memory://check/corpus.jsonl" in line]
    assert not [line for line in check(load(tiny, remote), network=True).warnings if "not looked at" in line]
    (problem,) = check(load(tiny, ['--dataset={name="jsonl",paths=["memory://check/none.jsonl"]}', "--validation=[]"]), network=True).problems
    assert "memory://check/none.jsonl" in problem


def test_d14_a_validation_file_that_is_trained_on_is_refused(tiny: Path) -> None:
    corpus = tiny.with_name("corpus.txt")
    other = tiny.with_name("other.txt")
    other.write_text("another text", encoding="utf-8")
    (tiny.parent / "folder").mkdir()
    (tiny.parent / "folder" / "link.txt").symlink_to(corpus)
    validation = f'--validation=[{{file="{corpus}"}}]'
    for paths in ([corpus], [tiny.parent], [tiny.with_name("*.txt")], [tiny.parent / "folder" / "*.txt"]):
        text = ", ".join(f'"{path}"' for path in paths)
        found = check(load(tiny, [validation, f"--dataset.paths=[{text}]", '--dataset.errors="replace"'])).problems
        assert [problem for problem in found if problem.startswith("validation.0.file: ") and "is training data too" in problem]
    assert not check(load(tiny, [f'--validation=[{{file="{other}"}}]'])).problems


def test_d14_a_set_holds_out_no_more_of_a_file_than_training_does(tiny: Path) -> None:
    """The other way to train on what is scored: one file, all of which is trained on, and a set that takes 5 % of it."""
    corpus = tiny.with_name("corpus.txt")

    def found(trained: object, fraction: float, scored: object, own: float) -> list[str]:
        dataset = f'--dataset={{name="text",paths=["{trained}"],unit="paragraph",validation_fraction={fraction}}}'
        of_set = f'--validation=[{{name="five",dataset={{name="text",paths=["{scored}"],unit="paragraph",validation_fraction={own}}}}}]'
        return check(load(tiny, [dataset, of_set])).problems

    (tiny.parent / "folder").mkdir()
    (tiny.parent / "folder" / "link.txt").symlink_to(corpus)
    problem = f"validation.0.dataset.validation_fraction: 0.3, but training leaves out 0.2 of {corpus} and reads the rest; leave out as much there"
    assert found(corpus, 0.2, corpus, 0.3) == [problem]
    assert found(tiny.parent / "*.txt", 0.2, tiny.parent / "folder" / "*.txt", 0.3) == [problem]
    (none_left,) = found(corpus, 0.0, corpus, 0.3)
    assert "training leaves out 0 of" in none_left
    for trained, scored in ((0.3, 0.3), (0.3, 0.2)):
        assert found(corpus, trained, corpus, scored) == []
    shares = ((0, "a"), (0.3, "b"), (0.3, "a"))
    rows = [f'{{name="parquet",paths=["{corpus}"],validation_fraction={n},filter=[{{name="one_of",values=["{one}"]}}]}}' for n, one in shares]
    told = [check(load(tiny, [f"--dataset={rows[0]}", f"--validation=[{{dataset={row}}}]"])).problems for row in rows[1:]]
    assert [any("validation_fraction" in problem for problem in problems) for problems in told] == [False, True]
    other = tiny.parent / "folder" / "other.txt"
    other.write_text("\n\n".join(f"paragraph {number}" for number in range(100)), encoding="utf-8")
    assert found(other, 0.1, corpus, 0.3) == []
    assert len(found(other.parent, 0.1, other, 0.3)) == len(found(other, 0.1, other.parent, 0.3)) == 1


def test_files_of_the_standard_library_that_a_set_names_are_left_out_of_training(tiny: Path) -> None:
    def found(trained: str, scored: str) -> list[str]:
        dataset = f'--dataset={{name="python_stdlib",validation_files={trained}}}'
        return check(load(tiny, [dataset, f'--validation=[{{dataset={{name="python_stdlib",validation_files={scored}}}}}]'])).problems

    assert not found('["json/*", "this.py"]', '["this.py"]')
    assert not found('["json/*"]', '["json/decoder.py"]')
    (problem,) = found('["json/*"]', '["json/*", "this.py"]')
    where = "validation.0.dataset.validation_files"
    assert problem == f"{where}: a file of it, such as 'this.py', would be trained on too; hold out as much in the training data's dataset.validation_files"
    (problem,) = found('["json/*"]', "[]")  # by the hash of the path
    assert "of its files, such as" in problem


def test_spans_that_rows_do_not_fill_and_documents_that_they_hide_are_told(tiny: Path) -> None:
    from titanlm.datasets.shard_file import ShardWriter, dtype_for

    for split in ("train", "val"):
        with ShardWriter(tiny.parent / f"a_{split}_000000.bin", dtype_for(257)) as writer:
            writer.write(np.arange(4000, dtype=np.uint16) % 250)
            writer.close()
    shards = f'--dataset={{name="token_spans",span_tokens=100,paths=["{tiny.parent}/a_train_*.bin"],validation_paths=["{tiny.parent}/a_val_*.bin"]}}'
    overrides = [shards, "--tokenizer=byte", "--packer=none", '--validation=[{packer="concat",max_tokens=96}]']
    report = check(load(tiny, overrides))
    assert [problem for problem in report.problems if "document_mask" in problem] == [
        "data.document_mask: dataset 'token_spans' does not tell documents apart; set it to false"
    ]
    assert [warning for warning in report.warnings if "span_tokens" in warning] == [
        "dataset.span_tokens: no multiple of train.seq_len = 48, so 31% of all positions are padding"
    ]
    report = check(load(tiny, [*overrides, "--data.document_mask=false", "--dataset.span_tokens=96"]))
    assert not [line for line in (*report.problems, *report.warnings) if "span_tokens" in line or "document_mask" in line]


def test_rounding_in_training_and_what_it_does_not_go_with(tiny: Path) -> None:
    rounding = '--quantizer=[{name="int6",qat=true}]'
    bf16 = check(load(tiny, [rounding, "--train.precision=bf16", "--parallel.gather_dtype=compute"]))
    assert [problem.partition(":")[0] for problem in bf16.problems] == ["parallel.gather_dtype"]
    assert not check(load(tiny, [rounding, "--parallel.gather_dtype=compute"])).problems


def test_fsdp2_needs_parameters_of_one_dtype(tiny: Path) -> None:
    golf = '--model={name="golf",n_layers=2,d_model=32,n_heads=2,n_kv_heads=1,d_ff=32,embedding_dtype="bfloat16"}'
    problems = check(load(tiny, [golf, "--parallel.strategy=fsdp2"])).problems
    assert len(problems) == 1
    assert "has bfloat16, float32" in problems[0]
    assert not check(load(tiny, [golf, "--parallel.strategy=replicate"])).problems


def test_muon_on_what_is_no_matrix_is_a_mistake_of_the_config(tiny: Path) -> None:
    problems = check(load(tiny, ['--optimizer=[{name="muon",params=["*"]}]'])).problems
    assert len(problems) == 1
    assert problems[0].startswith("optimizer.0.params: ")
    assert "takes matrices only" in problems[0]


def test_what_an_artifact_would_miss_is_one_line_each(tiny: Path) -> None:
    report = check(load(tiny, ['--export.code=["nope.py"]']))
    assert [line for line in report.problems if "nope.py" in line] == report.problems
    assert len(report.problems) == 1
    assert report.problems[0].startswith("export.code: 'nope.py' names no file")
    pruned = ("--fitter=prune_ladder", "--export.max_bytes=1000000")
    for quantizer, word in (('{name="int6",rounding="gptq"}', "fill the zeros"), ('{name="sdclip"}', "use fitter 'clip_dial'")):
        assert [word in line for line in check(load(tiny, [f"--quantizer=[{quantizer}]", *pruned])).warnings].count(True) == 1


def test_the_dial_has_something_to_turn_that_was_not_trained(tiny: Path) -> None:
    dialled = ("--fitter=clip_dial", "--export.max_bytes=1000000")
    assert [line for line in check(load(tiny, ['--quantizer=[{name="int6"}]', *dialled])).problems if "'clip_dial' turns quantizers such as 'sdclip'" in line]
    for settings, moved in (("", False), (",qat=true", True)):
        report = check(load(tiny, [f'--quantizer=[{{name="sdclip"{settings}}}]', *dialled]))
        assert not report.problems
        assert any("moves the levels that qat trained" in line for line in report.warnings) == moved


def test_calibration_has_a_share_of_the_clock(tiny: Path) -> None:
    gptq = ("--train.max_wallclock_s=60", '--quantizer=[{name="sdclip",rounding="gptq"}]')
    for reserve, warned in ((0, True), (4, False)):
        config = load(tiny, [*gptq, f"--export.calibration_reserve_s={reserve}"])
        assert any("export.calibration_reserve_s: 0, so what 'gptq' reads" in line for line in check(config).warnings) == warned
        assert horizon_of(config).max_wallclock_s == 60 - reserve
    with pytest.raises(ConfigError, match="export.calibration_reserve_s: leaves nothing of train.max_wallclock_s = 60"):
        load(tiny, [*gptq, "--export.calibration_reserve_s=60"])


def test_gptq_would_leave_the_levels_that_training_rounded_to(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="rounding: 'gptq' would leave the levels that qat trained"):
        load(tiny, ['--quantizer=[{name="int6",qat=true,rounding="gptq"}]'])
