"""LoRA against PEFT: what it computes, what it learns, and its files, both ways."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import peft
import peft_reference as ref
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitune import adapters, nf4, parallel, peft_format, pretrained
from minitune.adapters.lora import LoRALinear
from minitune.config import LINEARS, LoRAConfig, ModelConfig
from minitune.errors import UserError
from minitune.model import Llama, LlamaConfig

TARGETS = {"all seven": LINEARS, "q and v": ("q_proj", "v_proj"), "with the head": (*LINEARS, "lm_head")}
EXACT = 1e-5  # relative, whole tensors, fp32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("base") / "model")


def pair(base: Path, cfg: LoRAConfig) -> tuple[Llama, peft.PeftModel]:
    """The same adapters here and in PEFT, both in training mode."""
    ours, theirs = ref.adapted(base, cfg), ref.peft_model(base, cfg)
    ref.copy_adapters(ref.own_parameters(ours), ref.peft_parameters(theirs))
    return ours.train(), theirs.train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (3, 17) and labels, the token after each; rows hold unequal numbers of loss tokens."""
    tokens = ref.token_rows(3, 17, seed=100 + step)
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    for row, prompt in enumerate((2, 7, 13)):
        labels[row, : prompt + step % 3] = -100
    return tokens, labels


def our_loss(model: Llama, tokens: Tensor, labels: Tensor) -> Tensor:
    return model(tokens, labels=labels) / (labels != -100).sum()


def their_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """transformers shifts labels itself: the label of a token is the token."""
    shifted = F.pad(labels[:, :-1], (1, 0), value=-100)
    return model(input_ids=tokens, labels=shifted).loss


# ---- what it computes and learns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_outputs_loss_and_every_gradient_are_peft_s(base: Path, targets: tuple[str, ...]) -> None:
    ours, theirs = pair(base, ref.lora_config(*targets))
    tokens, labels = batch(0)
    assert ref.relative(ours(tokens), theirs(input_ids=tokens).logits) < EXACT
    loss, expected = our_loss(ours, tokens, labels), their_loss(theirs, tokens, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=EXACT)
    loss.backward()
    expected.backward()

    gradients, expected_gradients = ref.own_parameters(ours), ref.peft_parameters(theirs)
    assert len(gradients) == 2 * (2 * len(set(targets) - {"lm_head"}) + ("lm_head" in targets))
    for name, parameter in gradients.items():
        assert parameter.grad.abs().max() > 0, name
        assert ref.relative(parameter.grad, expected_gradients[name].grad) < EXACT, name
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in gradients)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_ten_adamw_steps_are_peft_s(base: Path, targets: tuple[str, ...]) -> None:
    ours, theirs = pair(base, ref.lora_config(*targets))
    weights, expected = ref.own_parameters(ours), ref.peft_parameters(theirs)
    before = {name: p.detach().clone() for name, p in weights.items()}
    # With an eps near zero the first steps take the sign of each gradient, and the sign of one that is all rounding is
    # chance; 1e-3 is far above rounding, so that what is compared is the adapter.
    options = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-3}
    optimizers = [torch.optim.AdamW(p.values(), **options) for p in (weights, expected)]
    for step in range(10):
        tokens, labels = batch(step)
        our_loss(ours, tokens, labels).backward()
        their_loss(theirs, tokens, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in weights.items():
            assert ref.relative(parameter, expected[name]) < EXACT, (step, name)
    assert all(ref.relative(p, before[name]) > 1e-2 for name, p in weights.items())


def root_of_r(model: Llama) -> None:
    for adapter in adapters.adapters(model).values():
        adapter.scaling = ref.ALPHA / math.sqrt(ref.R)


def no_scale(model: Llama) -> None:
    for adapter in adapters.adapters(model).values():
        adapter.scaling = 1.0


def transposed_B(model: Llama) -> None:
    for adapter in adapters.adapters(model).values():
        rows, columns = adapter.lora_B.shape
        adapter.lora_B.data = adapter.lora_B.data.reshape(columns, rows).T.contiguous()


def bf16_adapters(model: Llama) -> None:
    for adapter in adapters.adapters(model).values():
        for parameter in adapter.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16().float()


@pytest.mark.parametrize("spoil", [root_of_r, no_scale, transposed_B, bf16_adapters])
def test_a_wrong_adapter_would_be_caught(base: Path, spoil: Callable[[Llama], None]) -> None:
    ours, theirs = pair(base, ref.lora_config())
    spoil(ours)
    tokens, labels = batch(0)
    assert ref.relative(ours(tokens), theirs(input_ids=tokens).logits) > 10 * EXACT
    our_loss(ours, tokens, labels).backward()
    their_loss(theirs, tokens, labels).backward()
    expected = ref.peft_parameters(theirs)
    worst = max(ref.relative(p.grad, expected[name].grad) for name, p in ref.own_parameters(ours).items())
    assert worst > 10 * EXACT


def test_bf16_masters_would_be_caught(base: Path) -> None:
    """Rounding the weights to bf16 after each step loses updates within ten of them."""
    ours, theirs = pair(base, ref.lora_config("q_proj"))
    weights, expected = ref.own_parameters(ours), ref.peft_parameters(theirs)
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-4) for p in (weights, expected)]
    for step in range(10):
        tokens, labels = batch(step)
        our_loss(ours, tokens, labels).backward()
        their_loss(theirs, tokens, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bf16_adapters(ours)
    assert max(ref.relative(p, expected[name]) for name, p in weights.items()) > 10 * EXACT


def test_in_bf16_the_parameters_gradients_and_moments_stay_fp32(base: Path) -> None:
    model = pretrained.load(base, "bfloat16")
    adapters.attach(model, ref.lora_config())
    adapters.reset(model, 0)
    ref.liven(model)
    tokens, labels = batch(0)
    assert model(tokens).dtype == torch.bfloat16
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    our_loss(model.train(), tokens, labels).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert p.requires_grad == ("lora_" in name), name
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())


