from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.cli.elastic.invitation import PREFIX, Invitation, new_token
from mlx_distributed.errors import ConfigError

INVITATION = Invitation("192.168.1.20:4000", "0f" * 16, "a1" * 32)
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32), st.integers(0, 65535))
def test_a_join_string_says_what_was_put_in(token: bytes, fingerprint: bytes, port: int) -> None:
    invitation = Invitation(f"[fd00::7]:{port}", token.hex(), fingerprint.hex())
    text = invitation.encode()
    assert text.isalnum()
    assert Invitation.decode(text) == invitation
    assert Invitation.decode(f" {text[:40]}\r\n  {text[40:].upper()}\n") == invitation


def test_a_join_string_says_of_what_kind_the_run_is() -> None:
    for kind, begins in (("elastic", "mlxd1"), ("group", "mlxg1")):
        invitation = replace(INVITATION, kind=kind)
        assert invitation.encode().startswith(begins)
        assert Invitation.decode(invitation.encode()) == invitation


@given(st.data())
def test_one_wrong_letter_is_found_out(data: st.DataObject) -> None:
    text = INVITATION.encode()
    at = data.draw(st.integers(len(PREFIX) + 1, len(text) - 1))
    # The last letter may hold bits that say nothing.
    letter = data.draw(st.sampled_from(LETTERS + "-18").filter(lambda letter: letter != text[at]))
    wrong = text[:at] + letter + text[at + 1 :]
    try:
        assert Invitation.decode(wrong) == INVITATION
        assert at == len(text) - 1
    except ConfigError as error:
        assert "is damaged: its checksum does not fit" in str(error)  # noqa: PT017  # only the last letter may pass


@given(st.integers(len(PREFIX) + 1, len(INVITATION.encode()) - 1))
def test_a_part_of_it_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match="copy it again as a whole"):
        Invitation.decode(INVITATION.encode()[:length])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this is not a join string: those begin with mlxd1"),
        ("192.168.1.20:4000", "this is not a join string"),
        ("mlxd2abcdef", "is of version 2, and this program reads version 1"),
        ("mlxd", r"is of version \(none\)"),
        ("mlxd1", "is damaged"),
        ("mlxd1ä", "is damaged"),
    ],
)
def test_what_is_no_join_string_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Invitation.decode(text)


def test_an_address_that_nobody_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="is damaged"):
        Invitation.decode(Invitation("0.0.0.0:1", INVITATION.token, INVITATION.fingerprint).encode())


def test_the_secret_is_not_printed() -> None:
    for text in (repr(INVITATION), str(INVITATION), f"{[INVITATION]}"):
        assert INVITATION.token not in text
        assert INVITATION.encode() not in text
        assert "192.168.1.20:4000" in text
    with pytest.raises(ConfigError) as caught:
        Invitation.decode(INVITATION.encode() + "a")
    assert INVITATION.encode() not in str(caught.value)


def test_tokens_differ() -> None:
    assert len({new_token() for _ in range(8)}) == 8
    assert len(bytes.fromhex(new_token())) == 16
