"""Near duplicates: sketches and groups beside exact Jaccard similarity, computed pair by pair."""

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from minitune.data import duplicates
from minitune.data.duplicates import HASHES, KEYS, WIDTH, estimates, groups, said, similarity, sketches
from minitune.data.examples import Chat, Completion, Instruction, Text, Turn

ENGLISH = re.findall(
    r"\w+",
    "the a of red blue small order lamp chair table river because under quickly she they carried seven mountains "
    "history market never always between garden number letter winter answer question simple machine light",
)
CHINESE = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方"


def texts(count: int, seed: int) -> list[str]:
    """Texts of which many are edited copies of earlier ones, by a little or a lot, in two scripts."""
    draw = random.Random(seed)
    made: list[str] = []
    for number in range(count):
        if made and number % 2:
            made.append(edited(draw.choice(made), draw.choice([0.005, 0.01, 0.02, 0.04, 0.1]), draw))
        elif number % 4:
            made.append(" ".join(draw.choices(ENGLISH, k=draw.randint(20, 150))))
        else:
            made.append("".join(draw.choices(CHINESE, k=draw.randint(60, 400))))
    return made


def edited(text: str, share: float, draw: random.Random) -> str:
    spaced = " " in text
    parts = text.split(" ") if spaced else list(text)
    changed = [draw.choice(ENGLISH if spaced else CHINESE) if draw.random() < share else part for part in parts]
    return (" " if spaced else "").join(changed)


MADE = texts(400, seed=7)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    """Jaccard similarity of all pairs, (400, 400), from sets of substrings."""
    sets = [{text[i : i + WIDTH] for i in range(len(text) - WIDTH + 1)} for text in MADE]
    half = [[len(a & b) / len(a | b) for b in sets[:row]] + [0.5] for row, a in enumerate(sets)]
    lower = np.array([similar + [0.0] * (len(sets) - len(similar)) for similar in half])
    return lower + lower.T


