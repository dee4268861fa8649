"""Archives of torch.save, read without torch.load: their tensors and plain values, in memory that the file pays for.

torch.load(weights_only=True) runs nothing either, but takes the time and memory that a hostile file asks for:
compressed members, bytearrays of any size, keys that take for ever to hash.
"""

import mmap
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdit.data.safe_pickle import MAX_BYTES, Name, Unpickler

LOCAL_HEADER = 30
"""Bytes of a zip member's own header, without its name and extra field."""


@dataclass(frozen=True)
class _Storage(Name):
    """Stands in for a storage class of torch."""

    dtype: torch.dtype = torch.float32


class _Ignored:
    """Stands in for an argparse.Namespace, of which nothing is kept."""


def read_archive(path: Path | str) -> Any:
    """What torch.save wrote in its zip format, on the CPU; tensors lie in the file, mapped into memory.

    Raises:
        OSError: the file cannot be read.
        Exception: it is damaged, or holds more than strided tensors, dicts, lists, numbers and strings; a
            pickle.UnpicklingError names what it asks for.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written to a tensor stays in memory
        spans = {info.filename.partition("/")[2]: _span(info, content) for info in archive.infolist()}
    pickled = content[spans["data.pkl"]]
    order = content[spans["byteorder"]] if "byteorder" in spans else b"little"
    if len(pickled) > MAX_BYTES or order != b"little":
        raise ValueError("too large, or of a machine with another order of bytes")
    return _Unpickler(pickled, content, spans).load()


def _span(info: zipfile.ZipInfo, content: mmap.mmap) -> slice:
    """Where in the file a member's bytes are, which must be stored as they are."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{info.filename}: compressed")
    lengths = content[info.header_offset + 26 : info.header_offset + LOCAL_HEADER]  # of name and extra field
    start = info.header_offset + LOCAL_HEADER + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    if start + info.file_size > len(content):
        raise ValueError(f"{info.filename}: cut short")
    return slice(start, start + info.file_size)


class _Unpickler(Unpickler):
    """A `Unpickler` that knows tensors."""

    def __init__(self, data: bytes, content: mmap.mmap, spans: dict[str, slice]):
        super().__init__(data, _ADMITTED, "tensors and plain values")
        self.content, self.spans = content, spans

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage, by ("storage", class, key, device, count)."""
        _, storage, key, _, count = pid
        span, size = self.spans[f"data/{key}"], storage.dtype.itemsize
        if count * size != span.stop - span.start or span.start % size:
            raise pickle.UnpicklingError("a storage larger or smaller than its numbers")
        if not count:
            return torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(self.content, dtype=storage.dtype, count=count, offset=span.start)


def _newobj(it: Unpickler) -> None:
    arguments = it.stack.pop()
    it.stack[-1] = it.call(it.stack[-1], arguments)


def _build(it: Unpickler) -> None:
    it.stack.pop()  # the state: attributes of a Namespace, metadata of a state dict
    it.top(dict, _Ignored)


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *flags_and_hooks: Any) -> Tensor:
    return numbers.as_strided(size, stride, offset)  # which checks that all are there


def _ordered_dict() -> dict:  # dict itself would copy what it is given
    return {}


_Unpickler.dispatch = Unpickler.dispatch | {pickle.NEWOBJ[0]: _newobj, pickle.BUILD[0]: _build}
_ADMITTED = {
    "torch._utils._rebuild_tensor_v2": Name(_tensor),
    "torch._utils._rebuild_parameter": Name(lambda tensor, requires_grad, hooks: tensor),
    "collections.OrderedDict": Name(_ordered_dict),
    "argparse.Namespace": Name(_Ignored),
    "torch.DoubleStorage": _Storage(dtype=torch.float64),
    "torch.FloatStorage": _Storage(dtype=torch.float32),
    "torch.HalfStorage": _Storage(dtype=torch.float16),
    "torch.BFloat16Storage": _Storage(dtype=torch.bfloat16),
    "torch.LongStorage": _Storage(dtype=torch.int64),
    "torch.IntStorage": _Storage(dtype=torch.int32),
    "torch.ShortStorage": _Storage(dtype=torch.int16),
    "torch.CharStorage": _Storage(dtype=torch.int8),
    "torch.ByteStorage": _Storage(dtype=torch.uint8),
    "torch.BoolStorage": _Storage(dtype=torch.bool),
}
