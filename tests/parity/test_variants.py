"""Every variant of ADAPTERS: what it computes and learns, where it starts, its files, beside PEFT or a plain formula.

A new line in ADAPTERS is covered by itself; only what PEFT calls it goes into PEFT below, or its formula into FORMULAS.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import peft_reference as ref
import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitune import adapters, byhand, checkpoint, files, merge, nf4, optim, parallel, peft_format, pretrained, runs
from minitune.adapters import ADAPTERS
from minitune.build import build_model
from minitune.config import LINEARS, LORA_VARIANTS, Config, LoRAConfig, ModelConfig, OptimConfig, dump, load_config
from minitune.data.packing import Corpus
from minitune.data.stream import Stream
from minitune.errors import UserError
from minitune.generate import open_model
from minitune.model import Llama
from minitune.progress import Progress
from minitune.resume import resume

EXACT = 1e-5  # relative, whole tensors, fp32
R, ALPHA = ref.R, ref.ALPHA

PEFT: dict[str, dict[str, Any]] = {  # what PEFT's LoraConfig is told; "vera" has a config of its own
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loraplus": {},
    "lora_fa": {},
    "vera": {},
}


def oplora(W: Tensor, x: Tensor, kept: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`kept` is what dropout left of x."""
    U, _, Vh = torch.linalg.svd(W)
    left, right = (torch.eye(len(q), dtype=W.dtype) - q[:, :R] @ q[:, :R].T for q in (U, Vh.T))
    return x @ W.T + kept @ (ALPHA / R * left @ lora_B @ lora_A @ right).T


FORMULAS: dict[str, Callable[..., Tensor]] = {"oplora": oplora}  # in fp64, of those that PEFT lacks

by_peft = pytest.mark.parametrize("variant", [variant for variant in ADAPTERS if variant in PEFT])
by_formula = pytest.mark.parametrize("variant", [variant for variant in ADAPTERS if variant in FORMULAS])
every = pytest.mark.parametrize("variant", ADAPTERS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("wide") / "model", num_hidden_layers=1, wide=True)


def config(variant: str, dropout: float = 0.0, targets: tuple[str, ...] = LINEARS) -> LoRAConfig:
    return LoRAConfig(variant=variant, r=R, alpha=ALPHA, dropout=dropout, target_modules=targets)


def adapted(base: Path, cfg: LoRAConfig, dtype: str = "float32") -> Llama:
    """The model of a folder with adapters that have all moved away from where they started."""
    model = pretrained.load(base, dtype)
    adapters.attach(model, cfg)
    adapters.reset(model, 1)
    return liven(model)


@torch.no_grad()
def liven(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(2)
    for parameter in trained(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        assert (parameter != 0).all()
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def own(model: Llama) -> dict[str, Tensor]:
    """The adapters' parameters, and frozen ones that have a name in PEFT, under that name."""
    return {
        f"{name}.{theirs}": getattr(adapter, ours)
        for name, adapter in adapters.adapters(model).items()
        for ours, theirs in adapter.PEFT_NAMES.items()
    }


def peft_config(cfg: LoRAConfig) -> peft.PeftConfig:
    common = {"r": cfg.r, "target_modules": list(cfg.target_modules), "task_type": "CAUSAL_LM"}
    if cfg.variant == "vera":
        return peft.VeraConfig(**common, vera_dropout=cfg.dropout)
    return peft.LoraConfig(**common, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, **PEFT[cfg.variant])


def peft_model(base: Path, cfg: LoRAConfig) -> peft.PeftModel:
    return peft.get_peft_model(ref.reference(base), peft_config(cfg))


def peft_own(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): p
        for name, p in model.named_parameters()
        if "lora_" in name or "vera_" in name
    }


@torch.no_grad()
def copy(source: dict[str, Tensor], target: dict[str, nn.Parameter]) -> None:
    assert source.keys() == target.keys()
    for name, parameter in target.items():
        parameter.copy_(source[name])


def pair(base: Path, cfg: LoRAConfig) -> tuple[Llama, peft.PeftModel]:
    """The same adapters here and in PEFT, both in training mode; what does not train here does not there."""
    ours, theirs = adapted(base, cfg), peft_model(base, cfg)
    copy(own(ours), peft_own(theirs))
    for name, parameter in peft_own(theirs).items():
        parameter.requires_grad_(own(ours)[name].requires_grad)
    return ours.train(), theirs.train()


class Formula(nn.Module):
    """A linear whose variant is written out, in fp64."""

    def __init__(self, adapter: nn.Module, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = adapter.base.weight.detach().double()
        self.formula, self.dropout = formula, adapter.dropout
        for name, parameter in adapter.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().double()))

    def forward(self, x: Tensor) -> Tensor:
        kept = F.dropout(x, self.dropout, self.training).double()
        return self.formula(self.weight, x.double(), kept, **dict(self.named_parameters())).to(x.dtype)


