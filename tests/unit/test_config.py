"""The recipe: what is read, what is refused and in which words, and that a dumped recipe reads back as it was."""

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import config
from minitune.config import EXAMPLE, Config, ConfigError, DataConfig, dump, knobs, load_config, usage
from minitune.config.keys import ELSEWHERE
from minitune.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = [EXAMPLE, *sorted((ROOT / "scripts" / "recipes").glob("*.toml"))]

CONTRACT = """
method = "qlora"
seed = 42
out = "runs/llama3-8b-qlora"
[model]
path = "meta-llama/Meta-Llama-3-8B"
revision = ""
dtype = "bfloat16"
attention = "auto"
dense_weights = "auto"
[data]
train = ["data/train.jsonl"]
weights = []
eval = []
eval_fraction = 0.1
format = "auto"
columns = {}
template = "auto"
train_on_prompt = false
max_seq_len = 2048
packing = true
overlong = "drop"
bad_rows = "error"
deduplicate = true
near_duplicates = "report"
checks = "error"
category = ""
cache = "auto"
[lora]
variant = "lora"
r = 16
alpha = 32
dropout = 0.05
loraplus_lr_ratio = 16
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
exclude_modules = []
layers_to_transform = []
rank_pattern = {}
alpha_pattern = {}
modules_to_save = []
trainable_token_indices = []
[optim]
name = "adamw"
learning_rate = 2e-4
weight_decay = 0.01
max_grad_norm = 0.3
lr_scheduler = "cosine"
warmup_ratio = 0.03
[train]
num_epochs = 3
max_steps = 0
batch_size = 4
gradient_accumulation_steps = 4
gradient_checkpointing = "auto"
offload = "auto"
fused = "auto"
compile = "auto"
resume = "auto"
deterministic = false
[eval]
every_steps = 100
early_stopping_patience = 3
samples = 0
sample_tokens = 64
[save]
every_steps = 100
keep_last = 3
[parallel]
sharding = "auto"
timeout_seconds = 600
[log]
every_steps = 10
tensorboard = true
"""


@pytest.fixture
def load(tmp_path):
    """load("toml text", "key=value", ...) reads a recipe file with overrides."""

    def load(text: str, *overrides: str) -> Config:
        recipe = tmp_path / "recipe.toml"
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config([str(recipe), *overrides])

    return load


