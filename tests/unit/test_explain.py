"""explain: counts against the model, FLOPs against PyTorch's own counter, spectra against the dense product's."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minitune import adapters, optim, parallel, seeds
from minitune.adapters.lora import LoRALinear
from minitune.config import Config, LoRAConfig, load_config
from minitune.explain import page, recipe, updates
from minitune.pretrained import TINY, read_config
from minitune.train import train

CPU = torch.device("cpu")


def asked(*keys: str) -> Config:
    return load_config(["model.dtype=float32", "data.max_seq_len=33", "train.batch_size=3", *keys])


@pytest.mark.parametrize(
    "keys",
    [
        ("method=lora", "lora.dropout=0"),
        ("method=lora", "lora.r=5"),
        ("method=lora", 'lora.target_modules=["v_proj", "down_proj"]'),
        ("method=lora", 'lora.target_modules=["up_proj"]'),
        ("method=lora", 'lora.modules_to_save=["lm_head"]'),
        ("method=lora", "lora.trainable_token_indices=[5, 3]"),
        ("method=full",),
    ],
    ids=str,
)
def test_flops_are_those_of_pytorchs_counter(keys: tuple[str, ...]) -> None:
    """On the model itself, with memory and numbers. The counter takes attention's square whole, causal or not."""
    cfg = asked(*keys)
    view = recipe.view(cfg)
    model = recipe.shaped(read_config(TINY), cfg)
    parallel.materialize(model.modules(), CPU)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    B, T = 3, 33
    tokens = torch.randint(0, 2048, (B, T))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as there:  # the CPU's own kernel goes uncounted
        logits = model(tokens)
    with FlopCounterMode(display=False) as back:
        logits.float().logsumexp(-1).sum().backward()
    for way, counter in (("forward", there), ("backward", back)):
        flops = {part: ways[way] for part, ways in view.flops.items()}
        flops["attention"] *= 2 * T / (T + 1)  # half of the square, and its diagonal -> the square
        assert B * T * sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_an_adapters_flops_have_a_closed_form() -> None:
    """2 r (in + out) there, and back twice that; a rank of another size would not pass."""
    for one in recipe.view(asked("method=qlora", "lora.r=5")).adapted:
        wide = {"down_proj": (512, 256), "k_proj": (256, 128), "v_proj": (256, 128)}.get(one.name, (256, 256))
        wide = (256, 512) if one.name in ("gate_proj", "up_proj") else wide
        assert one.base.forward == one.base.backward == 2 * math.prod(wide)
        assert one.adapter.forward == 2 * 5 * sum(wide) and one.adapter.backward == 4 * 5 * sum(wide)
        assert one.adapter.forward != 2 * 6 * sum(wide) and one.adapter.bytes_moved > 0


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_counts_and_bytes_are_the_models(method: str) -> None:
    cfg = asked(f"method={method}")
    view = recipe.view(cfg)
    model = recipe.shaped(read_config(TINY), cfg)
    assert sum(view.bytes["trained"].values()) == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(view.bytes["frozen"].values()) == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    dense = sum(p.numel() for p in recipe.shaped(read_config(TINY), asked("method=full")).parameters())
    assert view.numbers["frozen"] + (view.numbers["trained"] if method == "full" else 0) == dense
    shown = sum(group.blocks * (p.frozen + p.trained) for group in view.groups for p in group.parts)
    assert shown == sum(view.numbers.values())
    assert [group.blocks for group in view.groups] == [1, 4]
    parallel.materialize(model.modules(), CPU)
    optimizer, _ = optim.make_optimizer(model, cfg.optim)
    state = optim.empty_state(model, optimizer).values()
    held = sum(v.nbytes for values in state for key, v in values.items() if key != "step")
    assert held == sum(view.bytes["moments"].values())


def test_blocks_that_differ_are_shown_apart() -> None:
    model = recipe.shaped(read_config(TINY), asked("method=lora"))
    third = model.layers[2].mlp
    third.up_proj = third.up_proj.base
    assert [group.blocks for group in recipe.groups(model)] == [1, 2, 1, 1]


