"""Ten kills of an 8B-shaped QLoRA run with paged AdamW in deterministic mode, and the memory of a thousand steps.

    python tests/gpu/survive.py FOLDER [--layers 32 --kills 10 --steps 40 --seconds 560]
    python tests/gpu/survive.py FOLDER --tiny                  # the same on a CPU, with a model of two layers

A run is killed with SIGKILL, in turn at any moment and inside the save after the first of its try, and started again,
until it ends. It must come to the losses, gradient norms and adapter of a run that nothing happened to, and at each
start, and at its end, hold the same bytes of frozen weights. The control goes on without the optimizer's memory, and
must differ. Before that (unless --long 0) a small model takes a thousand steps, evaluating and saving as it goes:
neither the GPU's memory nor the host's may grow. With a FOLDER in memory (/dev/shm) the saves do not wait for a disk.

Prints a table and, last, one line of JSON. When --seconds are nearly over no further kill is begun.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WATCHED = "--watched"  # how this file starts itself again
MOST_GROWTH = 1.0  # MB in a hundred steps
SAVES = 2  # steps from one to the next
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss", "skipped")

RECIPE = """
method = "qlora"
seed = 5
[model]
path = "{base}"
dtype = "{dtype}"
[data]
train = ["{rows}"]
format = "text"
overlong = "truncate"
eval_fraction = 0.02
max_seq_len = {length}
[lora]
dropout = 0.05
[optim]
name = "paged_adamw_32bit"
learning_rate = 1e-3
[train]
max_steps = {steps}
batch_size = 1
gradient_accumulation_steps = 2
deterministic = true
[eval]
every_steps = 10
early_stopping_patience = 0
[save]
every_steps = {saves}
keep_last = 2
[log]
every_steps = 1
tensorboard = false
"""


@dataclass
class Row:
    name: str
    injected: int
    survived: int
    note: str = ""


# ---- the run that is watched: a process of its own ------------------------------------------------------------------


def watched(told: Path, forgetful: bool, arguments: list[str]) -> None:
    """What scripts/train.py does, with notes in `told`: a digest of the frozen weights, and memory as it goes."""
    began = time.time()
    import torch

    from minitune import build, errors, optim, train
    from minitune.config import load_config
    from minitune.log import RunLog

    def note(**facts: Any) -> None:
        with open(told, "a") as file:
            file.write(json.dumps(facts | {"seconds": round(time.time() - began, 1)}) + "\n")

    real_fill, real_tick = build.fill, RunLog.tick
    models, ticks = [], []

    def fill(model: torch.nn.Module, *rest: Any) -> None:
        real_fill(model, *rest)
        models.append(model)
        note(frozen=fold(model), bytes=sum(p.nbytes for p in frozen(model)))

    def tick(self: RunLog) -> None:
        real_tick(self)
        ticks.append(1)
        on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        note(step=len(ticks), gpu=on_gpu, host=resident())

    build.fill, RunLog.tick = fill, tick
    if forgetful:
        optim.load_state = lambda *arguments: None

    def main(arguments: list[str]) -> None:
        train.train(load_config(arguments))
        note(frozen=fold(models[0]), at_the_end=True)

    sys.argv = [sys.argv[0], *arguments]
    errors.run(main)


def frozen(model: Any) -> list[Any]:
    return [p for _, p in sorted(model.named_parameters()) if not p.requires_grad]


def fold(model: Any) -> str:
    """A number from every bit of the frozen weights and its place: sums of integers, the same in any order."""
    import torch

    total, piece = 0, 2**24
    for number, parameter in enumerate(frozen(model)):
        flat = parameter.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(flat), piece):
            raw = flat[start : start + piece].long()
            places = torch.arange(start, start + len(raw), device=raw.device) * 0x9E3779B1 + 2 * number + 1
            mixed = (places ^ places >> 15) * 0x2545F491 + (places ^ places >> 7)
            total += ((raw + 1) * (mixed | 1)).sum().item()
    return f"{total % 2**64:016x}"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the harness ----------------------------------------------------------------------------------------------------


class Bench:
    """A recipe, the folders of its runs, and what each process noted."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe

    def start(self, name: str, *overrides: str, forgetful: bool = False) -> subprocess.Popen:
        command = [sys.executable, __file__, WATCHED, str(self.told(name)), "forgetful" if forgetful else ""]
        command += [str(self.recipe), f"out={self.folder / name}", *overrides]
        with open(self.folder / f"{name}.out", "a") as out:
            return subprocess.Popen(command, stdout=out, stderr=out)

    def end(self, name: str, process: subprocess.Popen) -> None:
        if code := process.wait():
            raise SystemExit(f"{name} ended with {code}:\n{(self.folder / f'{name}.out').read_text()[-2000:]}")

    def told(self, name: str) -> Path:
        return self.folder / f"{name}.told"

    def notes(self, name: str) -> list[dict[str, Any]]:
        """What the processes of a run noted; a line that is being written is left out."""
        told = self.told(name)
        return [json.loads(line) for line in told.read_text().split("\n")[:-1]] if told.exists() else []

    def loaded(self, name: str) -> int:
        """How many processes of a run have come to have their model."""
        return sum("bytes" in note for note in self.notes(name))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl without what the clock says; a line that is being written is left out."""
        path = self.folder / name / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [{key: line[key] for key in COMPARED if key in line} for line in map(json.loads, whole)]

    def checkpoints(self, name: str) -> set[str]:
        return {path.name for path in (self.folder / name / "checkpoints").glob("step-*")}

    def is_saving(self, name: str) -> bool:
        return any((self.folder / name / "checkpoints").glob(".step-*.part"))

    def adapter(self, name: str) -> bytes:
        return (self.folder / name / "adapter" / "adapter_model.safetensors").read_bytes()


def start_and_wait(bench: Bench, draw: random.Random, in_save: bool) -> subprocess.Popen:
    """A try of the run that is to be killed now: some steps on, or in a save after one that it has finished."""
    before, saved = bench.loaded("killed"), bench.checkpoints("killed")
    process, steps = bench.start("killed"), draw.randint(1, SAVES + 1)

    def far_enough() -> bool:
        if in_save:
            return bool(bench.checkpoints("killed") - saved) and bench.is_saving("killed")
        return bench.loaded("killed") > before and bench.notes("killed")[-1].get("step", 0) >= steps

    while process.poll() is None and not far_enough():
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.05 if in_save else 0.3))
    return process


def kill_again_and_again(bench: Bench, kills: int, until: float) -> list[Row]:
    """Kill a run `kills` times, half of them inside a save, and compare what it comes to with the straight run."""
    straight = bench.start("straight")  # beside the others: what shares a GPU computes no other numbers
    draw, done, inside = random.Random(0), 0, 0
    began = time.time()
    for number in range(kills):
        if time.time() + 3 * (time.time() - began) / max(1, done) > until and done:
            break  # what is left is needed for the last try and the control
        process = start_and_wait(bench, draw, in_save=number % 2 == 1)
        inside += bench.is_saving("killed")
        process.kill()
        if process.wait() == 0:
            print(f"kill {number + 1} came too late: the run was over", flush=True)
            break
        done += 1
    subprocess.run(["cp", "-r", bench.folder / "killed", bench.folder / "control"], check=True)
    control = bench.start("control", forgetful=True)
    bench.end("killed", bench.start("killed"))
    bench.end("control", control)
    bench.end("straight", straight)

    same = bench.lines("killed") == bench.lines("straight") and bench.adapter("killed") == bench.adapter("straight")
    digests = [note["frozen"] for name in ("straight", "killed") for note in bench.notes(name) if "frozen" in note]
    size = next(note["bytes"] for note in bench.notes("straight") if "bytes" in note)
    differs = bench.lines("control") != bench.lines("straight")
    return [
        Row("kill -9, losses and adapter equal", done, done if same else 0, f"{inside} with a save half written"),
        Row(
            "frozen bytes equal", len(digests), digests.count(digests[0]), f"{size / 1e9:.3g} GB at each start and end"
        ),
        Row("control: moments forgotten, must differ", 1, int(differs)),
    ]


def hold_memory(bench: Bench, steps: int) -> list[Row]:
    """Memory's slope over a long run of a small model, past its first fifth."""
    bench.end("long", bench.start("long", f"train.max_steps={steps}", "eval.every_steps=50", "save.every_steps=20"))
    notes = [note for note in bench.notes("long") if note.get("step", 0) > steps / 5]
    rows = []
    for where in ("gpu", "host"):
        growth = slope([note["step"] for note in notes], [note[where] / 1e6 for note in notes]) * 100
        fine = growth < MOST_GROWTH
        rows.append(Row(f"memory of {where}, {steps} steps", 1, int(fine), f"{growth:+.3f} MB in 100 steps"))
    leak = slope([note["step"] for note in notes], [(note["host"] + 2e4 * note["step"]) / 1e6 for note in notes]) * 100
    rows.append(Row("control: 20 kB a step, must be seen", 1, int(leak > MOST_GROWTH), f"{leak:+.3f} MB in 100 steps"))
    return rows


