"""The whole proof of one variant, which knows nothing of it but the four verbs (adapters/__init__.py).

Optional words of a class that are heeded here:
    STARTS_AS_BASE = False           after reset_parameters it is not what its base is
    CONSTANT_IN_BACKWARD = ("norms",)  methods whose result the gradient takes for a constant, as DoRA's norm
    PEFT_KEYS                        a knob that is not in it ("alpha", "dropout") plays no part
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import adapters, peft_format, pretrained, shards
from minitune.adapters import ADAPTERS
from minitune.config import Config, LoRAConfig, ModelConfig
from minitune.merge import MergeError, merged_tensors
from minitune.model import Llama
from minitune.nf4 import NF4Linear
from minitune.train import train
from minitune.verify import peers, ranks, small
from minitune.verify.small import ALPHA, R
from minitune.verify.table import EXACT, Check, NotMeant, apart, unequal, worst

IN, OUT = 64, 40  # of a single layer; NF4 wants inputs in blocks of 64
STEP = 1e-5  # of finite differences, in fp64
OF_UPDATE = 1e-4  # relative to what the adapter adds, which is some hundredth of what it is added to


def checks(variant: str, spec: str, folder: Path, device: torch.device) -> Iterator[Check]:
    """All of them; `spec` is what other processes find the variant by, and `folder` an empty one to work in."""
    yield from layer_checks(ADAPTERS[variant], variant, device)
    yield from model_checks(variant, spec, folder, device)


# ---- one layer -----------------------------------------------------------------------------------------------------


def layer_checks(kind: type[nn.Module], variant: str, device: torch.device) -> Iterator[Check]:
    cfg = LoRAConfig(variant=variant, r=R, alpha=ALPHA, dropout=0.0)
    layer = partial(Layer, kind, cfg, device)
    yield Check("reset_parameters fills all, and repeats", "itself, same seed", 0, partial(fills, layer))
    yield Check("forward after reset_parameters", "the base", EXACT, partial(start, kind, layer))
    yield Check("dtypes: fp32 parameters, x's outputs", "the four verbs", 0, partial(dtypes, layer))
    yield Check("the base under it, after all verbs", "the base before, bit for bit", 0, partial(base_kept, layer))
    yield Check("merged_weight", "forward, in fp64, of the update", 1e-8, partial(merged, layer))
    yield Check("every gradient", "finite differences, fp64", 1e-5, partial(gradient, kind, layer))
    doubled = partial(alpha, kind, layer)
    yield Check("alpha twice as large changes the update", "alpha as it was", 1e-2, doubled, at_least=True)
    heard = partial(dropout_heard, kind, layer)
    yield Check("dropout in training changes the update", "no dropout", 1e-2, heard, at_least=True)
    yield Check("dropout in evaluation", "no dropout, bit for bit", 0, partial(dropout_silent, layer))
    yield Check("over NF4: outputs and gradients", "over the same weight, dense", EXACT, partial(over_nf4, layer))
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    for four_bits in (False, True):
        what = f"torch.compile, one graph{' over NF4' if four_bits else ''}"
        yield Check(what, f"as it is ({backend})", EXACT, partial(compiled, layer, four_bits, backend))


class Layer:
    """A frozen linear and an adapter on it, after reset_parameters and, if `live`, away from it."""

    def __init__(
        self,
        kind: type[nn.Module],
        cfg: LoRAConfig,
        device: torch.device,
        *,
        live: bool = True,
        dtype: torch.dtype = torch.float32,
        base: nn.Module | None = None,
        reset: bool = True,
        **changes: Any,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.base = nn.Linear(IN, OUT) if base is None else base
        if base is None:
            with torch.no_grad():
                self.base.weight.copy_(torch.randn(OUT, IN, generator=draw) * IN**-0.5)
                self.base.bias.copy_(torch.randn(OUT, generator=draw) * 0.3)
        self.base.to(device, None if base is not None else dtype).requires_grad_(False)
        self.adapter = kind(self.base, replace(cfg, **changes)).to(device)
        self.x = torch.randn(6, IN, generator=draw).to(device, dtype)
        self.weight = torch.randn(6, OUT, generator=draw).to(device, dtype)  # of the outputs, in a sum to differentiate
        if reset:
            torch.manual_seed(1)
            self.adapter.reset_parameters()
        if live:
            small.liven(self.adapter)

    def update(self) -> Tensor:
        """What the adapter adds."""
        return self.adapter(self.x) - self.base(self.x)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.adapter.named_parameters() if p.requires_grad}

    def own(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the adapter, and none of the base's."""
        tensors = chain(self.adapter.named_parameters(), self.adapter.named_buffers())
        return {name: t.detach() for name, t in tensors if not name.startswith("base.")}

    def outcome(self, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """The outputs, and the gradient of x and of all that trains."""
        x = self.x.clone().requires_grad_()
        y = (self.adapter if call is None else call)(x)
        trained = self.trained()
        gradients = torch.autograd.grad((y * self.weight).sum(), [x, *trained.values()], allow_unused=True)
        return {"outputs": y.detach(), **dict(zip(("x", *trained), gradients, strict=True))}


MakeLayer = Callable[..., Layer]


def fills(layer: MakeLayer) -> tuple[float, str]:
    made = []
    for _ in range(2):
        one = layer(reset=False, live=False)
        for tensor in one.own().values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)  # what memory holds before
        torch.manual_seed(1)
        one.adapter.reset_parameters()
        made.append(one.own())
    if left := [name for name, t in made[0].items() if t.is_floating_point() and not t.isfinite().all()]:
        return float(len(left)), f"left as memory was: {', '.join(left)}"
    return unequal(*made)


