"""Writing against transformers' generate, against no cache at all, and from every kind of folder."""

import json
import shutil
from itertools import chain, combinations
from pathlib import Path

import peft
import peft_reference as ref
import pytest
import torch
from torch import Tensor

from minitune import files, generate, merge, parallel, peft_format, pretrained
from minitune.attention import CausalAttention
from minitune.build import build_model
from minitune.config import dump, load_config
from minitune.errors import UserError
from minitune.model import Llama
from minitune.tokenizer import load_tokenizer

LENGTHS = (1, 7, 23, 60)
NOTHING: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def model(base: Path) -> Llama:
    return pretrained.load(base)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [ref.token_rows(1, length, seed=length)[0].tolist() for length in LENGTHS]


def theirs(folder: Path, prompt: list[int], new: int, stop_ids: frozenset[int]) -> list[int]:
    """What transformers adds, greedily, up to a stop id, which is left out."""
    tokens = torch.tensor([prompt])
    written = ref.reference(folder).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=2,
    )
    ids = written[0, len(prompt) :].tolist()
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


@torch.no_grad()
def from_scratch(model: Llama, prompt: list[int], new: int) -> list[int]:
    """Greedy without any cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


# ---- greedy ---------------------------------------------------------------------------------------------------------


def test_greedy_is_transformers_token_by_token(base: Path, model: Llama, prompts: list[list[int]]) -> None:
    expected = [theirs(base, prompt, 40, NOTHING) for prompt in prompts]
    assert all(len(ids) == 40 for ids in expected)
    assert len({tuple(ids) for ids in expected}) == len(prompts)
    assert [generate.generate(model, [prompt], 40, NOTHING)[0] for prompt in prompts] == expected
    assert generate.generate(model, prompts, 40, NOTHING) == expected
    assert generate.generate(model, prompts[::-1], 40, NOTHING) == expected[::-1]
    assert [from_scratch(model, prompt, 40) for prompt in prompts] == expected


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_greedy_with_scaled_positions(tmp_path: Path, prompts: list[list[int]], scaling: str) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
    base = ref.base_folder(tmp_path / "base", rope_parameters=rope)
    expected = [theirs(base, prompt, 30, NOTHING) for prompt in prompts]
    assert generate.generate(pretrained.load(base), prompts, 30, NOTHING) == expected


def test_without_its_padding_mask_a_batch_would_differ(
    model: Llama, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the batched comparison."""
    right = generate.generate(model, prompts, 40, NOTHING)
    real_init = generate.CachedAttention.__init__
    monkeypatch.setattr(
        generate.CachedAttention,
        "__init__",
        lambda self, real, room: real_init(self, torch.ones_like(real), room),
    )
    wrong = generate.generate(model, prompts, 40, NOTHING)
    assert wrong[-1] == right[-1]  # the longest has no padding
    assert all(a != b for a, b in zip(wrong[:-1], right[:-1], strict=True))


def test_the_cache_gives_the_logits_of_the_whole_text(model: Llama, prompts: list[list[int]]) -> None:
    """Left padding, a prompt in one call, then pieces of one token and of several."""
    longest = max(map(len, prompts))
    texts = [prompt + ref.token_rows(1, 12, seed=len(prompt) + 50)[0].tolist() for prompt in prompts]
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * gap + text for gap, text in zip(padding, texts, strict=True)])
    real = torch.tensor([[False] * gap + [True] * len(text) for gap, text in zip(padding, texts, strict=True)])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits: list[Tensor] = []
    with torch.no_grad(), generate.kv_cache(model, real[:, :longest], 12):
        for start, end in (
            (0, longest),
            (longest, longest + 1),
            (longest + 1, longest + 5),
            (longest + 5, longest + 12),
        ):
            logits.append(model(tokens[:, start:end], positions[:, start:end]))
    cached = torch.cat(logits, 1)
    assert torch.isfinite(cached).all()
    for row, (gap, text) in enumerate(zip(padding, texts, strict=True)):
        assert ref.relative(cached[row, gap:], model(torch.tensor([text]))[0]) < 1e-5


def test_it_stops_at_each_stop_id_and_leaves_it_out(base: Path, model: Llama, prompts: list[list[int]]) -> None:
    free = [theirs(base, prompt, 40, NOTHING) for prompt in prompts]

    def lengths(stop_ids: tuple[int, ...]) -> set[int]:
        return {next((n for n, id in enumerate(ids) if id in stop_ids), 40) for ids in free}

    # two ids at which the rows stop at different times, not all of them at once
    stop_ids = frozenset(max(combinations(sorted(set(chain(*free))), 2), key=lambda two: len(lengths(two))))
    expected = [theirs(base, prompt, 40, stop_ids) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2
    assert generate.generate(model, prompts, 40, stop_ids) == expected
    assert [generate.generate(model, [prompt], 40, stop_ids)[0] for prompt in prompts] == expected
    assert generate.generate(model, [prompts[0]], 40, frozenset({free[0][0]})) == [[]]
    assert all(not stop_ids & set(ids) for ids in expected)


def test_stop_ids_come_from_generation_config_too(
    base: Path, model: Llama, prompts: list[list[int]], tmp_path: Path
) -> None:
    free = from_scratch(model, prompts[1], 20)
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, free[9]], "bos_token_id": 0}))
    stop_ids = load_tokenizer(folder).stop_ids
    assert stop_ids == {1, free[9]}
    written = generate.generate(model, [prompts[1]], 20, stop_ids)[0]
    assert written == free[: free.index(free[9])]
    tokens = torch.tensor([prompts[1]])
    expected = ref.reference(folder).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, pad_token_id=2
    )
    assert expected[0, tokens.shape[1] : -1].tolist() == written  # it read the same file by itself


