"""Everything that knows devices and ranks, and what is done to whole blocks of the model.

A run on many GPUs is one process for each, all of the same program; a process's number is its rank. Started by
torchrun or Ray Train (`launch.py`), they ask here what they need to know of each other: who is first, what a number is
over all of them, what the first one found out. On one process every question has its plain answer, and no process
group exists. The first process alone writes files and speaks; `watch.py` ends a job in which one of them hangs, and
`sharding.py` spreads a model over their memory.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitune import launch, watch
from minitune.errors import RunFailed, UserError
from minitune.log import say

BUCKET = 2**25  # numbers that are summed over the ranks at once
CONNECT = 300  # seconds in which all processes of a run find each other
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
        limit = timedelta(seconds=timeout_seconds + 10)
        dist.init_process_group(
            backend, store=fresh_store(place), rank=place.rank, world_size=place.world, timeout=limit
        )
    with quiet_unless_first(), watch.over(store(), rank(), place.world, timeout_seconds):
        yield device
    if started_here:
        dist.destroy_process_group()


def fresh_store(place: launch.Place) -> dist.Store:
    """The keys and values of this start.

    Those of torchrun's agent outlive a restart, and the new processes would read where the old ones were and why they
    failed. So the first process opens a store of its own, and the agent's only says where; what it still says of the
    last one leads nowhere, since that process is gone.
    """
    given, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=timedelta(seconds=CONNECT)))
    if not launch.store_outlives_processes():
        return given
    if place.rank == 0:
        own = dist.TCPStore(launch.address(), 0, None, is_master=True, wait_for_workers=False)
        given.set("minitune/port", str(own.port))
        return own
    until = time.monotonic() + CONNECT
    while True:
        given.wait(["minitune/port"], timedelta(seconds=CONNECT))
        port = int(given.get("minitune/port"))
        try:
            return dist.TCPStore(launch.address(), port, None, is_master=False, timeout=timedelta(seconds=2))
        except dist.DistError:
            if time.monotonic() > until:
                raise
            time.sleep(POLL)


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
    dist.all_gather(numbers, torch.tensor([int(number)]))
    return [int(n) for n in numbers]


def highest(number: int) -> int:
    """The largest of a whole number over all ranks."""
    return max(each(number))


def turn(number: int) -> int:
    """The place of this rank's micro-batch `number` among those of all ranks: rows are dealt to them in turn."""
    return number * world() + rank()


questions = itertools.count()  # that the processes have told each other the answer to; the same on all ranks


def of_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns on the first process, as JSON, on all; the others wait, however long it takes.

    A UserError or RunFailed that it raises there is raised on all.
    """
    return make() if world() == 1 else of_some(make, rank(), [0])


def of_some(make: Callable[[], Any], mine: int, makers: list[int]) -> Any:
    """`make()` on the ranks `makers`, while the others wait; what it returns on the first of them, on all.

    It is rank `mine` that asks.
    """
    asked = next(questions)
    with watch.patience():
        if mine in makers:
            kind, value = "", None
            try:
                value = make()
            except (UserError, RunFailed) as error:
                kind, value = type(error).__name__, str(error)
            store().set(f"told/{asked}/{mine}", json.dumps([kind, value]))
        keys = [f"told/{asked}/{maker}" for maker in makers]
        while not store().check(keys):
            time.sleep(POLL)
        told = [json.loads(store().get(key)) for key in keys]
    for kind, value in told:
        if kind:
            raise {"UserError": UserError, "RunFailed": RunFailed}[kind](value)
    return told[0][1]


def on_first(do: Callable[[], Any]) -> None:
    """Let the first process do something while the others wait, such as write a file that all will read."""
    of_first(lambda: (do(), None)[1])


def first_in(enter: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    """A context that the first process alone is in; what goes wrong on the way in is raised on all."""
    stack = ExitStack()
    on_first(lambda: stack.enter_context(enter()))
    return stack


def by_first(items: Iterator[Any], write: Callable[[Iterator[Any]], None]) -> None:
    """Let the first process write items that all make together, such as whole tensors of their parts."""
    with watch.patience():
        if is_first():
            write(items)
        else:
            for _ in items:
                pass
    on_first(lambda: None)  # nobody goes on before it is written


def machine_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns, on each machine made by one process before the others, which then find on its disk what
    that one left there: a download, tokenised data."""
    if world() == 1:
        return make()
    made = []
    first_here = launch.place().local_rank == 0
    leads = [r for r, first in enumerate(each(first_here)) if first]
    for makers in (leads, [r for r in range(world()) if r not in leads]):
        of_some(lambda: made.append(make()), rank(), makers)
    return made[0]


def check_same(what: str, digest: str) -> None:
    """Refuse a run whose processes see different things."""
    if total(digest != of_first(lambda: digest)):
        raise UserError(f"{what} are not the same on all machines; give them the same files")


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
    """A forward pass compiled at its first call with its backward pass, or plain from the first failure on.

    Left to itself, PyTorch compiles a backward pass when it is first needed, where nothing could go back to plain.
    """

    failed = False  # for all blocks at once

    def __init__(self, forward) -> None:
        self.plain, self.compiled = forward, torch.compile(forward)

    def __call__(self, *inputs):
        if not CompiledForward.failed:
            try:
                with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                    return self.compiled(*inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                CompiledForward.failed = True
                cause = getattr(error, "inner_exception", error)  # of a backend that failed, what it said
                reason = (str(cause).strip().splitlines() or [""])[0]
                say(f"blocks are not compiled after all, and run slower ({type(cause).__name__}: {reason})")
        return self.plain(*inputs)


@torch.no_grad()
def materialize(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give the own parameters of these modules memory on `device`, and buffers that have none; unfilled. Shared
    parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB (1e9 bytes): allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU has left for this process; on a CPU, this process' share of what the machine has in all."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    here = launch.place().local_world if world() > 1 else 1
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here
