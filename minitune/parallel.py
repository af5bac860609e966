"""Everything that knows devices and ranks, and what is done to whole blocks of the model."""

import os
import sys
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitune.errors import UserError
from minitune.log import say


def start(deterministic: bool) -> torch.device:
    """The device of this process, with PyTorch set up for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this version trains in one process; start it with python in place of torchrun")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # freed memory is whole again
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


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