def recall_and_precision(group: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Of rows that stand for themselves or need not: how many clear twins were found, and how many found are twins.

    A clear twin is 0.87 similar to an earlier row that stands for its group, over the threshold by two standard errors
    of an estimate; one that is 0.73 similar or more is no mistake.
    """
    rows = np.arange(len(group))
    leaders = group == rows
    found = ~leaders
    clear = np.array([(exact[row, :row][leaders[:row]] >= 0.87).any() for row in rows])
    right = exact[rows, group] >= 0.73
    return (found & clear).sum() / clear.sum(), (found & right).sum() / max(found.sum(), 1)


def test_recall_and_precision_beside_exact_similarity(exact: np.ndarray) -> None:
    group = groups(sketches(MADE))
    found = group != np.arange(len(group))
    recall, precision = recall_and_precision(group, exact)
    print(f"{found.sum()} near duplicates of {len(MADE)}, recall {recall:.3f}, precision {precision:.3f}")
    assert found.sum() > 80 and recall >= 0.99 and precision == 1
    for script in (" ", ""):  # found in either
        assert sum(found[i] for i, text in enumerate(MADE) if (" " in text) == (script == " ")) > 20


def test_the_measure_sees_what_is_missed_and_what_is_wrong(exact: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three mutants: pairs not verified, one key instead of sixteen, shingles of other texts mixed in."""
    right = sketches(MADE)
    with monkeypatch.context() as mutant:
        mutant.setattr(duplicates, "THRESHOLD", -1.0)
        assert recall_and_precision(groups(right), exact)[1] < 1
    with monkeypatch.context() as mutant:
        mutant.setattr(duplicates, "KEYS", 1)
        assert recall_and_precision(groups(right), exact)[0] < 0.9
    shifted = np.roll(right, 1, axis=0)
    assert recall_and_precision(groups(shifted), exact)[1] < 0.5


def test_a_group_is_of_rows_like_its_first(exact: np.ndarray) -> None:
    """No chains: a row that was removed never stands for another."""
    group = groups(sketches(MADE))
    assert (group[group] == group).all() and (group <= np.arange(len(group))).all()


def test_rows_added_behind_change_no_group() -> None:
    whole = sketches(MADE)
    for rows in (1, 2, 137, 400):
        assert (groups(whole[:rows]) == groups(whole)[:rows]).all()


def test_the_estimate_is_of_the_jaccard_similarity(exact: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by the error of so many hashes, and without bias: over several seeds, as pairs share rows and one draw."""
    for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 0.9)):
        a, b = np.argwhere((exact > low) & (exact < high)).T
        expected = np.sqrt((exact[a, b] * (1 - exact[a, b])) / HASHES)
        errors = []
        for seed in range(1, 13):
            monkeypatch.setattr(duplicates, "SEED", seed)
            errors.append(estimates(sketches(MADE), a, b) - exact[a, b])
        assert len(a) > 200 and 0.8 < (np.stack(errors) / expected).std() < 1.2
        assert abs(np.mean(errors)) < 0.005


def test_similarity_is_the_exact_one(exact: np.ndarray) -> None:
    for a, b in ((0, 1), (5, 4), (100, 333), (2, 2)):
        assert similarity(MADE[a], MADE[b]) == exact[a, b]
    assert similarity("Ångström  unit\n", "A\u030angstro\u0308m unit") == 1  # spelling, case and white space aside
    assert similarity("", "") == 1 and similarity("ab", "abc") == 0


def test_a_sketch_is_of_its_text_alone() -> None:
    """Whatever the texts before and after it are, and however many at once."""
    together = sketches(["", "a", "four", *MADE[:50], "long " * 50_000, "end"])
    assert together.shape == (55, KEYS) and together.dtype == np.uint64
    alone = [sketches([text])[0] for text in ["", "a", "four", *MADE[:50], "long " * 50_000, "end"]]
    assert (together == np.stack(alone)).all()
    assert (sketches([MADE[0]]) == sketches([MADE[0].upper().replace(" ", " \n")])).all()
    assert not (sketches([MADE[0]]) == sketches([MADE[0][::-1]])).any()


def test_no_rows_and_equal_rows() -> None:
    assert sketches([]).shape == (0, KEYS)
    assert groups(sketches([])).tolist() == []
    assert groups(sketches(["one text only"])).tolist() == [0]
    assert groups(sketches(["the same text", "another altogether", *["the same text"] * 3])).tolist() == [0, 1, 0, 0, 0]
    assert groups(np.zeros((5, KEYS), np.uint64)).tolist() == [0] * 5
    highest = np.full((3, KEYS), 2**64 - 1, np.uint64)
    assert groups(highest).tolist() == [0, 0, 0]


def test_rows_that_share_a_key_and_are_not_alike_are_told_apart() -> None:
    """A bucket of two interleaved groups, and rows that are like neither."""
    draw = np.random.default_rng(3)
    kinds = draw.integers(0, 2**63, (5, KEYS)).astype(np.uint64)
    kinds[:, 0] = 11  # the one key in common
    rows = kinds[[0, 1, 0, 1, 2, 0, 3, 1, 4]]
    assert groups(rows).tolist() == [0, 1, 0, 1, 4, 0, 6, 1, 8]


def test_a_memory_mapped_table_gives_the_same_groups(tmp_path) -> None:
    whole = sketches(MADE)
    np.save(tmp_path / "sketches.npy", whole)
    assert (groups(np.load(tmp_path / "sketches.npy", mmap_mode="r")) == groups(whole)).all()


def test_no_threads_are_started() -> None:
    """They would not survive a fork, and a forked worker would wait for them without end."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc, which is not there")
    program = (
        "import os\nfrom minitune.data.duplicates import sketches\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "sketches(['word ' * n for n in range(2000)] + ['x%d ' % n for n in range(5000)] + ['long text ' * 100_000])\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(printed) == 0


def test_what_is_compared_of_a_row() -> None:
    turns = (Turn("system", "Be kind.", False), Turn("user", "Hi", False), Turn("assistant", "Hello", True))
    assert said(Chat(turns, tools="[{}]")) == "Hi\nHello"
    called = Turn("assistant", "", True, more='{"tool_calls": []}')
    assert said(Chat((*turns[1:2], called))) == 'Hi\n{"tool_calls": []}'
    assert said(Instruction("Add", "1 2", "3", system="Be kind.")) == "Add\n1 2\n3"
    assert said(Instruction("Add", "", "3", history=(("One?", "1"),))) == "One?\n1\nAdd\n3"
    assert said(Completion("p", "c")) == "p\nc" and said(Text("t")) == "t"
