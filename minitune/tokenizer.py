"""The tokenizer of a Hugging Face model folder: `tokenizer.json`, or a sentencepiece `tokenizer.model`.

Both are read into one engine, that of the `tokenizers` library: transformers (5) does so too, and a model must be
trained on the ids that it will be served with. A sentencepiece file by itself gives sentencepiece's own ids, in both
(sentencepiece_model.py has the exceptions). The class LlamaTokenizer is a recipe of transformers' own, and there its
ids are the ones that models are served with: a text that begins with a space gets no second one before it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from minitune import sentencepiece_model
from minitune import tokenizer_bounds as bounds
from minitune.errors import UserError
from minitune.foreign import inside, read_json, read_text
from minitune.shards import LARGEST_COMPANION

CONFIG = "tokenizer_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`."""

    engine: Engine = field(repr=False)
    continuation: Engine = field(repr=False)  # the same, but it puts nothing before a text
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]  # eos, and whatever else the folder says ends a text
    adds_bos: bool  # whether bos goes before a text
    vocab_size: int  # ids run below this, added tokens included
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as text, for chat templates
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no bos or eos around it. A special token written in the text becomes its id."""
        return ids_by(self.engine, text)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that goes on after another: without the space that some tokenizers put at a beginning.

        `decode(ids + encode_continuation(text))` is `decode(ids) + text`, where ids decode to some text.
        """
        return ids_by(self.continuation, text)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of ids, its spaces left alone; special tokens are left out unless `skip_special` is False."""
        with at_work():
            return self.engine.decode(ids, skip_special_tokens=skip_special)


def ids_by(engine: Engine, text: str) -> list[int]:
    with at_work():
        return engine.encode(text, add_special_tokens=False).ids


class GivesUp(UserError):
    """A text on which the engine's pattern tries more ways than its library allows."""


@contextmanager
def at_work() -> Iterator[None]:
    """Around each call of an engine with somebody's text, since what the library raises where its regular expressions
    give up is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GivesUp(f"the tokenizer's pattern gives up on its text: {error}") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a model folder; tokenizer.json wins where tokenizer.model is there too.

    bos, eos and pad are those that the tokenizer's own JSON files name; else the ids in config.json and
    generation_config.json; else those of the sentencepiece model; and pad, where nothing names it, is eos.
    Raises UserError where both files are missing, one does not parse, or no eos can be found.
    """
    config = read_tokenizer_config(folder)
    model, generation = read_object(folder, "config.json"), read_object(folder, "generation_config.json")
    llama = (config.get("tokenizer_class") or model.get("tokenizer_class")) in LLAMA_CLASSES
    vocabulary = read_vocabulary(folder, config, llama)

    stated = named_tokens(config, folder)
    own = {name: text for name, text in vocabulary.names.items() if config.get(name, text)}  # null takes it back
    engine = build(vocabulary.state, vocabulary.path)
    added = tokens_to_add(config, own | stated, engine, vocabulary, folder)
    engine.add_tokens(added)
    continuation = engine
    if (plain := without_prefix(vocabulary.state)) != vocabulary.state:
        continuation = build(plain, vocabulary.path)
        continuation.add_tokens(added)

    def find(name: str) -> int | None:
        listed = [id for values in (model, generation) for id in ids_of(values, f"{name}_id")]
        ids = [engine.token_to_id(stated.get(name, "")), *listed, engine.token_to_id(own.get(name, ""))]
        return next((id for id in ids if id is not None and engine.id_to_token(id) is not None), None)

    bos_id = find("bos_token") if config.get("bos_token", "") is not None else None  # null: there is none
    eos_id = find("eos_token")
    if eos_id is None:
        raise UserError(f"{folder}: nothing says which token ends a text; name eos_token in {CONFIG}")
    pad_id = find("pad_token")
    special = own | stated | {"eos_token": engine.id_to_token(eos_id)}
    if bos_id is not None:
        special["bos_token"] = engine.id_to_token(bos_id)
    return Tokenizer(
        engine=engine,
        continuation=continuation,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        stop_ids=frozenset([eos_id, *ids_of(model, "eos_token_id"), *ids_of(generation, "eos_token_id")]),
        adds_bos=bos_id is not None and puts_bos(engine, bos_id, config, vocabulary),
        vocab_size=max(engine.get_vocab(with_added_tokens=True).values()) + 1,
        special_tokens=special,
        chat_template=read_chat_template(folder, config),
    )


