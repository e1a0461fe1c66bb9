"""recipes/custom_component: an outside package and loose modules, installed and used as their authors would."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli
import torch
import torch.nn.functional as F

from titanlm import checkpoint, registry
from titanlm.batch import IGNORE, Batch
from titanlm.data import validation_batches
from titanlm.errors import ArtifactError, DataError
from titanlm.exporters.encoding import Candidate, ExportRequest
from titanlm.losses.chunked import loss_sums
from titanlm.patterns import NamedParam
from titanlm.precision import set_precision
from titanlm.progress import Progress
from titanlm.registry import KINDS, Component
from titanlm.stream import build_streams
from titanlm.tokenizers.rebuild import rebuild

REPO = Path(__file__).parents[1]
SOURCE = REPO / "recipes" / "custom_component"
POINTS = {kind: next(iter(tomli.loads((SOURCE / "pyproject.toml").read_text())["project"]["entry-points"][f"titanlm.{kind}"].items())) for kind in KINDS}
"""Kind → (name, module)."""
SHORT = [
    "--train.device=cpu", "--train.deterministic=true", "--train.threads=1", "--train.log_every=1", "--train.seq_len=24",
    "--train.global_batch=6", "--train.micro_batch=3", "--averager.start=4", "--scheduler.warmup_steps=5", "--validation.0.max_tokens=500",
    "--checkpoint.keep_last=5", "--curriculum.0.steps=2", "--curriculum.0.seq_len=12",
]  # fmt: skip
"""All fifteen kinds in half a second; documents are longer than rows, so packers are stopped half-way through them."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in it; built from a copy, so that nothing is left in the source."""
    root = tmp_path_factory.mktemp("zoo")
    shutil.copytree(SOURCE, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "runs"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(root / "site"), str(root / "source")], check=True, timeout=120)
    return root / "site"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What lies beside the package: configs, the list of pieces, loose modules. The package itself is not in it."""
    shutil.copytree(SOURCE, tmp_path / "here", ignore=shutil.ignore_patterns("titanlm_zoo", "build", "*.egg-info", "__pycache__", "runs"))
    return tmp_path / "here"


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPO)]), "OMP_NUM_THREADS": "1"}


def titanlm(site: Path, cwd: Path, *words: str, status: int = 0) -> str:
    """Standard output of a command, or its errors when a status is expected."""
    done = subprocess.run([sys.executable, "-m", "titanlm", *words], cwd=cwd, env=environment(site), capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def train(site: Path, folder: Path, name: str, steps: int, *overrides: str) -> Path:
    titanlm(site, folder, "train", "config.toml", *SHORT, f"--run.name={name}", f"--train.steps={steps}", *overrides)
    return folder / "runs" / name


def losses(run: Path) -> dict[int, str]:
    """Step → loss, digit by digit as it was written."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "loss"]
    assert len({row["step"] for row in rows}) == len(rows), "a step was logged twice"
    return {int(row["step"]): row["value"] for row in rows}


def assert_same_state(a: Path, b: Path, step: int) -> None:
    """Every tensor of two checkpoints is equal to the last bit: weights, momenta, mean, packing buffers, random numbers."""
    left, right = (run / "checkpoints" / f"step-{step:08d}" for run in (a, b))
    files = {file.name for file in left.glob("*.safetensors")}
    assert files == {file.name for file in right.glob("*.safetensors")} >= {f"{part}-00000.safetensors" for part in ("model", "optimizers", "averagers", "own")}
    for name in files:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    data, again = (json.loads((folder / "state-00000.json").read_text())["own"]["data"] for folder in (left, right))
    assert data == again


# ---------------------------------------------------------------- the first door: entry points
def test_every_kind_has_one() -> None:
    assert set(POINTS) == set(KINDS)
    for name, module in POINTS.values():
        assert module == f"titanlm_zoo.{name}"
        assert (SOURCE / "titanlm_zoo" / f"{name}.py").is_file()


def test_list_names_components_without_importing_them(site: Path, folder: Path) -> None:
    script = (
        "import sys; from titanlm.cli import main; status = main(['list'])\n"
        "assert not [name for name in sys.modules if name.startswith(('titanlm_zoo', 'torch'))]; sys.exit(status)"
    )
    listing = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment(site), capture_output=True, text=True, timeout=60)
    assert listing.returncode == 0, listing.stderr
    for kind, (name, module) in POINTS.items():
        part = listing.stdout.split(f"{kind}: ")[1].split("\n\n")[0]
        assert re.search(rf"^  {name} .*{re.escape(module)} \(titanlm-zoo\)$", part, re.MULTILINE), (kind, part)


