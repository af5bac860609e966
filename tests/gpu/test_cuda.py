"""Only what is about the GPU: its attention kernels, four bits, paged moments, compiled blocks, fp32 masters."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import adapters, attention, files, nf4, optim, parallel
from minitune.attention import CausalAttention, Documents, FlashAttention, VarlenAttention
from minitune.config import LoRAConfig, OptimConfig
from minitune.kernels.adamw import join
from minitune.masters import MasterAdamW
from minitune.model import Llama, LlamaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

BF16 = 2.0**-8  # relative distance of neighbouring bf16 numbers
SHAPE = LlamaConfig(
    vocab_size=515,
    hidden_size=512,
    intermediate_size=1088,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


def relative(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.detach().double()
    return ((ours.detach().double() - theirs).norm() / theirs.norm()).item()


def llama(dtype: torch.dtype, method: str, seed: int = 0, layers: int = 3) -> Llama:
    """A random model on the GPU; the same weights for every call with one seed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Llama(replace(SHAPE, num_hidden_layers=layers))
        weights = {name: tuple(p.shape) for name, p in model.named_parameters()}
    values = {
        name: torch.randn(shape, generator=draw) * 0.05 + (1.0 if len(shape) == 1 else 0.0)  # norms lie around one
        for name, shape in weights.items()
    }
    model = model.to_empty(device="cuda")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name].bfloat16())  # the same numbers whatever the dtype
    model.to(dtype)
    if method == "full":
        return model
    if method == "qlora":
        dense = {
            name: module.weight.detach() for name, module in model.layers.named_modules() if type(module) is nn.Linear
        }
        nf4.quantize_linears(model, dtype)
        for name, module in model.layers.named_modules():
            if name in dense:
                module.quantize(dense[name])
    adapters.attach(model, LoRAConfig(r=8, alpha=20, dropout=0.0))
    adapters.reset(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    return model


def batch(step: int = 0) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Two packed rows of 256: tokens, labels, positions (2, 256), documents."""
    lengths = [100, 37, 119, 5, 251]
    tokens = torch.randint(3, SHAPE.vocab_size, (2, 256), generator=torch.Generator().manual_seed(step))
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 256)
    labels = tokens.roll(-1, 1)
    labels[positions % 7 == 3] = -100
    return tokens.cuda(), labels.cuda(), positions.cuda(), Documents.of(lengths).to(torch.device("cuda"))


def backward(model: Llama, step: int = 0) -> Tensor:
    tokens, labels, positions, documents = batch(step)
    loss = model(tokens, positions, documents, labels) / (labels != -100).sum()
    loss.backward()
    return loss.detach()


# ---- attention ------------------------------------------------------------------------------------------------------


def cores() -> list[type[nn.Module]]:
    installed = torch.cuda.is_available() and attention.flash_package() is not None
    skip = pytest.mark.skipif(not installed, reason="no flash-attn package is installed")
    return [VarlenAttention, pytest.param(FlashAttention, marks=skip)]


def qkv(T: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(2, T, 8, 64), (2, T, 2, 64), (2, T, 2, 64)]
    return [torch.randn(s, generator=draw).to("cuda", torch.bfloat16).requires_grad_() for s in shapes]


@pytest.mark.parametrize("core", cores())
@pytest.mark.parametrize("lengths", [[100, 37, 119, 5, 251], [1, 255, 256], None], ids=str)
def test_kernels_agree_with_the_reference(core: type[nn.Module], lengths: list[int] | None) -> None:
    """In bf16, against fp32: outputs and all three gradients, no worse than a few roundings."""
    documents = Documents.of(lengths).to(torch.device("cuda")) if lengths else None
    inputs = qkv(256)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    y, expected = core()(*inputs, documents), CausalAttention()(*exact, documents)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert relative(y, expected) < 2 * BF16
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).cuda()
    (y.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 4 * BF16
    elsewhere = Documents.of([256, 256] if lengths else [99, 157, 256]).to(torch.device("cuda"))
    assert relative(y, CausalAttention()(*exact, elsewhere)) > 20 * BF16  # it sees where documents end


@pytest.mark.parametrize("core", cores())
def test_documents_of_a_row_never_see_each_other(core: type[nn.Module]) -> None:
    """Another document's tokens change no bit of this one's output; each by itself gives the same within bf16."""
    lengths = [100, 37, 119, 5, 251]
    documents = Documents.of(lengths).to(torch.device("cuda"))
    inputs = [x.detach() for x in qkv(256)]
    before = core()(*inputs, documents).view(512, 8, 64)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, 100:137] = torch.randn_like(x[0, 100:137]) * 3  # the second document
    after = core()(*changed, documents).view(512, 8, 64)
    kept = torch.ones(512, dtype=torch.bool)
    kept[100:137] = False
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[~kept], after[~kept])
    ends = [0, *itertools.accumulate(lengths)]
    for start, end in itertools.pairwise(ends):
        alone = [x.reshape(1, 512, -1, 64)[:, start:end].contiguous() for x in inputs]
        assert relative(before[start:end], core()(*alone, None)[0]) < 1e-2


def test_auto_takes_a_kernel_in_bf16_and_the_plain_path_in_fp32() -> None:
    for dtype, plain in ((torch.bfloat16, False), (torch.float32, True)):
        model = Llama(SHAPE)
        attention.use(model, "auto", torch.device("cuda"), dtype)
        assert all((type(layer.self_attn.core) is CausalAttention) is plain for layer in model.layers)


# ---- four bits ------------------------------------------------------------------------------------------------------


def test_four_bits_are_the_same_bytes_as_on_the_cpu() -> None:
    """Every index is; the mean of the scales, a sum taken in another order, may differ in its last bit."""
    weight = (torch.randn(192, 320, generator=torch.Generator().manual_seed(0)) * 0.03).bfloat16()
    made = {}
    for device in ("cpu", "cuda"):
        with torch.device(device):
            made[device] = nf4.NF4Linear(320, 192, False, torch.bfloat16)
        made[device].quantize(weight)
    cpu, gpu = made["cpu"], made["cuda"]
    assert torch.equal(cpu.packed, gpu.packed.cpu()) and torch.equal(cpu.absmax, gpu.absmax.cpu())
    torch.testing.assert_close(cpu.nested_absmax, gpu.nested_absmax.cpu(), rtol=1e-6, atol=0)
    torch.testing.assert_close(cpu.nested_offset, gpu.nested_offset.cpu(), rtol=1e-6, atol=0)
    dense = [module.dense_weight().cpu() for module in (cpu, gpu)]
    assert (dense[0] != dense[1]).float().mean() < 0.01  # a scale's last bit seldom changes a bfloat16
    torch.testing.assert_close(*dense, rtol=2**-7, atol=0)
    assert 0 < relative(dense[1], weight) < 0.15


def test_four_bits_and_their_gradient_on_the_gpu() -> None:
    module = nf4.NF4Linear(320, 192, True, torch.bfloat16).cuda()
    with torch.no_grad():
        module.bias.normal_()
    module.quantize(torch.randn(192, 320) * 0.03)
    x = torch.randn(7, 5, 320, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    y, expected = module(x), F.linear(plain, module.dense_weight()) + module.bias
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert relative(y, expected) < BF16 and relative(x.grad, plain.grad) < BF16


# ---- moments --------------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Sizes on both sides of every threshold of bitsandbytes: 32 bits below 4096 elements, paged from 100,000."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"vector": (96,), "small": (40, 50), "middle": (96, 300), "large": (512, 384)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draw).cuda()))

    def take_steps(self, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        """Updates from gradients that depend on the step alone, so that only the optimizer is compared."""
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            for parameter in self.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw).cuda()
            optim.set_learning_rate(optimizer, 1e-2 / (1 + number))
            optim.update(self, optimizer, 1.0, torch.zeros((), device="cuda"))
            optimizer.zero_grad()
        torch.cuda.synchronize()  # paged memory is the host's too


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_twenty_steps_a_stop_and_twenty_more_are_forty(tmp_path: Path, name: str) -> None:
    cfg = OptimConfig(name=name, weight_decay=0.1)
    straight = Weights()
    optimizer, line = optim.make_optimizer(straight, cfg)
    assert line == name
    straight.take_steps(optimizer, range(20))
    tensors, numbers = optim.state(straight, optimizer)
    files.write_tensors(tmp_path / "optimizer.safetensors", tensors)
    files.write_tensors(tmp_path / "trained.safetensors", optim.trained_parameters(straight))
    straight.take_steps(optimizer, range(20, 40))

    for keep_moments in (True, False):  # False: the negative control
        resumed = Weights()
        resumed.load_state_dict(load_file(tmp_path / "trained.safetensors"))
        again, _ = optim.make_optimizer(resumed, cfg)
        if keep_moments:
            numbers = json.loads(json.dumps(numbers))
            optim.load_state(resumed, again, load_file(tmp_path / "optimizer.safetensors"), numbers)
        resumed.take_steps(again, range(20, 40))
        for key, parameter in straight.named_parameters():
            assert torch.equal(parameter, dict(resumed.named_parameters())[key]) is keep_moments, key


def test_paged_moments_are_paged_and_eight_bits_are_eight() -> None:
    for name, dtype in (("paged_adamw_32bit", torch.float32), ("paged_adamw_8bit", torch.uint8)):
        model = Weights()
        optimizer, _ = optim.make_optimizer(model, OptimConfig(name=name))
        model.take_steps(optimizer, range(1))
        moments = optimizer.state[model.large]["state1"]
        assert moments.dtype == dtype and getattr(moments, "is_paged", False)
        assert optimizer.state[model.vector]["state1"].dtype == torch.float32


@pytest.mark.parametrize(("name", "bound"), [("paged_adamw_32bit", 1e-3), ("paged_adamw_8bit", 0.1)])
def test_paged_is_adamw(name: str, bound: float) -> None:
    """bitsandbytes takes the decay off after the update, not before: a share of lr * weight_decay of it."""
    start, plain, paged = Weights(), Weights(), Weights()
    for model, kind in ((plain, "adamw"), (paged, name)):
        optimizer, _ = optim.make_optimizer(model, OptimConfig(name=kind, weight_decay=0.1))
        model.take_steps(optimizer, range(10))
    for key, p in plain.named_parameters():
        before = dict(start.named_parameters())[key]
        assert relative(dict(paged.named_parameters())[key] - before, p - before) < bound, key


# ---- compiled blocks ------------------------------------------------------------------------------------------------


def gradients(model: Llama) -> dict[str, Tensor]:
    backward(model)
    found = {name: p.grad.clone() for name, p in optim.trained_parameters(model).items()}
    model.zero_grad()
    return found


def worse(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The gradients that are further from fp32's than those of eager bf16 are (themselves some 5 %), and how far."""
    assert ours.keys() == eager.keys() == exact.keys()
    errors = {name: relative(ours[name], exact[name]) for name in exact}
    return {name: error for name, error in errors.items() if error > 1.5 * relative(eager[name], exact[name]) + 0.01}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_compiled_blocks_have_the_eager_gradients(method: str, recompute: bool) -> None:
    torch._dynamo.reset()
    exact = gradients(llama(torch.float32, method))
    model = llama(torch.bfloat16, method)
    attention.use(model, "varlen", torch.device("cuda"), torch.bfloat16)
    eager = gradients(model)
    parallel.compile_blocks(model)
    if recompute:
        parallel.recompute_blocks(model.layers)
    compiled = gradients(model)
    assert method == "full" or all(g.dtype == torch.float32 for g in compiled.values())
    assert not worse(compiled, eager, exact)


def test_a_planted_wrong_gradient_would_be_noticed() -> None:
    """The negative control: a block that computes the same output and passes on four fifths of the gradient."""
    exact = gradients(llama(torch.float32, "lora"))
    model = llama(torch.bfloat16, "lora")
    eager = gradients(model)
    assert not worse(eager, eager, exact)
    block = model.layers[1]
    real: Callable[..., Tensor] = block.forward
    block.forward = lambda x, *rest: real(x * 0.8 + x.detach() * 0.2, *rest)
    wrong = worse(gradients(model), eager, exact)
    assert {name for name in exact if name.startswith("model.layers.0.")} <= wrong.keys()


def test_one_compiled_block_serves_all() -> None:
    """Blocks are equal, so their code serves one more of them, and later steps, as it is."""
    graphs = []
    for layers in (2, 3):  # two, for the input of the very first needs no gradient
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = llama(torch.bfloat16, "lora", layers=layers)
        attention.use(model, "varlen", torch.device("cuda"), torch.bfloat16)
        parallel.compile_blocks(model)
        for step in range(3):
            backward(model, step)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1, graphs


# ---- full -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_full_in_bf16_keeps_fp32_masters(name: str) -> None:
    """Steps far below bf16's resolution add up in the lower halves, and what multiplies is bf16."""
    model = llama(torch.bfloat16, "full")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer, line = optim.make_optimizer(model, OptimConfig(name=name, weight_decay=0.0))
    assert line == name and type(optimizer) is MasterAdamW
    for step in range(3):
        optim.set_learning_rate(optimizer, 1e-6)
        loss = backward(model, step)
        optim.update(model, optimizer, 0.0, loss)
        optimizer.zero_grad()
    torch.cuda.synchronize()
    for key, p in model.named_parameters():
        assert p.dtype == torch.bfloat16, key
        masters = join(p.detach(), optimizer.state[p]["lower"])
        moved = (masters != before[key].float()).float().mean().item()
        rounded = (p != before[key]).float().mean().item()
        if p.ndim == 2 and "embed" not in key:
            assert moved > 0.5 and rounded < 0.1, (key, moved, rounded)
    for group in optimizer.param_groups:
        for p in group["params"]:
            large = p.numel() >= 4096 and name == "paged_adamw_8bit"
            assert optimizer.state[p]["exp_avg"].dtype == (torch.uint8 if large else torch.float32)


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_masters_move_as_fp32_weights_do(name: str) -> None:
    """Ten steps of the split masters against ten of an fp32 copy under the optimizer for fp32, from the same start."""
    whole, halves = Weights(), Weights()
    with torch.no_grad():
        for p in (*whole.parameters(), *halves.parameters()):
            p.copy_(p.bfloat16())
    start = {key: p.detach().clone() for key, p in whole.named_parameters()}
    for key, p in list(halves.named_parameters()):
        setattr(halves, key, nn.Parameter(p.detach().bfloat16()))
    optimizers = []
    for model in (whole, halves):
        cfg = OptimConfig(name=name if model is halves or "8bit" in name else "adamw", weight_decay=0.1)
        optimizers.append(optim.make_optimizer(model, cfg)[0])
    for number in range(10):
        for model, optimizer in zip((whole, halves), optimizers, strict=True):
            draw = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=draw).bfloat16()
                parameter.grad = gradient.to("cuda", parameter.dtype)
            optim.set_learning_rate(optimizer, 1e-3)
            optim.update(model, optimizer, 1.0, torch.zeros((), device="cuda"))
    torch.cuda.synchronize()
    for key, p in halves.named_parameters():
        masters = join(p.detach(), optimizers[1].state[p]["lower"])
        moved, expected = masters - start[key], dict(whole.named_parameters())[key] - start[key]
        bound = 5e-2 if "8bit" in name else 1e-4
        assert relative(moved, expected) < bound, (key, relative(moved, expected))
