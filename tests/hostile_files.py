"""Files made to harm whoever opens them: each case is a folder that is sound but for one thing, and the command that
meets it.

    for case in CASES:
        arguments = case.make(folder)     # ["scripts/generate.py", "...", ...], with everything under `folder`

must end with exit code 2, one clear message and no traceback, within five seconds of CPU and 500 MB, and must leave
`folder / "canary"` unwritten. `SOUND[case.kind](folder)` makes the same folder without the damage, whose command must
succeed: the control of every case of that kind.
"""

import array
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile_templates import BOMBS, INJECTIONS

# ruff: noqa: E501  (tables, a case a line)

TINY = Path(__file__).parents[1] / "minitune" / "tiny"
Json = dict[str, Any]
Tensors = dict[str, tuple[int, ...]]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LAYER = {
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
WEIGHTS: Tensors = {"model.embed_tokens.weight": (2048, 64), "model.norm.weight": (64,), "lm_head.weight": (2048, 64)}
WEIGHTS |= {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
ADAPTER: Tensors = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 64),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (64, 4),
}
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]}


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # the sound folder that it starts from
    damage: Callable[[Path], Any]  # done to that folder
    words: str  # that its message holds, lower case

    def make(self, folder: Path) -> list[str]:
        """Fill an empty folder; the arguments of the command that is to refuse it."""
        arguments = SOUND[self.kind](folder)
        changed = self.damage(folder)
        return changed if isinstance(changed, list) else arguments


# ---- sound folders -------------------------------------------------------------------------------------------------


def model(folder: Path) -> list[str]:
    base = folder / "model"
    base.mkdir(parents=True)
    write_json(base / "config.json", CONFIG)
    write_tensors(base / "model.safetensors", WEIGHTS)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, base / name)
    return ["scripts/generate.py", str(base), "--prompt", "a", "--max-new-tokens", "1"]


def sharded(folder: Path) -> list[str]:
    arguments = model(folder)
    base = folder / "model"
    (base / "model.safetensors").unlink()
    names = {True: "model-00001-of-00002.safetensors", False: "model-00002-of-00002.safetensors"}
    for is_layer, name in names.items():
        write_tensors(base / name, {key: s for key, s in WEIGHTS.items() if (".layers." in key) == is_layer})
    weight_map = {key: names[".layers." in key] for key in WEIGHTS}
    write_json(base / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return arguments


def sentencepiece(folder: Path) -> list[str]:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    arguments = model(folder)
    proto = ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    for text, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3), *((letter, 1) for letter in "▁abcdefghij"), ("ab", 1)):
        proto.pieces.add(piece=text, score=0.0, type=kind)
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    (folder / "model" / "tokenizer.model").write_bytes(proto.SerializeToString())
    return arguments


def adapter(folder: Path) -> list[str]:
    arguments = model(folder)
    place = folder / "adapter"
    place.mkdir()
    base = str(folder / "model")
    write_json(place / "adapter_config.json", ADAPTER_CONFIG | {"base_model_name_or_path": base})
    write_tensors(place / "adapter_model.safetensors", ADAPTER)
    return [arguments[0], str(place), *arguments[2:]]


