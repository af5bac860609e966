"""Which flash-attn is found: one that cannot be imported is none."""

import sys
from pathlib import Path

import pytest
import torch

from minitune import attention

FILES = {"flash-attn-4": "cute/__init__.py", "flash-attn": "flash_attn_interface.py"}


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "without what it needs"])
@pytest.mark.parametrize("package", FILES)
def test_a_package_that_cannot_be_imported_is_not_there(
    package: str, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "flash_attn" / FILES[package]
    part.parent.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").touch()
    part.write_text("import a_package_that_is_not_there" if broken else "")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "keep_compiled_kernels", lambda: None)
    attention.flash_package.cache_clear()
    try:
        assert attention.flash_package() == (None if broken else package)
    finally:
        attention.flash_package.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]
