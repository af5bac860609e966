"""The memory plan: what it chooses, and that it is what runs were measured to need."""

import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitune import adapters, loss, nf4, plan
from minitune.adapters import ADAPTERS, dora
from minitune.byhand import Keep
from minitune.config import Config, LoRAConfig, load_config
from minitune.loss import TokenLoss
from minitune.model import Llama, LlamaConfig
from minitune.plan import Choice

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZES = {
    "1b": (2048, 8192, 16, 32),
    "3b": (3072, 8192, 28, 24),
    "8b": (4096, 14336, 32, 32),
    "70b": (8192, 28672, 80, 64),
}


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
    totals = [need.total(choice) for choice in choices]
    assert totals == sorted(totals, reverse=True)
    for choice, gb in zip(choices, (140, 44, 30, 16, 9), strict=True):
        assert need.total(choice) <= gb * 1e9 * (1 - plan.SPARE)
    fewest = choices[2].keep.count(Keep.QKV)
    one_less = replace(choices[2], keep=(Keep.QKV,) * (fewest - 1) + (Keep.ALL,) * (33 - fewest))
    assert need.total(one_less) > 30e9 * (1 - plan.SPARE)


@pytest.mark.parametrize("size", ["1b", "8b"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_more_room_is_never_slower(tmp_path: Path, method: str, size: str) -> None:
    """What is computed again never grows with what is free; but where copies are not hidden, on the device first."""
    cfg = recipe(tmp_path, f"method={method}", "model.dense_weights=never" if method == "qlora" else "optim.name=adamw")
    need = needs(size, cfg)
    choices = [plan.choose(need, int(mb * 1e6), cfg, by_hand=True) for mb in range(1000, 60000, 250)]
    device = [choice for choice in choices if need.hidden or not choice.host]
    costs = [sum(plan.AGAIN[keep] for keep in choice.keep) for choice in device]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0 and len(set(costs)) > need.blocks // 2
    kinds = {keep for choice in choices for keep in choice.keep}
    assert kinds == {Keep.ALL, Keep.ATTENTION} | ({Keep.QKV} if need.hidden else set())
    assert need.hidden or [choice.host for choice in choices] == sorted(
        (choice.host for choice in choices), reverse=True
    )


def test_host_memory_is_not_taken_where_there_is_little(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, "method=lora")
    need = needs("8b", cfg)
    roomy, poor = (plan.choose(need, int(25e9), cfg, True, host_free=host) for host in (100e9, 1e9))
    assert roomy.host and need.on_host(roomy) == 8192 * 2 * roomy.keep.count(Keep.QKV) * (2 * 4096 + 4096 + 2 * 1024)
    assert not poor.host and poor.keep.count(Keep.ATTENTION) > roomy.keep.count(Keep.QKV)
    poorer = plan.choose(need, int(22e9), cfg, True, host_free=0)
    assert poorer == Choice((Keep.INPUT,) * 32) and plan.fits(need, poorer, int(22e9))
    told = recipe(tmp_path, "method=lora", "train.offload=inputs")
    assert plan.choose(need, int(22e9), told, True, host_free=0) == Choice((Keep.ATTENTION,) * 32, host=True)
    odd = needs("8b", recipe(tmp_path, "method=lora", "data.max_seq_len=2049"))  # page-locked by powers of two
    assert odd.on_host(roomy) == 2 * need.on_host(roomy)


def test_what_a_recipe_says_of_host_memory_is_done(tmp_path: Path) -> None:
    need = needs("8b", recipe(tmp_path, "method=lora"))
    for free in (1, 60e9):
        for checkpointing in ("auto", "full"):
            chosen = {}
            for offload in ("always", "inputs", "never"):
                keys = f"train.gradient_checkpointing={checkpointing}", f"train.offload={offload}"
                chosen[offload] = plan.choose(need, int(free), recipe(tmp_path, "method=lora", *keys), by_hand=True)
            roomy = free > 1
            assert chosen["always"] == Choice((Keep.QKV if roomy else Keep.ATTENTION,) * 32, host=True)
            assert chosen["inputs"] == Choice((Keep.ATTENTION,) * 32, host=True)
            kept = Keep.INPUT if not roomy else Keep.ALL if checkpointing == "auto" else Keep.ATTENTION
            assert chosen["never"] == Choice((kept,) * 32)
    none = recipe(tmp_path, "method=lora", "train.gradient_checkpointing=none", "train.offload=always")
    assert plan.choose(need, 1, none, by_hand=True) == Choice((Keep.ALL,) * 32)


@pytest.mark.parametrize(("size", "hidden"), [("1b", False), ("3b", False), ("8b", True), ("70b", True)])
def test_q_k_and_v_go_to_host_memory_where_that_is_hidden(tmp_path: Path, size: str, hidden: bool) -> None:
    """Behind the compute of a block, which grows faster with its width than what it keeps."""
    for method in ("lora", "qlora"):
        assert needs(size, recipe(tmp_path, f"method={method}")).hidden == hidden


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


def test_the_plan_is_what_was_measured(tmp_path: Path) -> None:
    """Within four per cent of the peak that each run of minitune's reached on a card, as it was planned then and, for
    the newest results, as it is planned now from the recipe that is kept with them."""
    measured = [
        (path.name, result)
        for path in RESULTS.glob("*.json")
        for result in (lambda found: found if isinstance(found, list) else [])(json.loads(path.read_text()))
        if result.get("system") == "minitune" and result.get("planned_gb") and "failed" not in result
    ]
    assert len(measured) >= 5
    planned = 0
    for name, result in measured:
        assert result["planned_gb"] == pytest.approx(result["peak_allocated_gb"], rel=0.04), result["case"]
        if name == "H200-2026-11-27-again.json" and "recipe" in result:
            cfg = recipe(tmp_path, *keys_of(result["recipe"]))
            need = needs(result["size"], cfg)
            total = need.total(plan.choose(need, int(140e9), cfg, by_hand=True)) / 1e9
            assert total == pytest.approx(result["peak_allocated_gb"], rel=0.04), result["case"]
            planned += 1
    assert planned >= 10


def keys_of(recipe: dict, above: str = "") -> list[str]:
    """A recipe's keys as a command line has them, but those of files."""
    keys = []
    for name, value in recipe.items():
        if isinstance(value, dict):
            keys += keys_of(value, f"{above}{name}.") if name not in ("columns",) else []
        elif not (isinstance(value, str) and "/" in value) and not isinstance(value, list):
            keys.append(f"{above}{name}={str(value).lower() if isinstance(value, bool) else value}")
    return keys


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


# ---- ends of the model that are adapted, or train ------------------------------------------------------------------


def most_alive(act: Callable[[], None]) -> int:
    """The most bytes of what PyTorch takes and gives back within `act` that are taken at once."""
    gc.collect()  # what earlier tests left would be given back within, if a collection came then
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    taken = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(taken, key=lambda event: event.start_ns())))


