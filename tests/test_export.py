"""Finalize: the order of its parts, what is in the artifact, and that it stands by itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm import checkpoint, export, registry
from titanlm.check import artifact_warnings, build_model
from titanlm.cli import main
from titanlm.config import load, loads
from titanlm.errors import ArtifactError, CheckpointError, ConfigError
from titanlm.evaluate import evaluate_target
from titanlm.export import encode_tensors, export_run
from titanlm.exported import as_json, describe
from titanlm.exporters.artifact import ArtifactExporter, inspect, read_artifact
from titanlm.exporters.encoding import Candidate, decode_tensors
from titanlm.loggers.golf import final_lines
from titanlm.models.layers.linear import Linear
from titanlm.quantizers.rowwise import Rowwise
from titanlm.registry import register
from titanlm.targets import find_checkpoint, open_target
from titanlm.tokenizers.training import train_sentencepiece
from titanlm.train import Trainer

QUANTIZERS = '--quantizer=[{name="int8",params=["@embedding"]},{name="int6",params=["@matrix"]}]'


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, ``auto`` would take it, and sums would differ in the last digits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---------------------------------------------------------------- components of the test's own
@dataclass(frozen=True)
class HalveConfig:
    """No settings."""


class Halve:
    """Zeroes half of what is left of every matrix until the artifact fits."""

    def __init__(self, config: HalveConfig, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    def fit(self, candidate: Candidate, size_bytes: Callable[[Candidate], int]) -> Candidate:
        kept = 1.0
        while size_bytes(candidate) > self.max_bytes:
            kept /= 2
            tensors = {name: _top(tensor, kept) if tensor.ndim == 2 else tensor for name, tensor in candidate.tensors.items()}
            candidate = replace(candidate, tensors=tensors, chosen={"kept": kept})
        return candidate


def _top(tensor: Tensor, share: float) -> Tensor:
    edge = tensor.abs().flatten().kthvalue(max(1, int(tensor.numel() * (1 - share)))).values
    return tensor.masked_fill(tensor.abs() <= edge, 0.0)


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 2


class LoraLinear(Linear):
    """W x + B A x; the matrix keeps its name."""

    def __init__(self, plain: Linear, rank: int) -> None:
        nn.Module.__init__(self)
        n_out, n_in = plain.weight.shape
        self.weight = plain.weight
        self.a, self.b = nn.Parameter(torch.empty(rank, n_in)), nn.Parameter(torch.empty(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class Lora:
    """Low-rank updates of two matrices, the only ones that are trained (Hu et al., arXiv:2106.09685)."""

    PATHS = ("blocks.0.attention.q_proj", "blocks.1.feed_forward.down_proj")

    def __init__(self, config: LoraConfig, *, model: Any) -> None:
        self.model = model
        for path in self.PATHS:
            model.set_submodule(path, LoraLinear(model.get_submodule(path), config.rank))

    def trains(self, name: str) -> bool:
        return name.endswith((".a", ".b"))

    def parameter_roles(self) -> dict[str, str]:
        return {f"{path}.{part}": "matrix" for path in self.PATHS for part in "ab"}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        for path in self.PATHS:
            layer = self.model.get_submodule(path)
            layer.a.copy_(torch.randn(layer.a.shape, generator=torch.Generator().manual_seed(seed)) / layer.a.shape[1] ** 0.5)
            layer.b.zero_()

    @torch.no_grad()
    def merge(self) -> None:
        for path in self.PATHS:
            layer = self.model.get_submodule(path)
            plain = Linear(layer.weight.shape[1], layer.weight.shape[0])
            plain.weight = nn.Parameter(layer.weight + layer.b @ layer.a)
            self.model.set_submodule(path, plain)


@pytest.fixture
def components() -> Iterator[None]:
    """The fitter ``halve`` and the adapter ``lora``, for one test."""
    register("fitter", "halve")(Halve)
    register("adapter", "lora")(Lora)
    yield
    for key in (("fitter", "halve"), ("adapter", "lora")):
        registry._entries.pop(key)


# ---------------------------------------------------------------- helpers
def train(config_path: Path, *overrides: str, steps: int = 8) -> Path:
    with Trainer(load(config_path, [f"--train.steps={steps}", "--scheduler=constant", "--validation.0.max_tokens=500", *overrides])) as trainer:
        trainer.train()
    return trainer.folder.path


def tensors_of(path: Path) -> dict[str, Tensor]:
    return decode_tensors(read_artifact(path).tensors)


def average_of(run: Path, step: int) -> dict[str, Tensor]:
    average: dict[str, Tensor] = checkpoint.load(run / "checkpoints" / f"step-{step:08d}").state["averagers"][0]["average"]
    return average


def export_text(run: Path, **settings: Any) -> str:
    return describe(export_run(run, **settings))


def scores(text: str) -> dict[str, float]:
    """Row → loss."""
    return {name.strip(): float(loss) for name, loss in re.findall(r"^  (raw|averaged|after round trip) {2,}([0-9.]+) ", text, re.MULTILINE)}


# ---------------------------------------------------------------- order and scores
def test_the_order_of_finalize(tiny: Path, components: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tiny, "--adapter=lora", "--fitter=halve", "--export.max_bytes=999_999", '--quantizer=[{name="int8",rounding="gptq"}]')
    events: list[str] = []

    def record(owner: Any, name: str, event: str) -> None:
        real = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if events[-1:] != [event]:
                events.append(event)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    for owner, name, event in (
        (export, "score_all", "score"),
        (export, "use_average", "average"),
        (Lora, "merge", "merge"),
        (export, "hessians", "calibrate"),
        (Halve, "fit", "fit"),
        (ArtifactExporter, "size_bytes", "measure"),
        (Rowwise, "encode_calibrated", "encode"),
        (ArtifactExporter, "write", "write"),
        (ArtifactExporter, "read", "read"),
    ):
        record(owner, name, event)
    export_run(run)
    assert events == ["score", "average", "score", "merge", "calibrate", "fit", "encode", "measure", "encode", "write", "read", "score"]


def test_gptq_is_calibrated_on_the_training_data_and_keeps_what_matrices_give(tiny: Path) -> None:
    """Other levels than rounding to nearest, and less change of the outputs on the very positions that were read."""
    coarse = '--quantizer=[{{name="sdclip",bits=5,k=20.0,params=["@matrix"],rounding="{}"}}]'
    run = train(tiny, coarse.format("nearest"))
    decoded = {}
    for rounding in ("nearest", "gptq"):
        path = run / f"{rounding}.titanlm"
        export_run(run, output=path, overrides=[coarse.format(rounding), "--export.calibration_tokens=4096"])
        decoded[rounding] = decode_tensors(read_artifact(path).tensors)
    opened = open_target(run)
    config = load(tiny, [coarse.format("gptq"), "--export.calibration_tokens=4096"])
    moments = export.calibrate(config, opened.module, opened.tokenizer, torch.device("cpu"))
    weights = dict(opened.module.model.named_parameters())
    assert set(moments) == {name for name, role in opened.module.model.parameter_roles().items() if role == "matrix"}

    def change(rounding: str, name: str) -> float:
        error = (decoded[rounding][name].float() - weights[name].detach()).double()
        return float(((error @ moments[name].double()) * error).sum())

    assert all(not torch.equal(decoded["nearest"][name], decoded["gptq"][name]) for name in moments)
    assert sum(change("gptq", name) for name in moments) < 0.9 * sum(change("nearest", name) for name in moments)
    assert export.calibrate(load(tiny, [coarse.format("nearest")]), opened.module, opened.tokenizer, torch.device("cpu")) == {}


def test_a_codec_that_is_missing_is_told_before_anything_is_scored(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tiny, steps=1)
    monkeypatch.setattr(export, "score_all", lambda *arguments: pytest.fail("scored first"))
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(ArtifactError, match="brotli"):
        export_run(run, overrides=["--export.exporter.codec=brotli"])


def test_three_scores_and_the_size_are_printed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny, QUANTIZERS, '--validation=[{name="one",max_tokens=500},{name="two",max_tokens=300}]')
    capsys.readouterr()
    assert main(["export", str(run), "--export.max_bytes=31_000"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["one", "two", "tensors", f"{run / 'artifact.titanlm'}:"]
    assert [line[2:18].strip() for line in lines if line.startswith("  ")][:6] == ["raw", "averaged", "after round trip"] * 2
    n_bytes = (run / "artifact.titanlm").stat().st_size
    assert lines[-1].startswith(f"{run / 'artifact.titanlm'}: {n_bytes:,} bytes of 31,000 allowed (zstd, ")
    assert n_bytes <= 31_000
    # Each row is what `titanlm eval` says of it.
    for row, settings in (("raw", {"averaged": False}), ("averaged", {"averaged": True})):
        loss = float(evaluate_target(run, **settings).split("two: loss ")[1].split()[0])
        assert scores(text)[row] == loss  # the last set's
    assert scores(text)["after round trip"] == float(evaluate_target(run / "artifact.titanlm").split("two: loss ")[1].split()[0])


def test_a_run_without_an_average_has_two_scores(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace('[averager]\nname = "ema"\ndecay = 0.9\n', ""))
    assert list(scores(export_text(train(tiny, steps=2)))) == ["raw", "after round trip"]


# ---------------------------------------------------------------- what is in it
def test_quantized_within_the_limit_and_close(tiny: Path) -> None:
    run = train(tiny, "--export.max_bytes=31_000")
    plain = scores(export_text(run, overrides=["--export.max_bytes=99_999", "--export.dtype=float32"]))
    quantized = scores(export_text(run, overrides=[QUANTIZERS]))
    assert plain["after round trip"] == plain["averaged"] == quantized["averaged"]
    assert quantized["after round trip"] == pytest.approx(plain["averaged"], abs=0.02)
    header = inspect(run / "artifact.titanlm")
    assert (run / "artifact.titanlm").stat().st_size <= 31_000
    by_quantizer = {spec.name: header.quantizers[spec.quantizer][0] if spec.quantizer is not None else spec.dtype for spec in header.tensors}
    assert by_quantizer["embedding.weight"] == "int8"
    assert by_quantizer["blocks.0.attention.q_proj.weight"] == "int6"
    assert by_quantizer["norm.weight"] == "float16"
    # Every value within half a level of the average.
    average = average_of(run, 8)
    for name, tensor in tensors_of(run / "artifact.titanlm").items():
        bits = {"int8": 8, "int6": 6}.get(by_quantizer[name])
        level = average[name].abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1) if bits else average[name].abs() * 2**-10
        assert ((tensor.float() - average[name]).abs() <= 0.5005 * level + 1e-7).all(), name


def test_float32_without_quantizers_is_the_average_bit_for_bit(tiny: Path) -> None:
    run = train(tiny, "--export.dtype=float32")
    export_run(run)
    written, average = tensors_of(run / "artifact.titanlm"), average_of(run, 8)
    assert written.keys() == average.keys()
    for name, tensor in average.items():
        assert torch.equal(written[name], tensor), name


def test_the_config_in_it_is_the_runs(tiny: Path) -> None:
    run = train(tiny, steps=2)
    export_run(run, overrides=["--export.dtype=bfloat16"])
    stored = loads(read_artifact(run / "artifact.titanlm").config_toml)
    assert stored.export.dtype == "bfloat16"
    assert stored.run.name == "tiny"
    assert inspect(run / "artifact.titanlm").tensors[0].dtype == "bfloat16"


def test_the_same_bytes_twice(tiny: Path) -> None:
    run = train(tiny, QUANTIZERS)
    export_run(run)
    export_run(run, output=run / "deep" / "again")
    assert (run / "deep" / "again").read_bytes() == (run / "artifact.titanlm").read_bytes()


def test_a_given_step(tiny: Path) -> None:
    run = train(tiny, "--checkpoint.every=3", "--export.dtype=float32")
    for step in (3, 6):
        export_run(run, step=step)
        average = average_of(run, step)
        assert all(torch.equal(tensor, average[name]) for name, tensor in tensors_of(run / "artifact.titanlm").items())
    export_run(run / "checkpoints" / "step-00000003", output=run / "three")
    assert all(torch.equal(tensor, average_of(run, 3)[name]) for name, tensor in tensors_of(run / "three").items())
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 \(there: 3, 6, 8\)"):
        export_run(run, step=4)


def test_a_checkpoint_away_from_its_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tiny, steps=2)
    away = tiny.parent / "away" / "step-00000002"
    shutil.copytree(run / "checkpoints" / "step-00000002", away)
    export_run(away)
    assert (away.parent / "artifact.titanlm").is_file()
    monkeypatch.chdir(run / "checkpoints")
    export_run(Path("step-00000002"))
    assert (run / "artifact.titanlm").is_file()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_run_whose_name_looks_like_a_checkpoint(tiny: Path) -> None:
    run = train(tiny, "--run.name=step-by-step", steps=2)
    assert find_checkpoint(run) == run / "checkpoints" / "step-00000002"


# ---------------------------------------------------------------- the limit
def test_the_limit_is_met_to_the_byte(tiny: Path) -> None:
    run = train(tiny, steps=2)
    artifact = run / "artifact.titanlm"
    export_run(run, overrides=["--export.max_bytes=99999"])
    n_bytes = artifact.stat().st_size
    assert 10_000 < n_bytes < 99_999

    def numbers_of_refusal(limit: int) -> list[int]:
        """Size, overshoot and limit as the error has them; none for what fits."""
        try:
            export_run(run, overrides=[f"--export.max_bytes={limit}"])
        except ArtifactError as error:
            return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", str(error).splitlines()[0])]
        return []

    fitting: list[int] = []
    for limit in range(n_bytes + 8, n_bytes - 9, -1):  # it stands in the header, which compresses to another size for other digits
        kept = artifact.read_bytes()
        if refused := numbers_of_refusal(limit):
            takes = refused[0]
            assert refused == [takes, takes - limit, limit]
            assert takes > limit
            assert artifact.read_bytes() == kept
        else:
            fitting.append(limit)
            assert len(artifact.read_bytes()) <= limit
    assert n_bytes + 8 in fitting
    assert n_bytes - 8 not in fitting
    with pytest.raises(ArtifactError):
        export_run(run, output=run / "new", overrides=["--export.max_bytes=1"])
    assert not (run / "new").exists()


def test_a_fitter_makes_it_fit(tiny: Path, components: None) -> None:
    run = train(tiny)
    with pytest.raises(ArtifactError, match="over export.max_bytes = 40,000"):
        export_run(run, overrides=["--export.max_bytes=40_000"])
    text = export_text(run, overrides=["--export.max_bytes=40_000", "--fitter=halve"])
    assert (run / "artifact.titanlm").stat().st_size <= 40_000
    written = tensors_of(run / "artifact.titanlm")
    assert (written["embedding.weight"] == 0).float().mean() >= 0.5
    assert (written["norm.weight"] != 0).all()
    assert scores(text)["after round trip"] != scores(text)["averaged"]
    export_run(run, overrides=["--export.max_bytes=99_999", "--fitter=halve"])
    assert (tensors_of(run / "artifact.titanlm")["embedding.weight"] == 0).float().mean() < 0.01  # fits as it is
    with pytest.raises(ConfigError, match="fitter: 'halve' fits an artifact to export.max_bytes, which is not set"):
        export_run(run, overrides=["--fitter=halve"])


@pytest.mark.parametrize("name", ["prune_ladder", "prune_bisect"])
def test_pruning_makes_it_fit(tiny: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny, QUANTIZERS)
    artifact = run / "artifact.titanlm"
    export_run(run, overrides=["--export.max_bytes=99_999"])
    whole, weights = artifact.stat().st_size, tensors_of(artifact)
    limit = whole - 400
    with pytest.raises(ArtifactError, match=f"over export.max_bytes = {limit:,}"):
        export_run(run, overrides=[f"--export.max_bytes={limit}"])
    capsys.readouterr()
    text = export_text(run, overrides=[f"--export.max_bytes={limit}", f'--fitter={{name="{name}",above_elements=500}}'])
    trials = re.findall(r"^prune_trial:(\S+) artifact:(\d+) (\w+)", capsys.readouterr().err, re.MULTILINE)
    valid = {int(size) for _, size, verdict in trials if verdict == "VALID"}
    assert artifact.stat().st_size in valid
    assert artifact.stat().st_size <= limit
    assert f"{artifact.stat().st_size:,} bytes of {limit:,} allowed" in text
    pruned = tensors_of(artifact)
    assert {name for name, tensor in pruned.items() if not torch.equal(tensor, weights[name])} == {
        name for name, tensor in weights.items() if tensor.ndim == 2 and tensor.numel() > 500
    }


def test_the_dial_makes_it_fit_and_the_artifact_says_how(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, artifact = train(tiny, steps=2), tiny.parent / "dialled"
    dialled = ['--quantizer=[{name="sdclip",bits=8,k=9.0,rounding="gptq"}]', "--fitter=clip_dial", "--export.calibration_tokens=512"]
    export_run(run, output=artifact, scored=False, overrides=[dialled[0], dialled[2]])
    limit = artifact.stat().st_size - 1000
    exported = export_run(run, output=artifact, scored=False, overrides=[*dialled, f"--export.max_bytes={limit}"])
    assert 0 <= limit - artifact.stat().st_size <= 200
    factor = exported.chosen["clip_factor"]
    assert f"clip_trial:{factor:.5g} artifact:{artifact.stat().st_size} VALID" in capsys.readouterr().err
    kept = loads(inspect(artifact).config, "artifact")
    assert [quantizer.config.k for quantizer in kept.quantizer] == [9.0 * factor]
    # The numbers in the file are those of that k, and of no other.
    again = tiny.parent / "again"
    export_run(run, output=again, scored=False, overrides=[f'--quantizer=[{{name="sdclip",bits=8,k={9.0 * factor!r},rounding="gptq"}}]', dialled[2]])
    assert all(torch.equal(tensor, tensors_of(again)[name]) for name, tensor in tensors_of(artifact).items())
    assert json.loads(as_json(exported))["chosen"] == {"clip_factor": factor}
    assert re.search(rf"^fitter: clip factor {factor:.5g}$", describe(exported), re.MULTILINE)


def test_the_challenges_log_tells_what_calibration_took_beyond_its_share(tiny: Path) -> None:
    quantizer = '--quantizer=[{name="sdclip",rounding="gptq"}]'
    exported = export_run(train(tiny, steps=2), overrides=[quantizer, "--export.calibration_tokens=512"])
    assert exported.calibration_s is not None
    exported = replace(exported, calibration_s=2.5, chosen={"prune_fraction": 0.12})
    scored = dict(zip(exported.sets, exported.rows[-1][1], strict=True))
    for settings, reserved, late in (([], 0, False), (["--train.max_wallclock_s=60"], 0, True), (["--train.max_wallclock_s=60"], 3, False)):
        config = load(tiny, [quantizer, *settings, f"--export.calibration_reserve_s={reserved}"])
        lines = list(final_lines(exported, 1000, config, scored, 1.5))
        told = [line for line in lines if line.startswith("gptq:")]
        assert [line.partition(" OVER")[0] for line in told] == [f"gptq:calibrated tokens:262144 time:2500ms reserved:{reserved * 1000}ms"]
        assert ["raise export.calibration_reserve_s" in line for line in told] == [late]
        assert "selected_prune_frac:0.12" in lines
        assert f"Total submission size artifact+zstd: {exported.report.path.stat().st_size + 1000} bytes" in lines


def test_settings_that_waste_are_warned_of(tiny: Path) -> None:
    def warnings(*overrides: str) -> list[str]:
        return list(artifact_warnings(load(tiny, overrides)))

    reserved = ("--train.max_wallclock_s=60", "--export.calibration_reserve_s=5")
    assert ["training ends 5 s early" in line for line in warnings(QUANTIZERS, *reserved)] == [True]
    assert not warnings('--quantizer=[{name="sdclip",rounding="gptq"}]', *reserved)
    for k, finest, remedy in ((12.85, 0.5, None), (6.0, 0.5, "0.54"), (6.0, 0.54, None), (12.85, 0.25, "0.26"), (3.0, 0.5, "1"), (3.0, 1.0, None)):
        told = warnings(f'--quantizer=[{{name="sdclip",k={k}}}]', f'--fitter={{name="clip_dial",finest={finest}}}', "--export.max_bytes=1000")
        assert [re.findall(r"than clipping costs; raise it to (\S+)$", line) for line in told] == ([[remedy]] if remedy else [])


def test_code_counts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tiny, steps=2)
    folder = tiny.parent / "submission"
    (folder / "parts").mkdir(parents=True)
    for name, n_bytes in (("train_gpt.py", 1000), ("parts/a.py", 200), ("parts/b.py", 30), ("notes[1].txt", 4)):
        (folder / name).write_bytes(b"#" * n_bytes)
    monkeypatch.chdir(folder)
    for code, n_bytes in (([], 0), (["train_gpt.py"], 1000), (["**/*.py", str(folder / "train_gpt.py")], 1230), (["notes[1].txt"], 4)):
        text = export_text(run, overrides=[f"--export.code={json.dumps(code)}"])
        assert re.search(rf"^  code +{n_bytes:,}$", text, re.MULTILINE)
        total = (run / "artifact.titanlm").stat().st_size + n_bytes
        assert f"{run / 'artifact.titanlm'}: {total:,} bytes" in text
    with pytest.raises(ArtifactError, match=r"over export.max_bytes = 40,000.*\n.* code 1,230"):
        export_run(run, overrides=["--export.code=['**/*.py']", "--export.max_bytes=40_000"])
    (folder / "gone").mkdir()
    for missing in ("gone", "gone/*.py"):
        with pytest.raises(ConfigError, match=f"export.code: '{re.escape(missing)}' names no file .looked in {folder}"):
            export_run(run, overrides=[f"--export.code=['{missing}']"])


def test_the_budget_by_groups(tiny: Path) -> None:
    run = train(tiny, QUANTIZERS, steps=2)
    text = export_text(run, overrides=["--export.max_bytes=99_999"])
    rows = dict(re.findall(r"^  (\w+) +(int6|int8|float16) ", text, re.MULTILINE))
    assert rows == {"attention": "int6", "feed_forward": "int6", "embedding": "int8", "norms": "float16"}
    read = json.loads(as_json(export_run(run, overrides=["--export.max_bytes=99_999"])))
    budget = read["budget"]
    assert budget["total_bytes"] == read["n_bytes"] == (run / "artifact.titanlm").stat().st_size
    assert sum(group["n_parameters"] for group in budget["groups"]) == sum(tensor.numel() for tensor in tensors_of(run / "artifact.titanlm").values())
    assert all(group["entropy"] < group["bits"] < group["entropy"] * 1.2 for group in budget["groups"] if group["entropy"])
    name = read["validation"].popitem()[0]
    read = json.loads(as_json(export_run(run, overrides=["--export.max_bytes=99_999"])))
    assert {row: round(values["loss"], 4) for row, values in read["validation"][name].items()} == scores(text)
    assert re.search(rf"^  left of 99,999 +{99_999 - read['n_bytes']:,}$", text, re.MULTILINE)


def test_codecs_that_were_tried_are_told(tiny: Path) -> None:
    run = train(tiny, QUANTIZERS, steps=2)
    text = export_text(run, overrides=["--export.exporter.codec=auto"])
    told = re.findall(r"^codec (\w+): ([\d,]+) bytes of payload in [\d.]+ s$", text, re.MULTILINE)
    assert {"zstd", "lzma", "zlib", "none"} <= {codec for codec, _ in told}
    sizes = [int(size.replace(",", "")) for _, size in told]
    header = inspect(run / "artifact.titanlm")
    assert sizes == sorted(sizes)
    assert (header.codec, header.payload_bytes) == (told[0][0], sizes[0])
    assert "codec " not in export_text(run)


def test_values_beyond_the_dtype_are_refused(tiny: Path) -> None:
    config = load(tiny)
    model = build_model(config, config.tokenizer.build())
    tensors = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    tensors["norm.weight"][3] = -1e5
    with pytest.raises(ArtifactError, match=r"""'norm.weight' reaches 1e\+05, too large for export.dtype = 'float16'; use "bfloat16" or "float32\""""):
        encode_tensors(config, model, tensors, {})
    for dtype in ("bfloat16", "float32"):
        encoded = encode_tensors(load(tiny, [f"--export.dtype={dtype}"]), model, tensors, {})["norm.weight"]
        assert isinstance(encoded, Tensor)
        assert float(encoded[3]) == pytest.approx(-1e5, rel=1e-2)