def training(folder: Path) -> list[str]:
    model(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(
        f'method = "lora"\nout = {json.dumps(str(folder / "run"))}\n'
        f'[model]\npath = {json.dumps(str(folder / "model"))}\ndtype = "float32"\n'
        f'[data]\ntrain = [{json.dumps(str(folder / "rows.jsonl"))}]\ntemplate = "chat"\neval_fraction = 0\nmax_seq_len = 64\n'
        "[train]\nmax_steps = 1\nbatch_size = 1\ngradient_accumulation_steps = 1\n"
        "[save]\nevery_steps = 0\n[log]\ntensorboard = false\n"
    )
    return ["scripts/train.py", str(folder / "recipe.toml")]


SOUND: dict[str, Callable[[Path], list[str]]] = {
    "model": model,
    "sharded": sharded,
    "sentencepiece": sentencepiece,
    "adapter": adapter,
    "training": training,
}


# ---- tools of damage -----------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_tensors(path: Path, shapes: Tensors, dtype: str = "F32") -> None:
    header, data = {}, b""
    for name, shape in shapes.items():
        values = array.array("f", (0.01 * (number * 7919 % 13 - 6) for number in range(math.prod(shape)))).tobytes()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    write_raw(path, json.dumps(header).encode(), data)


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def parts(path: Path) -> tuple[Json, bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def config(**changes: Any) -> Callable[[Path], None]:
    """config.json with other values; text in place of a whole value stands in the file as it is."""
    return in_json("model/config.json", lambda values: values.update(changes))


def config_text(key: str, text: str) -> Callable[[Path], None]:
    """config.json with a value that json.dumps would not write."""

    def damage(folder: Path) -> None:
        values = {**CONFIG, key: "@"}
        (folder / "model/config.json").write_text(json.dumps(values).replace('"@"', text))

    return damage


def in_json(name: str, change: Callable[[Json], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        write_json(folder / name, values)

    return damage


def contents(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data() if callable(data) else data) and None


def header(change: Callable[[Json], Any], name: str = "model/model.safetensors") -> Callable[[Path], None]:
    """A safetensors file whose header says something else."""

    def damage(folder: Path) -> None:
        said, data = parts(folder / name)
        change(said)
        write_raw(folder / name, json.dumps(said).encode(), data)

    return damage


def header_text(change: Callable[[bytes], bytes], length: int | None = None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model/model.safetensors"
        said, data = parts(path)
        write_raw(path, change(json.dumps(said).encode()), data, length)

    return damage


def weight_map(name: Any) -> Callable[[Path], None]:
    """An index that names another file for one tensor, which lies there, so that only the name is wrong."""

    def damage(folder: Path) -> None:
        index = folder / "model/model.safetensors.index.json"
        values = json.loads(index.read_text())
        place = values["weight_map"]["model.norm.weight"]
        for outside in (folder / "outside.safetensors", folder / "model" / "..\\outside.safetensors"):
            shutil.copyfile(folder / "model" / place, outside)
        named = name.replace("@", str(folder)) if isinstance(name, str) else name
        values["weight_map"] = {key: named if kept == place else kept for key, kept in values["weight_map"].items()}
        write_json(index, values)

    return damage


def replaced(name: str, by: str) -> Callable[[Path], None]:
    """In the place of a file something else that has its name."""

    def damage(folder: Path) -> None:
        path = folder / name
        aside = folder / f"aside{path.suffix}"
        if path.exists():
            path.rename(aside)
        if by == "fifo":
            os.mkfifo(path)
        elif by == "folder":
            path.mkdir()
        elif by == "device":
            path.symlink_to("/dev/zero")
        elif by == "link out":
            path.symlink_to(aside)
        elif by == "link by link":
            (folder / "model" / "inner").symlink_to(folder, target_is_directory=True)
            path.symlink_to(Path("inner") / aside.name)
        elif by == "circle":
            path.symlink_to(path.name)
        elif by == "nothing":
            pass
        else:
            raise ValueError(by)

    return damage


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickled(name: str, *, without: str = "") -> Callable[[Path], None]:
    """A pickle that leaves a canary, under this name, in place of the file `without`."""

    def damage(folder: Path) -> None:
        if without:
            (folder / without).unlink()
        (folder / name).write_bytes(pickle.dumps(Canary(folder / "canary")))

    return damage


def chat_template(source: str) -> Callable[[Path], None]:
    return in_json("model/tokenizer_config.json", lambda values: values.update(chat_template=source))


def tokenizer(change: Callable[[Json], Any]) -> Callable[[Path], None]:
    return in_json("model/tokenizer.json", change)


def split(pattern: str) -> Callable[[Path], None]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return tokenizer(lambda state: state.update(pre_tokenizer=part))


def replacing(*pairs: tuple[str, str]) -> Json:
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    return {"type": "Sequence", "normalizers": steps}


def recipe(text: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    return contents("recipe.toml", text)


def override(setting: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["scripts/train.py", str(folder / "recipe.toml"), setting.replace("@", str(folder))]


def pieces(*texts: str, raw: bytes = b"") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        path = folder / "model/tokenizer.model"
        proto = ModelProto.FromString(path.read_bytes())
        for text in texts:
            proto.pieces.add(piece=text, score=0.0, type=1)
        path.write_bytes(proto.SerializeToString() + raw)

    return damage


# ---- the cases -----------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000
LONG = 200_000_000  # bytes
EMBED = "model.embed_tokens.weight"


def big(make: Callable[[], bytes]) -> Callable[[], bytes]:
    return make


def index_cases() -> list[Case]:
    names: dict[str, Any] = {
        "..": "../outside.safetensors",
        "an absolute path": "@/outside.safetensors",
        "a backslash": "..\\outside.safetensors",
        "a way around": "a/../../outside.safetensors",
        "a folder in the folder": "./model-00002-of-00002.safetensors",
        "NUL": "model-00002-of-00002.safetensors\0.txt",
        "nothing": "",
        "the folder": ".",
        "its parent": "..",
        "null": None,
        "a number": 7,
        "a list": ["model-00002-of-00002.safetensors"],
        "a name too long": "x" * 5000,
        "half a character": "\ud800.safetensors",
        "a home": "~/outside.safetensors",
        "/proc": "/proc/self/mem",
        "a URL": "https://example.invalid/model.safetensors",
    }
    cases = [Case(f"a shard named by {name}", "sharded", weight_map(value), "file") for name, value in names.items()]
    shard, index = "model/model-00002-of-00002.safetensors", "model/model.safetensors.index.json"
    for by in ("fifo", "folder", "device", "link out", "link by link", "circle", "nothing"):
        cases.append(Case(f"a shard that is {by}", "sharded", replaced(shard, by), "file|missing|link"))
        if by != "nothing":
            cases.append(Case(f"an index that is {by}", "sharded", replaced(index, by), "file|link|weights"))
    texts: dict[str, bytes | Callable[[], bytes]] = {
        "deep": DEEP,
        "200 MB": lambda: b'{"weight_map": {"a": "' + b"x" * LONG + b'"}}',
        "millions of lists": lambda: b'{"weight_map": [' + b"[]," * 5_000_000 + b"1]}",
        "millions of names": lambda: b"{" + b",".join(b'"%d":1' % number for number in range(1_900_000)) + b"}",
        "empty": b"",
        "no object": b"[1, 2]",
        "no UTF-8": b'{"weight_map": {"\xff": "a"}}',
        "a key twice": b'{"weight_map": {"a": "b"}, "weight_map": {"a": "../x"}}',
        "no weight_map": b'{"metadata": {}}',
        "an empty weight_map": b'{"weight_map": {}}',
        "a name with a slash": b'{"weight_map": {"../x": "model-00002-of-00002.safetensors"}}',
        "a name with a line break": b'{"weight_map": {"a\\nb": "model-00002-of-00002.safetensors"}}',
    }
    cases += [
        Case(f"an index: {name}", "sharded", contents(index, text), "json|weight_map|no name|bytes|values")
        for name, text in texts.items()
    ]
    return cases


def header_cases() -> list[Case]:
    def moved(said: Json) -> None:
        said["lm_head.weight"]["data_offsets"] = said[EMBED]["data_offsets"]

    def gap(said: Json) -> None:
        start, end = said["model.norm.weight"]["data_offsets"]
        said["model.norm.weight"] |= {"data_offsets": [start + 4, end], "shape": [63]}

    says: dict[str, Callable[[Json], Any]] = {
        "overlapping tensors": moved,
        "a hole": gap,
        "an unknown dtype": lambda said: said[EMBED].update(dtype="F31"),
        "a dtype that is a list": lambda said: said[EMBED].update(dtype=["F32"]),
        "a dtype of another size": lambda said: said[EMBED].update(dtype="F16"),
        "a negative size": lambda said: said[EMBED].update(shape=[-2048, -64]),
        "a huge shape": lambda said: said[EMBED].update(shape=[2**40, 2**40]),
        "a shape that overflows to what is there": lambda said: said[EMBED].update(shape=[2**62, 2048 * 64]),
        "a shape of floats": lambda said: said[EMBED].update(shape=[2048.0, 64.0]),
        "a shape of truths": lambda said: said["model.norm.weight"].update(shape=[True, 64]),
        "a shape of thousands": lambda said: said["model.norm.weight"].update(shape=[1] * 5000 + [64]),
        "offsets of the wrong way": lambda said: said[EMBED].update(data_offsets=[2048 * 64 * 4, 0]),
        "offsets past the end": lambda said: said["lm_head.weight"].update(data_offsets=[2**50, 2**50 + 2048 * 64 * 4]),
        "three offsets": lambda said: said[EMBED].update(data_offsets=[0, 1, 2]),
        "no offsets": lambda said: said[EMBED].pop("data_offsets"),
        "more keys": lambda said: said[EMBED].update(code="import os"),
        "a tensor that is a list": lambda said: said.update({EMBED: [1]}),
        "metadata of numbers": lambda said: said.update(__metadata__={"a": 1}),
        "metadata that is a list": lambda said: said.update(__metadata__=["a"]),
        "another tensor": lambda said: said.update({"more": said.pop("model.norm.weight")}),
        "another shape": lambda said: said[EMBED].update(shape=[64, 2048]),
        "integers": lambda said: said[EMBED].update(dtype="I32"),
    }
    says |= {
        f"a name: {name}": lambda said, value=value: said.update({value: said.pop("model.norm.weight")})
        for name, value in {
            "a path": "../../etc/x",
            "an absolute path": "/etc/x",
            "a line break": "a\nb",
            "an escape": "a\x1b[2Jb",
            "NUL": "a\0b",
            "nothing": "",
            "a long one": "x" * 100_000,
            "another alphabet": "\uff4dodel",
            "half a character": "\ud800",
        }.items()
    }
    cases = [Case(f"a header with {name}", "model", header(change), "") for name, change in says.items()]
    texts: dict[str, tuple[Callable[[bytes], bytes], int | None]] = {
        "a tensor twice": (lambda text: text[:-1] + b', "model.norm.weight": {}}', None),
        "a key twice": (lambda text: text.replace(b'"dtype"', b'"dtype": "I64", "dtype"', 1), None),
        "no JSON": (lambda text: text[:-1] + b"!", None),
        "no object": (lambda text: b"[1]", None),
        "no UTF-8": (lambda text: text.replace(b"norm", b"\xff\xfe\xfd\xfc", 1), None),
        "depth": (lambda text: DEEP, None),
        "a number of 100,000 digits": (lambda text: text.replace(b"[2048, 64]", b"[" + b"9" * 100_000 + b"]", 1), None),
        "1e400": (lambda text: text.replace(b"[2048, 64]", b"[1e400]", 1), None),
        "NaN": (lambda text: text.replace(b"[2048, 64]", b"[NaN]", 1), None),
        "a length past the end": (lambda text: text, 10**9),
        "a length of 2^64 - 1": (lambda text: text, 2**64 - 1),
        "a length of 0": (lambda text: text, 0),
        "a length of 1": (lambda text: text, 1),
        "90 MB of spaces": (lambda text: text + b" " * 90_000_000, None),
        "millions of tensors": (lambda text: b"{" + b'"a":0,' * 1_500_000 + b'"a":0}', None),
    }
    cases += [Case(f"a header with {name}", "model", header_text(*change), "") for name, change in texts.items()]
    weights = "model/model.safetensors"
    cases += [
        Case("weights of 0 bytes", "model", contents(weights, b""), "safetensors"),
        Case("weights of 7 bytes", "model", contents(weights, b"\0" * 7), "safetensors"),
        Case(
            "weights with more behind them",
            "model",
            lambda f: (f / weights).open("ab").write(b"PK\x03\x04" * 9) and None,
            "safetensors",
        ),
        Case("weights cut short", "model", lambda f: os.truncate(f / weights, 500_000), "safetensors"),
    ]
    cases += [
        Case(f"weights that are {by}", "model", replaced(weights, by), "file|link|weights")
        for by in ("fifo", "folder", "device", "link out", "link by link", "circle", "nothing")
    ]
    return cases


def pickle_cases() -> list[Case]:
    weights = "model/model.safetensors"
    names = (
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "consolidated.00.pth",
        "model.ckpt",
        "model.pkl",
        "tf_model.h5",
    )
    cases = [Case(f"a pickle: {name}", "model", pickled(f"model/{name}", without=weights), "weights") for name in names]
    cases += [
        Case("a pickle named as safetensors", "model", pickled(weights), "safetensors"),
        Case("a pickle as a shard", "sharded", pickled("model/model-00002-of-00002.safetensors"), "safetensors"),
        Case("a pickle named by the index", "sharded", weight_map("pytorch_model.bin"), "missing|file"),
        Case(
            "a pickle as an adapter",
            "adapter",
            pickled("adapter/adapter_model.bin", without="adapter/adapter_model.safetensors"),
            "missing|pickle",
        ),
        Case("a pickle named as an adapter", "adapter", pickled("adapter/adapter_model.safetensors"), "safetensors"),
        Case("a pickle as config.json", "model", pickled("model/config.json"), "json"),
        Case("a pickle as tokenizer.json", "model", pickled("model/tokenizer.json"), "json"),
        Case("a pickle as tokenizer.model", "sentencepiece", pickled("model/tokenizer.model"), "sentencepiece"),
        Case(
            "a pickle as data",
            "training",
            lambda f: (pickled("rows.pkl")(f), override("data.train=@/rows.pkl")(f))[1],
            "rows.pkl",
        ),
        Case("a pickle named as data", "training", pickled("rows.jsonl"), "rows"),
        Case("a pickle as a recipe", "training", pickled("recipe.toml"), "recipe"),
    ]
    return cases


def config_cases() -> list[Case]:
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    values: dict[str, Any] = {
        "0": 0,
        "-1": -1,
        "10^12": 10**12,
        "a float": 64.5,
        "a truth": True,
        "a text": "64",
        "a list": [64],
    }
    cases = [
        Case(f"config.json: {key} is {name}", "model", config(**{key: value}), key if key != "head_dim" else "")
        for key in keys
        for name, value in values.items()
    ]
    cases += [
        Case(f"config.json: {key} is {text[:12]}", "model", config_text(key, text), "")
        for key, text in (
            ("rope_theta", "NaN"), ("rope_theta", "Infinity"), ("rope_theta", "0"), ("rope_theta", "-1"), ("rope_theta", "1e400"),
            ("rope_theta", '"10000"'), ("rope_theta", "true"), ("rope_theta", "[1]"), ("rms_norm_eps", "0"), ("rms_norm_eps", "-1e-5"),
            ("rms_norm_eps", "1e300"), ("rms_norm_eps", "NaN"), ("vocab_size", "9" * 100_000), ("vocab_size", "1e400"),
            ("hidden_size", "-" + "9" * 4000), ("num_hidden_layers", "1000"), ("num_hidden_layers", "1000000000"),
            ("max_position_embeddings", "0"), ("max_position_embeddings", "1e9"), ("tie_word_embeddings", '"yes"'), ("attention_bias", "7"),
        )
    ]  # fmt: skip
    cases += [
        Case(f"config.json: {name}", "model", config(**values), words)
        for name, values, words in (
            ("another model", {"model_type": "gpt2"}, "model_type"),
            ("a model_type of megabytes", {"model_type": "x" * 5_000_000}, "model_type"),
            ("remote code", {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "model_type"),
            ("a huge vocabulary", {"vocab_size": 2**24}, "config.json makes it"),
            ("widths beyond the weights", {"hidden_size": 2**20, "intermediate_size": 2**20}, "config.json makes it"),
            ("a thousand layers", {"num_hidden_layers": 1000}, "missing"),
            ("a vocabulary below the tokenizer's", {"vocab_size": 100}, ""),
            ("rope_scaling is a text", {"rope_scaling": "linear"}, "rope"),
            ("rope_scaling of an unknown kind", {"rope_scaling": {"rope_type": "evil", "factor": 2}}, "rope"),
            ("rope_scaling by 0", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope"),
            ("rope_scaling by -1", {"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "rope"),
            ("rope_scaling by a list", {"rope_scaling": {"rope_type": "linear", "factor": [2]}}, "rope"),
            ("rope_scaling without its numbers", {"rope_scaling": {"rope_type": "llama3"}}, "rope"),
            ("rope_scaling of a list", {"rope_scaling": {"rope_type": ["linear"]}}, "rope"),
            ("rope given twice", {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "rope"),
            ("quantization", {"quantization_config": {"quant_method": "evil"}}, "quantization_config"),
            ("layer_types of numbers", {"layer_types": [1] * 100_000}, "layer_types"),
        )
    ]  # fmt: skip
    path = "model/config.json"
    texts: dict[str, bytes | Callable[[], bytes]] = {
        "deep lists": DEEP,
        "deep objects": b'{"a":' * 100_000,
        "depth that parses": b'{"model_type": "llama", "a": ' + b"[" * 500 + b"]" * 500 + b"}",
        "200 MB": lambda: b'{"a": "' + b"x" * LONG + b'"}',
        "15 MB of lists": lambda: b'{"a": [' + b"[]," * 5_000_000 + b"1]}",
        "nothing": b"",
        "a text": b'"llama"',
        "a key twice": json.dumps(CONFIG).encode()[:-1] + b', "vocab_size": 2048}',
        "no UTF-8": b"\xff\xfe",
        "half of it": json.dumps(CONFIG).encode()[:50],
        "NUL": b"\0" * 1000,
    }
    cases += [
        Case(f"config.json: {name}", "model", contents(path, text), "config.json") for name, text in texts.items()
    ]
    cases += [
        Case(f"config.json that is {by}", "model", replaced(path, by), "config.json")
        for by in ("fifo", "folder", "device", "link out", "link by link", "circle", "nothing")
    ]
    return cases


def tokenizer_cases() -> list[Case]:
    def added(count: int, length: int = 5) -> Callable[[Json], Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokens = [{"id": 3000 + n, "content": f"<{n}>".ljust(length, "x"), **flags} for n in range(count)]
        return lambda state: state["added_tokens"].extend(tokens)

    state: dict[str, Callable[[Json], Any]] = {
        "added tokens without end": added(300_000),
        "a token of 10 MB": added(1, 10_000_000),
        "an added token without a text": lambda s: s["added_tokens"].append({"id": 5}),
        "added tokens that are no list": lambda s: s.update(added_tokens={"a": 1}),
        "an id of 10^12": lambda s: s["model"]["vocab"].update({"evil": 10**12}),
        "an id of 2^32 - 1": lambda s: s["model"]["vocab"].update({"evil": 2**32 - 1}),
        "an id of -1": lambda s: s["model"]["vocab"].update({"evil": -1}),
        "an id that is a text": lambda s: s["model"]["vocab"].update({"evil": "7"}),
        "an id of two pieces": lambda s: s["model"]["vocab"].update({"evil": 7}),
        "a piece of 1 MB": lambda s: s["model"]["vocab"].update({"x" * 1_000_000: 2048}),
        "a vocabulary that is a list": lambda s: s["model"].update(vocab=[1, 2]),
        "a vocabulary that is null": lambda s: s["model"].update(vocab=None),
        "merges of what is not there": lambda s: s["model"]["merges"].append(["evil", "pieces"]),
        "merges of numbers": lambda s: s["model"].update(merges=[1, 2, 3]),
        "merges that are a text": lambda s: s["model"].update(merges="x" * 100),
        "dropout": lambda s: s["model"].update(dropout=0.5),
        "an unknown kind of model": lambda s: s["model"].update(type="Evil"),
        "no model": lambda s: s.pop("model"),
        "a normalizer that makes a megabyte of a letter": lambda s: s.update(normalizer=replacing(("a", "b" * 1_000_000))),
        "a normalizer that doubles, 30 times": lambda s: s.update(normalizer=replacing(*[("a", "aa")] * 30)),
        "a normalizer that fills in between": lambda s: s.update(normalizer=replacing(("", "aa"), ("", "aaaa"), ("", "aaaa"), ("", "aaaa"))),
        "a decoder that grows": lambda s: s.update(decoder={"type": "Sequence", "decoders": replacing(*[("a", "aaaa")] * 9)["normalizers"]}),
        "a normalizer of a thousand steps": lambda s: s.update(normalizer=replacing(*[("a", "b")] * 1000)),
        "a normalizer that prepends": lambda s: s.update(normalizer={"type": "Prepend", "prepend": "x" * 1_000_000}),
        "a deep normalizer": lambda s: s.update(normalizer=nested(200)),
        "an unknown normalizer": lambda s: s.update(normalizer={"type": "Evil"}),
        "a post-processor of a million pieces": lambda s: s["post_processor"].update(single=[{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 100_000),
        "a post-processor of absurd ids": lambda s: s["post_processor"].update(special_tokens={"<s>": {"id": "<s>", "ids": [2**40], "tokens": ["<s>"]}}),
        "a charsmap that is none": lambda s: s.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "////" * 100}),
        "truncation of a wrong kind": lambda s: s.update(truncation={"max_length": -1}),
        "padding of a wrong kind": lambda s: s.update(padding={"strategy": {"Fixed": 10**30}}),
    }  # fmt: skip
    cases = [Case(f"tokenizer.json: {name}", "model", tokenizer(change), "tokenizer") for name, change in state.items()]
    more = tokenizer(lambda s: s["model"]["vocab"].update({f"evil{n}": 2048 + n for n in range(9)}))
    cases.append(Case("tokenizer.json: more ids than the model has rows", "training", more, "do not belong together"))
    patterns = {
        "(a+)+$": "(a+)+$", "(a|a)*b": "(a|a)*b", "(a|aa)+$": "(a|aa)+$", "nested counts": "(a{1,1000}){1,1000}c", "counts in a row": "a{1,3}{1,900}{1,900}b",
        "a reference back": r"(a*)\1*b", "a count of a million": "a{1000000}", "six repetitions": "a*a*a*a*a*a*b", "a lookahead repeated": "(?=(a+))*b",
        "a pattern of 1 MB": "a" * 1_000_000, "no pattern": "(((", "a class in a class": "[a[b[c]]]+", "a call of itself": r"(?<x>a\g<x>?b)*",
    }  # fmt: skip
    cases += [
        Case(f"tokenizer.json splits at {name}", "model", split(pattern), "tokenizer")
        for name, pattern in patterns.items()
    ]
    path = "model/tokenizer.json"
    texts: dict[str, bytes | Callable[[], bytes]] = {
        "deep": DEEP,
        "200 MB": lambda: b'{"a": "' + b"x" * LONG + b'"}',
        "35 MB of lists": lambda: b'{"a": [' + b"[]," * 11_000_000 + b"1]}",
        "nothing": b"",
        "a key twice": b'{"model": {}, "model": {}}',
        "no object": b"[]",
    }
    cases += [
        Case(f"tokenizer.json: {name}", "model", contents(path, text), "tokenizer.json") for name, text in texts.items()
    ]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        ways = ("fifo", "folder", "device", "link out", "link by link", "circle")
        cases += [Case(f"{name} that is {by}", "model", replaced(f"model/{name}", by), name) for by in ways]
    named: dict[str, Callable[[Json], Any]] = {
        "bos_token is a number": lambda s: s.update(bos_token=7),
        "eos_token is a list": lambda s: s.update(eos_token=["</s>"]),
        "a token of 10 MB": lambda s: s.update(extra_special_tokens=["x" * 10_000_000]),
        "tokens without end": lambda s: s.update(extra_special_tokens=[f"<{n}>" for n in range(100_000)]),
        "tokens that are numbers": lambda s: s.update(extra_special_tokens=[1, 2]),
        "added_tokens_decoder of a long id": lambda s: s.update(added_tokens_decoder={"9" * 5000: {"content": "x"}}),
        "added_tokens_decoder that is a list": lambda s: s.update(added_tokens_decoder=[1]),
        "flags that are texts": lambda s: s.update(added_tokens_decoder={"5": {"content": "x", "lstrip": "yes"}}),
        "chat_template is a number": lambda s: s.update(chat_template=7),
    }
    cases += [
        Case(f"tokenizer_config.json: {name}", "model", in_json("model/tokenizer_config.json", change), "token")
        for name, change in named.items()
    ]
    sp = "model/tokenizer.model"
    protos: dict[str, Callable[[Path], Any]] = {
        "nothing": contents(sp, b""),
        "noise": contents(sp, bytes(range(256)) * 100),
        "a length past the end": contents(sp, b"\x0a\xff\xff\xff\xff\x0f"),
        "a varint without end": contents(sp, b"\xff" * 1000),
        "millions of empty pieces": contents(sp, lambda: b"\x0a\x00" * 3_900_000),
        "100 MB": contents(sp, lambda: b"\x0a\x00" * 50_000_000),
        "a piece of 5 MB": pieces("x" * 5_100_000),
        "many long pieces": pieces(*("x" * 1500 + str(n) for n in range(4000))),
        "deep groups": contents(sp, b"\x0b" * 100_000),
        "tiktoken's format": contents(sp, b"IQ== 0\nIg== 1\n" * 1000),
        "Unigram": lambda f: (f / sp).write_bytes((f / sp).read_bytes() + b"\x12\x02\x18\x01") and None,
    }
    cases += [
        Case(f"tokenizer.model: {name}", "sentencepiece", damage, "tokenizer.model") for name, damage in protos.items()
    ]
    ways = ("fifo", "folder", "device", "link out", "circle")
    cases += [Case(f"tokenizer.model that is {by}", "sentencepiece", replaced(sp, by), "tokenizer") for by in ways]
    return cases


def nested(depth: int) -> Json:
    part: Json = {"type": "Lowercase"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


def adapter_cases() -> list[Case]:
    path, weights = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
    values: dict[str, Json] = {
        "r is 10^9": {"r": 10**9},
        "r is 65536": {"r": 65536},
        "r is 0": {"r": 0},
        "r is -4": {"r": -4},
        "r is a float": {"r": 4.0},
        "r is a truth": {"r": True},
        "r is a text": {"r": "4"},
        "r is another": {"r": 5},
        "alpha is 0": {"lora_alpha": 0},
        "alpha is -1": {"lora_alpha": -1},
        "alpha is 10^300": {"lora_alpha": 1e300},
        "alpha is a text": {"lora_alpha": "12"},
        "no targets": {"target_modules": []},
        "targets that are an expression": {"target_modules": "(.*)*x"},
        "targets that are not there": {"target_modules": ["evil_proj"]},
        "targets that are numbers": {"target_modules": [1]},
        "more targets than weights": {"target_modules": ["q_proj", "k_proj"]},
        "the embedding": {"target_modules": ["embed_tokens"]},
        "another kind": {"peft_type": "PROMPT_TUNING"},
        "a base by ..": {"base_model_name_or_path": "../../../../etc"},
        "a base that is a file": {"base_model_name_or_path": "/etc/passwd"},
        "a base that is a device": {"base_model_name_or_path": "/dev/zero"},
        "a base with NUL": {"base_model_name_or_path": "a\0b"},
        "a base with a name too long": {"base_model_name_or_path": "/" + "x" * 100_000},
        "a base that is a number": {"base_model_name_or_path": 7},
        "a base that is a list": {"base_model_name_or_path": ["tiny"]},
        "no base": {"base_model_name_or_path": None},
        "a revision that is a list": {"revision": ["main"]},
        "a rank pattern": {"rank_pattern": {"(a+)+": 10**9}},
        "modules to save": {"modules_to_save": ["lm_head"]},
        "weights of its own": {"init_lora_weights": "pissa"},
        "an unknown key": {"evil_config": {"code": "import os"}},
        "remote code": {"auto_mapping": None, "corda_config": {"x": 1}},
    }
    cases = [
        Case(f"an adapter: {name}", "adapter", in_json(path, lambda s, c=change: s.update(c)), "")
        for name, change in values.items()
    ]
    cases += [
        Case(
            "an adapter: alpha is NaN",
            "adapter",
            lambda f: (f / path).write_text((f / path).read_text().replace("12", "NaN")) and None,
            "nan",
        ),
        Case(
            "an adapter: a key twice",
            "adapter",
            lambda f: (f / path).write_text((f / path).read_text()[:-1] + ', "r": 4}') and None,
            "twice",
        ),
        Case("an adapter: deep", "adapter", contents(path, DEEP), "json"),
        Case("an adapter: 200 MB", "adapter", contents(path, lambda: b'{"a": "' + b"x" * LONG + b'"}'), "bytes"),
    ]
    first, second = ADAPTER
    tensors: dict[str, Tensors] = {
        "of nothing": {},
        "that lack one": {first: ADAPTER[first]},
        "that match nothing": {f"evil.{name}": shape for name, shape in ADAPTER.items()},
        "of another shape": {first: (64, 4), second: (4, 64)},
        "of another rank": {first: (8, 64), second: (64, 8)},
        "with one more": {**ADAPTER, "base_model.model.lm_head.lora_A.weight": (4, 64)},
        "of another layer": {name.replace("layers.0", "layers.7"): shape for name, shape in ADAPTER.items()},
        "with a prefix": {f"_orig_mod.{name}": shape for name, shape in ADAPTER.items()},
    }
    cases += [
        Case(
            f"an adapter with weights {name}",
            "adapter",
            lambda f, s=shapes: write_tensors(f / weights, s),
            "does not fit|missing|adapter",
        )
        for name, shapes in tensors.items()
    ]
    cases += [
        Case("an adapter of integers", "adapter", lambda f: write_tensors(f / weights, ADAPTER, "I32"), "dtype"),
        Case("an adapter of NaN", "adapter", lambda f: nan(f / weights), "nan"),
    ]
    for name in (path, weights):
        ways = ("fifo", "folder", "device", "link out", "circle")
        cases += [Case(f"{Path(name).name} that is {by}", "adapter", replaced(name, by), "") for by in ways]
    return cases


def nan(path: Path) -> None:
    said, data = parts(path)
    write_raw(path, json.dumps(said).encode(), struct.pack("<f", math.nan) + data[4:])


def recipe_cases() -> list[Case]:
    texts: dict[str, bytes | Callable[[], bytes]] = {
        "10^400": b"seed = 1" + b"0" * 400,
        "10^5000": b"seed = 1" + b"0" * 5000,
        "1e400": b"[optim]\nlearning_rate = 1e400",
        "nan": b"[optim]\nlearning_rate = nan",
        "inf": b"[lora]\nalpha = inf",
        "deep lists": b"a = " + DEEP,
        "deep tables": b"a = " + b"{a = " * 20_000,
        "deep keys": b".".join([b"a"] * 20_000) + b" = 1",
        "200 MB": lambda: b'out = "' + b"x" * LONG + b'"',
        "no UTF-8": b"\xff\xfe\x00",
        "NUL": b"seed = 1\0",
        "a key twice": b"seed = 1\nseed = 2",
        "an unknown key": b"[model]\ntrust_remote_code = true",
        "a batch of 10^9": b"[train]\nbatch_size = 1000000000",
        "a rank of -1": b"[lora]\nr = -1",
        "a list where a text is": b"out = [1]",
        "a table where a number is": b"seed = {a = 1}",
        "an empty name": b'out = ""',
    }
    cases = [Case(f"a recipe: {name}", "training", recipe(text), "") for name, text in texts.items()]
    cases += [
        Case(f"a recipe that is {by}", "training", replaced("recipe.toml", by), "recipe")
        for by in ("fifo", "folder", "device", "circle", "nothing")
    ]
    settings = (
        "out=@/rows.jsonl",
        "model.path=@/rows.jsonl",
        "model.path=/dev/zero",
        "model.path=@/nothing",
        "model.path=../../../../etc",
    )
    settings += (
        "data.train=/etc",
        "data.train=@/nothing.jsonl",
        "data.train=https://example.invalid/rows.jsonl",
        "data.max_seq_len=10000000000",
        "lora.r=1e400",
    )
    return cases + [Case(f"a setting: {setting}", "training", override(setting), "") for setting in settings]


def data_cases() -> list[Case]:
    rows = "rows.jsonl"
    texts: dict[str, bytes] = {
        "deep": DEEP + b"\n",
        "a number of 100,000 digits": b'{"messages": ' + b"9" * 100_000 + b"}\n",
        "no UTF-8": b'{"messages": "\xff"}\n',
        "NUL": b"\0" * 10_000 + b"\n",
        "nothing": b"",
        "a list": b"[1, 2]\n",
        "messages that are deep": b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        "roles that are numbers": b'{"messages": [{"role": 1, "content": 2}]}\n',
    }
    cases = [Case(f"data: {name}", "training", contents(rows, text), "rows.jsonl") for name, text in texts.items()]
    return cases + [
        Case(f"data that is {by}", "training", replaced(rows, by), "rows.jsonl")
        for by in ("fifo", "folder", "device", "circle")
    ]


def template_cases() -> list[Case]:
    ends = ("refused|template|nothing",)
    cases = [
        Case(f"a chat template reaches for {name}", "training", chat_template(source), ends[0])
        for name, source in INJECTIONS.items()
    ]
    kept = [
        name for number, name in enumerate(BOMBS) if number % 3 == 0 and not name.startswith(("many", "a long power"))
    ]
    cases += [
        Case(f"a chat template bombs by {name}", "training", chat_template(BOMBS[name]), ends[0]) for name in kept
    ]
    jinja = "model/chat_template.jinja"
    ways = ("fifo", "folder", "device", "link out")
    cases += [Case("a chat template of 200 MB", "training", contents(jinja, lambda: b"x" * LONG), "bytes")]
    cases += [Case("a chat template that is no UTF-8", "training", contents(jinja, b"\xff\xfe"), "utf-8")]
    return cases + [
        Case(
            f"a chat template that is {by}",
            "training",
            lambda f, by=by: ((f / jinja).write_text("x"), replaced(jinja, by)(f))[1],
            "chat_template.jinja",
        )
        for by in ways
    ]


CASES = [
    *index_cases(),
    *header_cases(),
    *pickle_cases(),
    *config_cases(),
    *tokenizer_cases(),
    *adapter_cases(),
    *recipe_cases(),
    *data_cases(),
    *template_cases(),
]