def written_out(model: Llama, base: Path, variant: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """transformers' model with the same adapters by their formula, and its parameters by PEFT's names."""
    theirs = ref.reference(base).requires_grad_(False)
    found = {}
    for name, adapter in adapters.adapters(model).items():
        parent, _, last = name.rpartition(".")
        formula = Formula(adapter, FORMULAS[variant])
        setattr(theirs.get_submodule(parent), last, formula)
        found |= {f"{name}.{adapter.PEFT_NAMES[ours]}": p for ours, p in formula.named_parameters()}
    return theirs.train(), found


def reference(base: Path, cfg: LoRAConfig) -> tuple[Llama, nn.Module, dict[str, nn.Parameter]]:
    """Ours, the live reference, and the reference's adapter parameters by PEFT's names."""
    if cfg.variant in PEFT:
        ours, theirs = pair(base, cfg)
        return ours, theirs, peft_own(theirs)
    ours = adapted(base, cfg).train()
    return ours, *written_out(ours, base, cfg.variant)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (2, 13) and labels, the token after each; rows hold unequal numbers of loss tokens."""
    tokens = ref.token_rows(2, 13, seed=100 + step)
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    for row, prompt in enumerate((2, 7)):
        labels[row, : prompt + step % 3] = -100
    return tokens, labels


def our_loss(model: Llama, step: int) -> Tensor:
    tokens, labels = batch(step)
    return model(tokens, labels=labels) / (labels != -100).sum()


def their_loss(model: nn.Module, step: int) -> Tensor:
    """transformers shifts labels itself: the label of a token is the token."""
    tokens, labels = batch(step)
    return model(input_ids=tokens, labels=F.pad(labels[:, :-1], (1, 0), value=-100)).loss


def test_every_variant_has_a_reference() -> None:
    assert set(ADAPTERS) == set(LORA_VARIANTS) == PEFT.keys() | FORMULAS.keys(), (
        "say in PEFT what PEFT calls a new variant, or write its formula out in FORMULAS"
    )


# ---- what it computes and learns -----------------------------------------------------------------------------------


@every
def test_outputs_and_every_gradient_are_the_reference_s(base: Path, variant: str) -> None:
    ours, theirs, expected = reference(base, config(variant))
    assert far_off(ours, theirs, expected) < EXACT


def far_off(ours: Llama, theirs: nn.Module, expected: dict[str, nn.Parameter]) -> float:
    """The largest relative difference in logits, loss or any gradient."""
    tokens, _ = batch(0)
    worst = ref.relative(ours(tokens), theirs(input_ids=tokens).logits)
    loss, their = our_loss(ours, 0), their_loss(theirs, 0)
    loss.backward()
    their.backward()
    worst = max(worst, abs(loss.item() / their.item() - 1))
    for name, parameter in own(ours).items():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            worst = max(worst, ref.relative(parameter.grad, expected[name].grad))
        else:
            assert expected[name].grad is None, name
    assert sum(p.grad is not None for p in ours.parameters()) == len(trained(ours))
    return worst


@every
def test_ten_adamw_steps_are_the_reference_s(base: Path, variant: str) -> None:
    targets = ("q_proj", "k_proj", "down_proj")
    ours, theirs, expected = reference(base, config(variant, targets=targets))
    before = {name: p.detach().clone() for name, p in own(ours).items()}
    assert ten_steps(ours, theirs, expected) < EXACT
    moved = {name: ref.relative(p, before[name]) for name, p in own(ours).items() if p.requires_grad}
    assert min(moved.values()) > 1e-3


def ten_steps(
    ours: Llama, theirs: nn.Module, expected: dict[str, nn.Parameter], rate: float = 1e-2, after: Any = None
) -> float:
    """The largest relative difference between any parameters after any of ten steps of AdamW.

    With an eps near zero the first steps take the sign of each gradient, and the sign of one that is all rounding is
    chance; 1e-3 is far above rounding, so that what is compared is the adapter.
    """
    options = {"lr": rate, "weight_decay": 0.01, "eps": 1e-3}
    optimizers = [
        torch.optim.AdamW([p for p in ps.values() if p.requires_grad], **options) for ps in (own(ours), expected)
    ]
    worst = 0.0
    for step in range(10):
        our_loss(ours, step).backward()
        their_loss(theirs, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if after is not None:
            after(ours)
        worst = max(worst, *(ref.relative(p, expected[name]) for name, p in own(ours).items()))
    return worst


@every
def test_the_merged_weight_is_the_reference_s(base: Path, variant: str) -> None:
    cfg = config(variant)
    ours, theirs, _ = reference(base, cfg)
    merged = merged_weights(ours, base)
    if variant in PEFT:
        expected = theirs.eval().merge_and_unload().state_dict()
        for name, weight in merged.items():
            assert ref.relative(weight, expected[f"{name}.weight"]) < EXACT, name
    plain = ref.reference(base)
    for name, weight in merged.items():
        assert ref.relative(weight, plain.get_submodule(name).weight) > 1e-2, name  # the adapter is seen
        plain.get_submodule(name).weight.data = weight.float()
    tokens, _ = batch(3)
    assert ref.relative(plain(input_ids=tokens).logits, ours.eval()(tokens)) < EXACT


def merged_weights(model: Llama, base: Path) -> dict[str, Tensor]:
    """Module's name -> what `merge` writes for it, in fp64."""
    return {name: a.merged_weight(a.base.weight.double()) for name, a in adapters.adapters(model).items()}


@every
def test_gradients_are_finite_differences(variant: str) -> None:
    """In fp64, of one layer, along a random direction of each parameter: needs no reference but itself."""
    adapter = alone(variant).double()
    x, dy = torch.randn(7, 46, dtype=torch.float64), torch.randn(7, 31, dtype=torch.float64)
    (adapter(x) * dy).sum().backward()
    for name in getattr(adapter, "CONSTANT_IN_BACKWARD", ()):
        held = getattr(adapter, name)(adapter.base.weight)
        setattr(adapter, name, lambda *_, held=held: held)
    for name, parameter in adapter.named_parameters(recurse=False):
        direction, step = torch.randn_like(parameter), 1e-6
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                ends.append((adapter(x) * dy).sum())
                parameter.add_(direction, alpha=-sign * step)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert ref.relative((parameter.grad * direction).sum(), slope) < 1e-6, name


def alone(variant: str, dropout: float = 0.0, bias: bool = False, base: nn.Module | None = None) -> nn.Module:
    """One adapter, 46 -> 31, that has moved away from its start."""
    torch.manual_seed(4)
    linear = base or nn.Linear(46, 31, bias=bias).requires_grad_(False)
    adapter = ADAPTERS[variant](linear, config(variant, dropout))
    adapter.reset_parameters()
    return liven(adapter)


@by_peft
def test_dropout_draws_and_falls_as_in_peft(variant: str) -> None:
    """One layer with a bias, so that the order of drawing is the same: outputs and gradients in training mode."""
    adapter = alone(variant, dropout=0.25, bias=True).train()
    bare = nn.Sequential(nn.Linear(46, 31))
    bare.load_state_dict({f"0.{name}": p for name, p in adapter.base.state_dict().items()})
    cfg = peft_config(config(variant, 0.25, ("0",)))
    cfg.task_type = None
    theirs = peft.get_peft_model(bare, cfg).train()
    expected = {name.removeprefix("0."): p for name, p in peft_own(theirs).items()}
    copy({adapter.PEFT_NAMES[name]: getattr(adapter, name) for name in adapter.PEFT_NAMES}, expected)
    x, dy = torch.randn(9, 46), torch.randn(9, 31)
    outputs = []
    for module in (adapter, theirs):
        torch.manual_seed(6)
        outputs.append(module(x))
        outputs[-1].backward(dy)
    assert ref.relative(*outputs) < EXACT
    assert ref.relative(outputs[0], adapter.eval()(x)) > 1e-2  # dropout is seen
    for name, theirs_name in adapter.PEFT_NAMES.items():
        if getattr(adapter, name).requires_grad:
            assert ref.relative(getattr(adapter, name).grad, expected[theirs_name].grad) < EXACT, name


@by_formula
def test_dropout_falls_as_in_the_formula(variant: str) -> None:
    adapter = alone(variant, dropout=0.25).train()
    formula = Formula(adapter, FORMULAS[variant]).train()
    x, dy = torch.randn(9, 46), torch.randn(9, 31)
    outputs = []
    for module in (adapter, formula):
        torch.manual_seed(6)
        outputs.append(module(x))
        outputs[-1].backward(dy)
    assert ref.relative(*outputs) < EXACT
    for name, parameter in formula.named_parameters():
        assert ref.relative(getattr(adapter, name).grad, parameter.grad) < EXACT, name


@every
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_on_four_bits_it_is_what_it_is_on_their_dense_weight(variant: str, dropout: float) -> None:
    torch.manual_seed(4)
    four, dense = nf4.NF4Linear(128, 31, True, torch.float32), nn.Linear(128, 31)
    four.quantize(torch.randn(31, 128) * 0.1)
    four.bias.data = dense.bias.data
    dense.weight.data = four.dense_weight()
    ours, expected = (alone(variant, dropout, base=b.requires_grad_(False)).train() for b in (four, dense))
    x, dy = torch.randn(9, 128), torch.randn(9, 31)
    outputs = []
    for adapter in (ours, expected):
        torch.manual_seed(6)
        outputs.append(adapter(x))
        outputs[-1].backward(dy)
    assert ref.relative(*outputs) < EXACT
    for (name, parameter), other in zip(trained(ours).items(), trained(expected).values(), strict=True):
        assert ref.relative(parameter.grad, other.grad) < EXACT, name


@every
def test_in_bf16_what_trains_stays_fp32(base: Path, variant: str) -> None:
    model = adapted(base, config(variant, dropout=0.1), "bfloat16").train()
    our_loss(model, 0).backward()
    for name, p in trained(model).items():
        assert p.dtype == p.grad.dtype == torch.float32, name
    exact = adapted(base, config(variant)).eval()
    tokens, _ = batch(0)
    assert model(tokens).dtype == torch.bfloat16
    assert ref.relative(model.eval()(tokens), exact(tokens)) < 0.05


@every
def test_recomputed_blocks_have_the_same_gradients(base: Path, variant: str) -> None:
    """Dropout draws the same numbers both times."""
    plain, again = (adapted(base, config(variant, dropout=0.3)).train() for _ in range(2))
    parallel.recompute_blocks(again.layers)
    for model in (plain, again):
        torch.manual_seed(8)
        our_loss(model, 0).backward()
    for name, parameter in trained(again).items():
        assert torch.equal(parameter.grad, trained(plain)[name].grad), name


# ---- mutants --------------------------------------------------------------------------------------------------------


def each(model: Llama) -> Iterator[nn.Module]:
    yield from adapters.adapters(model).values()


def alpha_ignored(model: Llama) -> None:
    for adapter in each(model):
        adapter.scaling = 1.0


def scaled_by_the_root_of_r(model: Llama) -> None:
    for adapter in each(model):
        adapter.scaling = ALPHA / math.sqrt(R)


def scaled_by_r(model: Llama) -> None:
    for adapter in each(model):
        adapter.scaling = ALPHA / R


def transposed_B(model: Llama) -> None:
    for adapter in each(model):
        rows, columns = adapter.lora_B.shape
        adapter.lora_B.data = adapter.lora_B.data.reshape(columns, rows).T.contiguous()


def gain_on_the_base_alone(model: Llama) -> None:
    for adapter in each(model):

        def forward(x: Tensor, a: nn.Module = adapter) -> Tensor:
            gain = a.lora_magnitude_vector / a.norms(a.base.weight)
            return gain * a.base(x) + F.linear(F.linear(x, a.lora_A) * a.scaling, a.lora_B)

        adapter.forward = forward


def norm_of_the_base_alone(model: Llama) -> None:
    for adapter in each(model):
        adapter.norms = lambda weight: weight.norm(dim=1)


def in_bf16(model: Llama) -> None:
    for parameter in trained(model).values():
        parameter.data = parameter.data.bfloat16().float()


SPOILED = {  # id -> variant and mutant; compared in outputs and gradients
    "alpha ignored": ("lora", alpha_ignored),
    "alpha ignored in DoRA": ("dora", alpha_ignored),
    "scale by sqrt r": ("lora", scaled_by_the_root_of_r),
    "rsLoRA's scale by r": ("rslora", scaled_by_r),
    "gain on the base only": ("dora", gain_on_the_base_alone),
    "norm of the base only": ("dora", norm_of_the_base_alone),
    "transposed B": ("lora", transposed_B),
}


@pytest.mark.parametrize(("variant", "spoil"), SPOILED.values(), ids=SPOILED)
def test_mutant_is_caught(base: Path, variant: str, spoil: Callable[[Llama], None]) -> None:
    ours, theirs, expected = reference(base, config(variant))
    spoil(ours)
    assert far_off(ours, theirs, expected) > 10 * EXACT


@pytest.mark.parametrize("variant", ["lora", "dora"], ids="bf16 masters of {}".format)
def test_mutant_of_training_is_caught(base: Path, variant: str) -> None:
    """Rounding the weights to bf16 after each step loses updates within ten of them."""
    ours, theirs, expected = reference(base, config(variant, targets=("q_proj",)))
    assert ten_steps(ours, theirs, expected, rate=1e-4, after=in_bf16) > 10 * EXACT


@every
def test_mutant_merge_without_scale_is_caught(base: Path, variant: str) -> None:
    model = adapted(base, config(variant))
    expected = merged_weights(model, base)
    for adapter in each(model):
        if hasattr(adapter, "scaling"):
            adapter.scaling = 1.0
        else:
            adapter.shared.B.mul_(2)
    for name, weight in merged_weights(model, base).items():
        assert ref.relative(weight, expected[name]) > 10 * EXACT, name


# ---- where it starts ------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_is_the_base_to_the_bit(base: Path, variant: str, dtype: str) -> None:
    model = pretrained.load(base, dtype)
    tokens, _ = batch(0)
    before = model(tokens)
    adapters.attach(model, config(variant, dropout=0.3))
    adapters.reset(model, 0)
    assert torch.equal(model.eval()(tokens), before)


@by_peft
def test_it_starts_as_in_peft(base: Path, variant: str) -> None:
    """In what is not drawn by chance: products of the singular vectors, whose signs are; magnitudes; projections."""
    model, theirs = pretrained.load(base), peft_model(base, config(variant))
    adapters.attach(model, config(variant))
    adapters.reset(model, 0)
    expected = peft_own(theirs)
    for name, adapter in adapters.adapters(model).items():
        if variant in ("pissa", "olora"):
            A, B = (expected[f"{name}.lora_{x}.weight"] for x in "AB")
            assert ref.relative(adapter.lora_B @ adapter.lora_A, B @ A) < EXACT
            assert ref.relative(adapter.lora_A.abs(), A.abs()) < 10 * EXACT  # fp32 vectors of neighbouring values
        elif variant == "vera":
            peft_layer = theirs.base_model.model.get_submodule(name)
            assert torch.equal(adapter.shared.A, peft_layer.vera_A["default"])
            assert torch.equal(adapter.shared.B, peft_layer.vera_B["default"])
        for ours, called in adapter.PEFT_NAMES.items():
            if "lora_A" not in ours and variant not in ("pissa", "olora"):
                assert ref.relative(getattr(adapter, ours), expected[f"{name}.{called}"]) < 1e-6


def test_the_leading_singular_values_of_both_shapes() -> None:
    for shape in ((31, 46), (46, 31)):
        W = torch.randn(shape)
        U, S, V = adapters.base_weight.leading(W, R)
        expected = torch.linalg.svd(W.double())
        assert ref.relative(S, expected.S[:R]) < 1e-6
        assert ref.relative(U @ torch.diag(S) @ V.T, (expected.U[:, :R] * expected.S[:R]) @ expected.Vh[:R]) < EXACT
        with pytest.raises(UserError, match=r"lora\.r"):
            adapters.base_weight.leading(W, 32)


def test_oplora_keeps_the_largest_singular_triples() -> None:
    adapter = alone("oplora")
    W = adapter.base.weight.double()
    before, after = torch.linalg.svd(W), torch.linalg.svd(adapter.merged_weight(W))
    kept = [i for i in range(len(before.S)) if (before.S[i] - after.S).abs().min() < 1e-5]
    assert kept[:R] == list(range(R)) and len(kept) < 10  # what is below them changed
    U, V = before.U[:, :R], before.Vh[:R]
    update = adapter.merged_weight(W) - W
    assert update.norm() > 0.1 and (U.T @ update).norm() < 1e-5 and (update @ V.T).norm() < 1e-5


def test_vera_shares_two_projections_among_all_shapes(base: Path) -> None:
    model = adapted(base, config("vera"))
    assert len({id(adapter.shared) for adapter in each(model)}) == 1
    shared = next(each(model)).shared
    assert shared.A.shape == (R, 93) and shared.B.shape == (93, R)
    shapes = {(adapter.in_features, adapter.out_features) for adapter in each(model)}
    assert len(shapes) == 5
    assert sum(p.numel() for p in trained(model).values()) == sum(R + a.out_features for a in each(model))


# ---- two learning rates, corrected gradients ------------------------------------------------------------------------


def test_lora_plus_is_peft_s_optimizer(base: Path) -> None:
    cfg = replace(config("loraplus", targets=("q_proj", "down_proj")), loraplus_lr_ratio=6.0)
    ours, theirs = pair(base, cfg)
    optimizer, _ = optim.make_optimizer(ours, OptimConfig(learning_rate=1.0, weight_decay=0.02))
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    optim.set_learning_rate(optimizer, 1e-3)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 6.0, "loraplus_weight_decay": 0.02, "eps": 1e-3}
    expected = create_loraplus_optimizer(theirs, torch.optim.AdamW, **options)
    for step in range(10):
        our_loss(ours, step).backward()
        their_loss(theirs, step).backward()
        for each_optimizer in (optimizer, expected):
            each_optimizer.step()
            each_optimizer.zero_grad()
        for name, parameter in own(ours).items():
            assert ref.relative(parameter, peft_own(theirs)[name]) < EXACT, (step, name)


