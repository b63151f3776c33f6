"""A list read in pieces gives what `json.loads` gives, errors and their places included."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embervlm.data import json_text
from embervlm.data.json_text import JsonText

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
DAMAGE = st.sampled_from(["", ",", '"', "]", "\n", "1", "[", "}", "e", "\\u12"])


def read(data: bytes):
    text = JsonText(io.BytesIO(data))
    try:
        assert text.peek() == "["
        return list(text.values())
    except json.JSONDecodeError as error:
        return error.msg, text.line, text.column


def whole(data: bytes):
    try:
        return json.loads(data.decode())
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


@given(
    values=st.lists(VALUES, max_size=4),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    piece=st.sampled_from([1, 2, 3, 7, 50]),
    damage=st.none() | st.tuples(st.floats(0, 1), DAMAGE, st.integers(0, 3)),
)
def test_a_list_in_pieces_is_read_as_the_whole(values, indent, ascii_only, piece, damage):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    if damage is not None:
        at = 1 + int(damage[0] * (len(text) - 1))
        text = text[:at] + damage[1] + text[at + damage[2] :]
    data = text.encode()
    before, json_text.PIECE_BYTES = json_text.PIECE_BYTES, piece
    try:
        assert repr(read(data)) == repr(whole(data))
    finally:
        json_text.PIECE_BYTES = before


@pytest.mark.parametrize("content", [b'["\xff"]', b'[1, "\xc3'])
def test_text_that_is_no_utf8_is_found_at_its_byte(content, monkeypatch):
    monkeypatch.setattr(json_text, "PIECE_BYTES", 2)
    with pytest.raises(UnicodeDecodeError) as caught:
        list(map(str, JsonText(io.BytesIO(content)).values()))
    with pytest.raises(UnicodeDecodeError) as of_whole:
        content.decode()
    assert caught.value.start == of_whole.value.start