# ---------------------------------------------------------------- adapters
def test_an_adapter_is_trained_alone_and_merged(tiny: Path, components: None) -> None:
    with Trainer(load(tiny, ["--run.name=fresh"])) as fresh:
        initial = {name: parameter.detach().clone() for name, parameter in fresh.model.named_parameters()}
    run = train(tiny, "--adapter=lora", "--export.dtype=float32")
    state = checkpoint.load(run / "checkpoints" / "step-00000008").state
    added = {f"{path}.{part}" for path in Lora.PATHS for part in "ab"}
    assert state["model"].keys() == initial.keys() | added
    for name, tensor in initial.items():
        assert torch.equal(state["model"][name], tensor), f"{name} is frozen"
    assert state["optimizers"][0]["params"].keys() == added
    assert all(state["model"][name].abs().sum() > 0 for name in added)

    text = export_text(run)
    written, average = tensors_of(run / "artifact.titanlm"), average_of(run, 8)
    assert written.keys() == initial.keys()
    for name, tensor in written.items():
        path = name.removesuffix(".weight")
        expected = average[name] + average[f"{path}.b"] @ average[f"{path}.a"] if path in Lora.PATHS else average[name]
        assert torch.equal(tensor, expected), name
    assert loads(read_artifact(run / "artifact.titanlm").config_toml).adapter is None
    assert scores(text)["after round trip"] == pytest.approx(scores(text)["averaged"], abs=1.1e-4)
    assert scores(text)["raw"] != pytest.approx(scores(text)["averaged"], abs=1.1e-4)