def test_other_variants_have_one_learning_rate(base: Path) -> None:
    for variant in set(ADAPTERS) - {"loraplus"}:
        optimizer, _ = optim.make_optimizer(adapted(base, config(variant)), OptimConfig(learning_rate=0.5))
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}
        for group in optimizer.param_groups:
            assert {group["weight_decay"] == 0 for p in group["params"]} == {p.ndim < 2 for p in group["params"]}


def test_lora_fa_corrects_gradients_as_peft_s_optimizer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps. PEFT's optimizer multiplies in bf16 where it can; here it is told that it cannot."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    cfg = config("lora_fa", targets=("q_proj", "down_proj"))
    ours, theirs = pair(base, cfg)
    expected = create_lorafa_optimizer(theirs, r=R, lora_alpha=ALPHA, lr=1e-3, weight_decay=0.01)
    names = {f"plain {name}": p for name, p in own(ours).items() if p.requires_grad}
    alike = lorafa.LoraFAOptimizer(  # which corrects nothing of what is not called lora
        [{"params": list(names.values()), "names": [f"plain {i}" for i in range(len(names))]}
         | {"scaling_factors": [None] * len(names)}],
        lr=1e-3, weight_decay=0.01,
    )  # fmt: skip
    for optimizer in (alike, expected):
        optimizer.param_groups[0]["eps"] = 1e-3
    before = {name: p.detach().clone() for name, p in own(ours).items()}
    for step in range(10):
        our_loss(ours, step).backward()
        their_loss(theirs, step).backward()
        raw = {name: p.grad.clone() for name, p in own(ours).items() if p.requires_grad}
        for adapter in each(ours):
            adapter.correct_gradients()
        assert all(ref.relative(own(ours)[name].grad, gradient) > 0.1 for name, gradient in raw.items())
        for optimizer in (alike, expected):
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in own(ours).items():
            assert ref.relative(parameter, peft_own(theirs)[name]) < EXACT, (step, name)
            assert torch.equal(parameter, before[name]) == ("lora_A" in name), name