@pytest.fixture
def refusal(load):
    """The message with which a recipe is refused."""

    def refusal(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert isinstance(caught.value, UserError)
        return str(caught.value)

    return refusal


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_contract(load):
    assert tomllib.loads(dump(Config())) == tomllib.loads(CONTRACT)
    assert load("") == load(CONTRACT) == Config()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load(recipe):
    cfg = load_config([str(recipe)])
    assert load_config([str(recipe), "seed=7"]) == dataclasses.replace(cfg, seed=7)


def test_without_a_recipe_the_example_is_meant():
    assert EXAMPLE.is_file()
    assert load_config([]) == load_config([str(EXAMPLE)])
    assert load_config(["model.path=elsewhere"]).model.path == "elsewhere"


def test_overrides_win_and_the_last_one_does(load):
    cfg = load("[optim]\nlearning_rate = 1e-3\nweight_decay = 0.5", "optim.learning_rate=1e-4", "optim.learning_rate=3")
    assert (cfg.optim.learning_rate, cfg.optim.weight_decay) == (3, 0.5)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("out=runs/x", "runs/x"),
        ('out="runs/x"', "runs/x"),
        ("out = 'runs/x' ", "runs/x"),
        ("out=a=b", "a=b"),
        ("out=réseau 模型", "réseau 模型"),
        ("out=true", "true"),
        ("model.revision=123", "123"),
        ("model.revision=1e5", "1e5"),
        ("model.revision=2024-01-01", "2024-01-01"),
        ("model.revision=", ""),
        ("data.train=a.jsonl", ("a.jsonl",)),
        ("data.train=123", ("123",)),
        ('data.train="a.jsonl"', ("a.jsonl",)),
        ('data.train=["a.jsonl", "b.jsonl"]', ("a.jsonl", "b.jsonl")),
        ("data.weights=[2]", (2,)),
        ('data.columns={ question = "instruction" }', {"question": "instruction"}),
        ("data.packing=false", False),
        ("optim.learning_rate=1", 1),
        ("optim.max_grad_norm=0", 0),
        ("lora.alpha=12", 12),
        ("lora.alpha=0.5", 0.5),
        ("train.batch_size=1_000", 1000),
        ("seed=9223372036854775807", 2**63 - 1),
        ("lora.target_modules=lm_head", ("lm_head",)),
        ("lora.target_modules=all-linear", "all-linear"),
        (r"lora.target_modules=.*\.[02]\..*_proj", r".*\.[02]\..*_proj"),
        ('lora.target_modules=["layers.1.self_attn.q_proj"]', ("layers.1.self_attn.q_proj",)),
        ("lora.layers_to_transform=3", (3,)),
        ("lora.layers_to_transform=[0, 2]", (0, 2)),
        ("lora.rank_pattern={ q_proj = 4 }", {"q_proj": 4}),
        ("lora.alpha_pattern={ q_proj = 4.5, k_proj = 2 }", {"q_proj": 4.5, "k_proj": 2}),
        ("lora.modules_to_save=norm", ("norm",)),
        ("lora.trainable_token_indices=[5, 3]", (5, 3)),
        ("lora.trainable_token_indices={ lm_head = [5, 3] }", {"lm_head": [5, 3]}),
    ],
)
def test_override_values(load, override, value):
    found = load("", override)
    for name in override.partition("=")[0].strip().split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_byte_order_mark_and_line_ends_of_windows(load):
    assert load("\ufeffseed = 7\r\n[lora]\r\nr = 3\r\n").lora.r == 3


def test_a_recipe_whose_path_holds_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    (folder / "config.toml").write_text("seed = 7")
    assert load_config([str(folder / "config.toml")]).seed == 7


def test_defaults_that_follow_from_other_keys(load):
    assert load('method = "full"').optim.learning_rate == 2e-5
    assert load('method = "full"', "optim.learning_rate=2e-4").optim.learning_rate == 2e-4
    assert load("", "method=full").optim.learning_rate == 2e-5
    assert load("", "method=lora").optim.learning_rate == 2e-4
    assert load("", "data.eval=e.jsonl").data.eval_fraction == 0
    assert load("", "data.eval_fraction=0").eval.early_stopping_patience == 0
    assert load("", "eval.every_steps=0").eval.early_stopping_patience == 0
    assert load("", "data.eval=e.jsonl").eval.early_stopping_patience == 3


# ---- what is written ------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    out=text,
    names=st.lists(text, min_size=1, unique=True),
    columns=st.dictionaries(text, text),
    rate=st.floats(1e-30, 1e9),
)
def test_dump_reads_back(tmp_path_factory, out, names, columns, rate):
    columns = {theirs: f"{ours}{number}" for number, (theirs, ours) in enumerate(columns.items())}
    cfg = Config(out=out, data=DataConfig(train=tuple(names), columns=columns))
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, learning_rate=rate))
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump(cfg), encoding="utf-8", newline="")
    assert load_config([str(path)]) == cfg


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=full"],
        ["data.eval=e.jsonl"],
        ["data.eval_fraction=0"],
        ["eval.every_steps=0"],
        ["eval.samples=5", "data.eval=e.jsonl"],
        ['out="quote\\" and\\nline\\tend\\\\"', 'data.columns={ "a.b = \\"c\\"" = "instruction" }'],
    ],
)
def test_a_resolved_recipe_contradicts_nothing(load, overrides):
    cfg = load("", *overrides)
    assert cfg != Config()
    assert load(dump(cfg)) == cfg


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rate", "optim.learning_rate"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("train.learning_rate", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("optimizer.weight_decay", "optim.weight_decay"),
        ("lora.lora_alpha", "lora.alpha"),
        ("lora.rank", "lora.r"),
        ("eval.every_step", "eval.every_steps"),
        ("save.every_step", "save.every_steps"),
        ("train.seed", "seed"),
        ("seed.x", "seed"),
        ("Out", "out"),
        ("data.columns.question", "data.columns"),
        ("per_device_train_batch_size", "train.batch_size"),
    ],
)
def test_unknown_keys_name_the_nearest(refusal, key, nearest):
    assert refusal("", f"{key}=1") == f"the command line: {key}: unknown key; did you mean {nearest}?"