# ---- the start ------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing(base: Path) -> None:
    tokens = ref.token_rows(2, 21)
    model = pretrained.load(base)
    before = model(tokens)
    adapters.attach(model, ref.lora_config(*LINEARS, "lm_head", dropout=0.3))
    adapters.reset(model, 0)
    for mode in (False, True):  # B is zero, so dropout cannot be seen either
        assert torch.equal(model.train(mode)(tokens), before)


def test_starting_values_are_kaiming_s() -> None:
    """Uniform within 1 / sqrt(in), so of standard deviation 1 / sqrt(3 in); as PEFT draws them."""
    adapter = LoRALinear(nn.Linear(1024, 48, bias=False), LoRAConfig(r=64))
    torch.manual_seed(0)
    adapter.reset_parameters()
    bound = 1 / math.sqrt(1024)
    assert adapter.lora_A.abs().max() <= bound
    assert adapter.lora_A.abs().max() > 0.999 * bound
    assert adapter.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(adapter.lora_A.mean().item()) < bound / 50
    assert torch.equal(adapter.lora_B, torch.zeros(48, 64))


def test_starting_values_depend_on_seed_and_name_alone(base: Path) -> None:
    def start(*targets: str, seed: int) -> dict[str, Tensor]:
        model = pretrained.load(base)
        adapters.attach(model, ref.lora_config(*targets))
        adapters.reset(model, seed)
        return {name: p.detach() for name, p in ref.own_parameters(model).items() if "lora_A" in name}

    torch.manual_seed(1)
    every = start(*LINEARS, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    some = start("v_proj", "q_proj", seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(some) == 4 and all(torch.equal(every[name], tensor) for name, tensor in some.items())
    other = start(*LINEARS, seed=8)
    assert not any(torch.equal(every[name], other[name]) for name in every)
    same_shape = [tensor for name, tensor in every.items() if "gate_proj" in name or "up_proj" in name]
    assert all(not torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


def test_the_guide_s_count_at_eight_billion() -> None:
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    )
    for quantized in (False, True):
        with torch.device("meta"):
            model = Llama(shape)
        if quantized:
            nf4.quantize_linears(model, torch.bfloat16)
        adapters.attach(model, LoRAConfig())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_943_040


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_and_on_in_train(base: Path) -> None:
    model = ref.adapted(base, ref.lora_config(dropout=0.4))
    tokens = ref.token_rows(2, 21)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_dropout_is_applied_to_the_adapter_s_input_alone() -> None:
    linear = nn.Linear(300, 70)
    adapter = LoRALinear(linear, LoRAConfig(r=ref.R, alpha=ref.ALPHA, dropout=0.25))
    adapter.reset_parameters()
    x = torch.randn(40, 300)
    assert torch.equal(adapter.train()(x), linear(x))  # B is zero: the base's output is not dropped
    nn.init.normal_(adapter.lora_B)

    torch.manual_seed(5)
    y = adapter(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.25)
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.02)
    expected = linear(x) + ref.ALPHA / ref.R * dropped @ adapter.lora_A.T @ adapter.lora_B.T
    assert ref.relative(y, expected) < EXACT


def test_dropout_draws_as_peft_s_does() -> None:
    """One layer, so that the order of drawing is the same: outputs in training mode are equal too."""
    cfg = LoRAConfig(r=ref.R, alpha=ref.ALPHA, dropout=0.25)
    linear = nn.Linear(54, 31)
    ours = LoRALinear(linear, cfg)
    ours.reset_parameters()
    nn.init.normal_(ours.lora_B)
    config = peft.LoraConfig(r=ref.R, lora_alpha=ref.ALPHA, lora_dropout=0.25, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(linear), config).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours.lora_A if "lora_A" in name else ours.lora_B)
    x = torch.randn(9, 54)
    torch.manual_seed(6)
    y = ours.train()(x)
    torch.manual_seed(6)
    assert ref.relative(y, theirs(x)) < EXACT


