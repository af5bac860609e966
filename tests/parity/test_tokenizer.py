"""Ids and text equal to those of transformers' AutoTokenizer, for both file formats and every way to say bos."""
# ruff: noqa: RUF001 (strange characters are the point)

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minitune.errors import UserError
from minitune.tokenizer import Tokenizer, load_tokenizer

LLAMA2 = Path(__file__).parents[3] / "shared" / "data" / "llama2_tokenizer.model"
SPECIAL = ["<s>", "</s>", "<unk>", "<|eot|>", "<|begin|>", "<|end|>", "<tool>", "<ctl>", "[PAD]", "<0x0A>"]
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "Hello world",
    " Hello  world ",
    "   three before, three after   ",
    "The naïve café's 3.14159 costs $1,234.56!",
    "中文测试，混合 English 和数字123。",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}  # done\n\n\n    return None\n",
    "windows\r\nline\rends\n\r",
    "👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin, 🇨🇭",
    "\x00\x01\x7f\x1b[0m\t\x0b\x0c\x85",
    "e\u0301 combining a\u0308\u0323, é composed, \u0301 alone",
    "line\u2028separator\u2029paragraph\u00a0nbsp\u200bzero\ufeffbom\u3000wide",
    "▁already ▁ marked▁",
    "ﬁ ligature Ａ full width ① ½ ™",
    "a<s>b",
    "a <s> b</s> c",
    "<s>",
    "<s> hi",
    "<s>hi</s>",
    "</s></s> <s>\n<s>",
    "user<|eot|>answer <|eot|> more<|eot|>",
    "<|begin|>x<|end|> y",
    "call <tool> x<ctl>y<pad>z",
    "<0x0A> is not a newline, < s > and <s are text, <unk> is a token",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ʇxǝʇ العربية עברית हिन्दी ไทย 한국어 日本語",
    "a" * 300 + " " * 50 + "=" * 80,
]
ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.text(" \t\n\r▁ab<>s/|", max_size=8),
        st.sampled_from([*SPECIAL, *TEXTS]),
    ),
    max_size=6,
).map("".join)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer"}
NOT_SPECIAL = {"lstrip": False, "rstrip": False, "single_word": False}
LLAMA2_CONFIGS: dict[str, dict[str, Any] | None] = {  # tokenizer_config.json beside the real tokenizer.model
    "none": None,
    "legacy": {"legacy": True},
    "not legacy": {"legacy": False},
    "no bos": {"add_bos_token": False},
    "bos": {"add_bos_token": True},
    "class": LLAMA_CLASS,
    "class, legacy": LLAMA_CLASS | {"legacy": True, "add_bos_token": True},
    "class, not legacy": {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_bos_token": False},
    "class, no prefix": LLAMA_CLASS | {"add_prefix_space": False},
    "fast class": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
    "as published": LLAMA_CLASS
    | {
        name: {"__type": "AddedToken", "content": text, "normalized": True, **NOT_SPECIAL}
        for name, text in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items()
    }
    | {"legacy": False, "pad_token": None, "add_bos_token": True, "add_eos_token": False},
    "new tokens": LLAMA_CLASS | {"pad_token": "[PAD]", "additional_special_tokens": ["<|eot|>"], "legacy": True},
    "decoder": LLAMA_CLASS
    | {
        "added_tokens_decoder": {
            "2": {"content": "</s>", "normalized": False, "special": True, **NOT_SPECIAL},
            "32000": {"content": "<|eot|>", "normalized": False, "special": True, **NOT_SPECIAL, "rstrip": True},
            "32001": {"content": "<tool>", "normalized": True, "special": False, **NOT_SPECIAL, "lstrip": True},
        },
        "eos_token": "<|eot|>",
    },
}


@pytest.mark.parametrize("config", LLAMA2_CONFIGS.values(), ids=LLAMA2_CONFIGS.keys())
def test_llama2_sentencepiece_alone(config: dict[str, Any] | None, tmp_path: Path) -> None:
    ours, reference = both(llama2_folder(tmp_path, config))
    check_equal(ours, reference, TEXTS)
    if "add_bos_token" in (config or {}):
        assert ours.adds_bos == (reference("x").input_ids[0] == reference.bos_token_id)
    else:  # the one difference: transformers 5 lost the default that it documents
        assert ours.adds_bos and reference.bos_token_id not in reference("x").input_ids


def test_the_variants_differ(tmp_path: Path) -> None:
    """Each of these texts tells two of the variants apart, so no single behaviour passes the test above."""
    names = ("none", "class", "class, legacy", "decoder")
    none, llama, legacy, decoder = (load_tokenizer(llama2_folder(tmp_path / n, LLAMA2_CONFIGS[n])) for n in names)
    assert none.encode(" Hello") != llama.encode(" Hello") == legacy.encode(" Hello")
    assert llama.encode("a<s>b") != legacy.encode("a<s>b")
    assert llama.encode("<|eot|>") != decoder.encode("<|eot|>") == [32000]
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "class")
    with pytest.raises(AssertionError):
        check_equal(legacy, reference, TEXTS)
    ours, theirs = (json.loads(engine.to_str()) for engine in (llama.engine, reference.backend_tokenizer))
    assert ours["model"] == theirs["model"]  # every merge in its place, which no text may need
    own = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))
    assert llama.encode("Plain words, 数字 and 👍🏽") == own.encode("Plain words, 数字 and 👍🏽")
    assert llama.encode("a</s>") != own.encode("a</s>")