def start(kind: type[nn.Module], layer: MakeLayer) -> float:
    if not getattr(kind, "STARTS_AS_BASE", True):
        raise NotMeant("STARTS_AS_BASE = False")
    one = layer(live=False)
    return apart(one.adapter(one.x), one.base(one.x))


def dtypes(layer: MakeLayer) -> tuple[float, str]:
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        one = layer(dtype=dtype)
        found = one.outcome()
        wrong += [f"{name} is {p.dtype}" for name, p in one.trained().items() if p.dtype != torch.float32]
        wrong += [f"of {dtype} x the outputs are {found['outputs'].dtype}"] * (found["outputs"].dtype != dtype)
        merged = one.adapter.merged_weight(one.base.weight.double())
        wrong += [f"of an fp64 weight merged_weight makes {merged.dtype}"] * (merged.dtype != torch.float64)
    return float(len(wrong)), wrong[0] if wrong else ""


def base_kept(layer: MakeLayer) -> tuple[float, str]:
    one = layer(reset=False, live=False)
    given = one.base.weight.double()
    before = {name: p.clone() for name, p in one.base.named_parameters()} | {"what merged_weight gets": given.clone()}
    one.adapter.reset_parameters()
    small.liven(one.adapter)
    one.outcome()
    one.adapter.merged_weight(given)
    assert not any(p.requires_grad for p in one.base.parameters()), "the base trains"
    return unequal(dict(one.base.named_parameters()) | {"what merged_weight gets": given}, before)


def merged(layer: MakeLayer) -> float:
    one = layer(dropout=0.5)
    one.adapter.double().eval()
    one.x = one.x.double()
    weight = one.adapter.merged_weight(one.base.weight.detach())
    assert weight.shape == one.base.weight.shape, f"it is {tuple(weight.shape)}, not {tuple(one.base.weight.shape)}"
    return apart(nn.functional.linear(one.x, weight, one.base.bias), one.adapter(one.x), one.update())


def gradient(kind: type[nn.Module], layer: MakeLayer) -> tuple[float, str]:
    """Each number of x and of what trains is moved by STEP to both sides, in fp64."""
    one = layer()
    one.adapter.double()
    one.x, one.weight = one.x.double()[:2], one.weight.double()[:2]
    ours = one.outcome()
    del ours["outputs"]
    slopes = {}
    with torch.no_grad(), constant(one, getattr(kind, "CONSTANT_IN_BACKWARD", ())):
        for name, tensor in {"x": one.x, **one.trained()}.items():
            flat, slope = tensor.view(-1), torch.empty_like(tensor).view(-1)
            for i, value in enumerate(flat.tolist()):
                sums = []
                for moved in (value + STEP, value - STEP):
                    flat[i] = moved
                    sums.append((one.adapter(one.x) * one.weight).sum())
                flat[i] = value
                slope[i] = (sums[0] - sums[1]) / (2 * STEP)
            slopes[name] = slope.view_as(tensor)
    return worst(ours, slopes)