def test_describe_shows_settings(site: Path, folder: Path) -> None:
    described = titanlm(site, folder, "describe", "scheduler", "inverse_sqrt")
    assert tomli.loads(described[described.index("[scheduler]") :]) == {"scheduler": {"name": "inverse_sqrt", "warmup_steps": 100}}


def test_a_mistake_in_its_settings_is_found_like_any_other(site: Path, folder: Path) -> None:
    problems = titanlm(site, folder, "train", "config.toml", "--optimizer.0.beta=0.9", "--fitter.max_fraction=2", "--packer=one_documents", status=2)
    assert "optimizer.0.beta: unknown key of optimizer 'lion'; did you mean 'betas'?" in problems
    assert "fitter.max_fraction: expected a number less than or equal to 1, got int 2" in problems
    assert "packer.name: no packer named 'one_documents'; did you mean 'one_document'?" in problems


@pytest.mark.slow
def test_trains_exports_and_resumes_to_the_bit(site: Path, folder: Path) -> None:
    straight = train(site, folder, "straight", 20, "--export.at_end=true", "--export.max_bytes=75_000")
    assert 0.97 * 75_000 < (straight / "artifact.titanlm").stat().st_size <= 75_000
    stopped = train(site, folder, "stopped", 7)
    state = checkpoint.load(stopped / "checkpoints" / "step-00000007").ranks[0]
    assert any(stream["packer"]["waiting"] for stream in state["data"]["streams"].values()), "no buffer was in play"
    assert train(site, folder, "stopped", 20) == stopped
    assert losses(stopped) == losses(straight)
    assert list(losses(straight)) == list(range(1, 21))
    assert_same_state(straight, stopped, 20)


@pytest.mark.slow
def test_exports_under_a_limit(site: Path, folder: Path) -> None:
    run = train(site, folder, "short", 3)
    free = titanlm(site, folder, "export", str(run), "--output", "free.xz", "--export.max_bytes=1_000_000")
    n_free = (folder / "free.xz").stat().st_size
    limit = n_free * 9 // 10
    fitted = titanlm(site, folder, "export", str(run), "--output", "fitted.xz", f"--export.max_bytes={limit}")
    n_fitted = (folder / "fitted.xz").stat().st_size
    assert f"{n_free:,} bytes" in free
    assert f"{n_fitted:,} bytes of {limit:,} allowed (xz, bytes)" in fitted
    assert 0.97 * limit < n_fitted <= limit
    scores = {name: float(loss) for name, loss in re.findall(r"^  (raw|averaged|after round trip) +([\d.]+)", fitted, re.MULTILINE)}
    assert len(scores) == 3
    assert scores["after round trip"] == pytest.approx(scores["averaged"], abs=0.3)