V, D = 8000, 512
SAVED, SHORT = 'lora.modules_to_save=["lm_head"]', "data.max_seq_len=8"
ENDS = {
    "an adapted head": ['lora.target_modules=["q_proj","lm_head"]'],
    "a head of DoRA": ['lora.target_modules=["q_proj","lm_head"]', "lora.variant=dora"],
    "a saved head": [SAVED],
    "a saved head, in one piece": [SAVED, "train.batch_size=1"],
    "a saved head, in one short piece": [SAVED, "train.batch_size=1", SHORT],
    "a saved head, in short pieces": [SAVED, SHORT],
    "a saved head in fp32": [SAVED, "model.dtype=float32"],
    "a saved head in fp32, in one piece": [SAVED, "train.batch_size=1", "model.dtype=float32"],
    "rows of the head": ["lora.trainable_token_indices={lm_head=[3, 5]}"],
    "a saved head, tied": ['lora.modules_to_save=["embed_tokens"]', "tied"],
}


def small(tmp_path: Path, *keys: str) -> tuple[Llama, plan.Memory, Config]:
    """A model of large ends and small blocks with adapters, and what is planned for two rows of 256 tokens."""
    own = [key for key in keys if key != "tied"]
    cfg = recipe(tmp_path, "method=lora", "data.max_seq_len=256", "train.batch_size=2", *own)
    config = LlamaConfig(V, D, 64, 2, 4, 4, 16, 512, 1e-5, 10000.0, tie_word_embeddings="tied" in keys)
    model = Llama(config).to(plan.DTYPES[cfg.model.dtype])
    adapters.attach(model, cfg.lora)
    adapters.reset(model, 0)
    return model, plan.memory(model, config, cfg, by_hand=True), cfg


