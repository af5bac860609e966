"""The memory plan: what it chooses, and that it is what runs were measured to need."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitune import adapters, nf4, plan
from minitune.adapters import ADAPTERS
from minitune.byhand import Keep
from minitune.config import Config, LoRAConfig, load_config
from minitune.model import Llama, LlamaConfig
from minitune.plan import Choice

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZES = {"8b": (4096, 14336, 32, 32), "70b": (8192, 28672, 80, 64)}


def shape(size: str) -> LlamaConfig:
    D, F, layers, heads = SIZES[size]
    return LlamaConfig(128256, D, F, layers, heads, 8, D // heads, 8192, 1e-5, 500000.0)


def needs(size: str, cfg: Config, by_hand: bool = True, **ranks: int) -> plan.Memory:
    config = shape(size)
    with torch.device("meta"):
        model = Llama(config)
    model.to(torch.bfloat16)
    if cfg.method == "qlora":
        nf4.quantize_linears(model, torch.bfloat16)
    if cfg.method != "full":
        adapters.attach(model, cfg.lora)
    return plan.memory(model, config, cfg, by_hand, **ranks)


def recipe(tmp_path: Path, *keys: str) -> Config:
    path = tmp_path / "recipe.toml"
    path.write_text("")
    return load_config([str(path), "train.gradient_accumulation_steps=1", *keys])


def test_more_room_buys_less_recompute(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, "method=qlora")
    need = needs("8b", cfg)
    choices = [plan.choose(need, int(gb * 1e9), cfg, by_hand=True) for gb in (140, 44, 30, 16, 9)]
    assert choices[0] == Choice((Keep.ALL,) * 32, dense=True)
    again = [sum(keep is not Keep.ALL for keep in choice.keep) for choice in choices]
    assert again == sorted(again) and again[1] == 0 and 0 < again[2] < 32 and again[-1] == 32
    assert choices[-1].host and not any(choice.host for choice in choices[:-1])
    totals = [need.total(choice) for choice in choices]
    assert totals == sorted(totals, reverse=True)
    for choice, gb in zip(choices, (140, 44, 30, 16, 9), strict=True):
        assert need.total(choice) <= gb * 1e9 * (1 - plan.SPARE)
    fewest = choices[2].keep.count(Keep.ATTENTION)
    one_less = replace(choices[2], keep=(Keep.ATTENTION,) * (fewest - 1) + (Keep.ALL,) * (33 - fewest))
    assert need.total(one_less) > 30e9 * (1 - plan.SPARE)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["train.gradient_checkpointing=none"], Choice((Keep.ALL,) * 32)),
        (["train.gradient_checkpointing=full"], Choice((Keep.ATTENTION,) * 32, host=True)),
        (["train.gradient_checkpointing=full", "train.offload=never"], Choice((Keep.INPUT,) * 32)),
        (["train.offload=always"], Choice((Keep.ATTENTION,) * 32, host=True)),
        (["train.gradient_checkpointing=none", "model.dense_weights=always"], Choice((Keep.ALL,) * 32, dense=True)),
    ],
    ids=str,
)
def test_a_recipe_that_says_what_to_do_is_done(tmp_path: Path, keys: list[str], expected: Choice) -> None:
    """Even where nothing fits."""
    cfg = recipe(tmp_path, "method=qlora", *keys)
    assert plan.choose(needs("8b", cfg), 1, cfg, by_hand=True) == expected


def test_a_compiled_block_is_kept_or_computed_again_as_a_whole(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, "method=lora")
    need = needs("8b", cfg, by_hand=False)
    choice = plan.choose(need, int(60e9), cfg, by_hand=False)
    assert set(choice.keep) == {Keep.ALL, Keep.INPUT} and not choice.host and not choice.dense


def test_the_plan_is_what_was_measured() -> None:
    """Within four per cent of the peak that each run of minitune's reached on a card, by the results kept here."""
    measured = [
        result
        for path in RESULTS.glob("*.json")
        for result in (lambda found: found if isinstance(found, list) else [])(json.loads(path.read_text()))
        if result.get("system") == "minitune" and result.get("planned_gb") and "failed" not in result
    ]
    assert len(measured) >= 5
    for result in measured:
        assert result["planned_gb"] == pytest.approx(result["peak_allocated_gb"], rel=0.04), result["case"]


def test_a_larger_rank_needs_more(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, "method=lora")
    more = replace(cfg, lora=LoRAConfig(r=64))
    assert needs("8b", more).weights > needs("8b", cfg).weights
    assert needs("8b", more).kept[Keep.INPUT] > needs("8b", cfg).kept[Keep.INPUT]


def test_what_a_variant_freezes_and_keeps_is_counted(tmp_path: Path) -> None:
    """LoRA has neither; PiSSA keeps where it started, VeRA its projections, DoRA two outputs of each linear."""
    cfg = recipe(tmp_path, "method=lora", "lora.dropout=0")
    found = {v: needs("8b", replace(cfg, lora=replace(cfg.lora, variant=v)), by_hand=False) for v in ADAPTERS}
    lora, trained = found["lora"], 41_943_040
    assert found["loraplus"] == found["rslora"] == lora
    assert found["pissa"].weights == lora.weights + 4 * trained
    assert found["oplora"].weights == lora.weights + 4 * trained
    assert found["lora_fa"].weights == lora.weights and found["lora_fa"].moments < lora.moments
    shared, vectors = 16 * (14336 + 14336), 32 * (7 * 16 + 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert found["vera"].weights == lora.weights - 4 * trained + 4 * (shared + vectors)
    tokens = cfg.train.batch_size * cfg.data.max_seq_len
    outputs = 2 * tokens * (3 * 4096 + 2 * 1024 + 2 * 14336)  # bytes, of the seven linears of a block, in bf16
    assert found["vera"].kept[Keep.ALL] == lora.kept[Keep.ALL] + outputs
    assert found["dora"].kept[Keep.ALL] == lora.kept[Keep.ALL] + 2 * outputs
    assert found["dora"].kept[Keep.INPUT] == lora.kept[Keep.INPUT]


def test_what_ranks_share_and_what_passes_between_them() -> None:
    """70B by LoRA in bf16: two ranks of 80 GB share the base, and what is not shared is small beside it."""
    cfg = replace(Config(), method="lora", train=replace(Config().train, batch_size=1))
    alone, shared = needs("70b", cfg), needs("70b", cfg, ranks=2, shards=2)
    adapters_ = 207e6 * (4 + 2)  # fp32, and a copy in bf16
    assert alone.weights - adapters_ == pytest.approx(70.5e9 * 2, rel=0.01)
    assert shared.weights - adapters_ == pytest.approx(70.5e9, rel=0.01)
    assert 0 < shared.passing < 12e9 and alone.passing == 0
    full = needs("70b", replace(cfg, method="full"), ranks=16, shards=16)
    assert full.weights < 9.1e9 and full.moments < 45e9 and full.gradients < 18e9
