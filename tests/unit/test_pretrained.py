"""Model folders in and out: what is accepted is exact, and everything else is refused by name, all of it at once."""

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune import build, errors, files, header, pretrained, shards
from minitune.config import Config, LoRAConfig, ModelConfig
from minitune.errors import UserError
from minitune.model import Llama, RopeScaling
from minitune.nf4 import NF4Linear
from minitune.shards import COMPANIONS, INDEX, SINGLE, Shards

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    """The message of the UserError that `call` ends with."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# config.json


@pytest.fixture
def config_file(tmp_path: Path, shape: dict[str, Any]) -> Callable[..., Path]:
    """config_file(drop=(...), **changes) -> a folder with just a config.json that is fine but for these."""

    def write(drop: tuple[str, ...] = (), **changes: object) -> Path:
        values = {"model_type": "llama", **shape, "rope_theta": 10000.0} | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))
        return tmp_path

    return write


def test_a_plain_config_is_read(config_file: Callable[..., Path], shape: dict[str, Any]) -> None:
    config = pretrained.read_config(config_file())
    assert {key: getattr(config, key) for key in shape} == shape
    assert (config.head_dim, config.rope_theta, config.rope_scaling) == (16, 10000.0, None)
    assert not (config.attention_bias or config.mlp_bias or config.tie_word_embeddings)


def test_what_a_config_leaves_out_is_as_in_transformers(config_file: Callable[..., Path]) -> None:
    import transformers

    keys = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    folder = config_file(drop=keys)
    ours, theirs = pretrained.read_config(folder), transformers.AutoConfig.from_pretrained(folder)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    for key in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key


REFUSED = {
    "another model": ({"model_type": "mistral"}, "model_type 'mistral' is not supported; minitune runs 'llama'"),
    "no model type": ({"model_type": None}, "model_type None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window = 4096"),
    "sliding window, in use": ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window = 4096"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partial rotary, new": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "rope type": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
    "rope type, old": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    "rope type, new": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    "rope type missing": ({"rope_scaling": {"factor": 2.0}}, "rope type None"),
    "rope type null": ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope type None"),
    "rope type missing, new": ({"rope_parameters": {"factor": 8.0, "rope_theta": 1e4}}, "rope type"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, "rope"),
    "rope type no word": ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope type"),
    "rope no object": ({"rope_scaling": "linear"}, "rope_parameters and rope_scaling must be objects"),
    "scaled twice": (
        {
            "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        "rope",
    ),
    "theta given twice": (
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "rope_theta is given twice, as 10000.0 and 500000.0",
    ),
    "theta a word": ({"rope_theta": "10000"}, "rope_theta is '10000'"),
    "theta below one": ({"rope_theta": 0.5}, "rope_theta is 0.5"),
    "theta true": ({"rope_theta": True}, "rope_theta is True"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope factor is None"),
    "factor zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope factor is 0"),
    "factor infinite": ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "Infinity is no JSON number"),
    "factor nan": ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "NaN is no JSON number"),
    "llama3 without all": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope low_freq_factor is None"),
    "llama3 upside down": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor",
    ),
    "llama3 without a middle": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
        "high_freq_factor",
    ),
    "heads that do not divide": ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 is no multiple of .* 4"),
    "odd head": ({"head_dim": 15}, "head_dim 15 is odd"),
    "width that heads do not divide": ({"hidden_size": 66}, "hidden_size 66"),
    "width zero": ({"hidden_size": 0}, "hidden_size is 0"),
    "width negative": ({"hidden_size": -64}, "hidden_size is -64"),
    "width a fraction": ({"hidden_size": 64.5}, "hidden_size is 64.5"),
    "width a word": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "vocabulary absurd": ({"vocab_size": 10**30}, "vocab_size is 1000000"),
    "layers absurd": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "epsilon zero": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "epsilon nan": ({"rms_norm_eps": float("nan")}, "NaN is no JSON number"),
    "bias no truth value": ({"attention_bias": "false"}, "attention_bias"),
    "tied no truth value": ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    "layer types no list": ({"layer_types": 5}, "layer_types"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_exactly_is_refused_by_name(case: str, config_file: Callable[..., Path]) -> None:
    changes, named = REFUSED[case]
    drop = ("rope_theta",) if "rope_parameters" in changes and "rope_theta" not in changes else ()
    message = refused(pretrained.read_config, config_file(drop=drop, **changes))
    assert re.search(named, message), message
    assert "config.json" in message
    assert "\n" not in message
    assert len(message) < 400


def test_missing_keys_are_named_all_at_once(config_file: Callable[..., Path]) -> None:
    message = refused(
        pretrained.read_config,
        config_file(drop=("vocab_size", "num_attention_heads"), hidden_act="relu", rope_scaling={"type": "ntk"}),
    )
    for named in ("vocab_size", "num_attention_heads", "hidden_act", "'ntk'"):
        assert named in message


ACCEPTED = {
    "theta twice, the same": (
        {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        None,
    ),
    "nothing scaled": ({"rope_scaling": None}, None),
    "an empty scaling": ({"rope_scaling": {}}, None),
    "default by name": ({"rope_scaling": {"rope_type": "default"}}, None),
    "theta alone": ({"rope_parameters": {"rope_theta": 10000.0}}, None),
    "both keys of the type": (
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}},
        RopeScaling("linear", 4.0),
    ),
    "both keys, of which transformers takes the newer": (
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 4}},
        RopeScaling("linear", 4.0),
    ),
    "a whole factor": ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeScaling("linear", 4.0)),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, RopeScaling("llama3", **LLAMA3)),
    "a window not in use": ({"sliding_window": 4096, "use_sliding_window": False}, None),
    "everything spelled out": (
        {"attention_dropout": 0.0, "hidden_act": "silu", "layer_types": ["full_attention"] * 2, "pretraining_tp": 1},
        None,
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_harmless_spellings_are_accepted(case: str, config_file: Callable[..., Path]) -> None:
    changes, scaling = ACCEPTED[case]
    config = pretrained.read_config(config_file(**changes))
    assert (config.rope_theta, config.rope_scaling) == (10000.0, scaling)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"{", "is no JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"\xff\xfe{}", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (None, "is missing"),
    ],
)
def test_a_file_that_is_no_object_is_refused(text: bytes | None, named: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    assert named in refused(pretrained.read_config, tmp_path)


def test_a_byte_order_mark_is_no_obstacle(config_file: Callable[..., Path]) -> None:
    folder = config_file()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert pretrained.read_config(folder).vocab_size == 101


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused(path: str) -> None:
    assert re.search(f"model.path: there is no folder {re.escape(path)}", refused(pretrained.find, path))


def test_a_model_too_short_or_of_another_tokenizer_is_refused(config_file: Callable[..., Path]) -> None:
    config = pretrained.read_config(config_file())
    pretrained.check_fits(config, 256, 101)
    assert "data.max_seq_len: 257 is more than the model's 256" in refused(pretrained.check_fits, config, 257, 101)
    assert "ids up to 101" in refused(pretrained.check_fits, config, 256, 102)


# Weights in


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder's single file in place."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def assert_holds(model: Llama, folder: Path) -> None:
    """Every parameter is on the CPU and equal to the file's."""
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, stored[name].to(parameter.dtype)), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_is_the_file_s(tied: bool, dtype: str, save_llama: Any) -> None:
    folder, _ = save_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    model = pretrained.load(folder, dtype=dtype)
    assert_holds(model, folder)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_sharded_and_single_files_give_the_same_model(save_llama: Any) -> None:
    single, theirs = save_llama("single")
    sharded = single.with_name("sharded")
    theirs.save_pretrained(sharded, max_shard_size="60KB")
    assert (single / SINGLE).exists()
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    one, other = pretrained.load(single).state_dict(), pretrained.load(sharded).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def spoil_everything(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].to(torch.int8)