def test_an_update_corrects_gradients_after_their_norm(base: Path) -> None:
    model = adapted(base, config("lora_fa", targets=("q_proj",)))
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    loss = our_loss(model.train(), 0)
    loss.backward()
    (adapter,) = each(model)
    raw, before = adapter.lora_B.grad.clone(), adapter.lora_B.detach().clone()
    norm, finite = optim.update(model, optimizer, 0.25 * raw.norm().item(), loss.detach())
    assert norm.item() == pytest.approx(raw.norm().item(), rel=1e-6) and finite
    A = adapter.lora_A.double()
    corrected = raw.double() @ torch.linalg.inv(A @ A.T) / (ALPHA / R) ** 2
    assert ref.relative(before - adapter.lora_B, 0.25 * corrected) < 1e-4


# ---- its files ------------------------------------------------------------------------------------------------------


def save(folder: Path, model: Llama, cfg: LoRAConfig, base: Path) -> Path:
    peft_format.save(folder, model, cfg, ModelConfig(path=str(base)))
    return folder


def load(base: Path, folder: Path) -> Llama:
    cfg, _ = peft_format.read_config(folder)
    model = pretrained.load(base)
    adapters.attach(model, cfg)
    peft_format.load(folder, model)
    return model.eval()


@every
def test_peft_loads_what_we_save_and_so_do_we(base: Path, tmp_path: Path, variant: str) -> None:
    cfg = config(variant, dropout=0.1)
    ours = adapted(base, cfg).eval()
    folder = save(tmp_path / "adapter", ours, cfg, base)
    tokens, _ = batch(5)
    expected = ours(tokens)
    theirs = peft.PeftModel.from_pretrained(ref.reference(base), folder).eval()
    assert ref.relative(theirs(input_ids=tokens).logits, expected) < EXACT
    assert ref.relative(load(base, folder)(tokens), expected) < EXACT
    assert ref.relative(ref.reference(base)(input_ids=tokens).logits, expected) > 0.01  # the adapter is seen
    said = json.loads((folder / peft_format.CONFIG).read_text())
    assert said.get("lora_dropout", said.get("vera_dropout")) == 0.1
    assert said.keys() <= theirs.peft_config["default"].to_dict().keys() | {"lora_bias"}  # nothing PEFT would warn of
    assert said.get("init_lora_weights", True) is True  # nobody changes a base to load it


