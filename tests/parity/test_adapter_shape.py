"""Which modules get an adapter, with which rank and alpha: as PEFT has it, live, on the same keys; files both ways."""

import json
import time
from dataclasses import replace
from pathlib import Path

import peft
import peft_reference as ref
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minitune import adapters, merge, peft_format, pretrained
from minitune.adapters import targets
from minitune.config import LINEARS, LoRAConfig, ModelConfig, dump, load_config
from minitune.errors import UserError
from minitune.model import Llama

EXACT = 1e-5  # relative, whole tensors, fp32
SHAPES: dict[str, dict[str, object]] = {
    "rank pattern": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"k_proj": 4.5, r"layers\.[02]\..*\.(up|gate)_proj": 31}},
    "both, and one module of two keys": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 9},
        "alpha_pattern": {r".*mlp\..*": 7},
    },
    "layers": {"layers_to_transform": (0, 2)},
    "layers, but one by its whole name": {
        "target_modules": ("q_proj", "model.layers.1.mlp.up_proj"),
        "layers_to_transform": (2,),
    },
    "an expression": {"target_modules": r".*\.layers\.[12]\.(self_attn\.[qv]|mlp\.down)_proj"},
    "ends of names": {"target_modules": ("layers.1.self_attn.o_proj", "up_proj")},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ("layers.0.self_attn.q_proj", "gate_proj")},
    "excluded by an expression": {"target_modules": (*LINEARS, "lm_head"), "exclude_modules": r".*\.1\..*"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=3)


def config(shape: dict[str, object]) -> LoRAConfig:
    return replace(ref.lora_config(), **shape)


def in_peft(base: Path, cfg: LoRAConfig) -> peft.PeftModel:
    said = cfg.target_modules
    return ref.peft_model(
        base,
        replace(cfg, target_modules=()),
        target_modules=said if isinstance(said, str) else list(said),
        exclude_modules=(cfg.exclude_modules if isinstance(cfg.exclude_modules, str) else list(cfg.exclude_modules))
        or None,
        layers_to_transform=list(cfg.layers_to_transform) or None,
        rank_pattern=dict(cfg.rank_pattern),
        alpha_pattern=dict(cfg.alpha_pattern),
    )


def pair(base: Path, cfg: LoRAConfig) -> tuple[Llama, peft.PeftModel]:
    ours, theirs = ref.adapted(base, cfg), in_peft(base, cfg)
    ref.copy_adapters(ref.own_parameters(ours), ref.peft_parameters(theirs))  # the same names and shapes, or it fails
    return ours, theirs.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_modules_outputs_and_every_gradient_are_peft_s(base: Path, shape: dict[str, object]) -> None:
    ours, theirs = pair(base, config(shape))
    tokens = ref.token_rows(3, 17)
    logits = ours(tokens)
    assert ref.relative(logits, theirs(input_ids=tokens).logits) < EXACT
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    (ours(tokens, labels=labels) / (labels != -100).sum()).backward()
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    expected = ref.peft_parameters(theirs)
    for name, parameter in ref.own_parameters(ours).items():
        assert parameter.grad.abs().max() > 0, name
        assert ref.relative(parameter.grad, expected[name].grad) < EXACT, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_files_go_both_ways(base: Path, tmp_path: Path, shape: dict[str, object]) -> None:
    cfg = config(shape)
    ours, theirs = pair(base, cfg)
    tokens = ref.token_rows(2, 19)
    logits = ours.eval()(tokens)
    peft_format.save(tmp_path / "ours", ours, cfg, ModelConfig(path=str(base)))
    loaded = peft.PeftModel.from_pretrained(ref.reference(base), tmp_path / "ours").eval()
    assert ref.relative(loaded(input_ids=tokens).logits, logits) < 1e-6
    assert all((p != 0).all() for name, p in ref.peft_parameters(loaded).items() if "lora_B" in name)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for folder in ("ours", "theirs"):
        read, _ = peft_format.read_config(tmp_path / folder)
        again = pretrained.load(base)
        adapters.attach(again, read)
        peft_format.load(tmp_path / folder, again)
        assert ref.relative(again.eval()(tokens), logits) < 1e-6


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_left_out_would_be_caught(base: Path, tmp_path: Path, key: str) -> None:
    """The negative control: a folder without its patterns is refused, or computes something else."""
    cfg = config({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 31}})
    ours = ref.adapted(base, cfg).eval()
    peft_format.save(tmp_path / "a", ours, cfg, ModelConfig(path=str(base)))
    path = tmp_path / "a" / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {}}))
    tokens = ref.token_rows(2, 19)
    try:
        read, _ = peft_format.read_config(tmp_path / "a")
        again = pretrained.load(base)
        adapters.attach(again, read)
        peft_format.load(tmp_path / "a", again)
    except UserError:
        assert key == "rank_pattern"
    else:
        assert key == "alpha_pattern"
        assert ref.relative(again.eval()(tokens), ours(tokens)) > 100 * EXACT


