"""A run is known again by what it is, whatever counts as a secret when it is written down and when it is read."""

import json
from pathlib import Path

import pytest

from minitune import secrets
from minitune.errors import UserError
from minitune.identity import SEALS, check_identity, differing, told, written

RUN = {"seed": 3, "data.columns": {"kunde": "prompt", "canary-answer": "completion"}, "lora.r": 8}


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("DB_PASSWORD", "canary-answer")
    return monkeypatch


def read_back(identity: dict) -> dict:
    return json.loads(json.dumps(secrets.hidden_in(identity)))


def test_without_secrets_it_is_written_as_it_is() -> None:
    assert written(RUN) == RUN and differing(read_back(RUN), RUN) == []


def test_a_secret_that_comes_or_goes_later_changes_nothing(secret: pytest.MonkeyPatch) -> None:
    hidden = read_back(written(RUN))
    assert "canary" not in json.dumps(hidden) and hidden[SEALS].keys() == {"data.columns"}
    assert differing(hidden, RUN) == []
    secret.delenv("DB_PASSWORD")
    assert differing(hidden, RUN) == []
    plain = read_back(written(RUN))
    assert plain == RUN
    secret.setenv("DB_PASSWORD", "canary-answer")
    assert differing(plain, RUN) == []


def test_two_hidden_values_are_not_the_same(secret: pytest.MonkeyPatch) -> None:
    hidden = read_back(written(RUN))
    secret.setenv("DB_PASSWORD", "another-canary")
    other = RUN | {"data.columns": {"kunde": "prompt", "another-canary": "completion"}}
    assert written(other)["data.columns"] == hidden["data.columns"]
    assert differing(hidden, other) == ["data.columns"]
    with pytest.raises(UserError, match=r"then, and something else of that form now") as refused:
        check_identity(Path("run.json"), hidden, other)
    assert "canary" not in str(refused.value)


def test_what_an_older_program_has_written_is_read(secret: pytest.MonkeyPatch) -> None:
    """It hid the values and kept no seal."""
    older = secrets.hidden_in(RUN)
    assert differing(older, RUN) == [] and differing(older, RUN | {"seed": 4}) == ["seed"]


@pytest.mark.parametrize("seals", [[], None, "x", {"data.columns": 5}, {"data.columns": ""}, {"data.columns": "a:b"}])
def test_seals_may_be_anybodys(secret: pytest.MonkeyPatch, seals: object) -> None:
    hidden = written(RUN) | {SEALS: seals}
    assert differing(hidden, RUN | {"seed": 4}) in (["seed"], ["seed", "data.columns"], ["data.columns", "seed"])


def test_seals_are_salted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DB_PASSWORD", "canary-answer")
        assert written(RUN)[SEALS] != written(RUN)[SEALS]


def test_a_long_value_is_cut_after_its_secrets_are_hidden(secret: pytest.MonkeyPatch) -> None:
    assert "canary" not in told("x" * 85 + "canary-answer" + "y" * 40)
