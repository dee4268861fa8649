"""Strategies: bytes that were a valid file once, and files built of parts that do not belong together."""

import io
import json
import struct
import zipfile
import zlib

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


# --- pickles ---

NAMES = [
    "numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar",
    "numpy._core.numeric _frombuffer", "_codecs encode", "builtins set", "builtins frozenset", "builtins bytes",
    "builtins bytearray", "builtins eval", "os system", "collections OrderedDict", "argparse Namespace",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch LongStorage",
]  # fmt: skip
GLOBALS = [b"c%s\n" % name.replace(" ", "\n").encode() for name in NAMES]
ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x03\x85"
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89C\x18" + bytes(24) + b"tb"
)
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x03\x85K\x01\x85\x89NtR"
LITERALS = [
    b"N", b"\x88", b"\x89", b"K\x01", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + bytes(8) + b"\x01",
    b"\x8b\x04\x00\x00\x00" + bytes(4), b"G" + bytes(8), b"G\x7f\xf8" + bytes(6), b"I12\n", b"L12L\n", b"F1.5\n",
    b"V\\u0000x\n", b"S'x'\n", b"X\x02\x00\x00\x00f8", b"X\x08\x00\x00\x00position", b"X\x03\x00\x00\x00yaw",
    b"X\x06\x00\x00\x00latin1", b"X\x03\x00\x00\x00ema", b"X\x01\x00\x00\x00a", b"\x8c\x01x", b"C\x08" + bytes(8),
    b"C\x00", b"B\x04\x00\x00\x00abcd", b"\x8e\x04" + bytes(7) + b"abcd", b"\x96\x08" + bytes(7) + bytes(8),
    b"\x96" + b"\xff" * 7 + b"\x00",
    ARRAY, STORAGE, TENSOR,
]  # fmt: skip
OPCODES = [bytes([code]) for code in b"(0123]}\x8f)\x85\x86\x87ltdaesu\x90\x91Rb\x81\x92ioQ\x93\x94\x97\x98"]
MEMO = (
    [b"q%c" % i for i in range(4)]
    + [b"h%c" % i for i in range(4)]
    + [b"p1\n", b"g1\n", b"r" + b"\xff" * 4, b"j" + bytes(4)]
)
FRAMES = [b"\x95" + struct.pack("<Q", size) for size in (0, 3, 50, 2**40, 2**63)] + [
    b"\x80\x05",
    b"\x80\x02",
    b"\x82\x01",
    b"Px\n",
]

pickles = st.lists(
    st.one_of(
        *(st.sampled_from(parts) for parts in (LITERALS, OPCODES, OPCODES, MEMO, GLOBALS)), st.sampled_from(FRAMES)
    ),
    max_size=40,
).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


def archives(seed: bytes) -> SearchStrategy[bytes]:
    """Archives of torch.save with another pickle, or other members."""
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    @st.composite
    def build(draw: DrawFn) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                if name.endswith("data.pkl"):
                    content = draw(st.one_of(pickles, mutated([content])))
                elif draw(st.integers(0, 9)) == 0:
                    content = draw(st.one_of(st.just(content[:-1]), st.just(content * 2), st.binary(max_size=9)))
                compression = zipfile.ZIP_DEFLATED if draw(st.integers(0, 19)) == 0 else zipfile.ZIP_STORED
                archive.writestr(name, content, compression)
        return buffer.getvalue()

    return build()


# --- images ---


def _chunk(kind: bytes, data: bytes, sound: bool) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ (not sound))


@st.composite
def pngs(draw: DrawFn) -> bytes:
    """A header of any kind and chunks in any order."""
    side = st.integers(1, 40) | st.sampled_from([0, 1, 300, 65535, 2**31 - 1, 2**31, 2**32 - 1])
    width, height = draw(side), draw(side)
    bits, color = draw(st.sampled_from([1, 2, 4, 8, 16, 3])), draw(st.sampled_from([0, 2, 3, 4, 6, 7]))
    interlace = draw(st.sampled_from([0, 0, 1, 2]))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, draw(st.sampled_from([0, 0, 1])), interlace)
    rows = min(height, 16) * (1 + min(width, 64) * 8)
    pixels = zlib.compress(draw(st.sampled_from([bytes(rows), bytes(rows // 2), b"\x07" * rows])))
    chunks = {
        b"IHDR": header, b"IDAT": pixels, b"PLTE": bytes(range(30)), b"tRNS": bytes(6), b"gAMA": bytes(4),
        b"iCCP": b"x\0\0" + zlib.compress(bytes(10_000)), b"zTXt": b"x\0\0" + zlib.compress(bytes(1_000_000)),
        b"eXIf": draw(st.binary(max_size=40)), b"acTL": bytes(8), b"fcTL": bytes(26), b"IEND": b"",
    }  # fmt: skip
    order = [b"IHDR", *draw(st.lists(st.sampled_from(sorted(chunks)), max_size=6)), b"IDAT", b"IEND"]
    sound = draw(st.integers(0, 9)) > 0
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, chunks[kind], sound) for kind in order)


def jpegs(seeds: list[bytes]) -> SearchStrategy[bytes]:
    """The segments of JPEGs in any order, with other sizes, EXIF and markers."""
    parts = [part for seed in seeds for part in _segments(seed)]

    @st.composite
    def build(draw: DrawFn) -> bytes:
        chosen = draw(st.sampled_from(seeds))
        segments = _segments(chosen)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(segments)))
            kind = draw(st.sampled_from(["size", "exif", "foreign", "drop", "marker", "fill"]))
            if kind == "size":
                size = struct.pack(">HH", *(draw(st.sampled_from([0, 1, 8, 16, 500, 65535])) for _ in range(2)))
                segments = [
                    s[:5] + size + s[9:] if s[:2] in (b"\xff\xc0", b"\xff\xc2") and len(s) > 9 else s for s in segments
                ]
            elif kind == "exif":
                exif = b"Exif\0\0" + draw(st.sampled_from([b"MM\0*", b"II*\0"])) + draw(st.binary(max_size=60))
                segments.insert(at, b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
            elif kind == "foreign":
                segments.insert(at, draw(st.sampled_from(parts)))
            elif kind == "drop" and segments:
                segments.pop(at - 1)
            elif kind == "marker":
                segments.insert(at, b"\xff" + bytes([draw(st.integers(0, 255))]) + draw(st.binary(max_size=4)))
            elif kind == "fill":
                segments.insert(at, b"\xff" * draw(st.integers(1, 9)) + b"\0")
        return b"\xff\xd8" + b"".join(segments)

    return build()


def _segments(jpeg: bytes) -> list[bytes]:
    """What follows the first marker, cut before each marker."""
    parts = jpeg[2:].split(b"\xff")
    return [b"\xff" + part for part in parts if part]


# --- safetensors ---


def safetensors(seed: bytes, names: list[str]) -> SearchStrategy[bytes]:
    """Another header before the same numbers."""
    size = int.from_bytes(seed[:8], "little")
    header, numbers = json.loads(seed[8 : 8 + size]), seed[8 + size :]

    @st.composite
    def build(draw: DrawFn) -> bytes:
        keys = ["dtype", "shape", "data_offsets", "F32", "F16", "I64", "F8_E4M3", "__metadata__", *names]
        text = json.dumps(draw(changed(header, keys))).encode()
        length = draw(st.sampled_from([len(text), len(text), len(text), 2**40, 2**63, 0, len(text) - 1]))
        return length.to_bytes(8, "little") + text + numbers

    return build()
