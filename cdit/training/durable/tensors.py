"""The tensors of a run by name, complete or as the part of one process, and their safetensors files.

Sharded tensors (see `cdit.training.sharding`) are split along their first dimension as by `torch.chunk`; concatenating
the parts of all processes gives the complete tensor.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cdit.training.ema import EMA


def run_tensors(
    networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, ema: EMA
) -> dict[str, dict[str, Tensor]]:
    """The live tensors of a run: those of each network, `average` and `optimizer`, each by name.

    If AdamW has no state yet, it is created as in its first step.
    """
    moments = {}
    for name, parameter in trainable(networks).items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        moments |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    weights = {name: network.state_dict() for name, network in networks.items()}
    return {**weights, "average": ema.tensors(), "optimizer": moments}


def trainable(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; those of networks other than `model` are prefixed with the network's name."""
    return {
        name if network == "model" else f"{network}.{name}": parameter
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def part(tensor: Tensor, main: bool) -> Tensor | None:
    """What this process saves of a tensor: its own part if sharded; otherwise all of it, on the main process."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor if main else None


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copies a complete tensor, or this process's part of it, into an existing one.

    Raises:
        ValueError: the shapes differ.
    """
    if tensor.shape != whole.shape:
        raise ValueError(f"expected {tuple(tensor.shape)}, not {tuple(whole.shape)}")
    if isinstance(tensor, DTensor):
        mesh, tensor = tensor.device_mesh, tensor.to_local()
        parts = whole.chunk(mesh.size())
        index = mesh.get_local_rank()
        whole = parts[index] if index < len(parts) else whole[:0]
    with torch.no_grad():
        tensor.copy_(whole)


def file_name(kind: str, tensors: Mapping[str, Tensor], index: int, processes: int) -> str:
    """The file name of a kind of tensors: one file for all processes, or one per process if any is sharded."""
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return f"{kind}-{index + 1:05d}-of-{processes:05d}.safetensors" if sharded else f"{kind}.safetensors"


class SavedTensors:
    """The complete tensors of one kind in a checkpoint folder; a context manager."""

    def __init__(self, folder: Path, kind: str):
        self.paths = sorted([*folder.glob(f"{kind}.safetensors"), *folder.glob(f"{kind}-*-of-*.safetensors")])
        if not self.paths:
            raise FileNotFoundError(f"{kind}.safetensors is missing")

    def __enter__(self) -> "SavedTensors":
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(safe_open(path, "pt")) for path in self.paths]
        self._names = [set(file.keys()) for file in self._files]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """A tensor, assembled from its parts.

        Raises:
            KeyError: there is no such tensor.
        """
        parts = [file.get_tensor(name) for file, names in zip(self._files, self._names, strict=True) if name in names]
        if not parts:
            raise KeyError(name)
        return torch.cat(parts) if len(parts) > 1 else parts[0]