@pytest.mark.slow
def test_builtin_artifact_of_outside_components(site: Path, folder: Path, tmp_path: Path) -> None:
    run = train(site, folder, "short", 3)
    exported = titanlm(site, folder, "export", str(run), "--export.exporter=artifact", "--output", str(tmp_path / "model.titanlm"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()  # without pieces.txt: the list is in the artifact
    scored = titanlm(site, elsewhere, "eval", str(tmp_path / "model.titanlm"))
    assert re.search(r"after round trip +(\S+)", exported)[1] == re.search(r"loss (\S+)", scored)[1]  # type: ignore[index]
    assert titanlm(site, elsewhere, "generate", str(tmp_path / "model.titanlm"), "--prompt", "1 + 2 =", "--max-tokens", "5").startswith("1 + 2 =")


@pytest.mark.slow
def test_interrupted_run_goes_on_to_the_bit(site: Path, folder: Path) -> None:
    straight = train(site, folder, "straight", 200)
    words = [sys.executable, "-m", "titanlm", "train", "config.toml", *SHORT, "--run.name=stopped", "--train.steps=100000"]
    process = subprocess.Popen(words, cwd=folder, env=environment(site), stdout=subprocess.DEVNULL)
    table = folder / "runs" / "stopped" / "metrics.csv"
    until = time.monotonic() + 120
    while not (table.exists() and ",loss," in table.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    (stopped_at,) = [step for step, _ in checkpoint.steps(folder / "runs" / "stopped" / "checkpoints")]
    assert 0 < stopped_at < 200
    stopped = train(site, folder, "stopped", 200)
    assert losses(stopped) == losses(straight)
    assert_same_state(straight, stopped, 200)


# ---------------------------------------------------------------- the second door: imports
@pytest.mark.slow
def test_imports_door(site: Path, folder: Path, tmp_path: Path) -> None:
    words = ["through_imports.toml", "--train.steps=3", "--train.seq_len=32", "--train.device=cpu", "--validation.0.max_tokens=500"]
    bare = tmp_path / "nothing installed"
    titanlm(bare, folder, "train", *words)
    refused = titanlm(bare, folder, "eval", "runs/through_imports", status=2)
    assert "no loss named 'focal'" in refused
    assert "--import focal --import staircase" in refused
    assert "loss " in titanlm(bare, folder, "eval", "runs/through_imports", "--import", "focal", "--import", "staircase")


def test_imports_are_found_from_their_folder_only(site: Path, folder: Path, tmp_path: Path) -> None:
    problems = titanlm(site, tmp_path, "train", "here/through_imports.toml", status=2)
    assert "imports.0: no module named 'focal'; install its package or run where it can be imported" in problems
    assert re.search(r"^  focal +.*\[.*focal\.py:\d+\]$", titanlm(site, folder, "list", "loss", "--import", "focal"), re.MULTILINE)


@pytest.mark.slow
def test_commands_of_the_readme(site: Path, folder: Path) -> None:
    text = (SOURCE / "README.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert commands[0] == "pip install ."
    printed = [titanlm(site, folder, *shlex.split(command.removeprefix("titanlm "))) for command in commands[1:]]
    assert (folder / "weights.safetensors.xz").stat().st_size <= 100_000
    scores = [float(score) for score in re.findall(r"averaged weights.*bits per byte ([\d.]+)", "".join(printed))]
    assert scores[-1] < 2.0  # as the README says


# ---------------------------------------------------------------- the components themselves
@pytest.fixture(scope="module")
def zoo() -> Iterator[None]:
    """The modules imported into this process, and forgotten after."""
    sys.path.insert(0, str(SOURCE))
    before = set(registry._entries)
    modules = [*(module for _, module in POINTS.values()), "focal", "staircase"]
    for module in modules:
        importlib.import_module(module)
    yield
    sys.path.remove(str(SOURCE))
    for key in set(registry._entries) - before:
        if registry._entries[key].place.startswith(str(SOURCE)):
            del registry._entries[key]
    for module in [*modules, "titanlm_zoo"]:
        sys.modules.pop(module, None)


def pieces() -> Any:
    return Component.named("tokenizer", "pieces", path=str(SOURCE / "pieces.txt")).build()


def batch(tokens: torch.Tensor, documents: list[int]) -> Batch:
    """One row; ``documents`` are lengths."""
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None]
    return Batch(tokens[None], torch.full_like(tokens, IGNORE)[None], positions, ids, torch.zeros_like(tokens)[None])


def min_gru(**settings: Any) -> Any:
    model = Component.named("model", "min_gru", n_layers=2, d_model=16, longest_memory=8, **settings).build(vocab_size=50)
    model.init_weights(0)
    return model


@pytest.mark.usefixtures("zoo")
def test_pieces_loses_nothing_and_travels() -> None:
    tokenizer = pieces()
    component = Component.named("tokenizer", "pieces", path="no/such/file")
    for text in ("größe 가나다 日本 🙂 = x\r\n", "12 + 30 = 42\n", " = = + -  *", "", "\n\u2028x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.target_bytes(ids, ids).sum() == len(text.encode())
    assert len(tokenizer.encode("12 + 30 = 42")) == 8
    with pytest.raises(DataError, match="no/such/file"):
        component.build()
    again = rebuild(component, tokenizer.files())
    assert again.fingerprint == tokenizer.fingerprint  # type: ignore[comparison-overlap]
    assert again.encode("1 + 2").tolist() == tokenizer.encode("1 + 2").tolist()


@pytest.mark.usefixtures("zoo")
def test_arithmetic_and_one_document_train_each_token_once() -> None:
    filters = (Component.named("filter", "min_length", min_bytes=36),)
    dataset = Component.named("dataset", "arithmetic", max_operand=19, hold_out_every=7, filter=filters)
    streams = {
        split: build_streams(dataset, Component.named("packer", "one_document"), pieces(), split=split, n_streams=1, seed=0, seq_len=10)[0]
        for split in ("train", "validation")
    }
    texts = {split: set(stream._dataset.texts()) for split, stream in streams.items()}  # type: ignore[attr-defined]
    whole = {f"{a} + {b} = {a + b}\n{a} - {b} = {a - b}\n{a} * {b} = {a * b}\n" for a in range(20) for b in range(20)}
    assert texts["train"] | texts["validation"] == {text for text in whole if len(text) >= 36}
    assert not texts["train"] & texts["validation"]

    batches = list(validation_batches(streams["validation"], 10, 4))
    assert sum(int(one.target_bytes.sum()) for one in batches) == sum(map(len, texts["validation"]))
    trained: dict[int, list[int]] = {}
    for labels, documents in (row for one in batches for row in zip(one.labels, one.document_ids)):
        assert len(set(documents[documents >= 0].tolist())) <= 1
        trained.setdefault(int(documents[0]), []).extend(labels[labels >= 0].tolist())
    tokenizer = pieces()
    assert {tokenizer.decode(ids) for number, ids in trained.items() if number >= 0} == texts["validation"]


@pytest.mark.usefixtures("zoo")
def test_min_gru_is_its_recurrence_and_forgets_at_document_boundaries() -> None:
    from titanlm_zoo.min_gru import scan

    generator = torch.Generator().manual_seed(0)
    keep, add = torch.rand(2, 2, 37, 3, generator=generator, dtype=torch.float64)
    keep[:, [0, 11]] = 0
    state, states = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(37):
        state = keep[:, t] * state + add[:, t]
        states.append(state)
    torch.testing.assert_close(scan(keep, add), torch.stack(states, 1), rtol=1e-13, atol=1e-13)

    model = min_gru()
    tokens = torch.randint(50, (12,), generator=generator)
    together = model(batch(tokens, [5, 7]))
    torch.testing.assert_close(together[:, 5:], model(batch(tokens[5:], [7])))
    changed = tokens.clone()
    changed[8] = (changed[8] + 1) % 50
    assert torch.equal(model(batch(changed, [5, 7]))[:, :8], together[:, :8])
    loss = F.cross_entropy(model.head(together)[0], tokens).item()
    assert loss == pytest.approx(math.log(50), abs=0.3)
    assert set(model.parameter_roles()) == {name for name, _ in model.named_parameters()}
    set_precision(model, "bf16")
    assert model(batch(tokens, [12])).dtype == torch.bfloat16


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("name", ["min_gru", "decoder"])
def test_row_multipliers_fold_into_any_model(name: str) -> None:
    settings = {"n_heads": 2} if name == "decoder" else {}
    component = Component.named("model", name, n_layers=2, d_model=16, **settings)
    model, plain = (component.build(vocab_size=50, max_seq_len=16) for _ in range(2))
    adapter = Component.named("adapter", "row_multipliers", freeze=("@matrix",)).build(model=model)
    for each in (model, plain, adapter):
        each.init_weights(0)
    row = batch(torch.arange(12), [5, 7])
    assert torch.equal(model(row), plain(row))  # factors start at 1
    added = adapter.parameter_roles()
    roles = dict(model.parameter_roles()) | dict(added)
    names = {name for name, _ in model.named_parameters()}
    assert names - {name for name, _ in plain.named_parameters()} == set(added)
    assert {name for name in names if not adapter.trains(name)} == {name for name, role in roles.items() if role == "matrix"}
    with torch.no_grad():
        for name in names:
            if name in added:
                model.get_parameter(name).uniform_(0.5, 2.0)
    expected = model(row)
    adapter.merge()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(model(row), expected)
    with pytest.raises(ValueError, match="match no matrix"):
        Component.named("adapter", "row_multipliers", params=("nothing",)).build(model=plain)


@pytest.mark.usefixtures("zoo")
def test_int4_groups() -> None:
    quantizer = Component.named("quantizer", "int4_groups", group=8).build()
    for shape in ((5, 20), (3,), (2, 3, 8), (), (0, 8)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        encoded = quantizer.encode(tensor)
        decoded = quantizer.decode(encoded)
        assert decoded.shape == tensor.shape
        assert encoded.bits == {"values": 4}
        if tensor.numel():
            assert int(encoded.parts["values"].abs().max()) == 7
            # A scale is half a level of its group's largest, rounded to 11 bits.
            assert float((decoded - tensor).abs().max()) <= float(encoded.parts["scale"].max()) * (0.5 + 7 * 2.0**-11)
        assert torch.equal(quantizer.decode(quantizer.encode(decoded)), decoded)  # a second round trip changes nothing
    # Each group has its own scale: a large weight spoils only its neighbours.
    row = torch.full((1, 16), 0.01)
    row[0, 0] = 100.0
    torch.testing.assert_close(quantizer.decode(quantizer.encode(row))[0, 8:], row[0, 8:], rtol=1e-3, atol=0)
    encoded.parts["scale"] = torch.zeros(3)
    with pytest.raises(ArtifactError, match="scale"):
        quantizer.decode(encoded)


@pytest.mark.usefixtures("zoo")
def test_int4_groups_in_training_computes_what_it_will_export() -> None:
    quantizer = Component.named("quantizer", "int4_groups", group=8, training="round").build()
    model = min_gru()
    row = batch(torch.arange(12), [12])
    plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantizer.prepare(model, [name for name, role in model.parameter_roles().items() if role == "matrix"])
    assert {name for name, _ in model.named_parameters()} == set(plain)
    out = model(row)
    out.square().sum().backward()
    rounded = min_gru()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if rounded.parameter_roles()[name] == "matrix":
                parameter.copy_(quantizer.decode(quantizer.encode(plain[name])))
    expected = rounded(row)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    gradients = {name: parameter.grad for name, parameter in rounded.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])  # straight through the rounding


@pytest.mark.usefixtures("zoo")
def test_lion_against_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.randn(4, generator=generator, dtype=torch.float64)
    named = [NamedParam("w", torch.nn.Parameter(weight.clone()), "matrix"), NamedParam("b", torch.nn.Parameter(bias.clone()), "bias")]
    optimizer = Component.named("optimizer", "lion", lr=0.01, betas=(0.8, 0.95), weight_decay=0.5).build(named_params=named)
    expected = [[weight.numpy().copy(), np.zeros((4, 3)), 0.5], [bias.numpy().copy(), np.zeros(4), 0.0]]
    for _ in range(5):
        for item, (_, parameter, _) in zip(expected, named):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.clone()
            value, momentum, decay = item
            direction = np.sign(0.8 * momentum + 0.2 * gradient.numpy())
            item[0] = value * (1 - 0.01 * decay) - 0.01 * direction
            item[1] = 0.95 * momentum + 0.05 * gradient.numpy()
        optimizer.step()
        for (value, _, _), (_, parameter, _) in zip(expected, named):
            np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12)


@pytest.mark.usefixtures("zoo")
def test_schedulers() -> None:
    inverse_sqrt = Component.named("scheduler", "inverse_sqrt", warmup_steps=4).build()
    assert [inverse_sqrt.factor(Progress(step)) for step in (0, 1, 3, 15, 63)] == pytest.approx([0.25, 0.5, 1.0, 0.5, 0.25])
    staircase = Component.named("scheduler", "staircase", stairs=3, ratio=0.5).build(total_steps=10)
    assert [staircase.factor(Progress(step)) for step in range(11)] == [1.0] * 4 + [0.5] * 3 + [0.25] * 4


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("chunk_tokens", [0, 4])
def test_losses_against_full_logits(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 9, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (1, 9), generator=generator)
    labels[0, 3] = IGNORE
    head = torch.nn.Linear(6, 11, bias=False, dtype=torch.float64)
    log_p = -F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none")[labels.flatten() != IGNORE]
    smoothed = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.2)
    for component, expected in (
        (Component.named("loss", "label_smoothing", smoothing=0.2, chunk_tokens=chunk_tokens), smoothed),
        (Component.named("loss", "focal", gamma=2.0, chunk_tokens=chunk_tokens), -((1 - log_p.exp()) ** 2 * log_p).sum()),
    ):
        sums = loss_sums(hidden, labels, head, component.build())
        torch.testing.assert_close(sums.loss, expected)
        (gradient,) = torch.autograd.grad(sums.loss, head.weight)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, head.weight, retain_graph=True)[0])


