"""One measurement of minitune, in a process of its own; run.py starts it and reads the JSON it writes.

    python benchmarks/measure.py RECIPE.toml OUT.json --steps 12 [--profile]

The run is `train` as a user starts it. Steps are timed on the GPU's clock, from the start of one to the start of the
next, so whatever lies between them counts, and looking at the clock makes nothing wait.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from shapes import random_tensors

from minitune import build, train
from minitune.config import load_config
from minitune.log import versions
from minitune.nf4 import NF4Linear
from minitune.pretrained import base_leaves

WARM_UP = 3  # steps that are not counted


class Enough(Exception):
    """All steps to be measured have been taken."""


class Recorder:
    """Takes the place of `train.take_step`, and notes when each step began and how it went."""

    def __init__(self, steps: int, profiled: "Profile | None") -> None:
        self.steps, self.profiled = steps, profiled
        self.real = train.take_step
        self.marks, self.losses, self.tokens, self.loss_tokens = [], [], [], []
        self.compiled_late: list[str] = []
        self.micro_batches = 1

    def __call__(self, model, optimizer, micro_batches, cfg, step):
        if step == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if step == WARM_UP:
            watch_compilers(self.compiled_late)
        self.marks.append(mark())
        if step == self.steps:
            raise Enough
        self.micro_batches = len(micro_batches)
        self.tokens.append(sum(batch.document_tokens for batch in micro_batches))
        self.loss_tokens.append(sum(batch.loss_tokens for batch in micro_batches))
        if self.profiled and step == self.steps - 1:
            with self.profiled:
                outcome = self.real(model, optimizer, micro_batches, cfg, step)
        else:
            outcome = self.real(model, optimizer, micro_batches, cfg, step)
        self.losses.append(outcome[0].detach())
        return outcome

    def seconds(self) -> list[float]:
        """Of each step."""
        wait()
        if torch.cuda.is_available():
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.marks)]
        return [b - a for a, b in itertools.pairwise(self.marks)]


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
            if not torch.cuda.is_available():
                kernels.setdefault(event.name, []).append(event.self_cpu_time_total / 1e3)
            elif event.device_type == torch.autograd.DeviceType.CUDA:
                kernels.setdefault(event.name, []).append(event.device_time_total / 1e3)
        rows = [{"kernel": k, "calls": len(t), "ms": sum(t)} for k, t in kernels.items()]
        self.out.write_text(json.dumps(sorted(rows, key=lambda row: -row["ms"]), indent=1))


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark():
    if not torch.cuda.is_available():
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


def product_tflops() -> float:
    """What the GPU reaches on the largest product of an 8B block, 8192 x 4096 x 14336 in bf16, after a warm-up."""
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((8192, 4096), (14336, 4096)))
    times = []
    for _ in range(60):
        begin = mark()
        a @ b.T
        end = mark()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * 8192 * 4096 * 14336 / statistics.median(times[20:]) / 1e12


def watch_compilers(seen: list[str]) -> None:
    """Note in `seen` everything that is compiled from now on, by torch.compile or Triton."""
    import torch._dynamo.convert_frame as frames

    real = frames.compile_frame if hasattr(frames, "compile_frame") else None
    if real:
        frames.compile_frame = lambda *a, **k: (seen.append("torch.compile"), real(*a, **k))[1]
    from minitune.kernels.launch import triton

    if triton is not None and hasattr(triton.knobs.runtime, "jit_post_compile_hook"):
        triton.knobs.runtime.jit_post_compile_hook = lambda **k: seen.append(str(k.get("key"))[:80])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--random", metavar="SIZE", help="draw the base's weights on the device, as shapes.py does")
    parser.add_argument("--profile", type=Path, help="also write a step's GPU time by kernel here")
    options = parser.parse_args()
    if options.random:
        build.pretrained.load_base = draw_base
        train.pretrained.fingerprint = lambda base: {"the base": f"random weights, {options.random}"}

    train.take_step = recorder = Recorder(options.steps, Profile(options.profile) if options.profile else None)
    begun = time.time()
    with contextlib.suppress(Enough):
        train.train(load_config([str(options.recipe)]))
    seconds = recorder.seconds()
    timed = seconds[WARM_UP : -1 if options.profile else None]
    cuda = torch.cuda.is_available()
    median = statistics.median(timed)
    found = {
        "tokens_per_second": recorder.tokens[-1] / median,
        "loss_tokens_per_second": sum(recorder.loss_tokens[WARM_UP:]) / sum(recorder.tokens[WARM_UP:])
        * (recorder.tokens[-1] / median),
        "step_seconds": {"median": median, "least": min(timed), "most": max(timed), "steps": len(timed)},
        "first_step_seconds": seconds[0],
        "compiled_after_warm_up": recorder.compiled_late,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else 0.0,
        **({"product_tflops": product_tflops()} if cuda else {}),
        "losses": [loss.item() for loss in recorder.losses],
        "final_loss": recorder.losses[-1].item(),
        "run_seconds": time.time() - begun,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": versions(),
    }  # fmt: skip
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