def test_all_that_is_wrong_with_the_tensors_is_listed_together(save_llama: Any) -> None:
    folder, _ = save_llama()
    edit(folder, spoil_everything)
    message = refused(pretrained.load, folder)
    for line in (
        "missing model.layers.1.mlp.up_proj.weight",
        "missing model.norm.weight",
        "unexpected model.layers.2.input_layernorm.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight is (100, 64), config.json makes it (101, 64)",
        "model.layers.0.mlp.gate_proj.weight has dtype I8",
    ):
        assert line in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"],
)
def test_each_tensor_is_missed(name: str, save_llama: Any) -> None:
    folder, _ = save_llama(attention_bias=True)
    edit(folder, lambda tensors: tensors.pop(name))
    message = refused(pretrained.load, folder)
    assert f"missing {name}" in message
    assert message.count("\n") == 1


def test_a_transposed_weight_is_refused(save_llama: Any) -> None:
    folder, _ = save_llama()
    edit(folder, lambda t: t.update({k: v.T for k, v in t.items() if "down_proj" in k}))
    assert "down_proj.weight is (128, 64), config.json makes it (64, 128)" in refused(pretrained.load, folder)


def test_long_lists_are_cut(save_llama: Any) -> None:
    folder, _ = save_llama(num_hidden_layers=5)
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers." in name])
    message = refused(pretrained.load, folder)
    assert message.count("\n") == 21
    assert "and 25 more" in message  # nine tensors a layer


