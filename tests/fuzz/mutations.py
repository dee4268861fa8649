"""Strategies: damaged files, and JSON and YAML that is nearly valid."""

import json

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

LENGTHS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
ODD_NUMBERS = [0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400]
ODD_TEXTS = [
    "", ".", "..", "../x", "/etc/passwd", "a\\b", "a\0b", "\x1b[31m", "é", "\ud800", "class_path", "init_args",
    "x" * 300, "os.system", "nan", "1e999", "!!python/object/apply:os.system [true]", "&a [*a]", "[" * 200, "{" * 60,
    "<<",
]  # fmt: skip


@st.composite
def mutated(draw: DrawFn, seeds: list[bytes]) -> bytes:
    """A seed after one to six accidents: flipped, cut, inserted, repeated, spliced, overwritten, taken from another."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "drop", "insert", "repeat", "splice", "number", "text"]))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=16)) + data[at:]
        elif kind == "repeat":
            part = data[at : at + draw(st.integers(1, 64))]
            data = data[:at] + part * draw(st.sampled_from([2, 3, 50, 500])) + data[at:]
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            data = data[:at] + other[draw(st.integers(0, len(other))) :]
        elif kind == "number":
            width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            number = (draw(st.sampled_from(LENGTHS)) % 256**width).to_bytes(width, order)
            data = data[:at] + number + data[at + width :]
        elif kind == "text":
            text = draw(st.sampled_from(ODD_TEXTS)).encode(errors="surrogatepass")
            data = data[:at] + text + data[at + draw(st.integers(0, 8)) :]
    return data


def values(names: list[str]) -> SearchStrategy:
    """JSON values, in which these names turn up as keys."""
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.sampled_from(ODD_NUMBERS),
        st.floats(width=64),
        st.sampled_from(ODD_TEXTS),
        st.text(max_size=8),
    )
    keys = st.one_of(st.sampled_from(names), st.sampled_from(ODD_TEXTS))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
    )


def changed(value: object, names: list[str]) -> SearchStrategy:
    """A JSON value with one value somewhere in it replaced, or one added."""

    @st.composite
    def change(draw: DrawFn) -> object:
        result = json.loads(json.dumps(value))
        for _ in range(draw(st.integers(1, 3))):
            inner = result
            while isinstance(inner, dict | list) and inner:
                keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                key = draw(st.sampled_from([*keys, *(names if isinstance(inner, dict) else [])]))
                deeper = inner[key] if key in inner or isinstance(inner, list) else None
                if not isinstance(deeper, dict | list) or draw(st.booleans()):
                    inner[key] = draw(values(names))
                    break
                inner = deeper
        return result

    return change()


def json_file(value: object, names: list[str]) -> SearchStrategy[bytes]:
    """A JSON file that is nearly this value, or none at all."""
    return st.one_of(changed(value, names), values(names)).map(lambda it: json.dumps(it).encode())


def yaml_file(value: object, names: list[str]) -> SearchStrategy[bytes]:
    """A YAML file that is nearly this value, or pieces of YAML."""
    pieces = st.lists(
        st.sampled_from([
            *(f"{name}: " for name in names), "- ", "\n", "\n  ", "{", "}", "[", "]", ", ", ": ", "? ", "| ", "> ",
            "&a ", "*a ", "<<: ", "!!python/name:os.system ", "!!binary ", "!!set ", "!!timestamp ", "2001-99-99",
            "0x", "1_0",
            "1e5", ".nan", ".inf", "~", "'", '"', "#", "%TAG", "---", "...", "\t", "\0", "é", "1:60:60", "yes", "null",
        ]),
        max_size=30,
    ).map(lambda parts: "".join(parts).encode())  # fmt: skip
    return st.one_of(changed(value, names).map(lambda it: yaml.safe_dump(it).encode(errors="replace")), pieces)