def test_a_rank_alone_changes_the_scale(base: Path) -> None:
    model = ref.adapted(base, config({"rank_pattern": {"q_proj": 3}}))
    scales = {name: adapter.scaling for name, adapter in adapters.adapters(model).items()}
    assert {scale for name, scale in scales.items() if "q_proj" in name} == {ref.ALPHA / 3}
    assert {scale for name, scale in scales.items() if "q_proj" not in name} == {ref.ALPHA / ref.R}


def test_merging_minds_the_patterns(base: Path, tmp_path: Path) -> None:
    run = ref.finished_run(tmp_path / "run", base)
    text = (run / "config.toml").read_text()
    patterns = 'rank_pattern = { q_proj = 3 }\nalpha_pattern = { "mlp.up_proj" = 31 }\nlayers_to_transform = [0, 2]\n'
    lines = [line for line in text.splitlines() if not line.startswith(("layers_to_", "rank_p", "alpha_p"))]
    lines = [line for line in lines if line not in ("[lora.rank_pattern]", "[lora.alpha_pattern]")]
    (run / "config.toml").write_text("\n".join(lines).replace("[lora]", f"[lora]\n{patterns}"))
    cfg = load_config([str(run / "config.toml")])
    model = ref.adapted(base, cfg.lora)
    for path in (run / "adapter").iterdir():
        path.unlink()
    (run / "adapter").rmdir()
    peft_format.save(run / "adapter", model, cfg.lora, ModelConfig(path=str(base)))
    ref.finish(run, base)
    merge.merge(run, tmp_path / "out")
    tokens = ref.token_rows(2, 19)
    merged = pretrained.load(tmp_path / "out")(tokens)
    assert ref.relative(merged, model.eval()(tokens)) < EXACT
    theirs = peft.PeftModel.from_pretrained(ref.reference(base), run / "adapter").merge_and_unload()
    assert ref.relative(merged, theirs(input_ids=tokens).logits) < EXACT


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"rank_pattern": {"w_pack": 3}}, "rank_pattern.*w_pack"),
        ({"alpha_pattern": {"lm_head": 3}}, "alpha_pattern.*lm_head"),
        ({"rank_pattern": {"q_proj": 3, "layers.0.self_attn.q_proj": 4}}, "order"),
        ({"layers_to_transform": (1, 3)}, "no layer 3"),
        ({"exclude_modules": ("vision",)}, "exclude_modules.*vision"),
        ({"exclude_modules": LINEARS}, "nothing is left"),
        ({"target_modules": "q_proj"}, "whole name"),
        ({"target_modules": r".*\.layers\.0"}, "is a Block"),
        ({"target_modules": ".*norm"}, "is a RMSNorm"),
        ({"modules_to_save": ("mlp",)}, "modules_to_save.*MLP"),
        ({"modules_to_save": ("w_pack",)}, "modules_to_save.*w_pack"),
        ({"trainable_token_indices": (5, ref.VOCAB)}, "rows for the tokens 0 to 130, and none for 131"),
        ({"trainable_token_indices": {"q_proj": [5]}}, "trainable_token_indices.*q_proj"),
        ({"trainable_token_indices": (5,), "target_modules": ("embed_tokens",)}, "another way"),
        ({"trainable_token_indices": (5,), "modules_to_save": ("tokens",)}, "embed_tokens would train whole"),
        ({"rank_pattern": {"a)|(b": 3}}, "rank_pattern"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_what_matches_nothing_or_cannot_be_is_refused(base: Path, shape: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapters.attach(pretrained.load(base), config(shape))


@pytest.mark.parametrize(
    "shape",
    [
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"q_proj": 3.0}},
        {"exclude_modules": ("q_proj",)},
        {"trainable_token_indices": (3,)},
        {"modules_to_save": ("lm_head",)},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_what_peft_s_files_say_of_lora_alone_is_refused_of_others(tied_base: Path, shape: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(shape))}: variant vera cannot"):
        adapters.attach(pretrained.load(tied_base), config(shape | {"variant": "vera"}))
    adapters.attach(pretrained.load(tied_base), config({"modules_to_save": ("norm",), "variant": "vera"}))


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_an_expression_that_never_ends_is_stopped(base: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    endless = r"(\w+\.?)+\d!"
    monkeypatch.setattr(targets, "SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(UserError, match="seconds"):
        adapters.attach(pretrained.load(base), config({key: endless if key == "target_modules" else {endless: 3}}))
    assert time.monotonic() - started < 10
    with torch.device("meta"):  # the control: one that ends is not stopped
        model = Llama(pretrained.read_config(base))
    assert len(adapters.attach(model, config({"target_modules": r"(\w+\.)+q_proj"}))) == 3


# ---- the embedding, the head, whole modules, rows ------------------------------------------------------------------

BESIDE: dict[str, dict[str, object]] = {
    "lora on embedding and head": {
        "target_modules": ("embed_tokens", "lm_head", "v_proj"),
        "rank_pattern": {"embed_tokens": 3},
    },
    "embedding and head whole": {"modules_to_save": ("embed_tokens", "lm_head")},
    "every norm": {"modules_to_save": ("norm",)},
    "a linear of each block": {"modules_to_save": ("q_proj",)},
    "rows of the embedding": {"trainable_token_indices": (60, 5, 17)},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [60, 5], "lm_head": [9, 60, 4]}},
}
TIED: dict[str, dict[str, object]] = {
    "embedding and head whole": {"modules_to_save": ("embed_tokens",)},
    "rows of both": {"trainable_token_indices": (60, 5, 17)},
}
CASES = [(False, shape) for shape in BESIDE.values()] + [(True, shape) for shape in TIED.values()]
NAMES = [*BESIDE, *(f"tied: {name}" for name in TIED)]


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("tied") / "model", tied=True)