@pytest.mark.usefixtures("zoo")
def test_tail_mean_is_the_mean() -> None:
    model = torch.nn.Linear(3, 2)
    averager = Component.named("averager", "tail_mean", start=3, every=2).build(model=model)
    seen = []
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.normal_()
        averager.update(Progress(step))
        if step in (3, 5, 7):
            seen.append(model.weight.detach().clone())
        if step == 1:
            with averager.swap():
                pass
    own = model.weight.detach().clone()
    restored = Component.named("averager", "tail_mean", start=3, every=2).build(model=model)
    restored.load_state_dict(averager.state_dict())
    for each in (averager, restored):
        with each.swap():
            torch.testing.assert_close(model.weight.detach(), torch.stack(seen).mean(0))
        assert torch.equal(model.weight, own)


@pytest.mark.usefixtures("zoo")
def test_zero_smallest_takes_as_few_as_it_can() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(64, 64, generator=generator), "b": 100 * torch.randn(32, 32, generator=generator), "norm": torch.full((8,), 1e-9)}

    def size_bytes(candidate: Candidate) -> int:
        return sum(int(tensor.count_nonzero()) for tensor in candidate.tensors.values())

    fit = Component.named("fitter", "zero_smallest", halvings=12).build(max_bytes=4000).fit
    found = fit(Candidate(tensors), size_bytes)
    assert 3990 <= size_bytes(found) <= 4000
    assert 0 < found.chosen["zero_fraction"] < 0.25
    fitted = found.tensors
    assert torch.equal(fitted["norm"], tensors["norm"])
    for name in ("a", "b"):  # the small ones are gone, the others untouched, and both tensors lose the same share
        zero = fitted[name] == 0
        assert float(tensors[name][zero].abs().max()) <= float(tensors[name][~zero].abs().min())
        assert torch.equal(fitted[name][~zero], tensors[name][~zero])
        assert float(zero.float().mean()) == pytest.approx(1120 / 5120, abs=0.02)
    assert fit(found, size_bytes) is found
    with pytest.raises(ArtifactError, match="over export.max_bytes = 5"):
        Component.named("fitter", "zero_smallest").build(max_bytes=5).fit(Candidate(tensors), size_bytes)


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("tokenizer", ["embed", "beside"])
def test_safetensors_xz_round_trip(tmp_path: Path, tokenizer: str) -> None:
    quantizer = Component.named("quantizer", "int4_groups").build()
    weight = torch.randn(16, 48)
    tensors = {"weight": quantizer.encode(weight), "norm": torch.ones(16, dtype=torch.float16)}
    exporter = Component.named("exporter", "safetensors_xz").build()
    request = ExportRequest(tmp_path / "out" / "weights.xz", "a = 1\n", None, tokenizer, {"pieces.txt": b"x" * 100}, "fingerprint")
    report = exporter.write(tensors, request)
    beside = 100 if tokenizer == "beside" else 0
    assert (tmp_path / "out" / "pieces.txt").exists() == bool(beside)
    assert report.n_bytes == exporter.size_bytes(tensors, request) == report.path.stat().st_size + beside
    read = exporter.read(report.path)
    assert torch.equal(read["weight"], quantizer.decode(tensors["weight"]))
    assert torch.equal(read["norm"], tensors["norm"])

    over = ExportRequest(tmp_path / "over.xz", "", report.n_bytes - 200, tokenizer, {}, "")
    with pytest.raises(ArtifactError, match="over export.max_bytes"):
        exporter.write(tensors, over)
    assert not over.path.exists()
    whole = report.path.read_bytes()
    for damaged in (whole[:-20], b"", b"rubbish", whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        report.path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=re.escape(str(report.path))):
            exporter.read(report.path)


@pytest.mark.usefixtures("zoo")
def test_csv_forgets_what_came_after_the_step_it_resumes_from(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        logger = Component.named("logger", "csv", only=("loss",)).build(run_dir=tmp_path)
        logger.start(start)
        for step in steps:
            logger.log(step, {"loss": step + start / 10, "lr": 1.0})
        logger.close()
        with open(tmp_path / "metrics.csv", "a") as file:
            file.write("3,lo" if start == 0 else "")  # torn by a kill
    assert (tmp_path / "metrics.csv").read_text() == "step,metric,value\n1,loss,1.0\n2,loss,2.0\n3,loss,3.2\n4,loss,4.2\n"
