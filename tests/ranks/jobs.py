"""What the processes of a job do. Imported by each of them, so neither transformers nor peft nor pytest is here."""

import ctypes
import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from minitune import build, errors, nf4, parallel, peft_format, plan, pretrained, sharding
from minitune import train as training
from minitune.adapters import ADAPTERS
from minitune.config import load_config


def run_in_place(
    rank: int, world: int, machine: int, port: int, log: str, job: Any, arguments: tuple[Any, ...]
) -> None:
    """One process of a job, as torchrun would have started it; `machine` processes share a machine."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(out), "w", buffering=1) for _ in range(2))
    faulthandler.enable(sys.stderr)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank % machine), "LOCAL_WORLD_SIZE": str(machine)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    job(*arguments)


def train(arguments: list[str], trouble: dict[str, Any] | None = None) -> None:
    """A run of scripts/train.py. `trouble`: what befalls which `rank` before which `step`."""
    if trouble:
        befall(**trouble)
    sys.argv = ["train.py", *arguments]
    errors.run(lambda given: training.train(load_config(given)))


def befall(rank: int, step: int, what: str) -> None:
    """Let one rank meet its trouble at the beginning of a step."""
    take_step = training.take_step

    def troubled(model: Any, optimizer: Any, batches: Any, cfg: Any, number: int) -> Any:
        if number == step and int(os.environ["RANK"]) == rank:
            match what:
                case "raises":
                    raise ValueError("a mistake on one rank")
                case "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "is stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hangs":
                    time.sleep(1000)
                case "gets SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
        return take_step(model, optimizer, batches, cfg, number)

    training.take_step = troubled


def train_by_hand(arguments: list[str]) -> None:
    """A run whose blocks run by hand, as on CUDA; here on the kernels' plain twins."""
    build.why_not_by_hand = lambda *_: None
    train(arguments)


def four_bits(arguments: list[str]) -> None:
    """What ranks hold of a four-bit base, and gather of it, is byte for byte what one process makes of it."""
    cfg = load_config(arguments)
    base = pretrained.find(cfg.model.path)
    with parallel.processes(False, 30) as device:
        alone = build.build_model(replace(cfg, parallel=replace(cfg.parallel, sharding="replicate")), base, device)
        spread = build.build_model(cfg, base, device)
        linear = spread.layers[0].mlp.gate_proj.base
        assert sharding.is_spread(linear.packed) and len(sharding.local(linear.packed)) < len(linear.packed)
        names = [name for name, _ in alone.named_parameters()]
        for name in names:
            ours, theirs = sharding.whole(spread.get_parameter(name)), alone.get_parameter(name)
            if linear.packed.dtype != torch.uint8 and theirs.dtype == torch.uint8:
                ours = nf4.as_bytes(ours)  # which PyTorch 2.11 shards by another name
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name

        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(linear.packed.shape)
        nf4.as_bytes(sharding.local(linear.packed)).copy_(patterns[sharding.own_rows(linear.packed)])
        seen = []
        spread.layers[0].register_forward_pre_hook(lambda *_: seen.append(nf4.as_bytes(linear.packed).clone()))
        with torch.no_grad():
            spread(torch.zeros(1, 3, dtype=torch.int64))
        assert torch.equal(seen[0], patterns)
        sharding.check(spread, device)


def variants(arguments: list[str]) -> None:
    """Every variant starts, computes and learns over a base that ranks share as over one that each has whole."""
    tokens = torch.arange(3, 14).view(1, 11)
    with parallel.processes(False, 30) as device:
        for variant, method in itertools.product(ADAPTERS, ("lora", "qlora")):
            cfg = load_config([*arguments, f"method={method}", f"lora.variant={variant}"])
            base = pretrained.find(cfg.model.path)
            whole = replace(cfg, parallel=replace(cfg.parallel, sharding="replicate"))
            alone, spread = (build.build_model(each, base, device) for each in (whole, cfg))
            linear = spread.layers[0].mlp.gate_proj.base
            assert sharding.is_spread(linear.packed if method == "qlora" else linear.weight)
            trained = {name: p for name, p in alone.named_parameters() if p.requires_grad}
            for number, (name, parameter) in enumerate(trained.items()):
                ours = spread.get_parameter(name)
                assert not sharding.is_spread(ours) and torch.equal(ours, parameter), (variant, name)
                moved = torch.randn(ours.shape, generator=torch.Generator().manual_seed(number)) * 0.1
                ours.data.add_(moved)
                parameter.data.add_(moved)
            outputs = [model.train()(tokens) for model in (alone, spread)]
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
            for output in outputs:
                output.square().mean().backward()
            for name, parameter in trained.items():
                gradient, expected = spread.get_parameter(name).grad, parameter.grad
                assert (gradient - expected).norm() < 1e-5 * expected.norm(), (variant, method, name)
            ours, theirs = (peft_format.export(model) for model in (spread, alone))
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), variant


