"""The typed unit of data: what predictions are conditioned on, and batches of windows.

Shape suffixes: B contexts, G goals of each, T past frames. A single sample is a `Batch` without its dimension B.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from cdit.common.motion import placed


class TensorData:
    """A dataclass of tensors and nested `TensorData` that is moved, indexed and stacked as a whole.

    Other fields (None, strings) are left unchanged; lists of strings are concatenated when samples are stacked.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `function` applied to every tensor."""
        return type(self)(**{f.name: _map(getattr(self, f.name), function) for f in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in pinned memory; called by torch's `DataLoader`."""
        return self.map(Tensor.pin_memory)

    def __getitem__(self, index: Any) -> Self:
        """Indexes every tensor along its first dimension."""
        return self.map(lambda x: x[index])

    @classmethod
    def collate(cls, samples: Sequence[Self]) -> Self:
        """Stacks samples along a new first dimension."""
        return cls(**{f.name: _collate([getattr(sample, f.name) for sample in samples]) for f in fields(cls)})

    def named_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors under dotted names."""
        found: dict[str, Tensor] = {}
        for f in fields(self):
            found |= _named(prefix + f.name, getattr(self, f.name))
        return found


@dataclass
class Condition(TensorData):
    """What predictions are conditioned on besides the past frames, in physical units."""

    time_shift: Tensor | None = None
    """(B, G) seconds from the last past frame to the goal, negative for the past. None: one frame (1 / fps)."""
    action: Tensor | None = None
    """(B, G, K) to the goal, in the units of the dataset's `ActionSpace`: by default dx, dy in metres and dyaw in
    radians, in the frame of the last past frame. None: unknown."""
    known: Tensor | None = None
    """(B, G) bool, which actions are known; values of the others are ignored. None: all."""
    spacing: Tensor | None = None
    """(B,) metres between consecutive frames; used by models trained on datasets of different spacings."""
    text: Tensor | None = None
    """(B, E) or (E,) embeddings of texts that describe what is done (see `WorldModel.encode_text`); zeros for an empty
    text."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further conditions by name, (B, G, …), for user-defined conditioners."""

    def shape(self, dims: int) -> tuple[int, ...] | None:
        """The leading dimensions, such as (B, G), of all fields except spacing and text; None if there are no other
        fields."""
        first = next(iter(replace(self, spacing=None, text=None).named_tensors().values()), None)
        return None if first is None else tuple(first.shape[:dims])

    def map_goals(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """A copy with `function` applied to every tensor of goals; spacing and text are kept."""
        return replace(replace(self, spacing=None, text=None).map(function), spacing=self.spacing, text=self.text)

    def then(self, following: "Condition") -> "Condition":
        """Composes these motions (dx, dy, dyaw) and times with those that follow; further conditions are taken from the
        latter."""
        action, known = None, following.known
        if self.action is not None and following.action is not None:
            action = placed(following.action[..., None, :], self.action)[..., 0, :]
            if self.known is not None:
                known = (self.known if known is None else self.known & known).expand(action.shape[:-1])
        return replace(following, time_shift=self.time_shift + following.time_shift, action=action, known=known)

    def part(self, goals: slice) -> "Condition":
        """The condition of some goals of a single sample, along its first dimension."""
        return self.map_goals(lambda x: x[goals])

    def select(self, dim: int, index: int) -> "Condition":
        """Selects one index along a dimension, such as that of goals (1), and removes it."""
        return self.map_goals(lambda x: x.select(dim, index))


@dataclass
class Following(TensorData):
    """The N consecutive frames after the current one, for rollouts."""

    frames: Tensor
    """(B, N, 3, H, W) uint8, or their latents' moments; in an `EncodedBatch` (B, N, C, h, w) latents."""
    condition: Condition | dict[str, Tensor]
    """The condition of each frame, with the motion and time from the frame before it; in an `EncodedBatch` for
    `CDiT.forward`."""


@dataclass
class Batch(TensorData):
    """Windows of a dataset: past frames, goals, and the conditions that lead to each goal."""

    context: Tensor
    """(B, T, 3, H, W) uint8 RGB past frames, oldest first; or their latents' moments (B, T, S, C, h, w)."""
    mask: Tensor
    """(B, T) bool, True where a past frame exists."""
    target: Tensor
    """(B, G, 3, H, W) uint8 goal frames, or their latents' moments."""
    condition: Condition
    key: Tensor | None = None
    """(B,) int64 key of each sample's random draws (see `KeyedDraws`)."""
    weight: Tensor | None = None
    """(B,) float32, weight of each sample; 0 for padding."""
    following: Following | None = None
    """The frames after the current one, with data.rollout."""
    skipped: list[str] = field(default_factory=list)
    """A message for each sample that could not be read and was replaced by one of weight 0."""

    def __len__(self) -> int:
        return len(self.context)


@dataclass
class EncodedBatch(TensorData):
    """A batch as the network sees it: latents and normalised conditions (see `WorldModel.encode`)."""

    context: Tensor
    """(B, T, C, h, w) latents of the past frames."""
    mask: Tensor | None
    """(B, T) bool; None if all past frames exist, for which there are faster kernels."""
    clean: Tensor
    """(B, G, C, h, w) latents of the goals."""
    condition: dict[str, Tensor]
    """For `CDiT.forward`; every tensor (B, G, …)."""
    action_dropout: float = 0.0
    """Probability with which `dropped` hides the action and the text of a goal."""
    noise_level: Tensor | None = None
    """(B, T) standard deviations of the noise in the past frames; None: no noise."""
    following: Following | None = None
    as_past: Callable[[Tensor], Tensor] | None = None
    """The form in which sampled latents join the past, see `Codec.as_past`."""

    @property
    def past(self) -> tuple[Tensor | None, ...]:
        """The past frames, their mask and, if they have any, noise levels: the last arguments of `CDiT.forward`."""
        noise = () if self.noise_level is None else (self.noise_level,)
        return self.context, self.mask, *noise

    def dropped(self, draws: "KeyedDraws") -> dict[str, Tensor]:
        """The condition with action and text hidden from some goals, for classifier-free guidance in sampling."""
        return hide(self.condition, draws.rand(self.clean.shape[1]) < self.action_dropout)


def hide(condition: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Normalised conditions without action and text where `hidden` ((B, G) or (G,)) is True."""
    found = dict(condition)
    if "action" in found:
        found["action_known"] = found["action_known"] & ~hidden
    if "text" in found:
        found["text"] = found["text"].masked_fill(hidden[..., None], 0.0)
    return found


class KeyedDraws:
    """Random numbers keyed by sample, independent of the batch, process and order in which they are drawn.

    Args:
        keys: (B,) of the samples.
        device: of the numbers, which differ between types of device.
    """

    def __init__(self, keys: Iterable[int] | Tensor, device: torch.device):
        self.device = device
        keys = keys.tolist() if isinstance(keys, Tensor) else keys
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape), uniform in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self._generators])

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._generators])


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorData):
        return value.map(function)
    if isinstance(value, dict):
        return {name: _map(item, function) for name, item in value.items()}
    return value


def _collate(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(values)
    if isinstance(first, TensorData):
        return type(first).collate(values)
    if isinstance(first, dict):
        return {name: _collate([value[name] for value in values]) for name in first}
    return [item for value in values for item in value] if isinstance(first, list) else first


def _named(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, TensorData):
        return value.named_tensors(f"{name}.")
    if isinstance(value, dict):
        return {f"{name}.{key}": item for key, item in value.items()}
    return {}