def test_the_number_of_new_tokens_is_a_limit(model: Llama, prompts: list[list[int]]) -> None:
    long = generate.generate(model, prompts, 9, NOTHING)
    for new in (1, 2, 8):
        assert generate.generate(model, prompts, new, NOTHING) == [ids[:new] for ids in long]


def test_the_last_position_can_be_used_and_no_more(model: Llama) -> None:
    room = model.config.max_position_embeddings
    prompt = ref.token_rows(1, room - 5)[0].tolist()
    assert len(generate.generate(model, [prompt], 5, NOTHING)[0]) == 5
    with pytest.raises(UserError, match=rf"{room - 5} tokens.*{room} positions.*at most 5"):
        generate.generate(model, [prompt], 6, NOTHING)
    with pytest.raises(UserError, match="at most 0"):
        generate.generate(model, [prompt * 2], 6, NOTHING)


def test_an_empty_prompt_is_refused(model: Llama) -> None:
    """A tokenizer that puts no bos makes no token at all of an empty text, and nothing can go on after nothing."""
    for prompts in ([[]], [[5, 6], []]):
        with pytest.raises(UserError, match="empty"):
            generate.generate(model, prompts, 3, NOTHING)


# ---- it leaves the model as it was ----------------------------------------------------------------------------------


def flags_and_cores(model: Llama) -> tuple[list[bool], list[int]]:
    return [module.training for module in model.modules()], [id(layer.self_attn.core) for layer in model.layers]


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_as_it_was(base: Path, prompts: list[list[int]], mode: bool) -> None:
    model = ref.adapted(base, ref.lora_config(dropout=0.3)).train(mode)
    tokens = ref.token_rows(2, 9)
    before, output = flags_and_cores(model), model.eval()(tokens)
    model.train(mode)
    state = torch.get_rng_state()
    written = generate.generate(model, prompts, 5, NOTHING)
    sampled = generate.generate(model, prompts, 5, NOTHING, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert written == generate.generate(model, prompts, 5, NOTHING)  # no dropout while it writes
    assert sampled == generate.generate(model, prompts, 5, NOTHING, temperature=1.0)
    assert flags_and_cores(model) == before
    assert all(type(layer.self_attn.core) is CausalAttention for layer in model.layers)
    assert torch.equal(model.eval()(tokens), output)
    assert all(p.grad is None for p in model.parameters())


def test_parts_in_another_mode_stay_so(base: Path, prompts: list[list[int]]) -> None:
    """One block in training mode, the rest not: as someone who freezes parts of a model leaves it."""
    model = ref.adapted(base, ref.lora_config(dropout=0.3)).eval()
    model.layers[0].train()
    before = flags_and_cores(model)
    assert len(set(before[0])) == 2
    generate.generate(model, prompts, 3, NOTHING)
    assert flags_and_cores(model) == before


def test_after_an_exception_too(base: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ref.adapted(base, ref.lora_config(dropout=0.3)).train()
    before = flags_and_cores(model)

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "choose", fail)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(model, prompts, 5, NOTHING)
    assert flags_and_cores(model) == before
    assert torch.is_grad_enabled()


def test_recomputed_blocks_write_the_same(base: Path, prompts: list[list[int]]) -> None:
    model = ref.adapted(base, ref.lora_config())
    expected = generate.generate(model, prompts, 12, NOTHING)
    parallel.recompute_blocks(model.layers)
    assert generate.generate(model.train(), prompts, 12, NOTHING) == expected


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_text(model: Llama, prompts: list[list[int]]) -> None:
    def write(seed: int, temperature: float = 1.0) -> list[list[int]]:
        return generate.generate(model, prompts, 20, NOTHING, temperature, seed)

    first = write(3)
    torch.manual_seed(99)
    assert write(3) == first
    assert write(4) != first
    assert write(0, 1e-4) == generate.generate(model, prompts, 20, NOTHING)  # nearly cold is greedy


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, float("-inf")])
    draw = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = generate.choose(logits.expand(40_000, -1), temperature, draw)
        share = torch.bincount(drawn, minlength=5) / len(drawn)
        expected = torch.exp(logits / temperature)
        torch.testing.assert_close(share, expected / expected.sum(), atol=0.01, rtol=0)
    assert generate.choose(logits[None], 0.0, draw).tolist() == [2]