def peft_name(name: str) -> str:
    """Of a trained parameter of PEFT's, as the file has it."""
    name = name.replace(".modules_to_save.default", "").replace(".default.weight", ".weight")
    return name.removesuffix(".default")


def beside(folder: Path, shape: dict[str, object], tied: bool) -> tuple[Llama, peft.PeftModel, LoRAConfig]:
    """A model and PEFT's, with the same numbers in all that trains, none of them where it started."""
    cfg = config(shape)
    ours = ref.adapted(folder, cfg)
    rows = cfg.trainable_token_indices
    theirs = ref.peft_model(
        folder,
        cfg,
        rank_pattern=dict(cfg.rank_pattern),
        modules_to_save=list(cfg.modules_to_save) or None,
        trainable_token_indices=(rows if isinstance(rows, dict) else list(rows)) or None,
        ensure_weight_tying=tied,
    )
    state = peft_format.state(ours)
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        trained = {peft_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
        assert trained.keys() <= state.keys()
        assert state.keys() - trained.keys() <= ({"base_model.model.lm_head.weight"} if tied else set())
        for name, parameter in trained.items():
            parameter.copy_(state[name])
    return ours, theirs.eval(), cfg


@pytest.mark.parametrize(("tied", "shape"), CASES, ids=NAMES)
def test_what_trains_beside_is_peft_s(
    base: Path, tied_base: Path, tmp_path: Path, tied: bool, shape: dict[str, object]
) -> None:
    folder = tied_base if tied else base
    ours, theirs, cfg = beside(folder, shape, tied)
    tokens = ref.token_rows(6, 37)
    logits = ours.eval()(tokens)
    assert ref.relative(logits, theirs(input_ids=tokens).logits) < EXACT
    assert ref.relative(logits, ref.reference(folder)(input_ids=tokens).logits) > 0.01

    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    (ours(tokens, labels=labels) / (labels != -100).sum()).backward()
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    places = peft_format.state(ours)
    mine = {p.data_ptr(): p.grad for p in ours.parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            grad = mine[places[peft_name(name)].data_ptr()]
            assert grad.abs().max() > 0, name
            assert ref.relative(grad, parameter.grad) < EXACT, name

    peft_format.save(tmp_path / "ours", ours, cfg, ModelConfig(path=str(folder)))
    loaded = peft.PeftModel.from_pretrained(ref.reference(folder), tmp_path / "ours").eval()
    assert ref.relative(loaded(input_ids=tokens).logits, logits) < 1e-6
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for name in ("ours", "theirs"):
        read, _ = peft_format.read_config(tmp_path / name)
        again = pretrained.load(folder)
        adapters.attach(again, read)
        peft_format.load(tmp_path / name, again)
        assert ref.relative(again.eval()(tokens), logits) < 1e-6


@pytest.mark.parametrize(("tied", "shape"), CASES, ids=NAMES)
def test_merging_minds_what_trains_beside(
    base: Path, tied_base: Path, tmp_path: Path, tied: bool, shape: dict[str, object]
) -> None:
    folder = tied_base if tied else base
    ours, _, cfg = beside(folder, shape, tied)
    run = tmp_path / "run"
    run.mkdir()
    options = [f"model.path={folder}", "model.dtype=float32", "method=lora", f"out={run}"]
    (run / "config.toml").write_text(dump(replace(load_config(options), lora=cfg)))
    peft_format.save(run / "adapter", ours, cfg, ModelConfig(path=str(folder)))
    ref.finish(run, folder)
    merge.merge(run, tmp_path / "out")
    tokens = ref.token_rows(4, 23)
    assert ref.relative(pretrained.load(tmp_path / "out")(tokens), ours.eval()(tokens)) < EXACT


@pytest.mark.parametrize("shape", BESIDE.values(), ids=BESIDE)
def test_a_fresh_start_changes_nothing(base: Path, shape: dict[str, object]) -> None:
    model, tokens = pretrained.load(base), ref.token_rows(2, 19)
    before = model(tokens)
    adapters.attach(model, config(shape))
    adapters.reset(model, 0)
    assert torch.allclose(model(tokens), before, rtol=0, atol=1e-5)


def test_rows_in_another_order_would_be_caught(base: Path) -> None:
    ours, theirs, _ = beside(base, {"trainable_token_indices": (60, 5, 17)}, False)
    rows = next(p for name, p in ours.named_parameters() if name.endswith("rows"))
    rows.data = rows.data[[1, 2, 0]]
    tokens = torch.tensor([[60, 5, 17, 9]])
    assert ref.relative(ours(tokens), theirs(input_ids=tokens).logits) > 100 * EXACT


def test_a_tied_head_that_was_trained_apart_is_refused(tied_base: Path, tmp_path: Path) -> None:
    ours, _, cfg = beside(tied_base, {"modules_to_save": ("embed_tokens",)}, True)
    peft_format.save(tmp_path / "a", ours, cfg, ModelConfig(path=str(tied_base)))
    path = tmp_path / "a" / peft_format.WEIGHTS
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match="unties"):
        peft_format.load(tmp_path / "a", ref.adapted(tied_base, cfg))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_pair_is_not_adapted_by_halves(tied_base: Path, target: str) -> None:
    with pytest.raises(UserError, match="tied"):
        adapters.attach(pretrained.load(tied_base), config({"target_modules": (target,)}))


def test_in_bf16_a_copy_is_fp32_and_its_file_is_not(base: Path, tmp_path: Path) -> None:
    model, cfg = pretrained.load(base, "bfloat16"), config({"modules_to_save": ("lm_head", "norm")})
    adapters.attach(model, cfg)
    adapters.reset(model, 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ref.token_rows(2, 9)).dtype == torch.bfloat16
    peft_format.save(tmp_path / "a", model, cfg, ModelConfig(path=str(base)))
    kinds = {name: t.dtype for name, t in load_file(tmp_path / "a" / peft_format.WEIGHTS).items()}
    assert kinds["base_model.model.lm_head.weight"] == kinds["base_model.model.model.norm.weight"] == torch.bfloat16
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}