def slope(x: list[float], y: list[float]) -> float:
    """Of the line with the least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def make_bench(folder: Path, size: str, layers: int, **recipe: Any) -> Bench:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from shapes import write_full_rows

    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "shapes.py"), str(folder / "base"), "--size", size]
    subprocess.run([*command, "--layers", str(layers)], check=True)  # in a process that gives the GPU back
    write_full_rows(folder / "rows.jsonl", recipe["length"], 60)
    text = RECIPE.format(base=folder / "base", rows=folder / "rows.jsonl", saves=SAVES, **recipe)
    (folder / "recipe.toml").write_text(text)
    return Bench(folder, folder / "recipe.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new; takes the weights and the runs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--long", type=int, default=1000, help="steps of the small model; 0: leave it out")
    parser.add_argument("--seconds", type=float, default=560)
    options = parser.parse_args()
    began = time.time()
    dtype = "float32" if options.tiny else "bfloat16"
    rows = []
    if options.long:
        small = make_bench(options.folder / "small", "tiny", 0, dtype=dtype, length=64, steps=10)
        rows += hold_memory(small, options.long)
        show(rows)
    size, layers, length = ("tiny", 0, 64) if options.tiny else ("8b", options.layers, 1024)
    large = make_bench(options.folder / "large", size, layers, dtype=dtype, length=length, steps=options.steps)
    more = kill_again_and_again(large, options.kills, began + options.seconds)
    show(more)
    rows += more
    seconds = round(time.time() - began, 1)
    print(json.dumps({"rows": [vars(row) for row in rows], "layers": layers, "tiny": options.tiny, "seconds": seconds}))
    sys.exit(any(row.survived < row.injected for row in rows))


def show(rows: list[Row]) -> None:
    for row in rows:
        failed = row.injected - row.survived
        print(f"{row.name:42} {row.injected:4} {row.survived:4} {failed:4}   {row.note}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WATCHED]:
        watched(Path(sys.argv[2]), bool(sys.argv[3]), sys.argv[4:])
    else:
        main()