@by_peft
def test_we_load_what_peft_saves(base: Path, tmp_path: Path, variant: str) -> None:
    _, theirs = pair(base, config(variant))
    theirs.eval().save_pretrained(tmp_path)
    read, where = peft_format.read_config(tmp_path)
    assert where.path == str(base)
    assert read.variant == variant or not ADAPTERS[variant].PEFT_CONFIG  # then it computes what LoRA does
    tokens, _ = batch(5)
    assert ref.relative(load(base, tmp_path)(tokens), theirs(input_ids=tokens).logits) < EXACT


@by_peft
def test_names_shapes_and_dtypes_are_those_peft_writes(base: Path, tmp_path: Path, variant: str) -> None:
    if hasattr(ADAPTERS[variant], "export"):
        pytest.skip("it is handed over as another variant")
    ours, theirs = pair(base, config(variant))
    theirs.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "ours", ours, config(variant), base)
    tensors = [load_file(tmp_path / who / peft_format.WEIGHTS) for who in ("ours", "theirs")]
    kinds = [{name: (t.shape, t.dtype) for name, t in found.items()} for found in tensors]
    assert kinds[0] == kinds[1]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def change(folder: Path, **keys: Any) -> None:
    path = folder / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_dora_folder_never_loads_as_lora(base: Path, tmp_path: Path) -> None:
    """Without its key, PEFT takes it for plain LoRA and says nothing."""
    cfg = config("dora")
    folder = save(tmp_path / "adapter", adapted(base, cfg), cfg, base)
    change(folder, use_dora=False)
    with pytest.raises(UserError, match="lora_magnitude_vector matches nothing"):
        load(base, folder)
    change(folder, use_dora=True, use_rslora=True)
    with pytest.raises(UserError, match=r"use_dora|use_rslora"):
        load(base, folder)


