"""Checks of untrusted save_pretrained folders before a network is built from them."""

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from cdit.common.errors import UserError
from cdit.common.files import read_json

LARGEST = 2**16
"""Largest integer in a network's config, such as a width or a number of channels."""
LAYERS = re.compile(r"depth|layers|blocks")
"""Names of config fields that count parts, each of which has its own weights."""


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder's safetensors files, by name, after checking its config.json.

    Shapes can be compared before a network takes memory; the checked numbers bound the time to build it.

    Raises:
        UserError: there are no such files, or the config has numbers that are impossible for these weights.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has its own exceptions
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if not shapes:
        raise UserError(f"{folder}: no weights here (expected *.safetensors)")
    _check_numbers(read_json(folder / "config.json"), len(shapes), folder / "config.json")
    return shapes


def _check_numbers(value: Any, most: int, where: Path, name: str = "") -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, most, where, key)
    elif isinstance(value, list):
        if len(value) > most:
            raise UserError(f"{where}: {name} has {len(value)} entries, but there are only {most} tensors")
        for item in value:
            _check_numbers(item, most, where, name)
    elif isinstance(value, int | float):
        largest = most if isinstance(value, int) and LAYERS.search(name) and "channels" not in name else LARGEST
        smallest = 0 if isinstance(value, int) else -LARGEST
        if not smallest <= value <= largest:
            raise UserError(f"{where}: {name} is {value:.6g}, expected {smallest} to {largest}")
