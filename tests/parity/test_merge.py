"""Merging against PEFT's merge_and_unload, against sums in fp64, and against the models that were trained."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import peft
import peft_reference as ref
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitune import merge, peft_format, shards
from minitune.adapters.lora import LoRALinear
from minitune.build import build_model
from minitune.config import LINEARS, load_config
from minitune.errors import UserError
from minitune.generate import open_model

MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # significant bits
SMALLEST = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}  # exponent of the least normal number


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def half_an_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` around each number of an fp64 tensor."""
    exponent = torch.frexp(exact).exponent.clamp(min=SMALLEST[dtype] + 1)  # |x| in [2^(e-1), 2^e)
    return torch.ldexp(torch.full_like(exact, 0.5), exponent - MANTISSA[dtype])


def deltas(run: Path) -> dict[str, Tensor]:
    """Name of each adapted weight -> (alpha / r) B A in fp64, read from the files by themselves."""
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name in saved:
        if name.endswith("lora_A.weight"):
            A, B = saved[name].double(), saved[name.replace("lora_A", "lora_B")].double()
            found[name.removeprefix("base_model.model.").replace("lora_A.", "")] = scale * (B @ A)
    assert found
    return found


def through_nf4(weight: Tensor) -> Tensor:
    """bitsandbytes' own way there and back."""
    packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)


def in_a_block(name: str) -> bool:
    return any(f".{linear}." in name for linear in LINEARS)