@contextmanager
def constant(layer: Layer, methods: tuple[str, ...]) -> Iterator[None]:
    """Within the block these methods of an adapter give what they gave where it stands."""
    for name in methods:
        method, given = getattr(layer.adapter, name), []
        setattr(layer.adapter, name, lambda *args, m=method, g=given: g.append(m(*args)) or g[-1])
        layer.adapter(layer.x)
        assert len(given) == 1, f"CONSTANT_IN_BACKWARD: forward calls {name} {len(given)} times, not once"
        setattr(layer.adapter, name, lambda *args, g=given: g[0])
    yield


def plays_no_part(kind: type[nn.Module], knob: str) -> bool:
    return hasattr(kind, "PEFT_KEYS") and knob not in kind.PEFT_KEYS


def alpha(kind: type[nn.Module], layer: MakeLayer) -> float:
    if plays_no_part(kind, "alpha"):
        raise NotMeant("PEFT_KEYS has no alpha")
    one, other = layer(), layer(alpha=2 * ALPHA)
    with torch.no_grad():
        for p, q in zip(other.trained().values(), one.trained().values(), strict=True):
            p.copy_(q)
    return apart(other.update(), one.update())


def dropout_heard(kind: type[nn.Module], layer: MakeLayer) -> float:
    if plays_no_part(kind, "dropout"):
        raise NotMeant("PEFT_KEYS has no dropout")
    one, other = layer(), layer(dropout=0.5)
    other.adapter.train()
    return apart(other.update(), one.update())


def dropout_silent(layer: MakeLayer) -> float:
    one, other = layer(), layer(dropout=0.5)
    one.adapter.eval(), other.adapter.eval()
    return apart(other.adapter(one.x), one.adapter(one.x))


def four_bit_linear(layer: Layer) -> NF4Linear:
    """The base of a layer in four bits, and that of the layer made what these stand for."""
    linear = NF4Linear(IN, OUT, True, torch.float32).to(layer.x.device)
    linear.quantize(layer.base.weight)
    with torch.no_grad():
        linear.bias.copy_(layer.base.bias)
    return linear


def over_nf4(layer: MakeLayer) -> tuple[float, str]:
    linear = four_bit_linear(layer())
    dense = nn.Linear(IN, OUT)
    dense.weight, dense.bias = (nn.Parameter(t.detach().clone()) for t in (linear.dense_weight(), linear.bias))
    return worst(layer(base=linear).outcome(), layer(base=dense).outcome())


def compiled(layer: MakeLayer, four_bits: bool, backend: str) -> tuple[float, str]:
    torch._dynamo.reset()
    one = layer(base=four_bit_linear(layer())) if four_bits else layer()
    one.adapter.train()
    whole = torch.compile(one.adapter, fullgraph=True, backend=backend)
    return worst(one.outcome(whole), one.outcome())


# ---- a model -------------------------------------------------------------------------------------------------------


def model_checks(variant: str, spec: str, folder: Path, device: torch.device) -> Iterator[Check]:
    base = small.base(folder / "base")
    cfg = small.recipe(base, variant)
    wet = small.recipe(base, variant, dropout=0.25)
    plain = "of what it adds to logits"
    yield Check("saved, and read back", plain, OF_UPDATE, partial(comes_back, cfg, folder, device))
    both = ("transformers", "peft")
    in_peft = partial(peers.loads_or_refuses, cfg, folder, device)
    yield Check("its files in PEFT: the same logits, or refused", "PEFT", OF_UPDATE, in_peft, both)
    for method in ("lora", "qlora"):
        what = f"merged model{'' if method == 'lora' else ', NF4 base'}"
        yield Check(what, plain, OF_UPDATE, partial(merged_model, replace(cfg, method=method), folder, device))
    for size in (1, 2):
        what = f"{len(small.LENGTHS) // size} micro-batches, every gradient"
        yield Check(what, "one batch", EXACT, partial(micro_batches, cfg, size, device))
    yield Check("a step repeated, dropout 0.25", "itself, bit for bit", 0, partial(repeated, wet, "none", device))
    recomputed = partial(repeated, wet, "full", device)
    yield Check("a step recomputed, dropout 0.25", "nothing recomputed, bit for bit", 0, recomputed)
    job = ranks.Job(cfg, spec, folder)
    for method, sharding in ranks.WAYS:
        what = f"2 ranks, {method}, sharding {sharding}"
        yield Check(what, "one process", EXACT, partial(job.gradients_apart, method, sharding))
    straight = replace(wet, out=str(folder / "straight"), train=replace(wet.train, max_steps=4, batch_size=2))
    yield Check("resumed at step 2 of 4: the adapter", "never stopped, bit for bit", 0, partial(resumed, straight))


