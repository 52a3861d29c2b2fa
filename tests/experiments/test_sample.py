"""Text from a model, piece by piece: characters across tokens, and stop texts across pieces."""

from __future__ import annotations

import pytest

from omninorm.errors import ConfigError, InputError
from omninorm.experiments import ByteTokenizer, stream_text
from omninorm.experiments.sample import _decode, _until


def _bytes(text: bytes):
    return (bytes([byte]) for byte in text)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        (b"one two three", [b"two"], b"one "),
        (b"aab", [b"ab"], b"a"),
        (b"aaaab", [b"aab"], b"aa"),
        (b"abcabd", [b"abd"], b"abc"),
        (b"no stop, but nearly: st", [b"stop!"], b"no stop, but nearly: st"),
        (b"first of two", [b"two", b"of"], b"first "),
        (b"xyz", [b"xyz"], b""),
        (b"xyz", [], b"xyz"),
    ],
)
def test_text_ends_before_the_first_stop(text, stops, expected):
    assert b"".join(_until(_bytes(text), stops)) == expected
    assert b"".join(_until(iter([text]), stops)) == expected


def test_only_what_may_begin_a_stop_is_held_back():
    pieces = _until(_bytes(b"abX"), [b"bc"])
    assert [next(pieces), next(pieces), next(pieces)] == [b"a", b"", b"bX"]


def test_a_character_is_yielded_with_its_last_byte():
    assert list(_decode(_bytes("a漢é".encode()))) == ["a", "漢", "é"]


def test_invalid_bytes_are_replaced_also_at_the_end():
    assert "".join(_decode(_bytes(b"a\xffb\xe6\xbc"))) == "a\ufffdb\ufffd"


def test_the_stream_is_what_generate_makes(model):
    prompt = "In the beginning"
    expected = model.generate([list(prompt.encode())], 30, temperature=1.0, seed=3)[0]
    pieces = list(stream_text(model, ByteTokenizer(), prompt, 30, seed=3))
    assert "".join(pieces) == bytes(expected).decode(errors="replace")
    assert len(pieces) > 1


def test_a_long_prompt_is_cut_to_its_last_tokens(model):
    ends = "the last sixteen"
    short = stream_text(model, ByteTokenizer(), ends, 10, temperature=0)
    long = stream_text(model, ByteTokenizer(), "x" * 100 + ends, 10, temperature=0)
    assert "".join(short) == "".join(long)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt"),
        ({"stop": [""]}, "stop text"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_a_bad_setting_is_refused_by_the_call(model, settings, message):
    arguments = {"prompt": "a", "max_new_tokens": 3, **settings}
    with pytest.raises((InputError, ConfigError), match=message):
        stream_text(model, ByteTokenizer(), **arguments)
