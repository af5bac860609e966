"""A model spread over ranks: the bytes that they gather, what they read, what runs on it."""

import json
from pathlib import Path

import jobs
import pytest
import torch
from conftest import SMALL, Launch, MakeBase, curve, made
from test_numbers import SPLITS, assert_same, over

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1, "tie_word_embeddings": False}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # gate_proj: 2 x 65,536 bytes


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_four_bit_bytes_are_those_of_one_process(
    ranks: int, launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    """All 65,536 pairs of bytes among them; on three ranks no row count is a multiple."""
    arguments = [str(recipe), "method=qlora", f"model.path={make_base(**WIDE)}", "parallel.sharding=full"]
    ended = launch(ranks, jobs.four_bits, arguments)
    assert ended.codes == [0] * ranks, "\n".join(ended.logs)


def test_every_variant_of_an_adapter_is_that_of_one_process(
    launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    folder = make_base(**SMALL | {"num_hidden_layers": 1})
    ended = launch(2, jobs.variants, [str(recipe), f"model.path={folder}", "parallel.sharding=full"])
    assert ended.codes == [0, 0], "\n".join(ended.logs)


def test_a_wrong_byte_is_found_before_training(
    launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    arguments = [str(recipe), "method=qlora", f"model.path={make_base(**WIDE)}", "parallel.sharding=full"]
    ended = launch(2, jobs.one_wrong_byte, arguments)
    assert 0 not in ended.codes
    assert "rank 1 gathers 1 units whose bytes are not those that the ranks hold" in "".join(ended.logs)


SLOW = pytest.mark.slow
SHAPES = [  # what a recipe says of what trains; whether FSDP left to itself gathers in vain
    (["method=lora"], True),
    (["method=lora", "lora.layers_to_transform=[1]"], True),
    pytest.param(["method=full"], True, marks=SLOW),
    pytest.param(["method=qlora", "lora.target_modules=lm_head"], True, marks=SLOW),
    pytest.param(["method=lora", 'lora.modules_to_save=["norm"]'], True, marks=SLOW),
    pytest.param(["method=lora", 'lora.modules_to_save=["embed_tokens"]'], True, marks=SLOW),
]


@pytest.mark.parametrize("tied", [pytest.param(True, marks=SLOW), False])
@pytest.mark.parametrize(("shape", "left"), SHAPES, ids=str)
def test_nothing_is_gathered_in_vain(
    shape: list[str], left: bool, tied: bool, launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    """After evaluations and answers too: what is gathered and nobody waits for has made wrong weights on GPUs."""
    if tied and "lora.target_modules=lm_head" in shape:
        pytest.skip("a head that is tied to its embedding is not adapted alone")
    folder = make_base(**SMALL | {"tie_word_embeddings": tied})
    arguments = [str(recipe), *shape, f"model.path={folder}", "eval.samples=2", "train.max_steps=3"]
    arguments += [*over(SPLITS["two ranks"]), "parallel.sharding=full"]
    for left_to_itself in (False, True):
        out = tmp_path / f"left_to_itself={left_to_itself}"
        ended = launch(2, jobs.gathered_in_vain, [*arguments, f"out={out}"], f"{out}-told", left_to_itself)
        assert ended.codes == [0, 0], "\n".join(ended.logs)
        for rank in range(2):
            ends, in_vain = json.loads(Path(f"{out}-told-{rank}").read_text())
            assert ends > 0 and (in_vain > 0) == (left and left_to_itself), (ends, in_vain, left_to_itself)


@pytest.mark.slow
def test_a_rank_s_host_memory_is_near_its_share(
    launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False}
    folder, peak = make_base(**size, **heads), {}
    for sharding in ("full", "replicate"):
        arguments = [str(recipe), f"model.path={folder}", f"parallel.sharding={sharding}"]
        ended = launch(4, jobs.memory, arguments, str(tmp_path / sharding))
        assert ended.codes == [0] * 4, ended.logs
        told = [json.loads((tmp_path / f"{sharding}-{rank}").read_text()) for rank in range(4)]
        peak[sharding] = max(took / whole for took, whole in told)
    assert peak["replicate"] > 0.9  # of the whole model: the measure sees it, sampled as it is
    assert peak["full"] < 0.65, peak  # a quarter each, and a twelfth for each block that is gathered


@pytest.mark.parametrize("method", ["full", pytest.param("qlora", marks=pytest.mark.slow)])
def test_tied_heads(method: str, launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path) -> None:
    tied = make_base(**SMALL | {"tie_word_embeddings": True})
    arguments = [str(recipe), f"method={method}", f"model.path={tied}", "optim.learning_rate=1e-3"]
    assert launch(1, jobs.train, [*arguments, f"out={tmp_path / 'alone'}"]).codes == [0]
    spread = [*arguments, *over(SPLITS["two ranks"]), "parallel.sharding=full", f"out={tmp_path / 'spread'}"]
    ended = launch(2, jobs.train, spread)
    assert ended.codes == [0, 0], "\n".join(ended.logs)
    assert_same(tmp_path / "alone", tmp_path / "spread")


@pytest.mark.parametrize("method", ["qlora", "full", pytest.param("lora", marks=pytest.mark.slow)])
def test_blocks_by_hand(method: str, launch: Launch, recipe: Path, tmp_path: Path) -> None:
    """Their backward pass reads weights that are gathered again only just before it."""
    arguments = [str(recipe), f"method={method}", "optim.learning_rate=1e-3", "eval.every_steps=3"]
    assert launch(1, jobs.train_by_hand, [*arguments, f"out={tmp_path / 'alone'}"]).codes == [0]
    spread = [*arguments, *over(SPLITS["two ranks"]), "parallel.sharding=full", f"out={tmp_path / 'spread'}"]
    ended = launch(2, jobs.train_by_hand, spread)
    assert ended.codes == [0, 0], "\n".join(ended.logs)
    assert "fused blocks" in ended.logs[0]
    assert_same(tmp_path / "alone", tmp_path / "spread")


def test_bf16_weights_have_their_masters_spread_and_go_on_bit_for_bit(
    launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    arguments = [str(recipe), "method=full", "model.dtype=bfloat16", "optim.learning_rate=1e-3"]
    assert launch(1, jobs.train, [*arguments, f"out={tmp_path / 'alone'}"]).codes == [0]
    arguments += [*over(SPLITS["two ranks"]), "parallel.sharding=full"]
    assert launch(2, jobs.train, [*arguments, f"out={tmp_path / 'whole'}"]).codes == [0, 0]
    for key in ("loss", "eval_loss"):
        ours, theirs = (torch.tensor(curve(tmp_path / name)[key]) for name in ("whole", "alone"))
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0)  # gradients of a micro-batch are bf16
    out = tmp_path / "stopped"
    trouble = {"rank": 1, "step": 2, "what": "gets SIGTERM"}
    assert launch(2, jobs.train, [*arguments, f"out={out}"], trouble).codes == [143, 143]
    assert launch(2, jobs.train, [*arguments, f"out={out}"]).codes == [0, 0]
    assert curve(out) == curve(tmp_path / "whole")
    assert all(torch.equal(made(out)[name], weight) for name, weight in made(tmp_path / "whole").items())


@pytest.mark.slow
def test_auto_takes_the_first_that_fits(launch: Launch, recipe: Path, make_base: MakeBase, tmp_path: Path) -> None:
    """On the rank that has least memory."""
    out, deep = tmp_path / "chosen.json", make_base(**SMALL | {"num_hidden_layers": 128})
    arguments = [str(recipe), f"model.path={deep}", "parallel.sharding=auto", "train.batch_size=1", "lora.r=1"]
    ended = launch(4, jobs.ways, arguments, str(out), machines=2)
    assert ended.codes == [0] * 4, ended.logs
    chosen = json.loads(out.read_text())
    for room, how in (("1", "replicate"), ("2", "hybrid"), ("4", "full"), ("too little", "full")):
        assert f"4 processes, {how}," in chosen[room], (room, chosen)
