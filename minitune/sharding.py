"""A model spread over the memory of several ranks, by FSDP2, https://arxiv.org/abs/2304.11277.

Of each matrix a rank keeps some rows, and before a decoder block computes, the ranks gather the rows of that block,
the next block's already on their way; afterwards they are dropped again. What trains as an adapter is small and stays
whole on every rank, as under `replicate`; where all weights train, a rank updates its own rows.

NF4 weights are bytes, gathered as they are. Nothing is cast on the way, and gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minitune import launch, nf4, parallel, watch
from minitune.errors import RunFailed, UserError
from minitune.nf4 import NF4Linear

PIECE = {"cpu": 2**18, "cuda": 2**22}  # numbers that are digested at once: as a cache holds, or few launches
BYTES_SHARD = (2, 12)  # the first PyTorch whose FSDP takes parameters that are bytes


# ---- spreading -----------------------------------------------------------------------------------------------------


def shard(model: nn.Module, how: str, device: torch.device) -> None:
    """Spread a model that is still on the meta device: over all ranks ("full"), or over those of each machine, so that
    each machine holds all of it ("hybrid"). A decoder block is one unit, and so are the embedding and the head, one
    together where they are tied."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    whole = {p for p in model.parameters() if frozen and p.requires_grad}  # adapters
    for module in model.modules():
        if isinstance(module, NF4Linear):
            whole |= {module.nested_absmax, module.nested_offset}  # 0.0002 bytes a weight, and no rows
            name_as_floats(module)
    if frozen:
        whole |= set(model.model.norm.parameters())  # a few thousand numbers, for which no head is to be gathered
    common = {
        "mesh": mesh_of(how, device),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        "ignored_params": whole,
    }
    blocks = list(model.layers)
    tied = model.config.tie_word_embeddings
    for unit in blocks if tied else [model.model.embed_tokens, *blocks]:
        fully_shard(unit, **common)
    fully_shard(model, reshard_after_forward=bool(frozen), **common)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies first
    in_turn(model, blocks, units_with_a_gradient(model, tied))
    if frozen:
        # The loss makes the gradient of the hidden states while the head is there (loss.py): to go back through it no
        # head is needed, unless it was called as a module.
        model.loss.register_forward_pre_hook(lambda *_: model.set_unshard_in_backward(False))
        model.lm_head.register_forward_pre_hook(lambda *_: model.set_unshard_in_backward(True))
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: watch.beat())
    model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else model.reshard())


def units_with_a_gradient(model: nn.Module, tied: bool) -> list[nn.Module]:
    """Those that a backward pass comes to, in the order of the forward pass: from the first in which something trains
    on. What is below gets no gradient."""
    units = list(model.layers) if tied else [model.model.embed_tokens, *model.layers]
    if any(p.requires_grad for p in model.model.embed_tokens.parameters()):
        return units
    trains = [any(p.requires_grad for p in unit.parameters()) for unit in units]
    return units[trains.index(True) :] if any(trains) else []


def in_turn(model: nn.Module, forward: list[nn.Module], backward: list[nn.Module]) -> None:
    """Say which unit is gathered while which computes, in both directions; units in the order of the forward pass.

    Left to itself, FSDP gathers in the backward pass what came before in a list of all forward passes, those of
    evaluations and answers too; so behind the first block it gathered one that nobody waits for. On two GPUs the next
    micro-batch then computed with wrong weights wherever the device was behind (PyTorch 2.11, five runs of five).
    """
    for unit, following in pairwise(forward):
        unit.set_modules_to_forward_prefetch([following])
    for unit, following in pairwise(backward):
        following.set_modules_to_backward_prefetch([unit])
    model.set_modules_to_backward_prefetch(backward[-1:] or [model])
    if backward:  # before the first there is nothing: it asks for itself, which is there, as no list is FSDP's own
        backward[0].set_modules_to_backward_prefetch(backward[:1])


def name_as_floats(linear: NF4Linear) -> None:
    """Where FSDP makes a parameter trainable for a moment, which bytes cannot be, call them floats of eight bits. They
    are copied and gathered as they are, and `nf4.as_bytes` gives them their name back."""
    if version_of(torch.__version__) >= BYTES_SHARD:
        return
    for name in ("packed", "absmax"):
        floats = getattr(linear, name).data.view(torch.float8_e5m2)
        setattr(linear, name, nn.Parameter(floats, requires_grad=False))


