"""The variant that a person names: one of ADAPTERS, or a class in a file of his own.

    dora                             a registered name
    path/to/file.py:MyLinear         runs that file, as `python path/to/file.py` would

It comes from the command line alone: no recipe and no file of a run can name code.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from minitune import config
from minitune.adapters import ADAPTERS
from minitune.errors import UserError
from minitune.verify.small import ALPHA, R

VERBS = ("__init__", "reset_parameters", "forward", "merged_weight")
TABLES = ("PEFT_NAMES", "PEFT_CONFIG")


@contextmanager
def variant(spec: str) -> Iterator[str]:
    """Within the block the variant that `spec` names is in ADAPTERS, under the name that this gives.

    Raises:
        UserError: no such name, file or class; a class that lacks a verb, or cannot be made.
    """
    if spec and Path(spec).is_dir() and spec not in ADAPTERS:
        raise UserError(
            f"--adapter: {spec} is a folder, and it is a variant's code that is proven; what an adapter "
            f"has learned is shown by python scripts/explain.py {spec}"
        )
    if ".py" not in spec and ":" not in spec:
        if spec not in ADAPTERS:
            near = get_close_matches(spec, ADAPTERS, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UserError(
                f"--adapter: no variant is called {spec!r}; there are {', '.join(ADAPTERS)}{hint} "
                "A class of your own is named as path/to/file.py:MyLinear"
            )
        yield spec
        return
    kind = load(spec)
    name = f"{Path(kind.__module__).name}.{kind.__name__}"  # has a dot, which no registered name has
    ADAPTERS[name] = kind
    try:
        yield name
    finally:
        del ADAPTERS[name]


def load(spec: str) -> type[nn.Module]:
    """The class that `path/to/file.py:MyLinear` names, which has all that a variant must have."""
    path_said, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise UserError(f"--adapter: {spec} names no class; write it as {spec.rstrip(':')}:MyLinear")
    path = Path(path_said).expanduser()
    if not path_said:
        raise UserError(f"--adapter: {spec} names no file; write it as path/to/file.py{spec}")
    if not path.is_file():
        raise UserError(f"--adapter: {path} is a folder" if path.is_dir() else f"--adapter: there is no file {path}")
    kind = getattr(imported(path), name, None)
    if kind is None:
        classes = [n for n, value in vars(sys.modules[module_name(path)]).items() if is_adapter(value)]
        near = get_close_matches(name, classes, 1) or classes
        raise UserError(f"--adapter: {path} has no class {name}" + (f"; it has {', '.join(near)}" if near else ""))
    if not is_module_class(kind):
        raise UserError(f"--adapter: {name} in {path} is no class of torch.nn.Module")
    check_face(kind, path)
    return kind


def imported(path: Path) -> ModuleType:
    """The module of a file, run once."""
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"--adapter: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))  # its neighbours can be imported, and hide nothing
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"--adapter: {path} cannot be imported: {where(error, path)}") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def module_name(path: Path) -> str:
    """A name that no module has which can be imported: the file's own path, without its end."""
    return str(path.resolve().with_suffix(""))


def is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def is_adapter(value: object) -> bool:
    return is_module_class(value) and hasattr(value, "merged_weight")


def check_face(kind: type[nn.Module], path: Path) -> None:
    """Refuse a class that lacks one of the four verbs or two tables, or of which none can be made."""
    what = f"--adapter: {kind.__name__} in {path}"
    lacking = [verb for verb in VERBS if getattr(kind, verb, None) in (None, getattr(nn.Module, verb, None))]
    if lacking:
        raise UserError(f"{what} has no {', '.join(lacking)}; the verbs of a variant are {', '.join(VERBS)}")
    if tables := [table for table in TABLES if not isinstance(getattr(kind, table, None), dict)]:
        raise UserError(f"{what} has no table {' and no '.join(tables)}; minitune/adapters says what they hold")
    linear = nn.Linear(64, 192).requires_grad_(False)
    try:
        with torch.random.fork_rng():
            adapter = kind(linear, config.LoRAConfig(r=R, alpha=ALPHA))
    except Exception as error:
        raise UserError(f"{what} cannot be made on a linear (64 -> 192), r = {R}: {where(error, path)}") from None
    if getattr(adapter, "base", None) is not linear:
        raise UserError(f"{what} does not keep the linear that it is given, whole, as self.base")
    if not any(p.requires_grad for p in adapter.parameters()):
        raise UserError(f"{what} has no parameter that trains")


def where(error: BaseException, path: Path) -> str:
    """What an error says, and the last line of the file that it came by."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.lineno else []
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}" + (f" (line {lines[-1]})" if lines else "")
