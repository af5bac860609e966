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

from minitune import adapters, merge, peft_format, pretrained
from minitune.adapters import targets
from minitune.config import LINEARS, LoRAConfig, ModelConfig, load_config
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
        ({"target_modules": ("embed_tokens",)}, "is a Embedding"),
        ({"modules_to_save": ("lm_head",)}, "modules_to_save"),
        ({"trainable_token_indices": (5,)}, "trainable_token_indices"),
        ({"rank_pattern": {"a)|(b": 3}}, "rank_pattern"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_what_matches_nothing_or_cannot_be_is_refused(base: Path, shape: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapters.attach(pretrained.load(base), config(shape))


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


def test_vllm_s_limits_are_said() -> None:
    assert "alpha_pattern" in peft_format.vllm_limits(config({"alpha_pattern": {"q_proj": 3}}))
    assert peft_format.vllm_limits(config({})) is None