def test_a_lora_folder_never_loads_as_another(base: Path, tmp_path: Path) -> None:
    cfg = config("lora")
    folder = save(tmp_path / "adapter", adapted(base, cfg), cfg, base)
    change(folder, use_dora=True)
    with pytest.raises(UserError, match="lora_magnitude_vector is missing"):
        load(base, folder)
    change(folder, use_dora=False, peft_type="VERA", save_projection=True)
    with pytest.raises(UserError, match="not supported"):
        load(base, folder)


def test_what_a_vera_folder_must_hold(base: Path, tmp_path: Path) -> None:
    cfg = config("vera")
    folder = save(tmp_path / "adapter", adapted(base, cfg), cfg, base)
    change(folder, save_projection=False)
    with pytest.raises(UserError, match=r"peft_type|save_projection"):
        load(base, folder)
    change(folder, save_projection=True, r=R + 1)
    with pytest.raises(UserError, match=r"r = 6, but base_model\.vera_A"):
        load(base, folder)
    change(folder, r=R)
    path = folder / peft_format.WEIGHTS
    tensors = load_file(path)
    del tensors["base_model.vera_B"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"base_model\.vera_B is missing"):
        load(base, folder)


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "peft_type", "init_lora_weights"])
def test_a_variant_that_is_taken_away_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (variant,) = (v for v, kind in ADAPTERS.items() if key in kind.PEFT_CONFIG and v != "olora")
    _, theirs = pair(base, config(variant))
    theirs.save_pretrained(tmp_path)
    monkeypatch.delitem(adapters.ADAPTERS, variant)
    with pytest.raises(UserError, match=key):
        peft_format.read_config(tmp_path)