# ---- where it is put ------------------------------------------------------------------------------------------------


def test_targets_that_match_nothing_are_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"target_modules.*w_pack"):
        adapters.attach(pretrained.load(base), LoRAConfig(target_modules=("q_proj", "w_pack")))


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    model = pretrained.load(ref.base_folder(tmp_path / "tied", tied=True))
    with pytest.raises(UserError, match="lm_head"):
        adapters.attach(model, LoRAConfig(target_modules=("lm_head",)))


# ---- its files ------------------------------------------------------------------------------------------------------


def save(folder: Path, model: Llama, cfg: LoRAConfig, base: Path) -> Path:
    peft_format.save(folder, model, cfg, ModelConfig(path=str(base)))
    return folder


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_loads_what_we_save(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    cfg = ref.lora_config(*targets, dropout=0.1)
    ours = ref.adapted(base, cfg).eval()
    folder = save(tmp_path / "adapter", ours, cfg, base)
    theirs = peft.PeftModel.from_pretrained(ref.reference(base), folder).eval()
    tokens = ref.token_rows(3, 33)
    assert ref.relative(ours(tokens), theirs(input_ids=tokens).logits) < 1e-6
    loaded = ref.peft_parameters(theirs)
    for name, parameter in ref.own_parameters(ours).items():
        assert torch.equal(loaded[name], parameter), name
        assert "lora_B" not in name or (loaded[name] != 0).all(), name
    assert theirs.peft_config["default"].lora_dropout == 0.1
    bare = ref.reference(base)(input_ids=tokens).logits
    assert ref.relative(bare, theirs(input_ids=tokens).logits) > 0.01  # the adapter is seen in the comparison


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_we_load_what_peft_saves(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    theirs = ref.liven(ref.peft_model(base, ref.lora_config(*targets))).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    cfg, where = peft_format.read_config(tmp_path)
    assert (cfg.r, cfg.alpha, set(cfg.target_modules)) == (ref.R, ref.ALPHA, set(targets))
    assert where.path == str(base)
    ours = pretrained.load(base)
    adapters.attach(ours, cfg)
    peft_format.load(tmp_path, ours)
    tokens = ref.token_rows(3, 33)
    assert ref.relative(ours.eval()(tokens), theirs(input_ids=tokens).logits) < 1e-6
    for name, parameter in ref.own_parameters(ours).items():
        assert torch.equal(parameter, ref.peft_parameters(theirs)[name]), name


def keys_and_dtypes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(folder / peft_format.WEIGHTS, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_names_shapes_and_dtypes_are_those_peft_writes(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    cfg = ref.lora_config(*targets)
    save(tmp_path / "ours", ref.adapted(base, cfg), cfg, base)
    # beside an adapted head PEFT would also store the embedding and the head themselves, if not told to leave them out
    ref.peft_model(base, cfg).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = keys_and_dtypes(tmp_path / "ours")
    assert ours == keys_and_dtypes(tmp_path / "theirs")
    assert {dtype for dtype, _ in ours.values()} == {"F32"}
    theirs = json.loads((tmp_path / "theirs" / peft_format.CONFIG).read_text())
    config = json.loads((tmp_path / "ours" / peft_format.CONFIG).read_text())
    assert config.keys() <= theirs.keys() | {"lora_bias"}
    assert not list(tmp_path.rglob("*.part"))


def test_an_adapter_on_four_bits_has_the_same_files(tmp_path: Path) -> None:
    base = ref.base_folder(tmp_path / "base", wide=True)
    cfg = ref.lora_config()
    with torch.device("meta"):
        model = Llama(pretrained.read_config(base))
    model.to(torch.bfloat16)
    nf4.quantize_linears(model, torch.bfloat16)
    adapters.attach(model, cfg)
    parallel.materialize(model.modules(), torch.device("cpu"))
    pretrained.load_base(model, base)
    adapters.reset(model, 0)
    ref.liven(model)
    save(tmp_path / "four", model, cfg, base)
    save(tmp_path / "plain", ref.adapted(base, cfg), cfg, base)
    assert keys_and_dtypes(tmp_path / "four") == keys_and_dtypes(tmp_path / "plain")
    loaded = peft.PeftModel.from_pretrained(ref.reference(base), tmp_path / "four")
    for name, parameter in ref.own_parameters(model).items():
        assert torch.equal(ref.peft_parameters(loaded)[name], parameter), name


def test_an_embedding_beside_the_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    """PEFT's default for an adapted head: the folder then holds weights of the base, which may have been trained."""
    ref.liven(ref.peft_model(base, ref.lora_config("lm_head"))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight matches nothing"):
        load(base, tmp_path)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """An adapter folder that loads as it stands."""
    cfg = ref.lora_config()
    folder = save(tmp_path / "adapter", ref.adapted(base, cfg), cfg, base)
    load(base, folder)
    return folder


def load(base: Path, folder: Path) -> Llama:
    cfg, _ = peft_format.read_config(folder)
    model = pretrained.load(base)
    adapters.attach(model, cfg)
    peft_format.load(folder, model)
    return model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [5]),
        ("target_parameters", ["mlp.experts"]),
        ("peft_type", "IA3"),
        # What changes the forward pass, or the base itself, in newer kinds of PEFT:
        ("use_qalora", True),
        ("alora_invocation_tokens", [5, 6]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(base: Path, folder: Path, key: str, value: object) -> None:
    path = folder / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key):
        load(base, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "all-linear"),
        ("target_modules", []),
        ("target_modules", [3]),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", -4),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", 3),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(base: Path, folder: Path, key: str, value: object) -> None:
    path = folder / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key):
        load(base, folder)


def test_pissa_is_why_the_way_of_starting_matters(base: Path, tmp_path: Path) -> None:
    """PEFT changes the base of such an adapter when it loads it: on the base as it stands, it means something else."""
    theirs = ref.peft_model(base, ref.lora_config("q_proj"), init_lora_weights="pissa").eval()
    theirs.save_pretrained(tmp_path)
    tokens = ref.token_rows(2, 9)
    right = theirs(input_ids=tokens).logits
    again = peft.PeftModel.from_pretrained(ref.reference(base), tmp_path).eval()(input_ids=tokens).logits
    assert ref.relative(again, right) < 1e-4
    cfg = ref.lora_config("q_proj")
    ours = pretrained.load(base)
    adapters.attach(ours, cfg)
    peft_format.load(tmp_path, ours)
    assert ref.relative(ours.eval()(tokens), right) > 0.01


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(iter(tensors))
    return {name.replace("q_proj", "wq") if name == first else name: t for name, t in tensors.items()}


def drop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def compiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("base_model.model.", "base_model.model._orig_mod."): t for name, t in tensors.items()}


def other_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (t[:-1] if "lora_A" in name else t[:, :-1]).contiguous() for name, t in tensors.items()}