# ---- what can be opened ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("wide") / "base", wide=True)


def opened(path: Path | str, tokens: Tensor) -> Tensor:
    """Logits of what `open_model` gives; it is ready to be asked, with no dropout, and it has a tokenizer."""
    model, tokenizer, _ = generate.open_model(str(path))
    assert tokenizer.eos_id == 1
    assert not any(module.training for module in model.modules())
    return model(tokens)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_opens(tmp_path: Path, wide_base: Path, method: str) -> None:
    run = ref.finished_run(tmp_path / "run", wide_base, method)
    cfg = load_config([str(run / "config.toml")])
    assert generate.open_model(str(run))[2].method == method
    expected = build_model(cfg, wide_base, torch.device("cpu"))
    peft_format.load(run / "adapter", expected)
    tokens = ref.token_rows(2, 19)
    assert torch.equal(opened(run, tokens), expected.eval()(tokens))
    assert ref.relative(opened(run, tokens), pretrained.load(wide_base)(tokens)) > 0.01


def test_a_full_run_opens(tmp_path: Path, base: Path) -> None:
    trained = ref.base_folder(tmp_path / "trained", seed=5)
    run = tmp_path / "run"
    run.mkdir()
    cfg = load_config([f"model.path={base}", "model.dtype=float32", "method=full", f"out={run}"])
    files.write_text(run / "config.toml", dump(cfg))
    with pytest.raises(UserError, match="has not finished"):
        generate.open_model(str(run))
    trained.rename(run / "model")
    ref.finish(run, base)
    tokens = ref.token_rows(2, 19)
    assert ref.relative(opened(run, tokens), ref.reference(run / "model")(input_ids=tokens).logits) < 1e-5


def test_an_adapter_folder_opens(tmp_path: Path, base: Path) -> None:
    run = ref.finished_run(tmp_path / "run", base)
    live = ref.liven(ref.peft_model(base, ref.lora_config("k_proj", "up_proj", dropout=0.2)), seed=8).eval()
    live.save_pretrained(tmp_path / "peft")
    tokens = ref.token_rows(2, 19)
    assert ref.relative(opened(tmp_path / "peft", tokens), live(input_ids=tokens).logits) < 1e-6
    loaded = peft.PeftModel.from_pretrained(ref.reference(base), run / "adapter").eval()
    assert ref.relative(opened(run / "adapter", tokens), loaded(input_ids=tokens).logits) < 1e-6


def test_an_adapter_on_a_moved_base_says_so(tmp_path: Path, base: Path) -> None:
    run = ref.finished_run(tmp_path / "run", base)
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(UserError, match="gone"):
        generate.open_model(str(run / "adapter"))


def test_a_merged_folder_and_a_plain_one_open(tmp_path: Path, base: Path) -> None:
    run = ref.finished_run(tmp_path / "run", base)
    merge.merge(run, tmp_path / "merged")
    tokens = ref.token_rows(2, 19)
    assert ref.relative(opened(tmp_path / "merged", tokens), opened(run, tokens)) < 1e-5
    assert ref.relative(opened(base, tokens), ref.reference(base)(input_ids=tokens).logits) < 1e-5


def test_tiny_opens_and_writes() -> None:
    model, tokenizer, recipe = generate.open_model("tiny")
    assert recipe is None
    ids = generate.prompt_ids(tokenizer, None, "The lamp is", "", "")
    assert ids[0] == tokenizer.bos_id or not tokenizer.adds_bos
    written = generate.generate(model, [ids], 12, tokenizer.stop_ids)[0]
    assert written and tokenizer.decode(written).strip()
    tokens = torch.tensor([ids])
    expected = ref.reference(pretrained.TINY).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12, pad_token_id=2
    )
    assert [id for id in expected[0, len(ids) :].tolist() if id not in tokenizer.stop_ids] == written


def test_an_instruction_goes_into_the_prompt_it_was_trained_with(tmp_path: Path, base: Path) -> None:
    from minitune.data.formats import alpaca
    from minitune.data.templates import prompt_ids

    run = ref.finished_run(tmp_path / "run", base)
    _, tokenizer, recipe = generate.open_model(str(run))
    row = {"instruction": "Repeat.", "input": "a lamp", "output": "a lamp"}
    expected = prompt_ids(alpaca(row, "row 1"), recipe.data.template, tokenizer)
    assert generate.prompt_ids(tokenizer, recipe, None, "Repeat.", "a lamp") == expected
    assert "a lamp" in tokenizer.decode(expected) and "### Response:" in tokenizer.decode(expected)
    with pytest.raises(UserError, match="--instruction needs a run folder"):
        generate.prompt_ids(tokenizer, None, None, "Repeat.", "")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", str(tmp_path)):
        with pytest.raises(UserError):
            generate.open_model(path)