def of_update(logits: Tensor, expected: Tensor, bare: Tensor) -> float:
    """A difference in logits relative to what the adapter changes about them."""
    return apart(logits, expected, expected - bare)


@torch.no_grad()
def logits(model: Llama) -> Tensor:
    tokens = torch.arange(3, 3 + 2 * 29).view(2, 29)
    return model.eval()(tokens.to(next(model.parameters()).device)).cpu()


def bare_logits(cfg: Config, device: torch.device) -> Tensor:
    return logits(pretrained.load(cfg.model.path, device=device))


def saved(cfg: Config, folder: Path, device: torch.device) -> tuple[Llama, Path]:
    """A live model, and the folder of its adapter."""
    model, path = small.built(cfg, device), folder / "adapter"
    if not path.exists():
        peft_format.save(path, model, cfg.lora, ModelConfig(path=cfg.model.path))
    return model, path


def comes_back(cfg: Config, folder: Path, device: torch.device) -> tuple[float, str]:
    """The folder says itself what it holds; nothing but the folder is there to read."""
    model, path = saved(cfg, folder, device)
    lora, base = peft_format.read_config(path)
    again = pretrained.load(base.path, device=device)
    adapters.attach(again, lora)
    peft_format.load(path, again)
    difference = of_update(logits(again), logits(model), bare_logits(cfg, device))
    said = ADAPTERS[lora.variant].__name__
    return difference, "" if lora.variant == cfg.lora.variant else f"adapter_config.json says that it is a {said}"


def merged_model(cfg: Config, folder: Path, device: torch.device) -> float:
    model, out = small.built(cfg, device), folder / f"merged-{cfg.method}"
    with shards.Shards(Path(cfg.model.path)) as weights:
        shards.save(
            out,
            merged_tensors(cfg, copy.deepcopy(model).cpu(), weights, "dequantized", None, MergeError()),
            like=Path(cfg.model.path),
        )
    return of_update(logits(pretrained.load(out, device=device)), logits(model), bare_logits(cfg, device))


def micro_batches(cfg: Config, size: int, device: torch.device) -> tuple[float, str]:
    steps = []
    for rows in (size, len(small.LENGTHS)):
        model = small.built(cfg, device)
        steps.append(small.step_gradients(model, cfg, small.step_batches(model.config.vocab_size, rows, device)))
    return worst(*steps)


def repeated(cfg: Config, recompute: str, device: torch.device) -> tuple[float, str]:
    steps = []
    for how in ("none", recompute):
        model = small.built(replace(cfg, train=replace(cfg.train, gradient_checkpointing=how)), device)
        steps.append(small.step_gradients(model, cfg, small.step_batches(model.config.vocab_size, 4, device)))
    return unequal(*steps)


def resumed(cfg: Config) -> tuple[float, str]:
    """A run, and one that finds the first one's checkpoint of step 2 and nothing else."""
    out = Path(cfg.out)
    cfg = replace(cfg, data=replace(cfg.data, train=(str(small.rows_file(out.with_name("rows.jsonl"))),)))
    again = out.with_name("resumed")
    train(cfg)
    shutil.copytree(out / "checkpoints" / "step-000002", again / "checkpoints" / "step-000002")
    train(replace(cfg, out=str(again)))
    lines = [line for line in (again / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(lines) == 2, f"it trained {len(lines)} steps after the checkpoint, not 2"
    return unequal(*(load_file(run / "adapter" / peft_format.WEIGHTS) for run in (out, again)))