@pytest.mark.parametrize("config", [{}, LLAMA_CLASS, LLAMA_CLASS | {"additional_special_tokens": ["<|eot|>"]}])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_sentencepiece_with_tokens_of_its_own(normalization: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Control and user-defined pieces, a pad, and a normalisation that rewrites characters."""
    train_sentencepiece(tmp_path, model_type="bpe", normalization_rule_name=normalization)
    write(tmp_path, "config.json", {"model_type": "llama"})
    write(tmp_path, "tokenizer_config.json", config)
    check_equal(*both(tmp_path), TEXTS)


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "TokenizersBackend", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},  # a byte-level file is left as it is
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "extra_special_tokens": ["<tool>"]},
    ],
    ids=["fast", "backend", "llama", "new tokens"],
)
def test_byte_level_json(bos: bool, config: dict[str, Any], tmp_path: Path) -> None:
    ours, reference = both(byte_level_folder(tmp_path, bos, config))
    check_equal(ours, reference, TEXTS)
    assert ours.adds_bos == adds_bos(reference) == bos
    assert (ours.bos_id, ours.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.special_tokens == reference.special_tokens_map
    assert ours.encode("<|eot|>") == [ours.engine.token_to_id("<|eot|>")]


@pytest.mark.parametrize(
    ("published", "config"),
    [
        (False, None),
        (False, LLAMA_CLASS | {"add_bos_token": True}),
        (True, None),
        (True, LLAMA_CLASS | {"legacy": False}),
        (True, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": False}),
        (True, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (True, {"tokenizer_class": "TokenizersBackend", "add_bos_token": False}),
        (True, LLAMA_CLASS | {"pad_token": "[PAD]", "extra_special_tokens": ["<tool>", "<|eot|>"]}),
    ],
)
def test_llama2_json(published: bool, config: dict[str, Any] | None, llama2_json: Path, tmp_path: Path) -> None:
    """The real tokenizer as transformers converts it, and in the layout in which Llama 2 was published: with the
    prefix in a normalizer, and bos in the post-processor."""
    state = json.loads((llama2_json / "tokenizer.json").read_text(encoding="utf-8"))
    if published:
        state |= published_pipeline()
    write(tmp_path, "tokenizer.json", state)
    write(tmp_path, "config.json", {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2})
    if config is not None:
        write(tmp_path, "tokenizer_config.json", config)
    ours, reference = both(tmp_path)
    check_equal(ours, reference, TEXTS)
    assert ours.adds_bos == (reference("x").input_ids[0] == 1) == published


# -- any text


@pytest.fixture(scope="module", params=["sentencepiece", "sentencepiece, legacy", "json", "byte level", "prefixed"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("model")
    match request.param:
        case "sentencepiece":
            return both(llama2_folder(folder, None))
        case "sentencepiece, legacy":
            return both(llama2_folder(folder, LLAMA_CLASS | {"legacy": True}))
        case "json":
            return both(request.getfixturevalue("llama2_json"))
        case "byte level":
            return both(byte_level_folder(folder, True, {}))
        case _:
            return both(byte_level_folder(folder, False, {}, add_prefix_space=True))


@FUZZ
@given(text=ANY_TEXT)
def test_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    check_equal(*pair, [text])


@FUZZ
@given(seed=st.lists(st.integers(0, 1 << 20), max_size=30), skip=st.booleans())
def test_any_ids(pair: tuple[Tokenizer, Any], seed: list[int], skip: bool) -> None:
    ours, reference = pair
    ids = [n % ours.vocab_size for n in seed]
    expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, skip) == expected


@FUZZ
@given(prompt=ANY_TEXT, answer=ANY_TEXT)
def test_continuation(pair: tuple[Tokenizer, Any], prompt: str, answer: str) -> None:
    ours, _ = pair
    assume(prompt and "▁" not in answer)  # a written ▁ comes back as a space
    ids = ours.encode(prompt)
    before = ours.decode(ids, skip_special=False)  # the prompt, but for spaces that a prefix adds or takes
    assert ours.decode(ids + ours.encode_continuation(answer), skip_special=False) == before + answer


def test_encode_is_no_continuation(llama2_json: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(llama2_json)
    for prompt in ("one", "两 three\n", "👍🏽"):
        assert ours.decode(ours.encode(prompt) + ours.encode_continuation(" two")) == prompt + " two"
    for folder in (llama2_json, byte_level_folder(tmp_path, False, {}, add_prefix_space=True)):
        ours = load_tokenizer(folder)
        assert ours.decode(ours.encode("one") + ours.encode("two")).strip() == "one two"
        assert ours.decode(ours.encode("one") + ours.encode_continuation("two")).strip() == "onetwo"


# -- special tokens, templates, and folders that cannot be read


def test_ids_come_from_the_folders_files(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, False, {})
    id_of = load_tokenizer(folder).engine.token_to_id
    begin, end, eot, pad = (id_of(text) for text in ("<|begin|>", "<|end|>", "<|eot|>", "<unk>"))

    def ids(**files: dict[str, Any]) -> tuple[int | None, int, int, frozenset[int]]:
        write(folder, "config.json", {"model_type": "llama"})
        for name in ("tokenizer_config", "special_tokens_map", "generation_config"):
            write(folder, f"{name}.json", {})
        for name, value in files.items():
            write(folder, f"{name}.json", value)
        ours = load_tokenizer(folder)
        return ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids

    named = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    by_id = {"bos_token_id": begin, "eos_token_id": [end, eot], "pad_token_id": pad}
    assert ids(tokenizer_config=named) == (begin, end, end, {end})
    assert ids(special_tokens_map=named) == (begin, end, end, {end})
    assert ids(config=by_id) == (begin, end, pad, {end, eot})
    assert ids(generation_config=by_id) == (begin, end, pad, {end, eot})
    assert ids(tokenizer_config=named, config=by_id | {"eos_token_id": eot}) == (begin, end, pad, {end, eot})
    assert ids(tokenizer_config=named | {"eos_token": "<|eot|>"}, special_tokens_map=named)[1] == end
    newer = named | {"eos_token": "<|eot|>", "added_tokens_decoder": {}}
    assert ids(tokenizer_config=newer, special_tokens_map=named)[1] == eot
    assert ids(tokenizer_config=named | {"bos_token": None}, config=by_id)[0] is None
    assert ids(tokenizer_config=named, config={"pad_token_id": -1})[2] == end


def test_sentencepiece_names_its_own(tmp_path: Path) -> None:
    ours = load_tokenizer(llama2_folder(tmp_path, None))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids, ours.vocab_size) == (1, 2, 2, {2}, 32000)
    write(tmp_path, "added_tokens.json", {"[PAD]": 32001, "<|eot|>": 32000})
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<|eot|>", "pad_token": "[PAD]"})
    ours, reference = both(tmp_path)
    check_equal(ours, reference, TEXTS)
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (32000, 32001, 32002)


def test_chat_template(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for template, expected in ((None, None), ("one", "one"), (several, "plain"), (several[:1], None)):
        folder = byte_level_folder(tmp_path, False, {"chat_template": template})
        assert load_tokenizer(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("é from the file\n", encoding="utf-8")
    ours, reference = both(folder)
    assert ours.chat_template == reference.chat_template == "é from the file\n"


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    def refused(expected: str) -> None:
        with pytest.raises(UserError, match=expected) as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path) in str(caught.value)

    refused("neither tokenizer.json nor a sentencepiece tokenizer.model$")
    write(tmp_path, "vocab.json", {})
    refused("vocab.json and merges.txt are not enough")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    refused("tiktoken")
    shutil.copy(tmp_path / "original" / "tokenizer.model", tmp_path)
    refused("tokenizer.model is not a sentencepiece model")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    refused("tokenizer.model is not a sentencepiece model")
    train_sentencepiece(tmp_path, model_type="unigram")
    refused("tokenizer.model is not a BPE model")
    write(tmp_path, "tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}})
    refused("tokenizer.json is not a tokenizer")
    byte_level_folder(tmp_path, False, {"bos_token": "<|begin|>"}, named=False)
    refused("name eos_token in tokenizer_config.json")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
        refused(f"{name} is no JSON")
        (tmp_path / name).write_bytes(b'{"\xff": 1}')
        refused(f"{name} is no JSON")
        write(tmp_path, name, [1])
        refused(f"{name} must hold a JSON object")
        write(tmp_path, name, {})
    byte_level_folder(tmp_path, False, {})
    for value in (7, {"text": "<s>"}):
        write(tmp_path, "tokenizer_config.json", {"eos_token": value})
        refused("where a token's text should be")
    for value in ([], {"a": "<s>"}, {"1": {"content": "<s>", "lstrip": "no"}}):
        write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": value})
        refused("added_tokens_decoder should map ids to tokens|the flags of the token .* must be true or false")
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": {"default": ""}})
    refused("chat_template is not a text")


# -- what the tests are made of


def both(folder: Path) -> tuple[Tokenizer, Any]:
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def check_equal(ours: Tokenizer, reference: Any, texts: list[str]) -> None:
    """Ids, the text of the ids with and without special tokens, and the vocabulary's end."""
    expected = [reference.encode(text, add_special_tokens=False) for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    for ids in expected:
        for skip in (True, False):
            text = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == text
    assert ours.vocab_size == len(reference)


def adds_bos(reference: Any) -> bool:
    return reference("x").input_ids[0] == reference.bos_token_id


def llama2_folder(folder: Path, config: dict[str, Any] | None) -> Path:
    """The real sentencepiece file alone, with a config.json and maybe a tokenizer_config.json."""
    if not LLAMA2.exists():
        pytest.skip(f"no {LLAMA2.name} in {LLAMA2.parent}")
    folder.mkdir(exist_ok=True)
    shutil.copy(LLAMA2, folder / "tokenizer.model")
    write(folder, "config.json", {"model_type": "llama"})
    if config is not None:
        write(folder, "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="module")
def llama2_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real tokenizer after transformers has written it as tokenizer.json."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("json")
    transformers.AutoTokenizer.from_pretrained(llama2_folder(source, LLAMA_CLASS)).save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


def train_sentencepiece(folder: Path, **options: Any) -> None:
    usual = {"byte_fallback": True, "user_defined_symbols": ["<tool>"], "control_symbols": ["<ctl>"], "pad_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
        **usual | options,
    )


def published_pipeline() -> dict[str, Any]:
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    }


def byte_level_folder(
    folder: Path, bos: bool, config: dict[str, Any], add_prefix_space: bool = False, named: bool = True
) -> Path:
    """A byte-level BPE trained here. Its file also asks for truncation and padding, which must not come to pass."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    engine.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|eot|>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        engine.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", engine.token_to_id("<|begin|>"))]
        )
    engine.enable_truncation(4)
    engine.enable_padding(length=4, pad_token="<unk>", pad_id=engine.token_to_id("<unk>"))
    engine.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<unk>"} if named else {}
    write(folder, "tokenizer_config.json", ends | config)
    write(folder, "config.json", {"model_type": "llama"})
    return folder


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