def puts_bos(engine: Engine, bos_id: int, config: dict[str, Any], vocabulary: "Vocabulary") -> bool:
    """tokenizer.json says it in its post-processor, and then nothing else counts, as in transformers."""
    if vocabulary.path.name == "tokenizer.json":
        return engine.encode("a", add_special_tokens=True).ids[:1] == [bos_id]
    # Left unsaid it is true, as models with such a file were trained, and as transformers' LlamaTokenizer documents;
    # what version 5 of it does there is to leave bos out.
    return bool(config.get("add_bos_token", True))


# -- the JSON files beside the vocabulary


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; in a folder older than its key added_tokens_decoder, with the two files that came before:
    special_tokens_map.json, which wins, and added_tokens.json."""
    config = read_object(folder, CONFIG)
    if "added_tokens_decoder" in config:
        return config
    config |= read_object(folder, "special_tokens_map.json")
    texts = read_object(folder, "added_tokens.json")
    special = [text_of(value, folder) for value in [*named_tokens(config, folder).values(), *extra_tokens(config)]]
    flags = {id: {"content": text, "special": text in special} for text, id in texts.items()}
    return config | {"added_tokens_decoder": flags}


def named_tokens(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Name (bos_token, ...) to text, the usual names first: tokens new to the vocabulary get ids in this order."""
    names = [*NAMED, *(name for name in config if name.endswith("_token") and name not in NAMED)]
    values = {name: config.get(name) for name in names}
    return {name: text_of(value, folder) for name, value in values.items() if value and not isinstance(value, bool)}


def extra_tokens(config: dict[str, Any]) -> list[Any]:
    """Special tokens without a name of their own, each a text or an object with its "content"."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else list(extra)


def text_of(token: Any, folder: Path) -> str:
    """The text of a token, which the files write as a string or as an object with its "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if not bounds.is_text(text):
        holds = f"holds {bounds.shown(token)} where a token's text should be"
        raise UserError(f"{folder}: {CONFIG} or special_tokens_map.json {holds}")
    return text