def gathered_in_vain(arguments: list[str], told: str, left_to_itself: bool) -> None:
    """A run that notes how often a backward pass ended with weights on their way that nobody waited for."""
    finalize, in_vain = FSDPParamGroup.finalize_backward, []

    def noting(group: FSDPParamGroup) -> None:
        in_vain.append(group._all_gather_result is not None)
        finalize(group)

    FSDPParamGroup.finalize_backward = noting
    if left_to_itself:
        sharding.in_turn = lambda *_: None
    train(arguments)
    Path(f"{told}-{os.environ['RANK']}").write_text(json.dumps([len(in_vain), sum(in_vain)]))


def one_wrong_byte(arguments: list[str]) -> None:
    """One byte that one rank gathers is not the one that was sent."""
    cfg = load_config(arguments)

    def flip(block: Any, *_: object) -> None:
        if parallel.rank() == 1:
            nf4.as_bytes(block.mlp.up_proj.base.packed)[100, 7] ^= 1

    def run(_: list[str]) -> None:
        with parallel.processes(False, 30) as device:
            model = build.build_model(cfg, pretrained.find(cfg.model.path), device)
            model.layers[0].register_forward_pre_hook(flip)
            sharding.check(model, device)

    errors.run(run)


def memory(arguments: list[str], out: str) -> None:
    """How much host memory building a model took at its peak, in bytes, and how much its base is."""
    cfg, small = load_config(arguments), load_config(arguments[:1] + arguments[2:])
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back, and counts no more
    with parallel.processes(False, 30) as device:
        base = pretrained.find(cfg.model.path)
        build.build_model(small, pretrained.find(small.model.path), device)  # what is imported for the first time
        before, most = resident(), 0
        done = threading.Event()

        def sample() -> None:
            nonlocal most
            while not done.wait(0.002):
                most = max(most, resident())

        sampler = threading.Thread(target=sample)
        sampler.start()
        model = build.build_model(cfg, base, device)
        done.set()
        sampler.join()
        whole = sum(p.numel() * p.itemsize for p in model.parameters())
        Path(f"{out}-{parallel.rank()}").write_text(json.dumps([most - before, whole]))


def resident() -> int:
    """Bytes of this process' own memory; pages of files, which the system takes back when it wants, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def ways(arguments: list[str], out: str) -> None:
    """What `auto` chooses, by how much memory a rank has."""
    cfg, chosen, needs = load_config(arguments), {}, {}
    memory = plan.memory

    def noted(*of: Any) -> plan.Memory:
        needs[of[-1]] = memory(*of)
        return needs[of[-1]]

    plan.memory = noted
    with parallel.processes(False, 30) as device:
        base = pretrained.find(cfg.model.path)
        parallel.free_memory = lambda _: 0
        chosen["too little"] = build.compose(cfg, base, device)[1]
        for shards, need in list(needs.items()):
            least = need.reserved(plan.choose(need, 0, cfg, False)) / (1 - plan.SPARE) + 10_000
            parallel.free_memory = lambda _, least=least: int(least) + parallel.rank() * 10**6
            chosen[shards] = build.compose(cfg, base, device)[1]
        if parallel.is_first():
            Path(out).write_text(json.dumps(chosen))


def train_wrong(arguments: list[str], mistake: str) -> None:
    """A run with one of the mistakes that the numbers must show."""
    match mistake:
        case "each rank divides by its own tokens":
            parallel.total = lambda number: number * parallel.world()
        case "gradients are not summed":
            sharding.whole_gradients = lambda model: []
        case "clipped by this rank's part":
            sharding.joint_norm = lambda model, norm: norm
    train(arguments)
