"""Who may ask a server, and how often."""

import pytest

from dit_jax.config import UserError
from infer.access import NOBODY, Access, KeyLimits, RateLimitError

FIRST, SECOND = "the-key-of-the-first", "the-key-of-the-second"


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys").write_text(f"# ours\n{FIRST}\n\n{SECOND} # of a friend\n")
    return tmp_path / "keys"


def test_without_a_file_all_are_one():
    access = Access(None)
    assert access.owner(None) == access.owner("Bearer whatever") == NOBODY


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("LocalHost:8000", True), ("127.0.0.1:80", True), ("127.8.8.8", True), ("[::1]:80", True),
        ("localhost.example", False), ("127.0.0.1.example", False), ("10.0.0.1", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_without_keys_only_this_machine_may_be_named(keys, host, local):
    assert Access(None).welcomes(host) == local and Access(keys).welcomes(host)


def test_keys_are_told_apart(keys):
    access = Access(keys)
    first, second = access.owner(f"Bearer {FIRST}"), access.owner(f"bearer {SECOND}")
    assert first and second and first != second and FIRST not in first
    for header in (None, "", "Bearer", f"Basic {FIRST}", FIRST, f"Bearer {FIRST}x", "Bearer # ours"):
        assert access.owner(header) is None


@pytest.mark.parametrize(("text", "words"), [("# none\n", "holds no key"), ("short\n", "line 1 is short")])
def test_a_file_of_poor_keys_is_refused(tmp_path, text, words):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=words):
        Access(tmp_path / "keys")
    with pytest.raises(UserError, match="cannot read keys"):
        Access(tmp_path / "nothing")


def test_a_key_that_asks_too_often_waits(keys):
    now = [0.0]
    access = Access(keys, KeyLimits(per_minute=2), clock=lambda: now[0])
    access.spend("a")
    access.spend("a")
    with pytest.raises(RateLimitError, match="2 requests a minute") as refused:
        access.spend("a")
    assert 0 < refused.value.retry_after <= 30
    access.spend("b")
    now[0] += refused.value.retry_after + 0.01
    access.spend("a")
    with pytest.raises(RateLimitError):
        access.spend("a")
    now[0] += 600
    access.spend("a")
    access.spend("a")
    with pytest.raises(RateLimitError):
        access.spend("a")