# ---- a run's way ----------------------------------------------------------------------------------------------------


def recipe(base: Path, out: Path, variant: str, method: str) -> Config:
    keys = [f"model.path={base}", "model.dtype=float32", f"method={method}", f"out={out}", f"lora.variant={variant}"]
    keys += [f"lora.r={R}", *([] if variant == "vera" else [f"lora.alpha={ALPHA}"])]
    return load_config([*keys, 'lora.target_modules=["q_proj", "down_proj"]'])


@every
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_is_merged_and_opened_again(wide_base: Path, tmp_path: Path, variant: str, method: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    cfg = recipe(wide_base, run, variant, method)
    files.write_text(run / "config.toml", dump(cfg))
    model = liven(build_model(cfg, wide_base, torch.device("cpu"))).eval()
    peft_format.save(run / "adapter", model, cfg.lora, cfg.model)
    ref.finish(run, wide_base)
    tokens, _ = batch(7)
    expected = model(tokens)
    opened, _, _ = open_model(str(run))
    if not torch.cuda.is_available():
        assert ref.relative(opened(tokens), expected) < EXACT
    merge.merge(run, tmp_path / "merged")
    assert ref.relative(ref.reference(tmp_path / "merged")(input_ids=tokens).logits, expected) < EXACT
    assert runs.open_run(run)[0].lora == adapters.exported(cfg.lora)


@every
def test_it_goes_on_from_a_checkpoint_to_the_bit(wide_base: Path, tmp_path: Path, variant: str) -> None:
    """What is frozen in it is in no checkpoint, and is there again."""
    cfg = recipe(wide_base, tmp_path, variant, "qlora")
    corpus = Corpus.from_documents(([n] * n, [True] * n) for n in range(3, 12))

    def fresh() -> tuple[Llama, torch.optim.Optimizer, Stream]:
        model = build_model(cfg, wide_base, torch.device("cpu")).train()
        stream = Stream(corpus, max_seq_len=16, packing=True, batch_size=1, accumulation=1, pad_id=0, seed=1)
        return model, optim.make_optimizer(model, OptimConfig(learning_rate=1e-2))[0], stream

    def steps(model: Llama, optimizer: torch.optim.Optimizer, stream: Stream, progress: Progress, number: int) -> None:
        for _ in range(number):
            torch.manual_seed(progress.step)
            loss = our_loss(model, progress.step)
            loss.backward()
            optim.update(model, optimizer, 1.0, loss.detach())
            optimizer.zero_grad()
            stream.next_step()
            progress.step += 1
            progress.stream = stream.state()

    model, optimizer, stream = fresh()
    progress = Progress(stream=stream.state())
    steps(model, optimizer, stream, progress, 2)
    (tmp_path / "checkpoints").mkdir()
    checkpoint.write(tmp_path, checkpoint.snapshot(model, optimizer, progress, {"seed": 3}))
    steps(model, optimizer, stream, progress, 2)
    again, optimizer, stream = fresh()
    found = resume(tmp_path, again, optimizer, stream, {"seed": 3}, lambda _: None)
    assert found.step == 2
    steps(again, optimizer, stream, found, 2)
    for name, tensor in peft_format.export(model).items():
        assert torch.equal(tensor, peft_format.export(again)[name]), name


# ---- speed, memory, recipes -----------------------------------------------------------------------------------------


def test_only_what_equals_lora_runs_by_hand(base: Path) -> None:
    refusals = {variant: byhand.refusal(adapted(base, config(variant)).layers[0]) for variant in ADAPTERS}
    assert {variant for variant, why in refusals.items() if why is None} == {"lora", "rslora", "loraplus"}
    assert "LoRAFALinear trains B alone" in refusals["lora_fa"]
    for variant in ("dora", "pissa", "olora", "vera", "oplora"):
        assert "has a forward pass of its own" in refusals[variant]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["lora.loraplus_lr_ratio=4"], "only variant loraplus"),
        (["lora.variant=vera", "lora.alpha=4"], "vera has no alpha"),
        (["lora.variant=oft"], "lora.variant"),
    ],
    ids=str,
)
def test_keys_that_would_do_nothing_are_refused(keys: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(keys)