def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.T.contiguous() for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (rename, r"wq.*matches nothing[\s\S]*is missing"),
        (drop, "is missing"),
        (compiled, r"_orig_mod.*matches nothing"),
        (other_rank, r"says r = 5, but .*lora_A\.weight in .* is \(4, \d+\)"),
        (transposed, r"says r = 5, but .*lora_A\.weight in .* is \(\d+, 5\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    base: Path, folder: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    path = folder / peft_format.WEIGHTS
    tensors = load_file(path)
    if spoil is rename:
        tensors = dict(sorted(tensors.items(), key=lambda item: "q_proj" not in item[0]))
    save_file(spoil(tensors), path)
    with pytest.raises(UserError, match=said):
        load(base, folder)


def test_a_refused_file_changes_nothing(base: Path, folder: Path) -> None:
    model = ref.adapted(base, ref.lora_config(), seed=9)
    before = {name: p.clone() for name, p in ref.own_parameters(model).items()}
    path = folder / peft_format.WEIGHTS
    save_file(drop(load_file(path)), path)
    with pytest.raises(UserError):
        peft_format.load(folder, model)
    assert all(torch.equal(before[name], p) for name, p in ref.own_parameters(model).items())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(base: Path, folder: Path, keep: int) -> None:
    path = folder / peft_format.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is no whole"):
        load(base, folder)


@pytest.mark.parametrize("name", [peft_format.CONFIG, peft_format.WEIGHTS])
def test_a_missing_file_is_refused(base: Path, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        load(base, folder)


# ---- a variant is one file and one line -----------------------------------------------------------------------------


class RsLoRALinear(LoRALinear):
    """rsLoRA, https://arxiv.org/abs/2312.03732, as a researcher would add it: another scale, and PEFT's name for it."""

    PEFT_CONFIG: ClassVar = {"use_rslora": True}

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.scaling = cfg.alpha / cfg.r**0.5


def test_a_new_variant_goes_out_to_peft_and_comes_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapters.ADAPTERS, "rslora", RsLoRALinear)
    cfg = LoRAConfig(variant="rslora", r=5, alpha=12, dropout=0.0)
    model = pretrained.load(base)
    adapters.attach(model, cfg)
    adapters.reset(model, 1)
    for adapter in adapters.adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    peft_format.save(tmp_path / "adapter", model, cfg, ModelConfig(path=str(base)))
    tokens = ref.token_rows(2, 19)
    theirs = peft.PeftModel.from_pretrained(ref.reference(base), tmp_path / "adapter").eval()
    assert ref.relative(model(tokens), theirs(input_ids=tokens).logits) < 1e-5

    read, _ = peft_format.read_config(tmp_path / "adapter")
    assert read.variant == "rslora"
    again = pretrained.load(base)
    adapters.attach(again, read)
    peft_format.load(tmp_path / "adapter", again)
    assert torch.equal(again(tokens), model(tokens))

    monkeypatch.delitem(adapters.ADAPTERS, "rslora")
    with pytest.raises(UserError, match="use_rslora"):  # unknown again: refused, not taken for plain LoRA
        peft_format.read_config(tmp_path / "adapter")


def test_a_parameter_without_a_name_in_peft_is_not_left_out(base: Path) -> None:
    model = pretrained.load(base)
    adapters.attach(model, LoRAConfig())
    next(iter(adapters.adapters(model).values())).extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="PEFT_NAMES must name"):
        peft_format.state(model)