def test_names_from_elsewhere_lead_to_keys_that_exist():
    assert set(ELSEWHERE.values()) <= knobs().keys()


def test_an_unknown_key_like_no_other(refusal):
    assert refusal("", "zzz=1").endswith("zzz: unknown key; --help lists all")


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("seed = true", "seed: must be a whole number, but is true"),
        ("seed = 1.0", "seed: must be a whole number, but is 1.0"),
        ('seed = "1"', 'seed: must be a whole number, but is "1"'),
        ("seed = 2024-01-01", 'seed: must be a whole number, but is "2024-01-01"'),
        ("[seed]\nx = 1", 'seed: must be a whole number, but is {"x": 1}'),
        ("data = 3", "data: is a section; set its keys one by one, as data.train=..."),
        ("[[data]]\nx = 1", "data: is a section; set its keys one by one, as data.train=..."),
        ("model.revision = 5", "model.revision: must be text, but is 5"),
        ('out = "a\\u0000"', 'out: must be text, but is "a\\u0000"'),
        ("data.packing = 1", "data.packing: must be true or false, but is 1"),
        ('data.train = "a"', 'data.train: must be a list of non-empty strings, but is "a"'),
        ("data.eval = ['']", 'data.eval: must be a list of non-empty strings, but is [""]'),
        ("data.eval = [1]", "data.eval: must be a list of non-empty strings, but is [1]"),
        ("data.columns = { a = 1 }", 'data.columns: must be a table of strings, but is {"a": 1}'),
        ("optim.weight_decay = nan", "optim.weight_decay: must be a finite number, but is NaN"),
        ("optim.max_grad_norm = inf", "optim.max_grad_norm: must be a finite number, but is Infinity"),
        ("lora.alpha = true", "lora.alpha: must be a finite number, but is true"),
        ('method = "QLora"', 'method: must be full | lora | qlora, but is "QLora"; did you mean qlora?'),
        ('data.overlong = "x"', 'data.overlong: must be drop | truncate | error, but is "x"'),
    ],
)
def test_wrong_types_and_choices(refusal, tmp_path, recipe, complaint):
    assert refusal(recipe) == f"{tmp_path / 'recipe.toml'}: {complaint}"


@pytest.mark.parametrize("huge", ["1" + "0" * 400, "1e999"])
def test_numbers_no_float_can_hold(refusal, huge):
    assert "optim.learning_rate: must be a finite number" in refusal("", f"optim.learning_rate={huge}")


