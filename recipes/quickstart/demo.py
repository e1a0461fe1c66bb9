"""The main job from end to end, as a user would type it, on the embedded data.

Trains a small model, interrupts it half-way with the signal that Ctrl-C sends,
resumes it, exports it under a byte limit, scores the artifact again, and lets
it write. Ends with a plot of the loss curve in the run folder. Every step is a
`titanlm` command, printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "train_configs/debug.toml"
RUN = Path("runs/demo")
INTERRUPT_AT = 80


def titanlm(*arguments: str) -> list[str]:
    print(f"\n$ titanlm {shlex.join(arguments)}", flush=True)
    return [sys.executable, "-m", "titanlm", *arguments]


def steps_done(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


def main() -> int:
    start = time.monotonic()
    shutil.rmtree(ROOT / RUN, ignore_errors=True)
    train = ("train", CONFIG, "--run.name=demo")

    process = subprocess.Popen(titanlm(*train), cwd=ROOT)
    while process.poll() is None and steps_done(ROOT / RUN / "metrics.jsonl") < INTERRUPT_AT:
        time.sleep(0.2)
    if process.poll() is not None:
        print("training ended before it could be interrupted", file=sys.stderr)
        return process.returncode or 1
    print("^C", flush=True)
    process.send_signal(signal.SIGINT)
    if process.wait() != 130:
        return 1

    subprocess.run(titanlm(*train), cwd=ROOT, check=True)
    subprocess.run(titanlm("export", str(RUN)), cwd=ROOT, check=True)
    artifact = str(RUN / "artifact.titanlm")
    subprocess.run(titanlm("eval", artifact), cwd=ROOT, check=True)
    subprocess.run(titanlm("generate", artifact, "--prompt", "def __init__(self", "--max-tokens", "200"), cwd=ROOT, check=True)
    plot(ROOT / RUN)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Everything is in {RUN}.")
    return 0


def plot(run: Path) -> None:
    """Loss and bits per byte over steps, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([row["step"] for row in trained], [row["bits_per_byte"] for row in trained], label="training")
    for key, label in (("validation/stdlib/bits_per_byte", "held out"), ("validation/stdlib/averaged_bits_per_byte", "held out, averaged weights")):
        scored = [row for row in rows if key in row]
        axes.plot([row["step"] for row in scored], [row[key] for row in scored], "o", label=label)
    axes.axvline(INTERRUPT_AT, color="grey", linestyle=":", label="Ctrl-C and resume")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_title("train_configs/debug.toml, interrupted once and resumed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run / "loss.png", dpi=120)
    print(f"loss curve: {(run / 'loss.png').relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
