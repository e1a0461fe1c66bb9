"""Weights of another run, artifact or file in a new model: all of them or none, and everything unusual is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from titanlm import checkpoint
from titanlm.averagers.ema import Ema, EmaConfig
from titanlm.check import build_model
from titanlm.config import RunConfig, _adapter, dump, load, loads
from titanlm.errors import CheckpointError, ConfigError
from titanlm.initial_load import InitialLoad, initial_weights
from titanlm.progress import Progress
from titanlm.weights import initialise, load_weights, unique_names


@pytest.fixture
def config(tiny: Path) -> RunConfig:
    return load(tiny)


@pytest.fixture
def make(tiny: Path) -> Callable[..., Any]:
    """A model of the tiny config with overrides, drawn from a seed."""

    def make(*overrides: str, seed: int = 1) -> Any:
        config = load(tiny, overrides)
        model = build_model(config, config.tokenizer.build())
        model.to_empty(device="cpu")
        initialise(model, seed)
        return model

    return make


def weights_of(model: Any) -> dict[str, Tensor]:
    stored = model.state_dict()
    return {name: stored[name].clone() for name in unique_names(model)}


def tokenizer_of(config: RunConfig) -> str:
    return config.tokenizer.build().fingerprint


@pytest.fixture
def file(tmp_path: Path) -> Callable[[dict[str, Tensor]], str]:
    """Writes tensors to a .safetensors file."""

    def write(tensors: dict[str, Tensor], name: str = "weights.safetensors") -> str:
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, tmp_path / name)
        return str(tmp_path / name)

    return write


def save(run: Path, step: int, config: RunConfig, model: Any, averager: Ema | None = None, config_toml: str = "") -> Path:
    averagers = [] if averager is None else [averager.state_dict()]
    state = {"model": weights_of(model), "averagers": averagers, "fingerprints": {"tokenizer": tokenizer_of(config)}}
    return checkpoint.save(run / "checkpoints", step, state, {}, config_toml or dump(config))


def take(settings: InitialLoad, model: Any, tokenizer: str = "own") -> tuple[dict[str, Tensor], list[str]]:
    own = weights_of(model)
    result, report = initial_weights(settings, model, tokenizer=tokenizer, fresh=own.__getitem__)
    assert list(result) == unique_names(model)
    load_weights(model, result, "test")  # names, shapes
    assert all(result[name].dtype == own[name].dtype for name in own)
    return result, report


def refused(settings: InitialLoad, model: Any, tokenizer: str = "own") -> str:
    own = weights_of(model)
    with pytest.raises(CheckpointError) as caught:
        initial_weights(settings, model, tokenizer=tokenizer, fresh=own.__getitem__)
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights_of(model).items())
    return str(caught.value)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- settings
def test_settings_are_strict_and_keep_the_order_of_renames() -> None:
    read = _adapter(InitialLoad).validate_json
    settings = read('{"path": "x", "step": "best", "rename": {"b.*": "a.*", "a.*": "c.*"}, "skip": ["head.*"]}')
    assert (settings.step, list(settings.rename), settings.skip) == ("best", ["b.*", "a.*"], ("head.*",))
    assert read('{"path": "x"}') == InitialLoad(path="x")
    for wrong in ('"step": 1.0', '"grow": "some"', '"rename": {"a": 1}', '"what": 1'):
        with pytest.raises(ValueError, match="validation error"):
            read(f'{{"path": "x", {wrong}}}')
    for step in (0, -1, "last", "5"):
        with pytest.raises(ValueError, match=f"step: {step!r} is no step; expected a number above 0 or 'best'"):
            InitialLoad(path="x", step=step)
    with pytest.raises(ValueError, match=r"rename: 'a\.\*\.\*' → 'b\.\*': as many \* on the right"):
        InitialLoad(path="x", rename={"a.*.*": "b.*"})


def test_a_config_with_it_comes_back_the_same(tiny: Path) -> None:
    text = tiny.read_text().replace("[checkpoint]", '[checkpoint.initial_load]\npath = "base"\nrename = { "b.*" = "a.*", "a.*" = "b.*" }\n[checkpoint]')
    tiny.write_text(text)
    config = load(tiny, ["--checkpoint.initial_load.step=3", '--checkpoint.initial_load.skip=["head.*"]'])
    assert config.checkpoint.initial_load == InitialLoad(path="base", step=3, rename={"b.*": "a.*", "a.*": "b.*"}, skip=("head.*",))
    assert loads(dump(config)) == config
    with pytest.raises(ConfigError, match=r"checkpoint\.initial_load\.step: 'last' is no step"):
        load(tiny, ["--checkpoint.initial_load.step=last"])


# ---------------------------------------------------------------- sources
def test_the_newest_the_named_and_the_best_checkpoint_of_a_run(tmp_path: Path, config: RunConfig, make: Any) -> None:
    run = tmp_path / "base"
    models = {step: make(seed=step) for step in (2, 4)}
    folders = {step: save(run, step, config, model) for step, model in models.items()}
    (run / "best.json").write_text('{"metric": "m", "value": 1.0, "step": 2}')
    for settings, step in (
        (InitialLoad(path=str(run)), 4),
        (InitialLoad(path=str(run), step=2), 2),
        (InitialLoad(path=str(run), step="best"), 2),
        (InitialLoad(path=str(folders[2])), 2),
    ):
        weights, report = take(settings, make(seed=9), tokenizer_of(config))
        assert equal(weights, weights_of(models[step]))
        assert report == [f"initial weights from {folders[step]} (raw)"]
    assert "no checkpoint of step 3 (there: 2, 4)" in refused(InitialLoad(path=str(run), step=3), make())
    assert "checkpoint.initial_load.step" in refused(InitialLoad(path=str(folders[2]), step=2), make())
    assert "has no averaged weights" in refused(InitialLoad(path=str(run), weights="averaged"), make())


def test_averaged_weights_where_they_exist(tmp_path: Path, config: RunConfig, make: Any) -> None:
    model = make(seed=2)
    averager = Ema(EmaConfig(decay=0.5), model=model)
    initialise(model, 3)
    averager.update(Progress())
    run = tmp_path / "base"
    save(run, 2, config, model, averager)
    raw = weights_of(model)
    with averager.swap():
        averaged = weights_of(model)
    assert not equal(raw, averaged)
    for choice, expected, said in (("auto", averaged, "averaged"), ("averaged", averaged, "averaged"), ("raw", raw, "raw")):
        weights, report = take(InitialLoad(path=str(run), weights=choice), make(seed=9), tokenizer_of(config))  # type: ignore[arg-type]
        assert equal(weights, expected)
        assert report[0].endswith(f"({said})")


def test_a_model_that_cannot_be_built_for_the_average_leaves_the_raw_weights(tmp_path: Path, config: RunConfig, make: Any) -> None:
    model = make()
    save(tmp_path / "base", 2, config, model, Ema(EmaConfig(), model=model), 'model = "outside"\noptimizer = "adamw"\n')
    said = refused(InitialLoad(path=str(tmp_path / "base")), make(), tokenizer_of(config))
    assert "no model named 'outside'" in said
    assert 'checkpoint.initial_load.weights = "raw"' in said
    take(InitialLoad(path=str(tmp_path / "base"), weights="raw"), make(), tokenizer_of(config))


def test_an_artifact_is_decoded_and_cast(tmp_path: Path, config: RunConfig, make: Any) -> None:
    from titanlm.exporters.artifact import ArtifactConfig, ArtifactExporter
    from titanlm.exporters.encoding import ExportRequest

    model, tokenizer = make(seed=2), config.tokenizer.build()
    path = tmp_path / "artifact.titanlm"
    request = ExportRequest(path, dump(config), None, "embed", tokenizer.files(), tokenizer.fingerprint)
    ArtifactExporter(ArtifactConfig()).write({name: tensor.half() for name, tensor in weights_of(model).items()}, request)
    weights, report = take(InitialLoad(path=str(path)), make(seed=9), tokenizer.fingerprint)
    assert equal(weights, {name: tensor.half().float() for name, tensor in weights_of(model).items()})
    assert report[1].startswith("cast from float16 to float32: embedding.weight, ")
    assert report[1].endswith(f"and {len(weights) - 5} more")
    assert "checkpoint.initial_load.weights" in refused(InitialLoad(path=str(path), weights="raw"), make())
    assert "checkpoint.initial_load.step" in refused(InitialLoad(path=str(path), step=2), make())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match="artifact.titanlm"):
        take(InitialLoad(path=str(path)), make(), tokenizer.fingerprint)


def test_safetensors_one_file_or_a_folder(tmp_path: Path, make: Any, file: Any) -> None:
    model = make(seed=2)
    weights = weights_of(model)
    path = file(weights)
    result, report = take(InitialLoad(path=path), make(seed=9))
    assert equal(result, weights)
    assert "does not say which tokenizer" in report[1]
    folder = tmp_path / "parts"
    folder.mkdir()
    names = sorted(weights)
    file({name: weights[name] for name in names[:3]}, "parts/a.safetensors")
    file({name: weights[name] for name in names[3:]}, "parts/b.safetensors")
    assert equal(take(InitialLoad(path=str(folder)), make(seed=9))[0], weights)
    file({names[0]: weights[names[0]]}, "parts/c.safetensors")
    assert f"{names[0]}: again in {folder / 'c.safetensors'}" in refused(InitialLoad(path=str(folder)), make())
    (folder / "c.safetensors").write_bytes(b"\x08")
    assert "c.safetensors cannot be read" in refused(InitialLoad(path=str(folder)), make())


def test_a_path_without_weights(tmp_path: Path, make: Any, file: Any) -> None:
    file(weights_of(make()), "base.safetensors")
    assert "base.safetens is not there; did you mean 'base.safetensors'?" in refused(InitialLoad(path=str(tmp_path / "base.safetens")), make())
    (tmp_path / "empty").mkdir()
    assert "is a folder without weights; expected a run folder" in refused(InitialLoad(path=str(tmp_path / "empty")), make())


# ---------------------------------------------------------------- names
def test_everything_that_does_not_fit_is_listed_at_once(make: Any, file: Any) -> None:
    model = make("--model.d_ff=48", seed=2)
    weights = weights_of(model)
    weights["more"] = torch.zeros(2)
    weights["norm.weight"] = weights["norm.weight"].int()
    del weights["blocks.0.attention.o_proj.weight"]
    settings = InitialLoad(path=file(weights), skip=("nothing.*",), rename={"none.*": "x.*"})
    said = refused(settings, make())
    for line in (
        "more: not part of the model; rename or skip it",
        "blocks.0.attention.o_proj.weight: missing; rename the stored tensor that is meant, or skip it",
        "norm.weight: int32, which is no float32 as the model has it",
        "skip: 'nothing.*' matches nothing",
        "rename: 'none.*' matches no stored tensor",
    ):
        assert line in said
    assert said.count("feed_forward") >= 4
    assert ", the model has [" in said


def test_rename_carries_stars_over_and_the_first_that_matches_counts(make: Any, file: Any) -> None:
    model = make(seed=2)
    weights = weights_of(model)
    foreign = {}
    for name, tensor in weights.items():
        foreign["model." + name.replace("blocks.", "layers.").replace(".attention.", ".attn.")] = tensor
    rename = {
        "model.layers.*.attn.*": "blocks.*.attention.*",
        "model.layers.*": "blocks.*",
        "model.*": "*",
    }
    assert equal(take(InitialLoad(path=file(foreign), rename=rename), make(seed=9))[0], weights)
    said = refused(InitialLoad(path=file(foreign), rename=dict(reversed(rename.items()))), make())
    assert "model.layers.0.attn.q_proj.weight (renamed layers.0.attn.q_proj.weight): not part of the model" in said
    clash = InitialLoad(path=file(weights), rename={"blocks.0.*": "blocks.1.*"})
    assert "blocks.1.attention.q_proj.weight: both blocks.0.attention.q_proj.weight and blocks.1.attention.q_proj.weight would be it" in refused(clash, make())


def test_dots_and_brackets_of_a_rename_are_plain(make: Any, file: Any) -> None:
    weights = weights_of(make(seed=2))
    weights["norm[0]xweight"] = weights.pop("norm.weight")
    assert "renamed" not in "".join(take(InitialLoad(path=file(weights), rename={"norm[0]xweight": "norm.weight"}), make(seed=9))[1])
    said = refused(InitialLoad(path=file(weights), rename={"norm.0.xweight": "norm.weight"}), make())
    assert "'norm.0.xweight' matches no stored tensor; did you mean 'norm[0]xweight'?" in said


def test_skip_keeps_fresh_values_and_leaves_stored_tensors_out(make: Any, file: Any) -> None:
    source, model = make("--model.n_layers=3", seed=2), make("--model.tie_embeddings=false", seed=9)
    fresh = weights_of(model)
    result, report = take(InitialLoad(path=file(weights_of(source)), skip=("head.*", "blocks.2.*", "norm.*")), model)
    assert torch.equal(result["head.weight"], fresh["head.weight"])
    assert torch.equal(result["norm.weight"], fresh["norm.weight"])
    assert torch.equal(result["embedding.weight"], source.state_dict()["embedding.weight"])
    assert any(line.startswith("left out: ") and "blocks.2." in line and line.endswith("more") for line in report)
    assert "fresh: norm.weight, head.weight" in report


def test_skip_knows_stored_names_before_and_after_renaming(make: Any, file: Any) -> None:
    weights = weights_of(make(seed=2)) | {"old.extra": torch.zeros(1)}
    for pattern in ("old.*", "new.*"):
        _, report = take(InitialLoad(path=file(weights), rename={"old.*": "new.*"}, skip=(pattern,)), make(seed=9))
        assert "left out: old.extra (renamed new.extra)" in report


# ---------------------------------------------------------------- ties
def test_a_tied_source_gives_an_untied_head_its_embedding(make: Any, file: Any) -> None:
    source, model = make(seed=2), make("--model.tie_embeddings=false", seed=9)
    result, report = take(InitialLoad(path=file(weights_of(source))), model)
    assert torch.equal(result["head.weight"], result["embedding.weight"])
    assert result["head.weight"].data_ptr() != result["embedding.weight"].data_ptr()
    assert "head.weight: a copy of embedding.weight, to which the source ties it" in report
    factorised = make("--model.embedding_rank=8", seed=2)
    said = refused(
        InitialLoad(path=file(weights_of(factorised)), skip=("embedding.projection",)), make("--model.tie_embeddings=false", "--model.embedding_rank=8")
    )
    assert "head.weight: missing" in said


def test_an_untied_head_is_dropped_only_by_name(make: Any, file: Any) -> None:
    source = make("--model.tie_embeddings=false", seed=2)
    path = file(weights_of(source))
    assert "head.weight: the model ties it to another tensor and has none of its own; skip it to leave the stored one out" in refused(
        InitialLoad(path=path), make()
    )
    result, report = take(InitialLoad(path=path, skip=("head.*",)), make(seed=9))
    assert torch.equal(result["embedding.weight"], source.state_dict()["embedding.weight"])
    assert "left out: head.weight" in report


# ---------------------------------------------------------------- a larger vocabulary
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grow", ["init", "mean"])
def test_growth_keeps_old_rows(make: Any, file: Any, grow: Any, tied: bool) -> None:
    tie = f"--model.tie_embeddings={str(tied).lower()}"
    source, model = make(tie, seed=2), make(tie, "--model.vocab_size=300", seed=9)
    old, fresh = weights_of(source), weights_of(model)
    n = len(old["embedding.weight"])
    path = file(old)
    said = refused(InitialLoad(path=path), model)
    assert f'embedding.weight: shape [{n}, 32], the model has [300, 32]; grow = "init" or "mean" adds rows' in said
    result, report = take(InitialLoad(path=path, grow=grow), model)
    for name in ["embedding.weight"] + ([] if tied else ["head.weight"]):
        assert torch.equal(result[name][:n], old[name])
        new = fresh[name][n:] if grow == "init" else old[name].mean(0).expand(len(fresh[name]) - n, -1)
        assert torch.equal(result[name][n:], new)
        assert any(line.startswith(f"{name}: {n:,} → 300 rows, new ones ") for line in report)


def test_only_rows_of_ids_grow_and_none_shrink(make: Any, file: Any) -> None:
    weights = weights_of(make(seed=2))
    weights["embedding.weight"] = torch.zeros(1259, 32)
    weights["blocks.0.feed_forward.up_proj.weight"] = torch.zeros(8, 32)
    said = refused(InitialLoad(path=file(weights), grow="init"), make())
    assert "embedding.weight: shape [1259, 32], the model has [" in said
    assert "blocks.0.feed_forward.up_proj.weight: shape [8, 32], the model has [64, 32]" in said
    assert "adds rows" not in said


def test_a_tied_source_grows_into_an_untied_head(make: Any, file: Any) -> None:
    source, model = make(seed=2), make("--model.tie_embeddings=false", "--model.vocab_size=300", seed=9)
    result, _ = take(InitialLoad(path=file(weights_of(source)), grow="mean"), model)
    assert torch.equal(result["head.weight"], result["embedding.weight"])
    assert result["head.weight"].shape == (300, 32)


# ---------------------------------------------------------------- settings and tokenizers
def test_settings_that_change_what_weights_of_the_same_shape_compute_are_told(tmp_path: Path, config: RunConfig, make: Any) -> None:
    save(tmp_path / "base", 2, config, make())
    model = make("--model.n_heads=8", "--model.head_dim=4", "--model.n_kv_heads=4", "--model.qk_norm=none", "--model.rope_theta=5e5")
    _, report = take(InitialLoad(path=str(tmp_path / "base"), skip=("*_norm.weight",)), model, tokenizer_of(config))
    changes = 'n_heads 4 → 8, n_kv_heads 2 → 4, head_dim not set → 4, qk_norm "learned" → "none", rope_theta 10000.0 → 500000.0'
    assert f"model settings are others than the source's: {changes}" in report


def test_another_tokenizer_is_refused_unless_the_vocabulary_grows_or_is_fresh(tmp_path: Path, config: RunConfig, make: Any) -> None:
    run = tmp_path / "base"
    save(run, 2, config, make(seed=2))
    other = json.dumps(json.loads(tokenizer_of(config)) | {"eos_id": 7})
    said = refused(InitialLoad(path=str(run)), make(), other)
    assert "tokenizer: made with another one; use its tokenizer; or, if old ids mean the same, set grow" in said
    assert "EOS id: " in said
    _, report = take(InitialLoad(path=str(run), grow="init"), make("--model.vocab_size=300"), other)
    assert any(line.startswith("WARNING: made with another tokenizer") and "EOS id: " in line for line in report)
    _, report = take(InitialLoad(path=str(run), skip=("embedding.weight",)), make(), other)
    assert report[1:] == ["left out: embedding.weight", "fresh: embedding.weight"]
