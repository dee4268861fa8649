"""Options of `python -m cdit.drive`. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.errors import UserError
from cdit.common.limits import Positive
from cdit.common.options import CheckpointOptions, DataOptions, TextOptions, check_options
from cdit.diffusion.config import SamplerOptions
from cdit.plan.config import OptimizerConfig, PlannerConfig
from cdit.worlds import starts_of

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class DriveConfig(TextOptions, DataOptions, CheckpointOptions):
    """What to drive, and who may connect."""

    checkpoint: str = "maze"
    """Folder of a training run or of a world model, or the name of a world that ships with the package (maze)."""
    data: str | None = None
    """Dataset folder with frames to start from; by default those that ship with the world, if any. The truth can be
    shown beside the dream if the dataset was recorded in Doom and ViZDoom is installed."""
    also: list[str] = field(default_factory=list)
    """Further checkpoints to drive side by side with the first, of the same frame size, frame rate and
    actions."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled at first; the page can change it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of the dream. bf16 is faster on many machines, and differs by rounding."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address that is not local to this machine requires the token."""
    port: int = 8600
    """Port to listen on; 0 for any free one."""
    token: str | None = None
    """Secret that the page's address must contain, as ?token=…; by default random if the host is not this machine."""
    sessions: int = 4
    """Largest number of pages that can drive at the same time."""
    session_mb: float = 256.0
    """Memory in MB of a session's drive, which limits its length."""
    idle_minutes: float = 10.0
    """Minutes without input after which a session ends."""
    threads: Positive[int] | None = None
    """Threads of the network on a CPU; by default OMP_NUM_THREADS or, if it is not set, one fewer than there are cores,
    which leaves one for the browser."""
    planner: PlannerConfig = field(
        default_factory=lambda: PlannerConfig(
            optimizer=OptimizerConfig(samples=24, iterations=2, elites=4),
            frames=[2, 4, 8],
            sampler=SamplerOptions(steps=1),
        )
    )
    """How the planner searches for a plan to the goal."""
    horizon: Positive[int] = 8
    """Steps of a plan."""
    record: str | None = None
    """Folder for drives that are recorded as datasets; without it, the page does not record."""

    def __post_init__(self) -> None:
        self.data = self.data or starts_of(self.checkpoint)

    def check(self) -> None:
        """Finds mistakes before anything is loaded.

        Raises:
            UserError: naming the option.
        """
        check_options(self)
        self.planner.validate(self.horizon)
        self.planner.validate_last(self.horizon)
        for other in self.also:
            check_options(CheckpointOptions(checkpoint=other))
        ranges = {"port": (0, 65535), "sessions": (1, 1000), "session_mb": (1, 1e6), "idle_minutes": (0.01, 1e6)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} is {getattr(self, name)}, expected {low:g} to {high:g}")
        if self.token is not None and not (len(self.token) >= 16 and self.token.isalnum()):
            raise UserError("token: expected at least 16 letters and digits")
