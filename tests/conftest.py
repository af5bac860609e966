"""What all tests share: fixed seeds, few threads, and small random Llamas as transformers writes them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when kernels are first imported: they then run on the CPU, for the tests
    os.environ["TRITON_INTERPRET"] = "1"

SaveLlama = Callable[..., tuple[Path, Any]]

# Odd where the architecture allows it, grouped queries, more than one layer; widths are multiples of 64 for NF4.
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Two; or one where pytest-xdist runs a test on each core, and then in what a test starts, too."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if not alone:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    torch.set_num_threads(2 if alone else 1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenised data goes where the tests' other files go, not into the home of whoever runs them."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shape() -> dict[str, Any]:
    """The keys of config.json that `save_llama` starts from."""
    return dict(SHAPE)


@pytest.fixture
def save_llama(tmp_path: Path) -> SaveLlama:
    """save_llama(name="base", dtype=..., max_shard_size=..., **changes to SHAPE) -> (folder, transformers' model).

    Every weight is random and of a size that matters, norms and biases included: a norm of ones or a bias of zeros
    would hide that it is put in the wrong place.
    """

    def save(
        name: str = "base",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **changes: object,
    ) -> tuple[Path, Any]:
        import transformers

        config = transformers.LlamaConfig(**(SHAPE | changes), attn_implementation="sdpa")
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif parameter_name.endswith("bias"):
                    parameter.normal_(std=0.3)
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model = model.to(dtype).eval()
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name, model

    return save


@pytest.fixture
def rewrite_config() -> Callable[..., None]:
    """rewrite_config(folder, drop=(...), **changes) edits a folder's config.json."""

    def rewrite(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in drop}))

    return rewrite


NIGHTLY = ("tests/faults/", "tests/ranks/test_launchers", "tests/ranks/test_numbers", "tests/ranks/test_sharding")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Real runs harmed or shared by the dozen take minutes: `pytest -m slow tests/faults tests/ranks`."""
    if item.nodeid.startswith(NIGHTLY):
        item.add_marker(pytest.mark.slow)
