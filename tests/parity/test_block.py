"""Blocks by hand against the same blocks by way of autograd: losses and every gradient, whatever is kept.

On the CPU, where the hand-written passes run on the kernels' plain twins; with Triton's interpreter also on the
kernels themselves. tests/gpu/test_block_cuda.py has the same on a card.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import adapters, byhand, generate, nf4, offload, optim
from minitune.adapters.lora import LoRALinear
from minitune.attention import Documents
from minitune.byhand import Keep, block, fan
from minitune.byhand.attention import AttentionPass
from minitune.byhand.fan import Dense, Fan
from minitune.config import LINEARS, LoRAConfig, OptimConfig
from minitune.kernels import launch
from minitune.kernels.dropout import Dropout, kept
from minitune.model import Llama, LlamaConfig
from minitune.offload import HostMemory

CPU = torch.device("cpu")
LENGTHS = [30, 17, 33, 1, 79]  # of the documents in two rows of 80
SHORTER = [15, 8, 17, 1, 39]  # in two rows of 40
SHAPE = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
METHODS = ["lora", "some", "qlora", "full"]  # "some": adapters on two of seven linears


def llama(method: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, layers: int = 3) -> Llama:
    """The same numbers for every call; no adapter is at its start, and alpha / r is neither 1 nor 2."""
    draw = torch.Generator().manual_seed(0)
    model = Llama(replace(SHAPE, num_hidden_layers=layers, head_dim=32 if method == "qlora" else 20))
    with torch.no_grad():
        for parameter in model.parameters():
            size = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * size)
    model.to(dtype)
    if method == "qlora":
        dense = {name: m.weight.detach() for name, m in model.layers.named_modules() if type(m) is nn.Linear}
        nf4.quantize_linears(model, dtype)
        for name, module in model.layers.named_modules():
            if name in dense:
                module.quantize(dense[name])
    if method != "full":
        targets = ("v_proj", "gate_proj") if method == "some" else LINEARS
        adapters.attach(model, LoRAConfig(r=5, alpha=7, dropout=dropout, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.train()


def by_hand(model: Llama, keep: Keep = Keep.ALL, host: HostMemory | None = None, own_dense: bool = False) -> Llama:
    byhand.by_hand(model, [keep] * len(model.layers), host, own_dense)
    return model


def batch(seed: int = 1, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Documents, Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)
    tokens = torch.randint(3, 61, positions.shape, generator=torch.Generator().manual_seed(seed))
    labels = tokens.roll(-1, 1)
    labels[positions % 5 == 3] = -100
    return tokens, positions, Documents.of(lengths), labels


def gradients(model: Llama, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    """The loss, as "loss", and every gradient."""
    loss = model(*batch(lengths=lengths)) / 100
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


EVERY_WAY = [(keep, away) for keep in Keep for away in (False, True)]  # and whether what is kept is on the host
SOME_WAYS = [(Keep.ALL, False), (Keep.QKV, True), (Keep.INPUT, True)]  # from all that is kept to nothing


@dataclass(frozen=True)
class Kernels:
    layers: int
    lengths: list[int]
    ways: list[tuple[Keep, bool]]


KERNELS = {
    "plain twins": Kernels(3, LENGTHS, EVERY_WAY),
    "Triton": Kernels(2, SHORTER, SOME_WAYS),  # its interpreter takes seconds a block
    "Triton, every way": Kernels(3, LENGTHS, EVERY_WAY),
}


@pytest.fixture(params=["plain twins", "Triton", pytest.param("Triton, every way", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param != "plain twins":
        if launch.triton is None or os.environ.get("TRITON_INTERPRET") != "1" or not kernel_cases.interpreter_works():
            pytest.skip("needs Triton whose interpreter works here")
        for module in kernel_cases.MODULES:
            monkeypatch.setattr(module, "fused", lambda x: True)
    return KERNELS[request.param]


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_autograd_s_whatever_is_kept(method: str, kernels: Kernels, monkeypatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1000)
    monkeypatch.setattr(offload, "WIDEST", 4)
    expected = gradients(llama(method, layers=kernels.layers), kernels.lengths)
    found = {}
    for keep, away in kernels.ways:
        host = HostMemory(CPU) if away else None
        found[keep, away] = gradients(by_hand(llama(method, layers=kernels.layers), keep, host), kernels.lengths)
        assert distance(found[keep, away], expected) < 1e-5, (keep, away)
    first, *others = found.values()
    assert all(distance(other, first) == 0 for other in others)  # computing again gives the same bits
    if method == "qlora" and kernels.ways is EVERY_WAY:
        assert distance(gradients(by_hand(llama(method), own_dense=True)), first) == 0


def test_blocks_that_no_backward_pass_comes_to_leave_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1000)
    monkeypatch.setattr(offload, "WIDEST", 4)

    def above(model: Llama) -> Llama:
        model.layers[0].requires_grad_(False)
        return model

    host = HostMemory(CPU)
    model = by_hand(above(llama("lora")), Keep.ATTENTION, host)
    expected = gradients(above(llama("lora")))
    for _ in range(3):
        assert distance(gradients(model), expected) < 1e-5
        assert host.waiting == []
        model.zero_grad()


def test_side_by_side_weights_change_nothing_and_are_the_models() -> None:
    for method in ("lora", "full"):
        model = llama(method)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        apart = gradients(by_hand(model))
        assert fan.side_by_side([Fan("x", qkv(model), Dense()).bases[i].weight for i in range(3)]) is None
        for layer in model.layers:
            byhand.lay_side_by_side(layer)
        together = fan.side_by_side([Fan("x", qkv(model), Dense()).bases[i].weight for i in range(3)])
        assert together.shape == (160, 64)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert distance(gradients(model), apart) < 1e-6


def qkv(model: Llama) -> list[nn.Module]:
    attention = model.layers[1].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def test_dropped_inputs_are_dropped_everywhere_alike(kernels: Kernels, monkeypatch) -> None:
    """A pass by autograd with the same masks written out; forward, backward and recomputed.

    Held to fp64: two fp32 results may lie on either side of it. By hand is at most 3 times as far as autograd in fp32.
    """
    seeds = torch.arange(11, 19)
    monkeypatch.setattr(Dropout, "draw", lambda share, device, n: Dropout(seeds, round(share * 65536)))
    dropping = partial(llama, "lora", dropout=0.3, layers=kernels.layers)
    found = [gradients(by_hand(dropping(), keep), kernels.lengths) for keep in dict(kernels.ways)]

    place = {"q": (0, 0), "k": (0, 1), "v": (0, 2), "o": (1, 0), "gate": (2, 0), "up": (2, 1), "down": (3, 0)}

    def forward(self: LoRALinear, x: Tensor) -> Tensor:
        where, which = place[self.short]
        drop = Dropout(seeds[2 * where : 2 * where + 2], round(0.3 * 65536))
        dropped = drop.scale * x * kept(drop, which, x[..., 0].numel(), x.shape[-1]).view(x.shape)
        return self.base(x) + self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)

    written_out = dropping()
    for name, adapter in adapters.adapters(written_out).items():
        adapter.short = name.rpartition(".")[2].removesuffix("_proj")
    with monkeypatch.context() as patch:
        patch.setattr(LoRALinear, "forward", forward)
        by_autograd = gradients(written_out, kernels.lengths)
        patch.setattr(Tensor, "float", Tensor.double)  # where the model asks for fp32, it is fp64 too
        exact = gradients(written_out.double(), kernels.lengths)
        seeds += 1  # the negative control: other masks
        others = gradients(written_out, kernels.lengths)

    def far(found: dict[str, Tensor]) -> float:
        return distance(*({name: x.double() for name, x in each.items()} for each in (found, exact)))

    assert far(others) > 0.1
    assert far(by_autograd) < 1e-5
    assert all(far(each) < 3 * far(by_autograd) for each in found)
    seeds -= 1
    undropped = gradients(llama("lora", layers=kernels.layers), kernels.lengths)
    assert distance(gradients(by_hand(dropping().eval()), kernels.lengths), undropped) < 1e-5


def test_an_update_below_half_a_step_of_bf16_is_not_lost() -> None:
    """A first AdamW update moves the loss in bf16 as far as in fp32. Added to outputs that are bf16 already, as
    adapters by way of autograd are, most of it is rounded away."""

    def gain(model: Llama) -> float:
        optimizer, _ = optim.make_optimizer(model, OptimConfig(learning_rate=1e-4))
        before = model(*batch()) / 100
        before.backward()
        optim.update(model, optimizer, 0.0, before.detach())
        with torch.no_grad():
            return (before - model(*batch()) / 100).item()

    def fresh(dtype: torch.dtype) -> Llama:
        model = llama("lora", dtype=dtype, layers=8)
        adapters.reset(model, 0)
        return model

    exact = gain(fresh(torch.float32))
    assert exact > 0
    assert gain(by_hand(fresh(torch.bfloat16))) == pytest.approx(exact, rel=0.25)
    assert gain(fresh(torch.bfloat16)) < 0.3 * exact


# ---- what is done, and how often ------------------------------------------------------------------------------------


def test_a_recomputed_block_never_redoes_down_and_makes_weights_dense_once(monkeypatch) -> None:
    products, made = [], []
    real_product, real_dense = Fan.product, nf4.NF4Linear.dense_weight
    monkeypatch.setattr(Fan, "product", lambda self, x: products.append(self.name) or real_product(self, x))
    adapted, but_last = Fan.adapted, Fan.product_but_last
    monkeypatch.setattr(Fan, "adapted", lambda self, *a: products.append(self.name) or adapted(self, *a))
    monkeypatch.setattr(Fan, "product_but_last", lambda self, *a: products.append(self.name) or but_last(self, *a))

    def dense_weight(self, out=None):
        made.append(self)
        return real_dense(self, out)

    monkeypatch.setattr(nf4.NF4Linear, "dense_weight", dense_weight)
    model = by_hand(llama("qlora"), Keep.INPUT)
    loss = model(*batch())
    assert sorted(products) == sorted(["qkv", "o", "gate_up", "down"] * 3) and len(made) == 7 * 3
    products.clear()
    made.clear()
    loss.backward()
    assert sorted(products) == sorted(["qkv", "o", "gate_up"] * 3)
    # Recompute and gradients share what is made dense; the last block finds what its forward pass left.
    assert len(made) == 7 * 2

    made.clear()
    model = by_hand(llama("qlora"), Keep.INPUT, own_dense=True)
    for _ in range(2):
        model(*batch()).backward()
    assert len(made) == 7 * 3  # once and for all


@pytest.mark.parametrize(("keep", "calls"), [(Keep.ALL, 3), (Keep.QKV, 3), (Keep.ATTENTION, 3), (Keep.INPUT, 6)])
def test_attention_is_computed_again_only_where_its_output_was_not_kept(keep: Keep, calls: int) -> None:
    model, seen = by_hand(llama("lora"), keep), []
    for layer in model.layers:
        layer.self_attn.core.register_forward_hook(lambda *_: seen.append(1))
    gradients(model)
    assert len(seen) == calls


@pytest.mark.parametrize(("keep", "times"), [(Keep.ALL, 1), (Keep.QKV, 1), (Keep.ATTENTION, 2), (Keep.INPUT, 2)])
def test_q_k_and_v_are_computed_again_only_where_they_were_not_kept(keep: Keep, times: int, monkeypatch) -> None:
    model, seen, real = by_hand(llama("lora"), keep), [], Fan.product_but_last
    monkeypatch.setattr(Fan, "product_but_last", lambda self, *given: seen.append(1) or real(self, *given))
    gradients(model)
    assert len(seen) == times * len(model.layers)


@pytest.mark.parametrize(("keep", "most"), [(Keep.ALL, 1.0), (Keep.QKV, 0.6), (Keep.ATTENTION, 0.4), (Keep.INPUT, 0.2)])
def test_what_is_kept_between_the_passes(keep: Keep, most: float) -> None:
    """Bytes alive after the forward pass, beside those of a block that keeps all (attention's output counts twice
    here, where the plain core puts it together from its documents')."""

    def alive(keep: Keep) -> int:
        model = by_hand(llama("lora"), keep)
        passes = []
        real = AttentionPass.__init__

        def noting(self, *rest):
            passes.append(self)
            real(self, *rest)

        AttentionPass.__init__ = noting
        storages: dict[int, int] = {}

        def see(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        try:
            with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
                loss = model.model(*batch()[:3])
        finally:
            AttentionPass.__init__ = real
        for each in passes:
            for x in getattr(each, "given", None) or ():
                assert keep is Keep.ALL or x.numel() == 0  # else host memory would hold a second one
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        del loss
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in storages.items() if place not in weights)

    assert alive(keep) <= most * alive(Keep.ALL)


def test_a_prompt_is_answered_by_hand_as_by_autograd() -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    written = [generate.generate(model, prompts, 9, frozenset()) for model in (llama("lora"), by_hand(llama("lora")))]
    assert written[0] == written[1]


def test_no_document_sees_another_by_hand() -> None:
    """Another document's tokens change no bit of this one's hidden states."""
    model = by_hand(llama("lora"))
    tokens, positions, documents, _ = batch()
    with torch.no_grad():
        before = model.model(tokens, positions, documents).view(160, -1)
        changed = tokens.clone().view(-1)
        changed[30:47] = (changed[30:47] + 1) % 61
        after = model.model(changed.view(2, 80), positions, documents).view(160, -1)
    same = (before == after).all(1)
    assert same[:30].all() and same[47:].all() and not same[30:47].any()


# ---- mistakes it would show -----------------------------------------------------------------------------------------


def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is written over while it is still needed: the loss stays right."""
    real = Fan.back

    def back(self, dy, t, drop):
        dx = real(self, dy, t, drop)
        dy.mul_(0.9)
        return dx

    monkeypatch.setattr(Fan, "back", back)


def scaled_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fan.up
    monkeypatch.setattr(fan, "up", lambda t, A, n, drop: 1.4 * real(t, A, n, drop))


def swapped_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = block.swiglu_backward

    def swiglu_backward(*given, **named):
        found = real(*given, **named)
        return found._replace(t=found.t.roll(found.t.shape[1] // 2, 1))

    monkeypatch.setattr(block, "swiglu_backward", swiglu_backward)


def stale_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of A and B that are made once and never again."""
    real = Fan.refresh
    monkeypatch.setattr(Fan, "refresh", lambda self: real(self) if self.A is None else iter(()))


@pytest.mark.parametrize("mistake", [in_place, scaled_once_more, swapped_gate_and_up, stale_adapters])
def test_a_mistake_in_the_passes_is_noticed(mistake: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    models = [llama("lora"), by_hand(llama("lora"))]
    for _ in range(2):
        for model in models:
            (model(*batch()) / 100).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
    found = [gradients(model) for model in models]
    assert distance(found[1], found[0]) > 1e-3


# ---- what does not run by hand --------------------------------------------------------------------------------------


class Other(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1


def test_what_cannot_run_by_hand_is_said() -> None:
    def refusal(change: Callable[[Llama], None], method: str = "lora") -> str | None:
        model = llama(method)
        change(model)
        return byhand.refusal(model.layers[1])

    mlp = 1
    assert refusal(lambda m: None) is None and refusal(lambda m: None, "full") is None
    assert refusal(lambda m: None, "qlora") is None and refusal(lambda m: None, "some") is None
    other = Other(nn.Linear(64, 192, bias=False), LoRAConfig(r=5, alpha=7, dropout=0.0))
    assert "Other" in refusal(lambda m: setattr(m.layers[mlp].mlp, "up_proj", other))
    rank = LoRALinear(nn.Linear(64, 192, bias=False), LoRAConfig(r=6, alpha=7, dropout=0.0))
    assert "differ" in refusal(lambda m: setattr(m.layers[mlp].mlp, "up_proj", rank))
    assert "bias" in refusal(lambda m: setattr(m.layers[mlp].mlp, "up_proj", nn.Linear(64, 192)), "full")
    assert "Identity" in refusal(lambda m: setattr(m.layers[mlp].mlp, "up_proj", nn.Identity()), "full")
    wide = replace_adapters(llama("lora"), 65)
    assert "above 64" in byhand.refusal(wide.layers[0])


def replace_adapters(model: Llama, r: int) -> Llama:
    for adapter in adapters.adapters(model).values():
        adapter.lora_A = nn.Parameter(torch.zeros(r, adapter.in_features))
    return model


def test_gradients_that_add_up_over_micro_batches_add_up_in_fp32() -> None:
    """bf16 weights whose gradients are asked for in fp32: each product's is never rounded, nor is the sum."""
    exact = llama("full")
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    model = by_hand(llama("full", dtype=torch.bfloat16))
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    for each in (exact, model):
        for seed in (1, 2):
            (each(*batch(seed)) / 100).backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32, name
        assert ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 0.05, name  # of bf16 activations
    down = model.layers[1].mlp.down_proj.weight.grad
    assert (down != down.bfloat16().float()).float().mean() > 0.9


def test_host_memory_does_not_grow_with_the_widths_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not packed are as wide as the longest of a batch, each batch anew."""
    monkeypatch.setattr(offload, "SMALLEST", 1000)
    monkeypatch.setattr(offload, "WIDEST", 4)
    host = HostMemory(CPU)
    model = by_hand(llama("lora"), Keep.QKV, host)

    def held() -> int:
        return sum(stretch.nbytes for shelf in host.free.values() for stretch in shelf)

    gradients(model, [64])
    of_the_widest = held()
    for width in range(20, 64, 2):
        gradients(model, [width])
    assert of_the_widest > 0 and held() <= 2 * of_the_widest and host.waiting == []
