"""Files of the published Navigation World Models: `*.pth.tar`, a dict of torch.save.

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
from cdit.nwm.archive import read_archive
from cdit.nwm.tensors import cdit_arguments, differences, from_nwm, to_nwm

LISTED = 4


def load_checkpoint(path: Path | str, weights: Literal["ema", "model"] = "ema", num_heads: int | None = None) -> CDiT:
    """Reads the network of a published checkpoint, in evaluation mode and float32. Nothing in the file is run.

    Size, patches, channels and longest context are read from the tensors' shapes; latents are taken to be square.

    Args:
        path: the *.pth.tar file.
        weights: the averaged ones, which the published evaluation uses, or those that were trained.
        num_heads: heads of each attention; by default those of the published network of that width and depth.

    Raises:
        UserError: the file is no such checkpoint, or a tensor is missing, left over or not of the shape that the others
            ask for.
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
    # Copies: what is read is the file itself, mapped into memory.
    cdit.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, assign=True)
    return cdit.eval()


def save_checkpoint(cdit: CDiT, path: Path | str) -> None:
    """Writes what the published code and `load_checkpoint` read, whole or not at all; "model" and "ema" are the same.

    The action that stands for an unknown one is left out: the published network has none.

    Raises:
        UserError: the network is not the published one, naming the settings that differ; or what is at `path` now is no
            checkpoint.
    """
    if different := differences(cdit):
        raise UserError(f"not the network of NWM: {'; '.join(different)}")
    path = Path(path)
    if path.exists():
        try:
            _tensors(path, "ema")
        except UserError as error:
            raise UserError(f"{path}: is there already and no checkpoint that could be replaced") from error
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
    """The tensors by name, of the file's own types and lying in the file.

    Raises:
        UserError: it has none.
    """
    expected = f"expected a checkpoint of Navigation World Models: a dict of torch.save with tensors in {weights!r}"
    try:
        checkpoint = read_archive(path)
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
        raise UserError(f"{path}: tensors of {weights!r} lie in the same place of the file")
    return tensors


def _is_weight(value: Any) -> bool:
    """Whether it is a plain tensor with numbers, each of which has a place of its own in the file."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and 0 < value.nbytes <= value.untyped_storage().nbytes()
    )


def _mismatches(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is missing, left over or of another shape; a line each, naming some."""
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": shapes,
    }
    return [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _reason(error: Exception) -> str:
    """What is wrong with a file that cannot be read."""
    asked_for = re.match(r"it asks for (\S+), and", str(error))
    if asked_for:
        return f"it asks for {asked_for[1]!r}, and only tensors and plain values are admitted"
    return "damaged, cut short or not of torch.save"