def ids_of(values: dict[str, Any], key: str) -> list[int]:
    """The ids under a key of config.json, which may hold one, a list, null, or -1 for none."""
    listed = values.get(key)
    listed = listed if isinstance(listed, list) else [listed]
    return [id for id in listed if isinstance(id, int) and id >= 0]


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja; else the template in tokenizer_config.json, of several the one named "default"."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(inside(folder, path.name))
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / CONFIG}: chat_template is not a text, or a list of objects with name and template")
    return template


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; an empty one where there is no such file."""
    path = folder / name
    return read_json(inside(folder, name), LARGEST_COMPANION) if path.exists() or path.is_symlink() else {}


# -- the vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """What a vocabulary file says, whichever its format."""

    path: Path
    state: dict[str, Any]  # the engine, described as tokenizer.json does
    names: dict[str, str]  # bos_token, eos_token, unk_token, where the file itself names them
    extra: list[dict[str, Any]]  # its other tokens that stand for themselves in a text
    added_as_written: bool = False  # added tokens are looked for in the text itself, not in its normalised form


def read_vocabulary(folder: Path, config: dict[str, Any], llama: bool) -> Vocabulary:
    if (path := folder / "tokenizer.json").exists():
        vocabulary = Vocabulary(path, read_object(folder, path.name), {}, [])
        return as_llama(vocabulary, config) if llama else vocabulary
    if (path := folder / "tokenizer.model").exists():
        model = sentencepiece_model.read(inside(folder, path.name))
        if llama:
            symbols = sentencepiece_model.symbols(model, user_defined=True)
            return as_llama(Vocabulary(path, sentencepiece_model.bare_state(model), {}, symbols), config)
        return read_sentencepiece(path, model, config)
    found = ""
    if (folder / "vocab.json").exists():
        found = "; vocab.json and merges.txt are not enough"
    if (folder / "original" / "tokenizer.model").exists():
        found = "; original/tokenizer.model is Meta's tiktoken format, which is not supported"
    raise UserError(f"{folder} has neither tokenizer.json nor a sentencepiece tokenizer.model{found}")


def read_sentencepiece(path: Path, model: Any, config: dict[str, Any]) -> Vocabulary:
    """A sentencepiece model with the names that the folder gives its pieces. Unsaid, it is "legacy" (sentencepiece's
    own way with special tokens in a text); in as_llama it is not, as in transformers."""
    renamed = {id: token.content for id, token in added_tokens_decoder(config, path.parent).items()}
    return Vocabulary(
        path,
        sentencepiece_model.own_state(model, renamed, legacy=bool(config.get("legacy", True))),
        sentencepiece_model.named_pieces(model),
        sentencepiece_model.symbols(model, user_defined=False),
        added_as_written=model.normalizer_spec.add_dummy_prefix,  # each chunk between them gets a prefix of its own
    )


def as_llama(vocabulary: Vocabulary, config: dict[str, Any]) -> Vocabulary:
    """What transformers makes of the class LlamaTokenizer: it keeps the vocabulary and builds the rest by this recipe,
    whatever tokenizer.json says, unless that is byte-level (Llama 3)."""
    if "ByteLevel" in json.dumps([vocabulary.state.get(part) for part in ("pre_tokenizer", "decoder")]):
        return vocabulary
    prefix = config.get("add_prefix_space") in (True, None)
    first = "always" if config.get("legacy", False) else "first"  # legacy: after each special token, too
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    state = vocabulary.state | {
        "normalizer": None,
        "pre_tokenizer": metaspace | {"prepend_scheme": first if prefix else "never"},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": vocabulary.state.get("model", {}) | {"unk_token": None, "fuse_unk": True, "byte_fallback": True},
    }
    return Vocabulary(vocabulary.path, state, LLAMA_TOKENS, vocabulary.extra)


# -- the engine


def tokens_to_add(
    config: dict[str, Any], names: dict[str, str], engine: Engine, vocabulary: Vocabulary, folder: Path
) -> list[AddedToken]:
    """The tokens that the JSON files know of and the vocabulary file does not, or not with these flags."""
    tokens = list(added_tokens_decoder(config, folder, vocabulary.added_as_written).values())
    known = {token.content for token in [*tokens, *engine.get_added_tokens_decoder().values()]}
    values = [*(config.get(name) or text for name, text in names.items()), *(extra_tokens(config) or vocabulary.extra)]
    for token in [added_token(value, folder) for value in values]:
        if token.content not in known:
            tokens.append(token)
            known.add(token.content)
    if len(tokens) > bounds.ADDED:
        raise UserError(f"{folder / CONFIG} adds {len(tokens):,} tokens; {bounds.ADDED:,} are the most")
    for token in tokens:
        token.special = token.special or token.content in names.values()
    return tokens


def added_tokens_decoder(config: dict[str, Any], folder: Path, as_written: bool = False) -> dict[int, AddedToken]:
    """Ids to tokens, the lowest id first."""
    flags = {"normalized": False} if as_written else {}
    try:
        listed = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        return {int(id): added_token(token, folder, **flags) for id, token in listed}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{folder / CONFIG}: added_tokens_decoder should map ids to tokens with their flags") from None


def added_token(token: Any, folder: Path, **more_flags: bool) -> AddedToken:
    flags = {flag: token[flag] for flag in FLAGS if flag in token} if isinstance(token, dict) else {"special": True}
    if not all(isinstance(value, bool) for value in flags.values()):
        raise UserError(f"{folder}: the flags of the token {bounds.shown(token)} must be true or false")
    return AddedToken(text_of(token, folder), **flags | more_flags)


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """The description of an engine that takes a text for a part of a longer one: it puts no space before it, and
    trims none from its ends."""
    return state | {part: strip_prefix(state.get(part)) for part in ("normalizer", "pre_tokenizer")}


def strip_prefix(part: Any) -> Any:
    if isinstance(part, list):
        return [kept for each in part if (kept := strip_prefix(each)) is not None]
    if not isinstance(part, dict):
        return part
    pattern = part.get("pattern")
    at_start = isinstance(pattern, dict) and str(pattern.get("Regex", "")).startswith(r"\A")
    if part.get("type") in ("Prepend", "Strip") or at_start:
        return None
    part = {key: strip_prefix(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":
        part |= {"prepend_scheme": "never"}
    return part | ({"add_prefix_space": False} if "add_prefix_space" in part else {})


def build(state: dict[str, Any], path: Path) -> Engine:
    bounds.check(state, path)
    try:
        engine = Engine.from_str(json.dumps(state))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing more exact, and where it panics, no Exception
        why = bounds.shown(str(error))
        raise UserError(f"{path} is not a tokenizer that the tokenizers library can read: {why}") from None
    engine.no_truncation()
    engine.no_padding()
    return engine