def test_nothing_is_read_before_names_and_shapes_are_right(save_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = save_llama()
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(Shards, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    refused(pretrained.load, folder)


@pytest.mark.parametrize("change", ["other", "half", "other shape", "equal"])
def test_a_tied_head_in_the_file_must_be_the_embedding(change: str, save_llama: Any) -> None:
    folder, _ = save_llama(tie_word_embeddings=True)

    def add(tensors: dict[str, Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        head[3, 5] += change == "other"
        tensors["lm_head.weight"] = {"half": head.half(), "other shape": head[:-1]}.get(change, head)

    edit(folder, add)
    if change == "equal":
        model = pretrained.load(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        assert "ties lm_head to the embedding, yet the file holds another" in refused(pretrained.load, folder)


def test_old_rotary_tables_are_passed_over(save_llama: Any) -> None:
    folder, _ = save_llama()
    before = pretrained.load(folder).state_dict()
    edit(folder, lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in (0, 1)}))
    after = pretrained.load(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def live_bytes_at_once(monkeypatch: pytest.MonkeyPatch, hoard: bool) -> Callable[[], int]:
    """Count the tensors that Shards gave out and that still live; `hoard` keeps them, as a state dict would."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    kept, most = [], [0]
    plain = Shards.tensor

    def counted(self: Shards, name: str) -> Tensor:
        tensor = plain(self, name)
        alive.add(tensor.untyped_storage())
        kept.extend([tensor] * hoard)
        most[0] = max(most[0], sum(storage.nbytes() for storage in alive))
        return tensor

    monkeypatch.setattr(Shards, "tensor", counted)
    return lambda: most[0]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("hoard", [False, True])
def test_the_host_holds_one_tensor_of_the_file_at_a_time(
    method: str, hoard: bool, save_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = save_llama(max_shard_size="60KB", num_hidden_layers=4)
    sizes = [tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    most = live_bytes_at_once(monkeypatch, hoard)
    build.build_model(recipe(folder, method), folder, torch.device("cpu"))
    assert most() == (sum(sizes) if hoard else max(sizes))


def recipe(folder: Path, method: str, dtype: str = "float32", **lora: Any) -> Config:
    model = ModelConfig(path=str(folder), dtype=dtype)
    return replace(Config(), method=method, seed=5, model=model, lora=LoRAConfig(**{"r": 4, "alpha": 12.0, **lora}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_composed_four_bit_model_holds_bitsandbytes_s_bytes(dtype: str, save_llama: Any) -> None:
    import bitsandbytes.functional as bnb

    folder, _ = save_llama(attention_bias=True, max_shard_size="60KB")
    model = build.build_model(recipe(folder, "qlora", dtype), folder, torch.device("cpu"))
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)

    four_bit = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(four_bit) == 2 * 7
    for name, module in four_bit.items():
        weight = stored[name.removesuffix(".base") + ".weight"].to(pretrained.DTYPES[dtype])
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(module.packed.flatten(), packed.flatten()), name
        assert torch.equal(module.absmax.flatten(), state.absmax), name
        assert torch.equal(module.nested_absmax, state.state2.absmax), name
        assert torch.equal(module.nested_offset[0], state.offset), name
        if module.bias is not None:
            bias = stored[name.removesuffix(".base") + ".bias"]
            assert torch.equal(module.bias, bias.to(module.bias.dtype)), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(model.get_parameter(name), stored[name].to(pretrained.DTYPES[dtype]))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_a_missing_tensor_of_a_four_bit_model_goes_by_the_base_s_name(save_llama: Any) -> None:
    folder, _ = save_llama()
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    message = refused(build.build_model, recipe(folder, "qlora"), folder, torch.device("cpu"))
    assert "missing model.layers.1.self_attn.q_proj.weight" in message
    assert message.count("\n") == 1


# Folders that cannot be trusted


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths of all safetensors files that were opened."""
    paths: list[Path] = []
    plain = header.opened

    def watched(path: Path) -> Any:
        paths.append(path)
        return plain(path)

    monkeypatch.setattr(header, "opened", watched)
    return paths


@pytest.fixture
def sharded(save_llama: Any) -> Path:
    folder, _ = save_llama(max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def rename_last_shard(folder: Path, name: object) -> None:
    """Let the index say `name` for the last shard."""
    index = json.loads((folder / INDEX).read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {k: name if v == last else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/hostname",
        "sub/x.safetensors",
        "./model.safetensors",
        "..\\outside.safetensors",
        "C:\\x.safetensors",
        "x.safetensors\0.txt",
        "",
        ".",
        "..",
        5,
        None,
        True,
        ["x.safetensors"],
        {"file": "x.safetensors"},
    ],
    ids=repr,
)
def test_a_shard_outside_the_folder_is_refused_before_anything_is_opened(
    name: object, sharded: Path, opened: list[Path]
) -> None:
    for place in (sharded.parent / "outside.safetensors", sharded / "sub" / "x.safetensors"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("not to be opened")
    rename_last_shard(sharded, name)
    message = refused(pretrained.load, sharded)
    assert f"{name!r} is no plain file name" in message
    assert opened == []


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "\ud800.safetensors", "missing.safetensors", "folder", "pipe", "dangling", "circle"],
    ids=["far too long", "no valid text", "missing", "a folder", "a pipe", "a link to nothing", "a link to itself"],
)
def test_a_shard_that_is_no_file_is_refused_before_anything_is_opened(
    name: str, sharded: Path, opened: list[Path]
) -> None:
    (sharded / "folder").mkdir()
    os.mkfifo(sharded / "pipe")  # opening it would wait for ever
    (sharded / "dangling").symlink_to(sharded / "nothing")
    (sharded / "circle").symlink_to(sharded / "circle")
    rename_last_shard(sharded, name)
    message = refused(pretrained.load, sharded)
    assert str(sharded) in message
    assert opened == []


@pytest.mark.parametrize("through", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused(through: str, sharded: Path, opened: list[Path]) -> None:
    outside = sharded.parent / "outside"
    outside.mkdir()
    last = max(sharded.glob("model-*.safetensors"))
    moved = shutil.move(last, outside / "x.safetensors")
    if through == "folder":
        (sharded / "way").symlink_to(outside)
        moved = sharded / "way" / "x.safetensors"
    last.symlink_to(moved)
    message = refused(pretrained.load, sharded)
    assert "is a link that leaves the folder" in message
    assert opened == []


def test_a_single_file_that_links_out_is_refused(save_llama: Any, opened: list[Path]) -> None:
    folder, _ = save_llama()
    shutil.move(folder / SINGLE, folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to("../elsewhere.safetensors")
    assert "is a link that leaves the folder" in refused(pretrained.load, folder)
    assert opened == []


def test_links_within_the_folder_and_to_it_are_fine(save_llama: Any) -> None:
    folder, _ = save_llama()
    shutil.move(folder / SINGLE, folder / "real.safetensors")
    (folder / SINGLE).symlink_to("real.safetensors")
    link = folder.with_name("link")
    link.symlink_to(folder)
    pretrained.load(link)


def test_the_hub_s_cache_links_to_its_blobs(save_llama: Any) -> None:
    folder, _ = save_llama()
    cache = folder.with_name("models--owner--name")
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "0a1b").mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copyfile(path, cache / "blobs" / f"blob-{path.name}")
        (cache / "snapshots" / "0a1b" / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert_holds(pretrained.load(cache / "snapshots" / "0a1b"), folder)

    (cache / "refs").mkdir()  # beside the blobs is still outside
    shutil.move(cache / "blobs" / f"blob-{SINGLE}", cache / "refs" / SINGLE)
    (cache / "snapshots" / "0a1b" / SINGLE).unlink()
    (cache / "snapshots" / "0a1b" / SINGLE).symlink_to(f"../../refs/{SINGLE}")
    assert "is a link that leaves the folder" in refused(pretrained.load, cache / "snapshots" / "0a1b")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("many", [False, True])
def test_a_truncated_file_is_refused(keep: int, many: bool, save_llama: Any) -> None:
    folder, _ = save_llama(max_shard_size="60KB" if many else "5GB")
    last = max(folder.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:keep])
    message = refused(pretrained.load, folder)
    assert f"{last} is no whole safetensors file" in message
    assert "\n" not in message


def test_a_folder_of_pickles_is_refused_plainly(save_llama: Any) -> None:
    folder, _ = save_llama()
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    message = refused(pretrained.load, folder)
    assert "pickle (pytorch_model.bin)" in message
    assert "take a revision" in message


def test_a_folder_without_weights_is_refused(save_llama: Any) -> None:
    folder, _ = save_llama()
    (folder / SINGLE).unlink()
    assert f"{folder} holds no weights" in refused(pretrained.load, folder)


def drop_from_index(index: dict[str, Any]) -> None:
    del index["weight_map"]["model.norm.weight"]


def add_to_index(index: dict[str, Any]) -> None:
    index["weight_map"]["model.norm.bias"] = index["weight_map"]["model.norm.weight"]


def move_in_index(index: dict[str, Any]) -> None:
    names = index["weight_map"]
    names["model.norm.weight"] = next(name for name in names.values() if name != names["model.norm.weight"])


@pytest.mark.parametrize("change", [drop_from_index, add_to_index, move_in_index])
def test_an_index_that_disagrees_with_its_files_is_refused(change: Callable[..., None], sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    change(index)
    (sharded / INDEX).write_text(json.dumps(index))
    message = refused(pretrained.load, sharded)
    assert re.search(r"index\.json and model-\d+-of-\d+\.safetensors disagree about model\.norm\.", message)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_without_a_map_is_refused(weight_map: object, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map must be an object" in refused(pretrained.load, sharded)


def test_of_a_single_file_and_an_index_the_single_file_counts(sharded: Path, save_llama: Any) -> None:
    """As in transformers: a folder must not be two models."""
    other, _ = save_llama("other")
    edit(other, lambda tensors: tensors.update({name: -tensor for name, tensor in tensors.items()}))
    shutil.copyfile(other / SINGLE, sharded / SINGLE)
    assert torch.equal(logits(sharded), logits(other))
    assert_holds(pretrained.load(sharded), other)


def test_files_are_closed_when_a_folder_is_refused(sharded: Path) -> None:
    def handles() -> int:
        return sum(1 for link in Path("/proc/self/fd").iterdir() if str(sharded) in os.path.realpath(link))

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are counted through /proc")
    max(sharded.glob("model-*.safetensors")).write_bytes(b"")
    refused(pretrained.load, sharded)
    assert handles() == 0


# Weights out


def like(folder: Path) -> Path:
    """Put companions there that a careless copy would change."""
    (folder / "tokenizer.json").write_bytes(b'{"b": 1.0, "a": "\\u00e9 \xc3\xa9"}\r\n')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / "chat_template.jinja").write_bytes(b"{{ x }}\n\n")
    (folder / "notes.txt").write_text("stays behind")
    return folder


def logits(folder: Path) -> Tensor:
    import transformers

    model, report = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()(torch.arange(30)[None]).logits.detach()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [shards.SHARD_BYTES, 60_000])
def test_saved_folders_load_in_transformers_with_equal_logits(
    tied: bool, limit: int, save_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    base, _ = save_llama(tie_word_embeddings=tied, attention_bias=True)
    model = pretrained.load(like(base))
    out = tmp_path / "deep" / "out"
    shards.save(out, pretrained.full_state(model, torch.float32), like=base)

    weights = sorted(path.name for path in out.glob("*.safetensors"))
    if limit == 60_000:
        assert weights == [f"model-{n:05d}-of-{len(weights):05d}.safetensors" for n in range(1, len(weights) + 1)]
        assert len(weights) > 2
        assert all(sum(tensor.nbytes for tensor in load_file(out / name).values()) <= limit for name in weights)
        index = json.loads((out / INDEX).read_text())
        parameters = sum(tensor.nbytes for name in weights for tensor in load_file(out / name).values())
        assert index["metadata"]["total_size"] == parameters
    else:
        assert weights == [SINGLE]
        assert not (out / INDEX).exists()

    assert torch.equal(logits(out), logits(base))
    again = pretrained.load(out).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())

    copied = {path.name for path in out.iterdir()} - {*weights, INDEX}
    assert copied == {name for name in COMPANIONS if (base / name).exists()}
    assert {"config.json", "tokenizer.model", "chat_template.jinja"} <= copied
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in copied)
    assert not [path for path in out.parent.iterdir() if path != out]  # nothing temporary is left


def test_a_shard_ends_before_it_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    tensors = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate([60, 40, 1, 250, 99, 1, 1])]
    assert [list(shard) for shard in shards.in_shards(tensors)] == [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"]]


def test_saving_that_fails_leaves_the_old_folder(save_llama: Any, tmp_path: Path) -> None:
    base, _ = save_llama()
    model = pretrained.load(base)
    out = tmp_path / "out"
    shards.save(out, pretrained.full_state(model, torch.float32), like=base)
    before = {path.name: files.sha256(path) for path in out.iterdir()}

    def breaks_off() -> Any:
        yield from list(pretrained.full_state(model, torch.bfloat16))[:3]
        raise errors.RunFailed("the disk is full")

    with pytest.raises(errors.RunFailed):
        shards.save(out, breaks_off(), like=base)
    assert {path.name: files.sha256(path) for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}

    shards.save(out, pretrained.full_state(model, torch.bfloat16), like=base)  # and one that works replaces it
    assert load_file(out / SINGLE)["model.norm.weight"].dtype == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_companions_that_link_out_are_not_copied(save_llama: Any, tmp_path: Path) -> None:
    base, _ = save_llama()
    (tmp_path / "secret").write_text("not to be copied")
    (base / "tokenizer.json").symlink_to("../secret")
    model = pretrained.load(base)
    message = refused(shards.save, tmp_path / "out", pretrained.full_state(model, torch.float32), base)
    assert "tokenizer.json is a link that leaves the folder" in message
    assert not (tmp_path / "out").exists()


# What a base is


def test_the_fingerprint_tells_bases_and_tokenizers_apart(save_llama: Any) -> None:
    base, _ = save_llama()
    like(base)
    first = pretrained.fingerprint(base)
    assert pretrained.fingerprint(base) == first

    (base / "tokenizer.model").write_bytes(b"other")
    second = pretrained.fingerprint(base)
    assert second["the tokenizer"] != first["the tokenizer"]
    assert second["the base model"] == first["the base model"]
    edit(base, lambda tensors: tensors["model.embed_tokens.weight"].neg_())
    assert pretrained.fingerprint(base)["the base model"] != first["the base model"]