def test_a_target_module_is_named_with_the_nearest(refusal):
    message = refusal("", 'lora.target_modules=["q_proj", "gate_prj"]')
    assert 'but is ["q_proj", "gate_prj"]; did you mean gate_proj?' in message
    assert "without repeats" in refusal("", 'lora.target_modules=["q_proj", "q_proj"]')
    assert "not empty" in refusal("", "lora.target_modules=[]")


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("seed", "0", "-1"),
        ("seed", str(2**63 - 1), str(2**63)),
        ("data.eval_fraction", "0", "-0.1"),
        ("data.eval_fraction", "0.999", "1"),
        ("data.max_seq_len", "2", "1"),
        ("lora.r", "1", "0"),
        ("lora.alpha", "1e-9", "0"),
        ("lora.dropout", "0", "-0.01"),
        ("lora.dropout", "0.99", "1"),
        ("optim.learning_rate", "1e-9", "0"),
        ("optim.weight_decay", "0", "-1e-9"),
        ("optim.max_grad_norm", "0", "-1"),
        ("optim.warmup_ratio", "0", "-0.1"),
        ("optim.warmup_ratio", "0.99", "1"),
        ("train.num_epochs", "1", "-1"),
        ("train.max_steps", "0", "-1"),
        ("train.batch_size", "1", "0"),
        ("train.gradient_accumulation_steps", "1", "0"),
        ("eval.every_steps", "0", "-1"),
        ("eval.early_stopping_patience", "0", "-1"),
        ("eval.samples", "0", "-1"),
        ("eval.sample_tokens", "1", "0"),
        ("save.every_steps", "0", "-1"),
        ("save.keep_last", "1", "0"),
        ("log.every_steps", "1", "0"),
        ("model.path", "x", '""'),
        ("out", "x", ""),
        ("data.train", "x", "[]"),
    ],
)
def test_ranges_at_their_ends(load, refusal, key, inside, outside):
    load("", f"{key}={inside}")
    assert f"{key}: must be " in refusal("", f"{key}={outside}")


def test_every_number_is_bounded():
    assert [key for key, knob in knobs().items() if knob.kind in (int, float) and not knob.rules] == []


@pytest.mark.parametrize(
    ("overrides", "keys", "mended"),
    [
        (["train.num_epochs=0"], "train.num_epochs, train.max_steps", ["train.max_steps=5"]),
        (["data.eval=e", "data.eval_fraction=0.2"], "data.eval, data.eval_fraction", ["data.eval_fraction=0"]),
        (["data.train=a/../b", "data.eval=./b"], "data.train, data.eval", ["data.eval=c"]),
        (["data.train=tiny", "data.eval=tiny"], "data.train, data.eval", ["data.eval=c"]),
        (
            ["eval.early_stopping_patience=2", "data.eval_fraction=0"],
            "eval.early_stopping_patience, data.eval, data.eval_fraction",
            ["data.eval=e"],
        ),
        (
            ["eval.early_stopping_patience=2", "eval.every_steps=0"],
            "eval.early_stopping_patience, eval.every_steps",
            ["eval.every_steps=1"],
        ),
        (
            ["eval.samples=5", "data.eval_fraction=0"],
            "eval.samples, data.eval, data.eval_fraction",
            ["data.eval_fraction=0.1"],
        ),
        (["eval.samples=5", "data.format=text"], "eval.samples, data.format", ["eval.samples=0"]),
        (["data.template=chat", "data.format=text"], "data.template, data.format", ["data.template=auto"]),
        (["data.template=alpaca", "data.format=text"], "data.template, data.format", ["data.format=alpaca"]),
        (['data.columns={ a = "text", b = "text" }'], "data.columns", ['data.columns={ a = "text", b = "input" }']),
        (["model.attention=flash", "model.dtype=float32"], "model.attention, model.dtype", ["model.dtype=bfloat16"]),
        (["model.attention=varlen", "model.dtype=float32"], "model.attention, model.dtype", ["model.attention=sdpa"]),
        (["model.revision=v1", "model.path=tiny"], "model.revision, model.path", ["model.path=owner/name"]),
        (["lora.r=4", "method=full", "lora.alpha=8"], "lora.r, lora.alpha", ["method=lora"]),
    ],
)
def test_contradictions(load, refusal, overrides, keys, mended):
    assert refusal("", *overrides).startswith(f"the command line: {keys}: ")
    load("", *overrides, *mended)


def test_methods_are_switched_from_the_command_line(load):
    assert load("[lora]\nr = 4", "method=full").lora.r == 4


