"""Real rows, third-party, beside the checkout: skipped where that folder is absent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import metrics

from minitune import shards
from minitune.config import load_config
from minitune.model import Llama
from minitune.pretrained import TINY, read_config
from minitune.train import train

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not there ({DATA})")

SETS = {
    "alpaca": [f"data.train={DATA / 'alpaca_en_demo.json'}"],
    "gsm8k": [f"data.train={DATA / 'gsm8k_train.jsonl'}", "data.columns={question='instruction', answer='output'}"],
}
RATES = {"full": "5e-4", "lora": "4e-3", "qlora": "4e-3"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("name", SETS)
def test_two_hundred_steps_of_the_built_in_base(tmp_path: Path, name: str, method: str) -> None:
    """The loss on held-out rows falls from evaluation to evaluation, and by much."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    facts = train(
        load_config(
            [
                str(recipe),
                f"out={tmp_path / 'run'}",
                f"method={method}",
                "model.path=tiny",
                "model.dtype=float32",
                *SETS[name],
                "data.eval_fraction=0.03",
                "data.max_seq_len=1024",
                f"optim.learning_rate={RATES[method]}",
                "optim.max_grad_norm=1.0",
                "train.max_steps=200",
                "train.batch_size=1",
                "train.gradient_accumulation_steps=1",
                "eval.every_steps=50",
                "save.every_steps=100",
                "log.tensorboard=false",
            ]
        )
    )
    evals = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line]
    print(name, method, [round(loss, 3) for loss in evals])
    assert len(evals) == 4 and evals == sorted(evals, reverse=True)
    first = metrics(tmp_path / "run")[0]["loss"]
    assert evals[-1] < 0.75 * first
    assert facts["data"]["rows"] == facts["data"]["train_documents"] + facts["data"]["eval_documents"] + sum(
        facts["data"][gone] for gone in ("skipped", "duplicates", "dropped")
    )


def test_a_random_llama_with_the_real_tokenizer(tmp_path: Path) -> None:
    """Llama 2's sentencepiece model, 32,000 pieces; twenty steps on Alpaca rows."""
    like = tmp_path / "like"
    like.mkdir()
    shutil.copyfile(DATA / "llama2_tokenizer.model", like / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (like / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    config = json.loads((TINY / "config.json").read_text())
    config |= {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (like / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(read_config(like))
    tensors = {
        name: torch.ones(p.shape) if name.endswith("norm.weight") else torch.randn(p.shape) * 0.02
        for name, p in model.named_parameters()
    }
    shards.save(tmp_path / "base", tensors.items(), like=like)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    train(
        load_config(
            [
                str(recipe),
                f"out={tmp_path / 'run'}",
                "method=full",
                f"model.path={tmp_path / 'base'}",
                "model.dtype=float32",
                f"data.train={DATA / 'alpaca_en_demo.json'}",
                "data.max_seq_len=512",
                "optim.learning_rate=3e-3",
                "train.max_steps=20",
                "train.batch_size=2",
                "train.gradient_accumulation_steps=1",
                "eval.every_steps=10",
                "log.every_steps=1",
                "log.tensorboard=false",
            ]
        )
    )
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(32000.0)).item(), abs=0.1)
    assert losses[-1] < losses[0] - 1.0
