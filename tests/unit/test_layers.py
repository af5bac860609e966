"""The order of the house: imports point down, the model is ignorant, and nothing unsafe is in the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A file imports from floors below its own, or from its own as long as no circle arises.
FLOORS = [
    ["__init__", "errors", "secrets", "foreign", "files", "digests", "seeds", "rules", "config", "progress", "views"],
    ["host", "identity", "launch", "watch"],
    ["kernels", "surgery", "attention", "loss", "log", "model"],
    ["header", "shards", "tokenizer_bounds", "sentencepiece_model", "tokenizer"],
    ["signals", "terminal", "lock", "trouble"],
    ["nf4", "precision", "masters", "optim", "offload", "parallel", "data", "sharding"],
    ["adapters"],
    ["byhand", "plan"],
    ["pretrained", "peft_format", "checkpoint", "resume", "saver"],
    ["build", "runs"],
    ["merge", "generate"],
    ["step", "samples", "preview", "explain"],
    ["train"],
    ["verify"],
    ["scripts"],
]
REFERENCES = {"transformers", "peft"}  # for tests and benchmarks alone
PROOF = ["minitune.verify.peers"]  # which holds to them what is there, and imports them where it does
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
STRANGERS = ("lora", "nf4", "fsdp", "rank", "cuda", "checkpoint")  # what model.py has not heard of


def sources() -> dict[str, str]:
    """Module name -> text, for every file of the package and the scripts."""
    found = {}
    for path in sorted([*(ROOT / "minitune").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path.read_text()
    return found


# Imports


def imports(text: str) -> Iterator[str]:
    """Every module that a source imports, at its top or inside a function; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which floor they come from"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("__import__", "importlib.import_module", "import_module"):
            name = node.args[0]
            yield name.value if isinstance(name, ast.Constant) else "<computed>"


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as far as it is one."""
    return ast.unparse(node.func)


def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Which of these modules each of them imports. A name that is no module is something in one."""
    edges = {}
    for name, text in texts.items():
        edges[name] = {other for other in imports(text) if other in texts and other != name}
        if name.startswith("scripts."):  # which names its neighbours without their folder
            edges[name] |= {f"scripts.{other}" for other in imports(text) if f"scripts.{other}" in texts}
    return edges


def floor(module: str) -> int:
    first, _, rest = module.partition(".")
    key = "scripts" if first == "scripts" else rest.split(".")[0]
    for number, names in enumerate(FLOORS):
        if key in names:
            return number
    raise AssertionError(f"{module} has no floor; give it one in FLOORS")


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [f"{a} -> {b}" for a, others in sorted(edges.items()) for b in sorted(others) if floor(b) > floor(a)]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A path of imports that returns to where it began, or []."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(edges):
        if found := visit(module, []):
            return found
    return []


def test_imports_point_down() -> None:
    assert upward(graph(sources())) == []


def test_imports_form_no_circle() -> None:
    assert circle(graph(sources())) == []


def test_every_name_of_a_floor_is_a_file() -> None:
    standing = {module.split(".")[1] for module in sources() if module.startswith("minitune.")} | {"scripts"}
    assert {name for names in FLOORS for name in names} == standing


def test_the_graph_is_seen() -> None:
    """The checks above would pass on an empty graph."""
    edges = graph(sources())
    assert "minitune.attention" in edges["minitune.model"]
    assert "minitune.adapters" in edges["minitune.build"]
    assert "minitune.adapters.lora" in edges["minitune.adapters"]
    assert "minitune.train" in edges["scripts.train"]
    assert sum(map(len, edges.values())) > 40


@pytest.mark.parametrize(
    "line",
    [
        "import minitune.train",
        "from minitune import errors, train",
        "from minitune.train import train",
        "def f():\n    from minitune.train import train",
        "import importlib\nimportlib.import_module('minitune.train')",
    ],
)
def test_an_import_upward_would_be_caught(line: str) -> None:
    assert upward(graph(sources() | {"minitune.loss": line})) == ["minitune.loss -> minitune.train"]


def test_a_circle_would_be_caught() -> None:
    bad = {"minitune.files": "import minitune.seeds", "minitune.seeds": "from minitune import files"}
    assert upward(graph(sources() | bad)) == []
    assert set(circle(graph(sources() | bad))) == {"minitune.files", "minitune.seeds"}


def test_a_file_without_a_floor_would_be_caught() -> None:
    with pytest.raises(AssertionError, match=r"minitune\.utils has no floor"):
        upward(graph(sources() | {"minitune.utils": "import minitune.errors"}))


# What is not imported, and not called


def forbidden(text: str) -> list[str]:
    """Uses of the reference libraries, of pickle, and of anything that runs text as code."""
    found = []
    for name in imports(text):
        if name.split(".")[0] in REFERENCES | PICKLES or name == "<computed>":
            found.append(f"import {name}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            if called(node) in ("eval", "exec", "compile", "builtins.eval", "builtins.exec"):
                found.append(called(node))
            found += [
                f"{keyword.arg}=..."
                for keyword in node.keywords
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.hub"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            found += [f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save", "hub")]
    return sorted(set(found))


@pytest.mark.parametrize("module", sources())
def test_nothing_unsafe_or_of_the_references_is_used(module: str) -> None:
    found = forbidden(sources()[module])
    assert [use for use in found if module not in PROOF or use.split()[-1] not in REFERENCES] == []


@pytest.mark.parametrize("module", PROOF)
def test_the_references_are_imported_where_they_are_used(module: str) -> None:
    """minitune, its proof too, works without them."""
    top = ast.parse(sources()[module]).body
    assert not {"transformers", "peft"} & {name for node in top for name in imported_by(node)}


def imported_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import transformers", "import transformers"),
        ("def f():\n    from peft.tuners import lora", "import peft.tuners"),
        ("import pickle as p", "import pickle"),
        ("__import__('pickle')", "import pickle"),
        ("import importlib\nimportlib.import_module(name)", "import <computed>"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch\nread = torch.load", "torch.load"),
        ("from torch import Tensor, load", "torch.load"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle=..."),
        ("load(path, trust_remote_code=flag)", "trust_remote_code=..."),
    ],
)
def test_unsafe_code_would_be_caught(line: str, found: str) -> None:
    assert found in forbidden(line)


@pytest.mark.parametrize("line", ["model.eval()", "torch.compile(f)", "re.compile('a')", "'torch.load, eval, pickle'"])
def test_harmless_namesakes_pass(line: str) -> None:
    assert forbidden(line) == []


# The ignorance of model.py


def words(text: str) -> Iterator[str]:
    """Identifiers, attributes, keywords, imported names and strings of a source; not comments, nor docstrings."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            docstrings.add(node.body[0].value)
    for node in ast.walk(tree):
        if node in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield one


def said(text: str) -> list[str]:
    return sorted({word for word in words(text) if re.search("|".join(STRANGERS), word, re.IGNORECASE)})


def test_the_model_is_ignorant() -> None:
    assert said(sources()["minitune.model"]) == []


@pytest.mark.parametrize(
    "line",
    [
        "class LoRALinear: pass",
        "x.cuda()",
        "import minitune.nf4",
        "from torch.utils.checkpoint import checkpoint",
        "f(rank=0)",
        "if device.type == 'cuda': pass",
        "def f(low_rank): return low_rank",
        "print(f'{x} on CUDA')",
    ],
)
def test_a_model_that_knows_would_be_caught(line: str) -> None:
    assert said(line) != []


def test_docstrings_and_comments_may_explain() -> None:
    assert said('"""No lora here."""\ndef f():\n    "Not cuda."  # nor fsdp\n    return 1') == []
