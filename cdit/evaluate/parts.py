"""Results of finished batches on disk, from which an interrupted evaluation continues."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cdit.common.errors import UserError
from cdit.common.files import read_json, write_json, write_whole
from cdit.evaluate.study import joined
from cdit.world_model import WorldModel

FINGERPRINT = "made_of.json"


class Parts:
    """The batches of one protocol: `<folder>/<batch>.safetensors`, and made_of.json with what they depend on."""

    def __init__(self, folder: Path, made_of: dict[str, Any], count: int):
        self.folder, self.count = folder, count
        self.made_of = json.loads(json.dumps(made_of))  # as it is read back

    def check(self) -> None:
        """Checks that files in the folder, if there are any, belong to this evaluation.

        Raises:
            UserError: they belong to another one.
        """
        path = self.folder / FINGERPRINT
        if not path.is_file():
            return
        before = read_json(path)
        if not isinstance(before, dict):
            raise UserError(f"{path}: not written by an evaluation: choose another --out, or pass --overwrite true")
        changed = [key for key in self.made_of | before if before.get(key) != self.made_of.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} holds parts of another evaluation (other {', '.join(changed)}): choose another --out, "
                "or pass --overwrite true"
            )

    def clear(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        """Makes the folder, with made_of.json.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / FINGERPRINT, self.made_of)
        except OSError as error:
            raise UserError(f"out: {self.folder} cannot be written to ({error.strerror})") from error

    def missing(self) -> list[int]:
        """The batches that have no results yet."""
        return [batch for batch in range(self.count) if not (self.folder / _name(batch)).is_file()]

    def write(self, batch: int, tensors: dict[str, Tensor]) -> None:
        """Writes the results of a batch."""
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # shares no memory
        write_whole(self.folder / _name(batch), save(whole))

    def read(self) -> dict[str, Tensor]:
        """The results of all batches, concatenated by name.

        Raises:
            UserError: a file is damaged.
        """
        parts = []
        for batch in range(self.count):
            try:
                parts.append(load_file(self.folder / _name(batch)))
            except Exception as error:  # safetensors has its own exceptions
                raise UserError(
                    f"{self.folder / _name(batch)}: damaged ({error}): delete it and run the command again"
                ) from error
        return joined(parts)


def weights_hash(world: WorldModel) -> str:
    """Hexadecimal SHA-256 of all weights, those of the codec included, and of the configs saved with them."""
    digest = hashlib.sha256(json.dumps([asdict(world.description), dict(world.cdit.config)], default=str).encode())
    for name, tensor in sorted(world.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _name(batch: int) -> str:
    return f"{batch:05}.safetensors"
