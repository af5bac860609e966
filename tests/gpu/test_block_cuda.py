"""Blocks by hand on a card: their gradients are the eager blocks', whatever is kept, offloaded or dropped."""

import itertools

import pytest
import torch
from test_cuda import batch, gradients, llama, worse

from minitune import adapters, attention, byhand, offload
from minitune.adapters import lora
from minitune.byhand import Keep
from minitune.byhand.fan import Fan
from minitune.kernels import dropout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
DEVICE = torch.device("cuda")


def by_hand(method: str, keep: Keep, host: bool = False, own_dense: bool = False, core: str = "varlen"):
    model = llama(torch.bfloat16, method)
    attention.use(model, core, DEVICE, torch.bfloat16)
    if method != "qlora":
        for layer in model.layers:
            byhand.lay_side_by_side(layer)
    assert [byhand.refusal(layer) for layer in model.layers] == [None] * 3
    byhand.by_hand(model, [keep] * 3, offload.HostMemory(DEVICE) if host else None, own_dense)
    return model


CORES = ["varlen"] + (["flash"] if torch.cuda.is_available() and attention.flash_package() else [])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_gradients_are_the_eager_ones_whatever_is_kept(method: str, core: str, monkeypatch) -> None:
    exact = gradients(llama(torch.float32, method))
    eager = llama(torch.bfloat16, method)
    attention.use(eager, core, DEVICE, torch.bfloat16)
    eager = gradients(eager)
    kept = gradients(by_hand(method, Keep.ALL, core=core))
    assert not worse(kept, eager, exact)
    monkeypatch.setattr(offload, "SMALLEST", 1000)
    for keep, host in itertools.product((Keep.QKV, Keep.ATTENTION, Keep.INPUT), (False, True)):
        again = gradients(by_hand(method, keep, host, core=core))
        assert not worse(again, eager, exact)
        if core == "varlen":  # flash attention's backward pass adds up in no fixed order
            same = [torch.equal(again[name], kept[name]) for name in kept]
            assert sum(same) > 0.5 * len(same), (keep, host)
    if method == "qlora":
        assert not worse(gradients(by_hand(method, Keep.ALL, own_dense=True, core=core)), eager, exact)


def test_dropped_inputs_are_the_plain_path_s(monkeypatch) -> None:
    """The same seeds give the same masks in the kernels and in plain PyTorch."""
    seeds = torch.tensor([11, 12, 13, 14, 15, 16, 17, 18], device="cuda")
    monkeypatch.setattr(dropout.Dropout, "draw", lambda share, device, n: dropout.Dropout(seeds, round(share * 65536)))
    model = by_hand("lora", Keep.ALL)
    for adapter in adapters.adapters(model).values():
        adapter.dropout = 0.3
    hands = [layer.forward.__self__ for layer in model.layers]
    for hand in hands:
        for fan in hand.fans:
            fan.dropout = 0.3
    ours = gradients(model)

    place = {"q": (0, 0), "k": (0, 1), "v": (0, 2), "o": (1, 0), "gate": (2, 0), "up": (2, 1), "down": (3, 0)}

    def forward(self, x):
        where, which = place[self.short]
        drop = dropout.Dropout(seeds[2 * where : 2 * where + 2], round(0.3 * 65536))
        mask = dropout.kept(drop, which, x[..., 0].numel(), x.shape[-1]).view(x.shape)
        inner = drop.scale * torch.nn.functional.linear(x * mask, self.lora_A.to(x.dtype))
        return self.base(x) + torch.nn.functional.linear(inner * self.scaling, self.lora_B.to(x.dtype))

    monkeypatch.setattr(lora.LoRALinear, "forward", forward)
    models = {dtype: llama(dtype, "lora") for dtype in (torch.float32, torch.bfloat16)}
    for plain in models.values():
        for name, adapter in adapters.adapters(plain).items():
            adapter.short = name.rpartition(".")[2].removesuffix("_proj")
    results = {dtype: gradients(plain) for dtype, plain in models.items()}
    assert not worse(ours, results[torch.bfloat16], results[torch.float32])
    seeds += 1  # the negative control: other masks
    others = {dtype: gradients(model) for dtype, model in models.items()}
    assert worse(ours, others[torch.bfloat16], others[torch.float32])


def test_a_planted_in_place_bug_would_be_noticed(monkeypatch) -> None:
    """A gradient written over while it is still needed: losses stay, gradients do not."""
    exact = gradients(llama(torch.float32, "lora"))
    eager = gradients(llama(torch.bfloat16, "lora"))
    real = Fan.back

    def back(self, dy, t, drop):
        dx = real(self, dy, t, drop)
        dy.mul_(0.9)
        return dx

    monkeypatch.setattr(Fan, "back", back)
    assert worse(gradients(by_hand("lora", Keep.ALL)), eager, exact)


def test_nothing_waits_for_the_device() -> None:
    """A whole pass forward and backward without a synchronization."""
    model = by_hand("lora", Keep.ATTENTION)
    tokens, labels, positions, documents = batch()
    learned = (labels.flatten() != -100).nonzero()[:, 0]
    model(tokens, positions, documents, labels, learned).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens, positions, documents, labels, learned).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
