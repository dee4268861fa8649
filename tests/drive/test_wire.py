"""Messages are checked field by field, and packed as their docstring says."""

import json
import struct

import numpy as np
import pytest

from cdit.drive.wire import Malformed, Message, pack


def test_arrays_follow_the_json():
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.array([0.5, -2.0], np.float32)}
    packed = pack("frame", {"step": 3}, arrays)
    (length,) = struct.unpack("<I", packed[:4])
    facts = json.loads(packed[4 : 4 + length])
    assert facts == {"step": 3, "type": "frame", "arrays": {"a": ["uint8", [2, 3]], "b": ["float32", [2]]}}
    assert packed[4 + length :] == bytes(range(6)) + struct.pack("<2f", 0.5, -2.0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"type": 3}', '{"type": "a", "x": NaN}', "[" * 10000, "9" * 5000, '"\\ud800"']
)
def test_what_is_not_a_message_is_malformed(text):
    with pytest.raises(Malformed):
        Message(text)


@pytest.mark.parametrize("value", ["null", "true", '"1"', "1e999", "-3", "[]", "{}", str(10**400)])
def test_numbers_out_of_range_are_malformed(value):
    message = Message(f'{{"type": "a", "x": {value}}}')
    with pytest.raises(Malformed):
        message.number("x", 0, 2)
    with pytest.raises(Malformed):
        message.integer("x", 0, 2)
    with pytest.raises(Malformed):
        message.pairs("x", (2, 2), 3) if value != "[]" else message.choice("x", ["a"])


@pytest.mark.parametrize("value", ["[[0]]", "[[0, 2]]", "[[-1, 0]]", "[[true, 0]]", "[[0, 0], [0, 1], [1, 0]]", "[3]"])
def test_pairs_out_of_range_are_malformed(value):
    with pytest.raises(Malformed):
        Message(f'{{"type": "a", "x": {value}}}').pairs("x", (2, 2), 2)


def test_good_fields_are_read():
    message = Message('{"type": "a", "n": 1, "f": false, "p": [[1, 0], [1, 0]], "c": "x", "none": null}')
    assert (message.type, message.number("n", 0, 2), message.integer("n", 1, 1)) == ("a", 1.0, 1)
    assert (message.flag("f"), message.pairs("p", (2, 2), 2), message.choice("c", ["x"])) == (False, [(1, 0)], "x")
    assert (message.has("n"), message.has("none"), message.has("other")) == (True, False, False)
