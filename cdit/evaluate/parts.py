"""Results of batches on disk, each whole or not at all, so that an interrupted evaluation continues."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdit.common.errors import UserError
from cdit.common.files import read_json
from cdit.evaluate.study import joined
from cdit.world_model import WorldModel

FINGERPRINT = "made_of.json"


class Parts:
    """The batches of one protocol: `<folder>/<batch>.safetensors`, and in made_of.json what they depend on.

    Args:
        folder: where they are.
        made_of: everything the results depend on, as JSON values.
        count: number of batches.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any], count: int):
        self.folder, self.count = folder, count
        self.made_of = json.loads(json.dumps(made_of))  # as it will be read

    def check(self) -> None:
        """Looks whether what is there, if anything, is of this evaluation.

        Raises:
            UserError: it is of another, which can be overwritten.
        """
        path = self.folder / FINGERPRINT
        if not path.is_file():
            return
        before = read_json(path)
        if not isinstance(before, dict):
            raise UserError(f"{path}: not what an evaluation writes: give another out, or --overwrite true")
        changed = [key for key in self.made_of | before if before.get(key) != self.made_of.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} holds parts of another evaluation (other {', '.join(changed)}): give another out, or "
                "--overwrite true"
            )

    def clear(self) -> None:
        """Removes all there is."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        """Writes what the parts are made of, before the first of them.

        Raises:
            UserError: the folder cannot be made, or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace(FINGERPRINT, lambda partial: partial.write_text(json.dumps(self.made_of, indent=2) + "\n"))
        except OSError as error:
            raise UserError(f"out: {self.folder} cannot be written to ({error.strerror})") from error

    def missing(self) -> list[int]:
        """The batches that are still to be computed."""
        return [batch for batch in range(self.count) if not (self.folder / _name(batch)).is_file()]

    def write(self, batch: int, tensors: dict[str, Tensor]) -> None:
        """Puts a batch's results there."""
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # safetensors shares no memory
        self._replace(_name(batch), lambda partial: save_file(whole, partial))

    def read(self) -> dict[str, Tensor]:
        """The results of all batches one after the other, by name.

        Raises:
            UserError: a file is damaged.
        """
        parts = []
        for batch in range(self.count):
            try:
                parts.append(load_file(self.folder / _name(batch)))
            except Exception as error:  # safetensors has errors of its own
                raise UserError(f"{self.folder / _name(batch)}: damaged ({error}): delete it and go on") from error
        return joined(parts)

    def _replace(self, name: str, write: Any) -> None:
        partial = self.folder / f".{name}.partial"
        write(partial)
        os.replace(partial, self.folder / name)


def weights_hash(world: WorldModel) -> str:
    """Hexadecimal SHA-256 of all weights, the codec's included, and of what is saved beside them."""
    digest = hashlib.sha256(json.dumps([asdict(world.description), dict(world.cdit.config)], default=str).encode())
    for name, tensor in sorted(world.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _name(batch: int) -> str:
    return f"{batch:05}.safetensors"