@pytest.mark.parametrize(("out", "into", "r"), [(37, 53, 5), (8, 40, 13), (64, 64, 1)])
def test_singular_values_are_those_of_the_dense_product(out: int, into: int, r: int) -> None:
    """Also where r is more than a side of the weight."""
    A, B = torch.randn(r, into), torch.randn(out, r)
    found = updates.of_product(B, A, 1.7)
    expected = torch.linalg.svdvals(1.7 * B.double() @ A.double())
    kept = min(len(found), len(expected))
    torch.testing.assert_close(found[:kept], expected[:kept], rtol=1e-12, atol=1e-12)
    assert found[kept:].sum() < 1e-10 and expected[kept:].sum() < 1e-10
    without_scale = updates.of_product(B, A, 1.0)
    assert not torch.allclose(without_scale[:kept], expected[:kept], rtol=1e-3)


def test_ranks_of_known_spectra() -> None:
    for values, rank in ([1, 1, 1, 1], 4.0), ([7, 0, 0], 1.0), ([0, 0], 0.0):
        assert updates.effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(rank)
    values = torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # squares: 9 of 12, then 10, 11, 12
    assert updates.rank_of_energy(values) == 3 and updates.rank_of_energy(values, 0.7) == 1
    assert updates.rank_of_energy(torch.zeros(3)) == 0


class Gained(LoRALinear):
    """A variant that is no plain product."""

    def merged_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return 1.25 * super().merged_weight(weight)


def test_a_variant_that_is_no_product_is_decomposed_whole() -> None:
    cfg, base = LoRAConfig(r=3, alpha=5, dropout=0.0), torch.nn.Linear(20, 11, bias=False)
    for kind in (LoRALinear, Gained):
        adapter = kind(base, cfg)
        with torch.no_grad():
            adapter.lora_A.normal_(), adapter.lora_B.normal_()
            weight = base.weight.double()
            found = updates.update("model.layers.4.mlp.up_proj", adapter, weight)
            dense = adapter.double().merged_weight(weight) - weight
        expected = torch.linalg.svdvals(dense)[: len(found.values)]
        torch.testing.assert_close(torch.tensor(found.values).double(), expected, rtol=1e-5, atol=1e-7)
        assert found.product == (kind is LoRALinear) and (found.layer, found.module) == (4, "up_proj")
        assert found.norm == pytest.approx(dense.norm().item(), rel=1e-6)
        assert found.weight_norm == pytest.approx(weight.norm().item())


def test_the_page_escapes_and_loads_nothing() -> None:
    view = recipe.view(asked("method=lora"))
    html = page.recipe_html(type(view)(**{**vars(view), "model": "<script>alert(1)</script>"}))
    assert "<script" not in html and "&lt;script&gt;" in html and "default-src 'none'" in html
    assert html.endswith("</html>\n") and "http" not in html.replace("http-equiv", "")


def test_adapters_start_as_no_update_at_all() -> None:
    model = recipe.shaped(read_config(TINY), asked("method=lora"))
    parallel.materialize(adapters.adapters(model).values(), CPU)
    adapters.reset(model, seeds.derive(3, "x"))
    name, adapter = next(iter(adapters.adapters(model).items()))
    found = updates.update(name, adapter, torch.ones(256, 256, dtype=torch.float64))
    assert (found.effective_rank, found.rank_90, found.norm) == (0.0, 0, 0.0)
    assert "nan" not in page.heat_map([found], lambda one: one.norm)


@pytest.mark.parametrize("variant", ["pissa", "lora_fa"])
def test_a_checkpoint_is_explained_as_its_run_is(tmp_path: Path, variant: str) -> None:
    """No checkpoint holds the buffers of these variants."""
    plain = ("train.max_steps=1", "train.batch_size=1", "eval.samples=0", "data.max_seq_len=128", "data.cache=none")
    train(load_config([f"lora.variant={variant}", f"out={tmp_path / 'run'}", "save.every_steps=1", *plain]))
    run, checkpoint = (updates.view(tmp_path / each) for each in ("run", "run/checkpoints/step-000001"))
    for one, other in zip(run.updates, checkpoint.updates, strict=True):
        assert one.norm > 0 and other.norm == pytest.approx(one.norm, rel=1e-4)