@pytest.mark.parametrize("keys", ENDS.values(), ids=ENDS)
def test_what_the_loss_of_a_head_that_is_not_plain_holds_is_planned(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within five per cent of what is alive at the peak; by way of autograd, so a CPU holds what a card would."""
    model, _, cfg = small(tmp_path, *keys)
    for module in (loss, plan):
        monkeypatch.setattr(module, "CHUNK", cfg.data.max_seq_len)  # a row is a piece
    monkeypatch.setattr(dora, "PIECE", 2**16)
    need = plan.memory(model, model.config, cfg, by_hand=True)
    assert not loss.is_plain(model.lm_head)
    shape = (cfg.train.batch_size, cfg.data.max_seq_len)
    hidden = torch.randn(*shape, D, dtype=model.model.norm.weight.dtype, requires_grad=True)
    labels = torch.randint(0, V, shape)
    alive = most_alive(lambda: TokenLoss()(hidden, model.lm_head, labels).backward())
    assert need.head == pytest.approx(alive, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_the_gradient_of_a_saved_embedding_is_made_of_is_planned(
    tmp_path: Path, dtype: str, micro_batches: int
) -> None:
    saved = 'lora.modules_to_save=["embed_tokens"]'
    steps = f"train.gradient_accumulation_steps={micro_batches}"
    model, need, _ = small(tmp_path, saved, f"model.dtype={dtype}", steps)
    table, gradient = model.model.embed_tokens, 4 * V * D
    if need.accumulates:
        table.weight.grad = torch.zeros_like(table.weight)
    out = table(torch.randint(0, V, (2, 256)))
    dout = torch.randn_like(out)
    alive = most_alive(lambda: out.backward(dout)) + (gradient if need.accumulates else 0)
    assert gradient + need.embedding == pytest.approx(alive, rel=0.05)


def test_the_gradient_of_a_saved_head_is_there_while_blocks_compute(tmp_path: Path) -> None:
    """But for the sum of earlier micro-batches, which has a place already; a tied one waits for the embedding's."""
    both = ('lora.modules_to_save=["embed_tokens"]', "tied")
    for keys, steps, held, arriving in (((SAVED,), 1, 4, 0), ((SAVED,), 2, 0, 0), (both, 1, 4, 0), (both, 2, 4, 4)):
        _, need, _ = small(tmp_path, *keys, f"train.gradient_accumulation_steps={steps}")
        assert (need.held, need.arriving) == (held * V * D, arriving * V * D)
    _, need, _ = small(tmp_path, SAVED)
    wide = replace(need, working={Keep.ALL: 10**9}, kept={Keep.ALL: 10**9})
    rest = wide.weights + wide.moments + 2 * 10**9 + 10**9  # two blocks that keep, one that works
    assert wide.total(Choice((Keep.ALL,) * 2)) == rest + 4 * V * D


def test_a_saved_head_has_no_copy_that_multiplies(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, "method=lora")
    saved = replace(cfg, lora=replace(cfg.lora, modules_to_save=("lm_head",)))
    assert needs("8b", saved).weights - needs("8b", cfg).weights == 4 * 128256 * 4096


# ---- blocks that no backward pass comes to -------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "compiled"])
def test_blocks_below_the_first_adapter_keep_nothing(tmp_path: Path, by_hand: bool) -> None:
    cfg = recipe(tmp_path, "method=lora", "train.batch_size=64", "train.gradient_checkpointing=full")
    least = Keep.ATTENTION if by_hand else Keep.INPUT
    for layers, keys, met in (
        ((31,), {}, 1),
        ((3, 30), {}, 29),
        ((31,), {"modules_to_save": ("embed_tokens",)}, 32),  # the gradient goes all the way down
        ((), {"target_modules": ("lm_head",)}, 0),
    ):
        some = replace(cfg, lora=replace(cfg.lora, layers_to_transform=layers, **keys))
        need = needs("8b", some, by_hand)
        choice = plan.choose(need, 1, some, by_hand)
        assert need.untouched == 32 - met
        assert choice.keep == (Keep.ALL,) * (32 - met) + (least,) * met
        assert choice.host == (by_hand and met > 0)
        auto = replace(some, train=replace(some.train, gradient_checkpointing="auto"))
        roomy = plan.choose(need, int(80e9), auto, by_hand)
        assert (str(roomy) == "no recompute") == (met < 2), (layers, str(roomy))
        everything = Choice((Keep.ALL,) * 32)
        more = need.total(everything) - replace(need, kept=dict.fromkeys(need.kept, 0)).total(everything)
        assert more <= met * need.kept[Keep.ALL]