def version_of(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def ranks_a_machine() -> int:
    """Raises UserError where some machines have more than others."""
    here = launch.place().local_world if parallel.world() > 1 else 1
    if len(set(parallel.each(here))) > 1:
        raise UserError(
            "some machines have more processes than others; start torchrun with one --nproc-per-node on all"
        )
    return here


def mesh_of(how: str, device: torch.device) -> dist.DeviceMesh:
    """Along "shard" ranks hold different rows, along "replicate" (hybrid) the same."""
    if how == "full":
        return init_device_mesh(device.type, (parallel.world(),), mesh_dim_names=("shard",))
    here = ranks_a_machine()
    return init_device_mesh(device.type, (parallel.world() // here, here), mesh_dim_names=("replicate", "shard"))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def is_spread(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


@contextmanager
def gathered_head(model: nn.Module) -> Iterator[None]:
    """Within the block the decoder and the head may be called by themselves, as generation does."""
    if not is_sharded(model):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


# ---- rows ----------------------------------------------------------------------------------------------------------


def own_rows(parameter: Tensor) -> slice:
    """Which rows of a parameter are this rank's: all, if it is whole."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    return rows_of(parameter, parameter.device_mesh.get_local_rank("shard"))


def rows_of(parameter: DTensor, rank: int) -> slice:
    """As `torch.chunk` cuts: equal shares, rounded up, until nothing is left."""
    rows, share = parameter.shape[0], -(-parameter.shape[0] // parameter.device_mesh["shard"].size())
    return slice(min(rows, rank * share), min(rows, (rank + 1) * share))


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, the memory itself."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data


@torch.no_grad()
def put_rows(parameter: Tensor, rows: Tensor) -> None:
    local(parameter).copy_(rows)


@torch.no_grad()
def quantize_rows(linear: NF4Linear, rows: Tensor) -> None:
    """Fill four-bit storage of which each rank holds some rows from these rows (n, in) of the dense weight.

    The scales are quantized by the mean of all of them, so the ranks gather them first: a sixteenth of a byte a
    weight. What comes out is byte for byte what one process would store.
    """
    device = linear.nested_offset.device
    scales = torch.empty(0, device=device)
    if len(rows):
        packed, scales = nf4.quantized(rows.to(device, linear.dtype).contiguous())
        nf4.as_bytes(local(linear.packed)).copy_(packed.view_as(local(linear.packed)))
    absmax, nested_absmax, offset = nf4.nested(gathered(linear.absmax, scales.flatten()))
    nf4.as_bytes(local(linear.absmax)).copy_(absmax.view(linear.absmax.shape)[own_rows(linear.absmax)])
    linear.nested_absmax.copy_(nested_absmax)
    linear.nested_offset.copy_(offset)
    linear.storage()  # makes its constant


def gathered(like: DTensor, part: Tensor) -> Tensor:
    """All ranks' parts, end to end, of something flat that goes along with the rows of `like`: as many numbers a row,
    or one for so many numbers."""
    group, ranks = like.device_mesh.get_group("shard"), like.device_mesh["shard"].size()
    watch.beat()
    longest = torch.tensor([part.numel()], device=part.device)
    lengths = [torch.empty_like(longest) for _ in range(ranks)]
    dist.all_gather(lengths, longest, group=group)
    most = max(int(length) for length in lengths)
    padded = torch.zeros(most * part.itemsize, dtype=torch.uint8, device=part.device)
    padded[: part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    everything = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(everything, padded, group=group)
    parts = [x[: int(n) * part.itemsize] for x, n in zip(everything, lengths, strict=True)]
    whole = torch.cat(parts).view(part.dtype)
    before = sum(int(n) for n in lengths[: like.device_mesh.get_local_rank("shard")])
    mine = whole[before : before + part.numel()]
    if not torch.equal(mine.view(torch.uint8), part.contiguous().view(-1).view(torch.uint8)):
        raise RunFailed("what was gathered of all ranks does not hold this rank's part; its network or memory is bad")
    return whole


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, on every rank."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    return gathered(parameter, local(parameter).reshape(-1)).view(parameter.shape)


# ---- training on own rows ------------------------------------------------------------------------------------------


def share(parameter: nn.Parameter) -> nn.Parameter:
    """What this rank updates of a parameter, as a plain parameter over the same memory; itself, if it is whole."""
    if not isinstance(parameter, DTensor):
        return parameter
    if not hasattr(parameter, "share"):
        parameter.share = nn.Parameter(local(parameter))
        parameter.share.grad_dtype = torch.float32
    return parameter.share


def collect_gradients(model: nn.Module) -> None:
    """After a backward pass: add what it gave to this rank's rows to their gradient, in fp32."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            gradient, mine = parameter.grad._local_tensor.float(), share(parameter)
            mine.grad = gradient if mine.grad is None else mine.grad.add_(gradient)
            parameter.grad = None


def whole_gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that each rank has a part of the sum of; those of spread parameters are summed already."""
    return [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]


def joint_norm(model: nn.Module, norm: Tensor) -> Tensor:
    """The norm over all rows, from that over this rank's."""
    trained = next(p for p in model.parameters() if p.requires_grad)
    if not isinstance(trained, DTensor):
        return norm
    square = norm.double().square()
    dist.all_reduce(square, group=trained.device_mesh.get_group("shard"))
    return square.sqrt().to(norm.dtype)


def wholes(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parameters, or what an optimizer keeps for them under `parameter name.key`, whole, on all ranks; one by one."""
    named = dict(model.named_parameters())
    for key, tensor in tensors.items():
        parameter = named[key] if key in named else named[key.rpartition(".")[0]]
        if not isinstance(parameter, DTensor) or tensor.ndim == 0:
            yield key, tensor.detach()
            continue
        flat = gathered(parameter, tensor.detach().reshape(-1))
        yield key, flat.view(parameter.shape) if flat.numel() == parameter.numel() else flat


def parts(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of what `wholes` gave, possibly on another number of ranks. Raises ValueError where something
    is not of this model."""
    named, mine = dict(model.named_parameters()), {}
    for key, tensor in tensors.items():
        name = key if key in named else key.rpartition(".")[0]
        parameter = named.get(name)
        if not isinstance(parameter, DTensor) or tensor.ndim == 0:
            mine[key] = tensor
            continue
        every = -(-parameter.numel() // max(1, tensor.numel()))  # numbers of the parameter to one of the tensor
        if -(-parameter.numel() // every) != tensor.numel() or (every == 1 and tensor.shape != parameter.shape):
            raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)} in it")
        rows = own_rows(parameter)
        a_row = parameter.numel() // parameter.shape[0]
        start, end = rows.start * a_row // every, -(-rows.stop * a_row // every)
        part = tensor.reshape(-1)[start:end]
        mine[key] = part.view(rows.stop - rows.start, *parameter.shape[1:]) if every == 1 else part
    return mine


# ---- what is gathered is what was read -----------------------------------------------------------------------------


@torch.no_grad()
def check(model: nn.Module, device: torch.device) -> None:
    """Run one token through a sharded model, and compare what each unit gathers for it with what the ranks hold.

    Raises:
        RunFailed: some bytes are not the same, and in which unit, on which rank.
    """
    units = {name or "the head": unit for name, unit in model.named_modules() if isinstance(unit, FSDPModule)}
    places = {}  # unit -> the modules and names of its parameters, which are others while they are gathered
    seen: set[int] = set()
    for name, unit in reversed(units.items()):  # the inner ones first
        places[name] = []
        for module in unit.modules():
            for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if isinstance(parameter, DTensor) and id(parameter) not in seen:
                    seen.add(id(parameter))
                    places[name].append((module, own))
    held = torch.stack([sum_of(places[name]) for name in units]).to(device)
    spread = next(p for p in model.parameters() if isinstance(p, DTensor))
    dist.all_reduce(held, group=spread.device_mesh.get_group("shard"))
    found = {}

    def look(name: str):
        def note(*_: object) -> None:
            found[name] = sum_of(places[name])

        return note

    hooks = [unit.register_forward_pre_hook(look(name)) for name, unit in units.items()]
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    wrong = [name for name, sum_ in zip(units, held.tolist(), strict=True) if int(found[name]) != sum_]
    for other, number in enumerate(parallel.each(len(wrong))):
        if number:
            where = f" ({', '.join(wrong[:3])})" if wrong else ""
            raise RunFailed(f"rank {other} gathers {number} units whose bytes are not those that the ranks hold{where}")


def sum_of(places: list[tuple[nn.Module, str]]) -> Tensor:
    """A digest of parameters, int64 on their device: of the rows that are here, such that those of all ranks add up to
    that of the whole."""
    total = 0
    for which, (module, name) in enumerate(places):
        parameter = getattr(module, name)
        a_row = parameter.numel() // parameter.shape[0] * parameter.itemsize  # bytes
        data = local(parameter).contiguous().view(-1).view(torch.uint8)
        word = 8 if a_row % 8 == 0 else 1
        data = data if data.data_ptr() % word == 0 else data.clone()
        start = own_rows(parameter).start * a_row // word
        size = PIECE[data.device.type]
        for number, piece in enumerate(data.view(torch.int64 if word == 8 else torch.uint8).split(size)):
            first = start + number * size
            weight = torch.arange(first, first + len(piece), device=piece.device)
            weight.add_(which << 40).mul_(0x1E3779B97F4A7C15)  # modulo 2^64, as all that follows
            weight.bitwise_xor_(weight >> 29).bitwise_or_(1)
            total = total + weight.mul_(piece).sum()
    return total if isinstance(total, Tensor) else torch.zeros((), dtype=torch.int64)