# ---------------------------------------------------------------- tokenizers
@pytest.fixture
def spoken(tiny: Path, corpus: Path) -> Path:
    """A run with a sentencepiece tokenizer."""
    model = tiny.parent / "spm.model"
    train_sentencepiece([corpus.read_text(encoding="utf-8")], model, 320)
    return train(tiny, f'--tokenizer={{name="sentencepiece",path="{model}"}}', steps=3)


def test_an_embedded_tokenizer_travels(spoken: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_run(spoken)
    before = evaluate_target(spoken / "artifact.titanlm")
    moved = tmp_path / "elsewhere" / "model.titanlm"
    moved.parent.mkdir()
    (spoken / "artifact.titanlm").rename(moved)
    (tiny.parent / "spm.model").unlink()
    assert evaluate_target(moved).splitlines()[1:] == before.splitlines()[1:]
    capsys.readouterr()
    assert main(["generate", str(moved), "--prompt", "größe 🙂", "--max-tokens=20"]) == 0
    assert capsys.readouterr().out.startswith("größe 🙂")


def test_a_tokenizer_beside_the_artifact(spoken: Path, tiny: Path, tmp_path: Path) -> None:
    embedded = export_text(spoken)
    size = (spoken / "artifact.titanlm").stat().st_size
    text = export_text(spoken, overrides=["--export.tokenizer=beside"])
    beside, artifact = spoken / "tokenizer.model", spoken / "artifact.titanlm"
    assert beside.read_bytes() == (tiny.parent / "spm.model").read_bytes()
    assert artifact.stat().st_size < size
    assert f"{artifact.stat().st_size + beside.stat().st_size:,} bytes" in text  # both count
    assert scores(text) == scores(embedded)
    free = export_text(spoken, overrides=["--export.tokenizer=beside", "--export.count_tokenizer=false"])
    assert f"{artifact}: {artifact.stat().st_size:,} bytes (" in free
    assert re.search(rf"^  tokenizer \(beside, not counted\) +{beside.stat().st_size:,}$", free, re.MULTILINE)
    with pytest.raises(ConfigError, match='export.count_tokenizer: a tokenizer inside the artifact always counts; use tokenizer = "beside"'):
        export_run(spoken, overrides=["--export.count_tokenizer=false"])
    (tiny.parent / "spm.model").unlink()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(artifact, moved / "model")
    with pytest.raises(ArtifactError, match="tokenizer.model"):
        evaluate_target(moved / "model")
    shutil.move(beside, moved / "tokenizer.model")
    evaluate_target(moved / "model")
