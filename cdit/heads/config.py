"""What is looked at in a model's attention, as configs and command lines say it. Imports no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cdit.common.errors import UserError

if TYPE_CHECKING:
    from cdit.model import CDiT

Kind = Literal["cross", "self"]


@dataclass
class AttentionConfig:
    """Which attention is looked at."""

    kinds: list[Kind] = field(default_factory=lambda: ["cross"])
    """cross, to the past frames, and self, within the target. The page has the first."""
    layers: list[int] | None = None
    """Blocks, from 0; by default all. Figures are drawn of the first, the middle and the last of them."""
    times: list[float] = field(default_factory=lambda: [0.25, 0.75])
    """Diffusion times between 0 (clean) and 1 (noise)."""
    samples: int = 8
    """Samples that are measured, each with all its goals; 0 for none."""
    drawn: int = 1
    """How many of them are drawn: on the page with their first and last goal, in figures with the first."""
    patch: tuple[int, int] | None = None
    """Row and column of the target patch from which figures look, from 0 at the top left; by default the centre."""

    def resolve(self, cdit: "CDiT", field: str = "attention") -> tuple[list[int], tuple[int, int]]:
        """The layers and the patch that this means for a network.

        Args:
            cdit: the network.
            field: what messages call this config; empty where its fields stand alone.

        Raises:
            UserError: the network has no such layer or patch, or a value is out of its range; the message names the
                field.
        """
        depth, (rows, columns) = len(cdit.blocks), cdit.grid
        layers = list(range(depth)) if self.layers is None else sorted(set(self.layers))
        row, column = (rows // 2, columns // 2) if self.patch is None else self.patch
        requirements = {
            "kinds": (self.kinds and len(set(self.kinds)) == len(self.kinds), "cross, self or both"),
            "layers": (layers and all(0 <= layer < depth for layer in layers), f"numbers from 0 to {depth - 1}"),
            "times": (self.times and all(0 < time < 1 for time in self.times), "numbers between 0 and 1"),
            "drawn": (self.drawn >= 0, "at least 0"),
            "patch": (0 <= row < rows and 0 <= column < columns, f"one of the {rows} × {columns} patches of a frame"),
        }
        for name, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"{field}{'.' if field else ''}{name} is {getattr(self, name)}, expected {expected}")
        return layers, (row, column)
