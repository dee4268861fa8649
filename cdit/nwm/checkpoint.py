"""Reads and writes checkpoints of the published Navigation World Models: `*.pth.tar`, a dict written by torch.save.

It holds "model", "ema" (tensors by name, those of "model" perhaps prefixed by torch.compile), "opt", "args" (an
argparse.Namespace), "epoch", "train_steps" and perhaps "scaler".
"""

import argparse
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cdit.common.errors import UserError
from cdit.model import CDiT
from cdit.nwm.tensors import cdit_arguments, differences, from_nwm, to_nwm

LISTED = 4


def load_checkpoint(path: Path | str, weights: Literal["ema", "model"] = "ema", num_heads: int | None = None) -> CDiT:
    """Loads the network of a published checkpoint, in evaluation mode and float32; no code in the file runs.

    Size, patches, channels and longest context follow from the shapes of the tensors; latents are assumed square.

    Args:
        path: the *.pth.tar file.
        weights: the averaged weights, which the published evaluation uses, or the trained ones.
        num_heads: heads of each attention; by default those of the published network of that width and depth.

    Raises:
        UserError: the file is not such a checkpoint, or a tensor is missing, unexpected or of the wrong shape.
    """
    tensors = _tensors(path, weights)
    try:
        arguments = cdit_arguments(tensors, num_heads)
        with torch.device("meta"):
            cdit = CDiT(**arguments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    problems = _mismatches(tensors, to_nwm(cdit.state_dict()))
    if problems:
        raise UserError(f"{path}: not the network of NWM: in {weights!r}, {'; '.join(problems)}")
    state = from_nwm(tensors, cdit.config.num_heads)
    # Copies, because the tensors are mapped from the file.
    cdit.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, assign=True)
    return cdit.eval()


def save_checkpoint(cdit: CDiT, path: Path | str) -> None:
    """Writes, atomically, a checkpoint that the published code and `load_checkpoint` read; "model" and "ema" are equal.

    The embedding of an unknown action is left out, as the published network has none.

    Raises:
        UserError: the network differs from the published one (the message lists how), or `path` exists and is not a
            checkpoint.
    """
    if different := differences(cdit):
        raise UserError(f"not the network of NWM: {'; '.join(different)}")
    path = Path(path)
    if path.exists():
        try:
            _tensors(path, "ema")
        except UserError as error:
            raise UserError(f"{path}: exists and is not a checkpoint") from error
    tensors = to_nwm({name: tensor.detach().cpu() for name, tensor in cdit.state_dict().items()})
    checkpoint = {"model": tensors, "ema": tensors, "args": argparse.Namespace(), "epoch": 0, "train_steps": 0}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _tensors(path: Path | str, weights: str) -> dict[str, Tensor]:
    """The tensors by name, in the file's own types, mapped from the file.

    Raises:
        UserError: the file has none.
    """
    expected = f"expected a checkpoint of Navigation World Models: a dict with tensors in {weights!r}"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, "cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {expected}") from error
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        raise UserError(f"{path}: {_reason(error)}; {expected}") from error
    found = checkpoint.get(weights) if isinstance(checkpoint, dict) else None
    if not (isinstance(found, dict) and found and all(isinstance(name, str) for name in found)):
        raise UserError(f"{path}: no {weights!r} in it; {expected}")
    odd = [name for name, value in found.items() if not _is_weight(value)]
    if odd:
        raise UserError(f"{path}: {_some(odd)} of {weights!r}: expected tensors of floating-point numbers")
    tensors = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    if len(tensors) < len(found):
        raise UserError(f"{path}: {weights!r} has tensors twice, with and without the prefix _orig_mod.")
    if sum(tensor.nbytes for tensor in tensors.values()) > os.path.getsize(path):
        raise UserError(f"{path}: tensors of {weights!r} share their numbers")
    return tensors


def _is_weight(value: Any) -> bool:
    """Whether it is a plain, non-empty tensor with a stored number for each element."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and 0 < value.nbytes <= value.untyped_storage().nbytes()
    )


def _mismatches(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Which tensors are missing, unexpected or of the wrong shape; a line each, naming some."""
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrong shape": shapes,
    }
    return [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _reason(error: Exception) -> str:
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    if asked_for:
        return f"it refers to {asked_for[1]}, expected tensors and plain values only"
    return "damaged, or not in torch.save's zip format"
