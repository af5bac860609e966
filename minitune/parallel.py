"""Everything that knows devices and ranks, and what is done to whole blocks of the model.

A run on many GPUs is one process for each, all of the same program; a process's number is its rank. Started by
torchrun or Ray Train (`launch.py`), they ask here what they need to know of each other: who is first, what a number is
over all of them, what the first one found out. On one process every question has its plain answer, and no process
group exists. The first process alone writes files and speaks; `watch.py` ends a job in which one of them hangs, and
`sharding.py` spreads a model over their memory.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitune import launch, watch
from minitune.errors import Interrupted, RunFailed, UserError
from minitune.log import say

BUCKET = 2**25  # numbers that are summed over the ranks at once
POLL = 0.05  # seconds between two looks at what the first process has written down


# ---- the processes of a run ----------------------------------------------------------------------------------------


@contextmanager
def processes(deterministic: bool, timeout_seconds: float) -> Iterator[torch.device]:
    """Within the block this process is one of its run's, and has a device, with PyTorch set up for it.

    Without a launcher it is the only one. If another one fails, or does not move for `timeout_seconds`, all of them
    end, and the reason names it.
    """
    place = launch.place()
    launch.check(place, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # freed memory is whole again
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if place.world == 1:
        yield device
        return

    if device.type == "cuda":
        torch.cuda.set_device(device)
    started_here = not dist.is_initialized()  # Ray Train has done it already
    if started_here:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # The watch speaks first and names who hangs; the backend's own limit is there if it cannot.
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds + 10))
    with quiet_unless_first(), watch.over(store(), rank(), place.world, timeout_seconds) as watcher:
        try:
            yield device
        except BaseException as error:
            if not isinstance(error, UserError | Interrupted):  # these are raised on all ranks alike
                watcher.explain(error)
            raise
    if started_here:
        dist.destroy_process_group()


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """What the other processes say to the person watching goes nowhere: all say the same. Errors are still shown."""
    if is_first():
        yield
        return
    before = sys.stdout
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        try:
            yield
        finally:
            sys.stdout = before


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def store() -> dist.Store:
    """A few keys and values that all processes see; it outlives each of them, but not the job."""
    return dist.distributed_c10d._get_default_store()


# ---- questions, each with one answer on all ranks ------------------------------------------------------------------


def total(number: int) -> int:
    """The sum of a whole number over all ranks. Waits for the others, not for a GPU."""
    return sum(each(number))


def each(number: int) -> list[int]:
    """A whole number of every rank."""
    if world() == 1:
        return [number]
    numbers = [torch.empty(1, dtype=torch.int64) for _ in range(world())]
    watch.beat()
    dist.all_gather(numbers, torch.tensor([number]))
    return [int(n) for n in numbers]


def turn(number: int) -> int:
    """The place of this rank's micro-batch `number` among those of all ranks: rows are dealt to them in turn."""
    return number * world() + rank()


asked = 0  # how often the first process has been asked; the same on all ranks


def of_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns on the first process, as JSON, on all; the others wait, however long it takes.

    A UserError or RunFailed that it raises there is raised on all.
    """
    if world() == 1:
        return make()
    global asked
    asked += 1
    key = f"first/{asked}"
    with watch.patience():
        if is_first():
            kind, value = "value", None
            try:
                value = make()
            except (UserError, RunFailed) as error:
                kind, value = type(error).__name__, str(error)
            store().set(key, json.dumps([kind, value]))
            if kind == "value":
                return json.loads(json.dumps(value))
        while not store().check([key]):
            time.sleep(POLL)
        kind, value = json.loads(store().get(key))
    if kind != "value":
        raise {"UserError": UserError, "RunFailed": RunFailed}[kind](value)
    return value


def on_first(do: Callable[[], Any]) -> None:
    """Let the first process do something while the others wait, such as write a file that all will read."""
    of_first(lambda: do() and None)


def sum_over_ranks(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors by their sums over the ranks, in fp32 or wider, a few large messages in place of many."""
    if world() == 1:
        return
    for some in in_buckets(tensors):
        watch.beat()
        widest = torch.float64 if any(t.dtype == torch.float64 for t in some) else torch.float32
        flat = torch.cat([t.reshape(-1).to(widest) for t in some])
        dist.all_reduce(flat, group=group)
        parts = flat.split([t.numel() for t in some])
        torch._foreach_copy_(some, [part.view_as(t) for part, t in zip(parts, some, strict=True)])


def in_buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


# ---- blocks and devices --------------------------------------------------------------------------------------------


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's input in the forward pass and compute the block again in the backward pass.

    Training deep nets with sublinear memory cost, https://arxiv.org/abs/1604.06174. Dropout draws the same numbers
    both times; parameter names do not change.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block; blocks are equal, so the first one's code serves all. Where that fails, the blocks run as
    they are, and a line says so."""
    for block in model.layers:
        block.forward = CompiledForward(block.forward)


class CompiledForward:
    """A forward pass compiled at its first call, or plain from the first failure on."""

    failed = False  # for all blocks at once

    def __init__(self, forward) -> None:
        self.plain, self.compiled = forward, torch.compile(forward)

    def __call__(self, *inputs):
        if not CompiledForward.failed:
            try:
                return self.compiled(*inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                CompiledForward.failed = True
                reason = str(error).strip().splitlines()[0]
                say(f"blocks are not compiled after all, and run slower ({type(error).__name__}: {reason})")
        return self.plain(*inputs)


@torch.no_grad()
def materialize(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give the own parameters of these modules memory on `device`, unfilled; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB (1e9 bytes): allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU has left for this process; on a CPU, what the machine has in all."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
