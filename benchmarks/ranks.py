"""What a rank of many holds and computes, on one GPU: the other ranks are not there, and what they would send is void.

    python benchmarks/ranks.py --out benchmarks/results/GPU-DATE-ranks.json [--case CASE ...] [--card GIB]
    torchrun --nproc-per-node 8 benchmarks/ranks.py --real --out ...          # the same cases on 8 GPUs, over NCCL

Memory and compute are those of a rank: the model is spread, gathered, computed and its gradients reduced as always, but
a fake process group returns at once and moves nothing. So losses mean nothing here, and nothing is seen of bandwidth,
nor of how far it hides behind compute: only `--real` on as many GPUs shows these. Weights are unset (zeros).

`--card 79.1` leaves a larger GPU no more memory than an 80 GB one has, so that what is said to fit there has to, and
what is paged has to move.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import shapes
import torch
import torch.distributed as dist

from minitune import adapters, build, files, launch, log, optim, parallel, sharding
from minitune.config import load_config
from minitune.data.packing import Batch, Corpus, collate
from minitune.step import take_step

CONTEXT = 1.0  # GiB of a card that CUDA and NCCL take for themselves
CASES: dict[str, tuple[str, int, list[str]]] = {  # size, ranks, what the recipe says besides
    "70b-qlora-1": ("70b", 1, ["method=qlora"]),
    "70b-qlora-full-8": ("70b", 8, ["method=qlora", "parallel.sharding=full"]),
    "70b-qlora-full-64": ("70b", 64, ["method=qlora", "parallel.sharding=full"]),
    "70b-lora-full-2": ("70b", 2, ["method=lora", "parallel.sharding=full", "optim.name=paged_adamw_32bit"]),
    "70b-lora-full-8": ("70b", 8, ["method=lora", "parallel.sharding=full"]),
    "70b-lora-full-64": ("70b", 64, ["method=lora", "parallel.sharding=full"]),
    "70b-full-full-8": ("70b", 8, ["method=full", "parallel.sharding=full", "optim.name=paged_adamw_32bit"]),
    "70b-full-full-16": ("70b", 16, ["method=full", "parallel.sharding=full", "optim.name=paged_adamw_32bit"]),
    "8b-lora-full-2": ("8b", 2, ["method=lora", "parallel.sharding=full"]),
    "8b-qlora-full-2": ("8b", 2, ["method=qlora", "parallel.sharding=full"]),
    "8b-lora-full-8": ("8b", 8, ["method=lora", "parallel.sharding=full"]),
    "8b-qlora-full-8": ("8b", 8, ["method=qlora", "parallel.sharding=full"]),
    "8b-lora-replicate-4": ("8b", 4, ["method=lora", "parallel.sharding=replicate"]),
    "8b-qlora-replicate-8": ("8b", 8, ["method=qlora", "parallel.sharding=replicate"]),
    "8b-lora-replicate-8": ("8b", 8, ["method=lora", "parallel.sharding=replicate"]),
    "tiny-qlora-full-2": ("tiny", 2, ["method=qlora", "parallel.sharding=full", "model.dtype=float32"]),
    "tiny-qlora-full-8": ("tiny", 8, ["method=qlora", "parallel.sharding=full", "model.dtype=float32"]),
    "tiny-full-full-64": ("tiny", 64, ["method=full", "parallel.sharding=full", "model.dtype=float32"]),
    "tiny-lora-replicate-8": ("tiny", 8, ["method=lora", "parallel.sharding=replicate", "model.dtype=float32"]),
}


def measure(name: str, tokens: int, steps: int, real: bool, card: float) -> dict[str, Any]:
    """Build and step a case; what a row of the results holds."""
    size, ranks, keys = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        shapes.write_model(Path(folder, "model"), size, weights=False)
        recipe = Path(folder, "recipe.toml")
        recipe.write_text("")
        common = [f"model.path={folder}/model", f"data.max_seq_len={tokens}", "train.batch_size=1"]
        cfg = load_config([str(recipe), *common, "train.gradient_accumulation_steps=1", *keys])
        cfg = replace(cfg, lora=replace(cfg.lora, dropout=0.0))
        if ranks > 1 and not real:
            pretend(ranks)
        device = this_device()
        build.pretrained.check_weights = lambda model, folder: None  # a shape alone has none
        try:
            model, made_of = build.compose(cfg, Path(folder, "model"), device)
            zeros(model, device)
            check_seconds = time_of_check(model, device) if real and sharding.is_sharded(model) else None
            adapters.reset(model, cfg.seed)
            optimizer, _ = optim.make_optimizer(model, replace(cfg.optim, learning_rate=1e-5))
            batch = rows(tokens).to(device)
            seconds, updates = [], time_updates(optimizer)
            for step in range(steps):
                since = time.perf_counter()
                take_step(model, optimizer, [batch], cfg, step)
                wait()
                seconds.append(time.perf_counter() - since)
            reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
            retries = torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0
            planned = float(made_of.rpartition("about ")[2].removesuffix(" GB"))
            return {
                "case": name,
                "system": "minitune",
                "method": cfg.method,
                "ranks": parallel.world(),
                "communication": "real" if real else "void",
                "sharding": cfg.parallel.sharding,
                "card_gib": card or None,
                "made_of": made_of,
                "tokens_per_second": round(tokens / statistics.median(seconds[len(seconds) // 2 :]), 1),
                "update_seconds": round(statistics.median(updates[len(updates) // 2 :]), 3),
                "peak_allocated_gb": round(parallel.memory_gb(device), 2),
                "peak_reserved_gb": round(reserved / 1e9, 2),
                "allocator_retries": retries,
                "planned_gb": planned,
                "check_seconds": check_seconds,
                "final_loss": None,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "versions": log.versions(),
                "command": f"python benchmarks/ranks.py --case {name} --tokens {tokens} --steps {steps}"
                + (f" --card {card:g}" if card else ""),
            }
        finally:
            if ranks > 1 and not real:
                dist.destroy_process_group()


def this_device() -> torch.device:
    return torch.device("cuda", launch.place().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def confine(device: torch.device, card: float) -> None:
    """Hold so much of a GPU's memory, past PyTorch's reach, that it is as small as one of so many GiB."""
    import ctypes

    rest = torch.cuda.mem_get_info(device)[0] - int((card - CONTEXT) * 2**30)
    pointer = ctypes.c_uint64()
    code = ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(rest))
    if code:
        raise SystemExit(f"--card {card}: the GPU does not give {rest / 1e9:.1f} GB away (CUDA error {code})")


def time_updates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The seconds of each update from now on, as the optimizer takes them."""
    real, found = optimizer.step, []

    def step(*arguments: Any) -> None:
        wait()
        since = time.perf_counter()
        real(*arguments)
        wait()
        found.append(time.perf_counter() - since)

    optimizer.step = step
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pretend(ranks: int) -> None:
    """Be the first of so many ranks, of whom none else is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(min(ranks, 8))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    parallel.each = lambda number: [int(number)] * ranks  # which would wait for what they say


@torch.no_grad()
def zeros(model: torch.nn.Module, device: torch.device) -> None:
    """Memory for a model, as `build.fill` makes it, with nothing in it."""
    for layer in model.layers:
        parallel.materialize(layer.modules(), device)
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    parallel.materialize((m for m in model.modules() if id(m) not in inside), device)
    for parameter in model.parameters():
        sharding.local(parameter).zero_()
    if sharding.is_sharded(model):  # as `sharding.check` does, whose sums need the other ranks
        with torch.compiler.set_stance("force_eager"):
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))


def time_of_check(model: torch.nn.Module, device: torch.device) -> float:
    """Of the comparison that a run starts with, of what is gathered with what the ranks hold; kernels are there."""
    since = time.perf_counter()
    sharding.check(model, device)  # which waits for the digests
    return round(time.perf_counter() - since, 3)


def rows(tokens: int) -> Batch:
    """One full row, all of it learned."""
    return collate(Corpus.from_documents([([7] * tokens, [True] * tokens)]), [[0]], tokens, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=CASES, help="all but the tiny ones, if none is named")
    parser.add_argument("--tokens", type=int, default=2048, help="in the one row of a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--card", type=float, default=0, help="GiB that each GPU is to have; 0: all it has")
    parser.add_argument("--real", action="store_true", help="over as many GPUs as torchrun started processes for")
    options = parser.parse_args()
    cases = options.case or [name for name in CASES if not name.startswith("tiny")]
    if options.real:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        cases = [name for name in cases if CASES[name][1] == ranks]
        if not cases:
            parser.error(f"no case is of {ranks} ranks; start torchrun with as many processes as a case has")
    if options.card and not torch.cuda.is_available():
        parser.error("--card is for a GPU")

    def run() -> None:
        found = []
        if options.card:
            confine(this_device(), options.card)
        for name in cases:
            gc.collect()  # the last model, which its hooks hold
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found.append(measure(name, options.tokens, options.steps, options.real, options.card))
            log.say(f"{name}: {found[-1]['peak_allocated_gb']} GB, planned {found[-1]['planned_gb']}")
            if parallel.is_first():
                files.write_text(options.out, json.dumps(found, indent=1) + "\n")

    with parallel.processes(False, 600):  # one, unless they are real
        run()


if __name__ == "__main__":
    main()
