"""Measurements of minitune, one after the other in this process; run.py starts it.

    python benchmarks/measure.py PLAN.json

PLAN.json is a list: {recipe: a TOML file, out: where the result goes, steps, random: a size whose weights are drawn on
the device in place of being read, profile: where a step's GPU time by kernel goes, or null}.

A run is `train` as a user starts it, left after so many steps. Steps are timed on the GPU's clock, from the start of
one to the start of the next, so whatever lies between them counts, and looking at the clock makes nothing wait.
"""

import contextlib
import gc
import itertools
import json
import re
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
from clock import product_rate
from shapes import random_tensors

from minitune import build, files, train
from minitune.config import load_config
from minitune.kernels.launch import triton
from minitune.log import versions
from minitune.nf4 import NF4Linear
from minitune.pretrained import base_leaves

WARM_UP = 3  # steps that are not counted
CUDA = torch.cuda.is_available()


class Enough(Exception):
    """All steps to be measured have been taken."""


class Recorder:
    """Takes the place of `train.take_step`, and notes when each step began and how it went."""

    def __init__(self, steps: int, profile: "Profile | None") -> None:
        self.steps, self.profile = steps, profile
        self.marks, self.losses, self.tokens, self.loss_tokens = [], [], [], []
        self.compiled_late: list[str] = []

    def __call__(self, model, optimizer, micro_batches, cfg, step):
        if step == 0 and CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        LATE[:] = [self.compiled_late] if step >= WARM_UP else []
        self.marks.append(mark())
        if step == self.steps:
            raise Enough
        self.tokens.append(sum(batch.document_tokens for batch in micro_batches))
        self.loss_tokens.append(sum(batch.loss_tokens for batch in micro_batches))
        last = self.profile if step == self.steps - 1 and self.profile else contextlib.nullcontext()
        with last:
            outcome = REAL_STEP(model, optimizer, micro_batches, cfg, step)
        self.losses.append(outcome[0].detach())
        return outcome

    def seconds(self) -> list[float]:
        """Of each step."""
        wait()
        if CUDA:
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.marks)]
        return [b - a for a, b in itertools.pairwise(self.marks)]


REAL_STEP = train.take_step
LATE: list[list[str]] = []  # where compilations are noted, while they are late


def watch_compilers() -> None:
    """Note, while LATE says where, everything that torch.compile or Triton compiles."""
    import torch._dynamo.convert_frame as frames

    compile_frame = getattr(frames, "_compile", None)
    if compile_frame is not None:

        def noting(*given, **named):
            for place in LATE:
                place.append("torch.compile")
            return compile_frame(*given, **named)

        frames._compile = noting
    if triton is not None and hasattr(triton.knobs.runtime, "jit_post_compile_hook"):
        triton.knobs.runtime.jit_post_compile_hook = lambda **told: [
            place.append(str(told.get("repr", "a kernel"))[:100]) for place in LATE
        ]


class Profile:
    """One step under PyTorch's profiler: GPU time by kernel (CPU time by operation where there is no GPU)."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self):
        wait()
        self.profiler = torch.profiler.profile()
        self.profiler.__enter__()

    def __exit__(self, *error):
        wait()
        self.profiler.__exit__(*error)
        kernels: dict[str, list[float]] = {}
        for event in self.profiler.events():
            if not CUDA:
                kernels.setdefault(event.name, []).append(event.self_cpu_time_total / 1e3)
            elif event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer.step"):
                kernels.setdefault(event.name, []).append(event.device_time_total / 1e3)
        rows = [{"kernel": k, "calls": len(t), "ms": sum(t)} for k, t in kernels.items()]
        self.out.write_text(json.dumps(sorted(rows, key=lambda row: -row["ms"]), indent=1))


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def mark():
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@torch.no_grad()
def draw_base(model, folder) -> None:
    """In the place of `pretrained.load_base`: the weights that `shapes.write_model` would have written."""
    leaves = base_leaves(model)
    for name, tensor in random_tensors(folder):
        module, attribute = leaves[name]
        if isinstance(module, NF4Linear):
            module.quantize(tensor)
        else:
            getattr(module, attribute).copy_(tensor)


def measure(task: dict) -> dict:
    begun, said = time.time(), []
    weights = build.pretrained
    real = train.say, weights.load_base, weights.check_weights, weights.fingerprint
    train.say = lambda line: (said.append(line), real[0](line))
    if task["random"]:
        weights.load_base = draw_base
        weights.check_weights = lambda model, folder: None  # there are none in the folder
        weights.fingerprint = lambda base: {"the base": f"random weights, {task['random']}"}
    profile = Profile(Path(task["profile"])) if task.get("profile") else None
    train.take_step = recorder = Recorder(task["steps"], profile)
    try:
        with contextlib.suppress(Enough):
            train.train(load_config([task["recipe"]]))
    finally:
        train.take_step = REAL_STEP
        train.say, weights.load_base, weights.check_weights, weights.fingerprint = real
    seconds = recorder.seconds()
    timed = seconds[WARM_UP : -1 if profile else None]
    median = statistics.median(timed)
    per_step = statistics.mean(recorder.tokens[WARM_UP:])
    learned = sum(recorder.loss_tokens[WARM_UP:]) / sum(recorder.tokens[WARM_UP:])
    promised = re.search(r"about ([\d.]+) GB", " ".join(said))
    return {
        "tokens_per_second": per_step / median,
        "loss_tokens_per_second": learned * per_step / median,
        "step_seconds": {"median": median, "least": min(timed), "most": max(timed), "steps": len(timed)},
        "first_step_seconds": seconds[0],
        "compiled_after_warm_up": recorder.compiled_late,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if CUDA else 0.0,
        "planned_gb": float(promised.group(1)) if promised else None,
        "made_of": next((line for line in said if "parameters train" in line), ""),
        "losses": [loss.item() for loss in recorder.losses],
        "final_loss": recorder.losses[-1].item(),
        "run_seconds": time.time() - begun,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": versions(),
    }


def main() -> None:
    watch_compilers()
    rate = None
    for task in json.loads(Path(sys.argv[1]).read_text()):
        try:
            found = measure(task)
        except Exception:  # the next one may do better
            found = {"failed": traceback.format_exc()[-1500:]}
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            rate = product_rate()  # now, as warm as the run left the card
            found["left_behind_gb"] = torch.cuda.memory_allocated() / 1e9
            found["product_tflops"] = rate / 1e12
        files.write_json(Path(task["out"]), found)  # whole or absent, since run.py looks for it meanwhile


if __name__ == "__main__":
    main()