def test_vllm_s_limits_are_said() -> None:
    assert "alpha_pattern" in peft_format.vllm_limits(config({"alpha_pattern": {"q_proj": 3}}))
    assert "modules_to_save" in peft_format.vllm_limits(config({"modules_to_save": ("lm_head",)}))
    assert peft_format.vllm_limits(config({})) is None


def test_a_folder_with_peft_s_copies_of_the_base_loads_if_they_are_the_base_s(base: Path, tmp_path: Path) -> None:
    """PEFT's default, where the embedding or the head is adapted."""
    ours, theirs, _ = beside(base, {"target_modules": ("q_proj", "embed_tokens", "lm_head")}, False)
    theirs.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / peft_format.WEIGHTS
    weights = load_file(path)
    name = "base_model.model.lm_head.base_layer.weight"
    cfg, _ = peft_format.read_config(tmp_path / "a")
    again, tokens = pretrained.load(base), ref.token_rows(2, 19)
    adapters.attach(again, cfg)
    peft_format.load(tmp_path / "a", again)
    assert ref.relative(again.eval()(tokens), ours.eval()(tokens)) < 1e-6
    save_file({**weights, name: weights[name] + 1e-3}, path)
    with pytest.raises(UserError, match="another base"):
        peft_format.load(tmp_path / "a", again)