def test_a_contradiction_in_the_file_names_the_file(refusal, tmp_path):
    assert refusal("[train]\nnum_epochs = 0").startswith(f"{tmp_path / 'recipe.toml'}: train.num_epochs, ")


def test_no_contradiction_is_derived_from_a_wrong_key(refusal):
    message = refusal("[data]\neval = 5\neval_fraction = 0", "eval.samples=5")
    assert "data.eval: must be" in message and "eval.samples" not in message


def test_all_problems_at_once(refusal, tmp_path):
    text = '[optim]\nlerning_rate = 1\n[train]\nbatch_size = 0\n[model]\nattention = "flash"\ndtype = "float32"'
    assert refusal(text).splitlines() == [
        f"3 problems in {tmp_path / 'recipe.toml'}:",
        "  optim.lerning_rate: unknown key; did you mean optim.learning_rate?",
        "  train.batch_size: must be at least 1, but is 0",
        "  model.attention, model.dtype: flash and varlen compute in bfloat16 alone; use sdpa or auto",
    ]
    lines = refusal(text, "--lr", "lora.r", "b.toml", "seed=x", "data.train=[a]").splitlines()
    assert lines[0] == f"8 problems in {tmp_path / 'recipe.toml'} and the command line:"
    keys = ["optim.lerning_rate", "train.batch_size", "model.attention, model.dtype"]  # the file's
    keys += ["--lr", "lora.r", "b.toml", "data.train", "seed"]
    assert [line.strip().partition(":")[0] for line in lines[1:]] == keys


@pytest.mark.parametrize("value", ['"runs/x', "'runs/x", "[1"])
def test_a_value_that_begins_as_toml_must_be_toml(refusal, value):
    assert f"out: {value} is not TOML" in refusal("", f"out={value}")


def test_a_line_break_does_not_smuggle_in_a_key(load, refusal):
    assert load("", "out=1\nseed=7").out == "1\nseed=7"
    assert "lora.r: must be a whole number" in refusal("", "lora.r=1\nseed=7")


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (b"seed = 1\nlora = {\n", "this recipe is not TOML: "),
        (b"seed = 1\n\nout = runs/x\n", "(at line 3, column 7)"),
        (b"seed = 1\nseed = 2\n", "this recipe is not TOML: "),
        (b"out = '\xff'", "this recipe is not UTF-8 text (byte 7)"),
    ],
)
def test_a_file_that_is_no_toml(refusal, tmp_path, recipe, complaint):
    message = refusal(recipe)
    assert message.startswith(f"{tmp_path / 'recipe.toml'}: ") and complaint in message


def test_a_missing_file_and_the_rest(tmp_path):
    with pytest.raises(
        ConfigError, match=r"(?s)2 problems in .*nope.toml and .*nope.toml is missing.*lora.r: must be"
    ) as caught:
        load_config([str(tmp_path / "nope.toml"), "lora.r=0", "eval.samples=5", "data.eval_fraction=0"])
    assert "held out" not in str(caught.value)  # the file might have said data.eval
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config([str(tmp_path)])


# ---- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_key_with_its_default(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        load_config(["nope.toml", flag])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.strip() == usage().strip()
    for key in knobs():
        assert f"  {key} = " in printed
    assert 'optim.name = "adamw"' in printed and "adamw | paged_adamw_32bit | paged_adamw_8bit" in printed


def test_every_key_may_be_overridden(load):
    for key, knob in knobs().items():
        value = tomli_w.dumps({"value": knob.default}).partition("=")[2] or "{}"
        assert load("", f"{key}={value}") == Config()


def test_variants_are_those_with_an_adapter():
    from minitune.adapters import ADAPTERS

    assert set(config.LORA_VARIANTS) == set(ADAPTERS)


def test_torch_is_not_loaded():
    code = "import sys, minitune.config; minitune.config.load_config([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    control = code.replace("import sys,", "import sys, torch,")
    assert subprocess.run([sys.executable, "-c", control], cwd=ROOT, check=False).returncode == 1