# ---- lora -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_what_peft_merges(tmp_path: Path, tied: bool) -> None:
    base = ref.base_folder(tmp_path / "base", tied=tied)
    targets = LINEARS if tied else (*LINEARS, "lm_head")
    run = ref.finished_run(tmp_path / "run", base, "lora", "float32", *targets)
    merge.merge(run, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(ref.reference(base), run / "adapter").merge_and_unload()
    expected = theirs.state_dict()
    merged = tensors_of(tmp_path / "out")
    assert merged.keys() == tensors_of(base).keys()
    assert ("lm_head.weight" in merged) is not tied
    for name, tensor in merged.items():
        assert ref.relative(tensor, expected[name]) < 1e-6, name
    changed = {name for name, t in tensors_of(base).items() if not torch.equal(merged[name], t)}
    assert changed == deltas(run).keys()


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_with_the_live_model_s_logits(tmp_path: Path, tied: bool) -> None:
    base = ref.base_folder(tmp_path / "base", tied=tied)
    targets = LINEARS if tied else (*LINEARS, "lm_head")
    run = ref.finished_run(tmp_path / "run", base, "lora", "float32", *targets)
    merge.merge(run, tmp_path / "out")
    tokens = ref.token_rows(3, 40)
    live, _, _ = open_model(str(run))
    logits = live.eval()(tokens)
    assert ref.relative(ref.reference(tmp_path / "out")(input_ids=tokens).logits, logits) < 1e-5
    assert ref.relative(ref.reference(base)(input_ids=tokens).logits, logits) > 0.01
    own, _, _ = open_model(str(tmp_path / "out"))
    assert ref.relative(own(tokens), logits) < 1e-5


@pytest.mark.parametrize("stored", MANTISSA, ids=str)
@pytest.mark.parametrize("asked", [None, "bfloat16", "float16", "float32"])
def test_every_weight_is_the_fp64_sum_rounded_once(tmp_path: Path, stored: torch.dtype, asked: str | None) -> None:
    base = ref.base_folder(tmp_path / "base", dtype=stored)
    run = ref.finished_run(tmp_path / "run", base, "lora", "float32", "q_proj", "down_proj")
    merge.merge(run, tmp_path / "out", dtype=asked)
    dtype = getattr(torch, asked) if asked else stored
    originals, merged = tensors_of(base), tensors_of(tmp_path / "out")
    adapted = deltas(run)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype, name
        exact = originals[name].double() + adapted.get(name, 0)
        assert ((tensor.double() - exact).abs() <= half_an_ulp(exact, dtype) * (1 + 1e-9)).all(), name


def test_rounding_twice_would_be_caught(tmp_path: Path) -> None:
    """The negative control: adding in bf16, with the product rounded before, leaves some weights further off."""
    base = ref.base_folder(tmp_path / "base", dtype=torch.bfloat16)
    run = ref.finished_run(tmp_path / "run", base, "lora", "float32", "q_proj")
    originals = tensors_of(base)
    for name, delta in deltas(run).items():
        exact = originals[name].double() + delta
        careless = originals[name] + delta.bfloat16()
        assert ((careless.double() - exact).abs() > half_an_ulp(exact, torch.bfloat16) * (1 + 1e-9)).any()


@pytest.mark.parametrize("wrong", ["no scale", "transposed"])
def test_a_wrong_merge_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    base = ref.base_folder(tmp_path / "base", num_key_value_heads=6, head_dim=9 * 2, hidden_size=108)

    def spoiled(self: LoRALinear, weight: Tensor) -> Tensor:
        A, B = self.lora_A.detach().to(weight), self.lora_B.detach().to(weight)
        return weight + B @ A if wrong == "no scale" else weight + self.scaling * (B @ A).T

    run = ref.finished_run(tmp_path / "run", base, "lora", "float32", "q_proj")
    monkeypatch.setattr(LoRALinear, "merged_weight", spoiled)
    merge.merge(run, tmp_path / "out")
    expected = peft.PeftModel.from_pretrained(ref.reference(base), run / "adapter").merge_and_unload().state_dict()
    merged = tensors_of(tmp_path / "out")
    assert all(ref.relative(merged[name], expected[name]) > 1e-3 for name in deltas(run))


def test_the_other_files_are_the_base_s_own_bytes(tmp_path: Path) -> None:
    base = ref.base_folder(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (base / "tokenizer.model").write_bytes(b"\x00\xff not read here")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace("\n", "\r\n") + "\n\n")  # rewriting it would lose these
    run = ref.finished_run(tmp_path / "run", base)
    merge.merge(run, tmp_path / "out")
    names = {path.name for path in base.iterdir()} - {"model.safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name


def test_several_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ref.base_folder(tmp_path / "base", max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    run = ref.finished_run(tmp_path / "run", base)
    merge.merge(run, tmp_path / "whole")
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    merge.merge(run, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert index["weight_map"].keys() == whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(path.stat().st_size < 60_000 + 8192 for path in (tmp_path / "cut").glob("*.safetensors"))
    tokens = ref.token_rows(2, 12)
    expected = ref.reference(tmp_path / "whole")(input_ids=tokens).logits
    assert torch.equal(ref.reference(tmp_path / "cut")(input_ids=tokens).logits, expected)


# ---- qlora ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("wide") / "base", wide=True)


def live_logits(run: Path, tokens: Tensor) -> Tensor:
    """Of the model that was trained: four-bit weights and adapters beside them."""
    cfg = load_config([str(run / "config.toml")])
    model = build_model(cfg, Path(cfg.model.path), torch.device("cpu"))
    peft_format.load(run / "adapter", model)
    return model.eval()(tokens)


@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "v_proj")], ids=["all seven", "q and v"])
def test_dequantized_is_the_model_that_was_trained(tmp_path: Path, wide_base: Path, targets: tuple[str, ...]) -> None:
    run = ref.finished_run(tmp_path / "run", wide_base, "qlora", "float32", *targets)
    merge.merge(run, tmp_path / "dequantized")
    merge.merge(run, tmp_path / "original", base="original")
    tokens = ref.token_rows(3, 40)
    expected = live_logits(run, tokens)
    assert ref.relative(ref.reference(tmp_path / "dequantized")(input_ids=tokens).logits, expected) < 1e-5
    assert ref.relative(ref.reference(tmp_path / "original")(input_ids=tokens).logits, expected) > 1e-3

    originals, adapted = tensors_of(wide_base), deltas(run)
    for kind in ("dequantized", "original"):
        for name, tensor in tensors_of(tmp_path / kind).items():
            under = through_nf4(originals[name]) if kind == "dequantized" and in_a_block(name) else originals[name]
            exact = under.double() + adapted.get(name, 0)
            assert ((tensor.double() - exact).abs() <= half_an_ulp(exact, tensor.dtype) * (1 + 1e-9)).all(), (
                kind,
                name,
            )
            assert tensor.dtype == originals[name].dtype


def test_linears_without_an_adapter_are_dequantized_too(tmp_path: Path, wide_base: Path) -> None:
    """The adapter was trained beside four-bit weights in all of a block, adapted or not."""
    run = ref.finished_run(tmp_path / "run", wide_base, "qlora", "float32", "v_proj")
    merge.merge(run, tmp_path / "out")
    originals, merged = tensors_of(wide_base), tensors_of(tmp_path / "out")
    for name in originals:
        if in_a_block(name) and "v_proj" not in name:
            assert torch.equal(merged[name], through_nf4(originals[name])), name
        assert torch.equal(merged[name], originals[name]) is not in_a_block(name), name


def test_in_bf16_the_dequantized_weight_is_that_of_the_bf16_model(tmp_path: Path, wide_base: Path) -> None:
    run = ref.finished_run(tmp_path / "run", wide_base, "qlora", "bfloat16", "v_proj")
    merge.merge(run, tmp_path / "out", dtype="float32")
    originals, merged, adapted = tensors_of(wide_base), tensors_of(tmp_path / "out"), deltas(run)
    for name, tensor in merged.items():
        under = originals[name].bfloat16()
        under = through_nf4(under) if in_a_block(name) else under
        exact = under.double() + adapted.get(name, 0)
        assert ((tensor.double() - exact).abs() <= half_an_ulp(exact, torch.float32) * (1 + 1e-9)).all(), name


@pytest.mark.parametrize("kind", ["dequantized", "original"])
def test_the_errors_it_tells_are_right(tmp_path: Path, wide_base: Path, kind: str) -> None:
    run = ref.finished_run(tmp_path / "run", wide_base, "qlora", "float32", "q_proj", "down_proj")
    found = merge.merge(run, tmp_path / "out", base=kind, dtype="bfloat16")
    originals, merged, adapted = tensors_of(wide_base), tensors_of(tmp_path / "out"), deltas(run)
    update = weight = rounding = quantization = 0.0
    for name, delta in adapted.items():
        original = originals[name].double()
        four = through_nf4(originals[name]).double()
        exact = (four if kind == "dequantized" else original) + delta
        update += delta.square().sum().item()
        weight += original.square().sum().item()
        rounding += (merged[name].double() - exact).square().sum().item()
        quantization += (four - original).square().sum().item()
    assert found.update == pytest.approx(update, rel=1e-9)
    assert found.weight == pytest.approx(weight, rel=1e-9)
    assert found.rounding == pytest.approx(rounding, rel=1e-9)
    first, second, third = found.lines(kind)
    assert f"{(update / weight) ** 0.5:.3%}" in first
    assert f"{(rounding / update) ** 0.5:.3%}" in second
    assert rounding > 0
    # over the adapted weights, as the update is: a ratio of sums over different weights says nothing
    assert found.quantization == pytest.approx(quantization, rel=1e-9)
    assert f"{(quantization / update) ** 0.5:.3g} times" in third


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_tells_of_no_quantization(tmp_path: Path, dtype: str) -> None:
    """Nor of what bf16 rounds off the base's fp32 weights: that is no four-bit weight."""
    run = ref.finished_run(tmp_path / "run", ref.base_folder(tmp_path / "base"), "lora", dtype)
    found = merge.merge(run, tmp_path / "out")
    assert found.quantization == 0
    assert len(found.lines("dequantized")) == 2


# ---- where the run was trained does not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("core", ["varlen", "flash"])
def test_a_run_trained_on_a_gpu_merges_and_opens_without_one(tmp_path: Path, wide_base: Path, core: str) -> None:
    """model.attention says how to train; a merge multiplies no queries, and writing takes what the machine has."""
    run = ref.finished_run(tmp_path / "run", wide_base, "qlora", "bfloat16", "q_proj")
    path = run / "config.toml"
    path.write_text(path.read_text().replace('attention = "auto"', f'attention = "{core}"'))
    assert load_config([str(path)]).model.attention == core
    merge.merge(run, tmp_path / "out")
    assert tensors_of(tmp_path / "out")
    if not torch.cuda.is_available():
        open_model(str(run))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return ref.finished_run(tmp_path / "run", ref.base_folder(tmp_path / "base"))


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever is refused leaves the disk as it was, but for what the test itself made."""
    yield
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".old"))]


def test_an_existing_folder_is_refused(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="out exists already"):
        merge.merge(run, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("nothing_left")
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", ref.base_folder(tmp_path / "base")):
        with pytest.raises(UserError, match=r"is no run folder"):
            merge.merge(folder, tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_a_full_run_is_refused(tmp_path: Path, run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace('method = "lora"', 'method = "full"'))
    with pytest.raises(UserError, match="trained the whole model"):
        merge.merge(run, tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_an_unfinished_run_is_refused(tmp_path: Path, run: Path) -> None:
    (run / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has not finished"):
        merge.merge(run, tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_a_damaged_base_is_refused(tmp_path: Path, run: Path) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="is not the one that"):
        merge.merge(run, tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_a_damaged_adapter_is_refused(tmp_path: Path, run: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="has not finished"):  # it is not what the run made
        merge.merge(run, tmp_path / "out")
    ref.finish(run, tmp_path / "base")
    with pytest.raises(UserError, match="no whole safetensors file"):
        merge.merge(run, tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("what", ["missing", "unexpected", "misshapen"])
def test_a_base_whose_weights_are_not_its_config_s_is_refused(tmp_path: Path, run: Path, what: str) -> None:
    """A weight that is not there would be left out, and its adapter with it, without a word."""
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "unexpected":
        tensors["model.layers.9.self_attn.q_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:1].contiguous()
    shards.files.write_tensors(weights, tensors)
    with pytest.raises(UserError, match=r"the base model in .* is not the one that"):
        merge.merge(run, tmp_path / "out")


@pytest.mark.usefixtures("nothing_left")
def test_an_error_halfway_leaves_nothing(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "copy_companions", fail)
    with pytest.raises(OSError, match="No space"):
        merge.merge(run, tmp_path / "out")


def test_the_script_says_the_errors_and_exits_with_2(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    script = str(Path(__file__).parents[2] / "scripts" / "merge.py")
    monkeypatch.setattr(sys, "argv", [script, str(run), "--out", str(tmp_path / "out"), "--dtype", "float16"])
    runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    assert "of the weights (Frobenius norm)" in said and "rounding" in said and str(tmp_path / "out") in said
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.usefixtures("nothing_left")
def test_another_base_of_the_same_shape_is_refused(tmp_path: Path, run: Path) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    shards.files.write_tensors(weights, {name: tensor * 1.01 for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"the base model in .* is not the one that"):
        merge.merge(run, tmp_path / "out")
