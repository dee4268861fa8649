"""The configurations of planning. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Literal

from cdit.common.errors import UserError
from cdit.common.limits import NotNegative
from cdit.common.options import CheckpointOptions, DataOptions, OutputOptions, TextOptions
from cdit.diffusion.config import SamplerOptions

LEARNED = ("steps", "distance")
FARTHEST_JUMP = 16
"""Largest number of frames that the world predicts ahead for `learn`."""
COSTS = ("pixels", "latents", "lpips", "dreamsim", *LEARNED, "features:NAME")


def check_cost(cost: str, learned: str | None) -> None:
    """Checks the name of a cost.

    Raises:
        UserError: the cost is unknown, or it is learned and `learned` is None.
    """
    kind, _, name = cost.partition(":")
    known = {cost.partition(":")[0] for cost in COSTS}
    if kind not in known or (kind == "features") != bool(name):
        raise UserError(f"planner.cost is {cost!r}, expected one of {', '.join(COSTS)}")
    if cost in LEARNED and learned is None:
        raise UserError(f"planner.cost is {cost}, which is learned: set planner.learned or choose another cost")


@dataclass
class OptimizerConfig:
    """How the best candidate is searched for."""

    name: Literal["cem", "icem", "mppi", "best"] = "cem"
    """cem: refits mean and standard deviation to the elites; icem: cem with coloured noise, kept elites, and the
    best candidate as the result; mppi: a mean weighted by cost; best: cem that always returns the best candidate."""
    samples: int = 60
    """Candidates per iteration."""
    iterations: int = 3
    """Iterations; the first draws from the data."""
    elites: int = 6
    """Best candidates, to which the next iteration is fitted."""
    first: Literal["data", "gaussian"] = "data"
    """Candidates of the first iteration: recorded motions, or a Gaussian with their mean and standard deviation."""
    noise_beta: float = 2.0
    """Exponent of the power spectrum of icem's and mppi's noise along the knots; 0 is white noise."""
    kept: float = 0.3
    """Fraction of the elites that icem keeps for the next iteration."""
    temperature: float = 0.3
    """Temperature of mppi's weights, in standard deviations of the candidates' costs."""
    smallest_std: float = 0.1
    """Lower bound of the standard deviation, as a fraction of the data's."""
    result: Literal["mean", "best"] = "best"
    """What cem and mppi return: the mean, as the NWM release does, or the best candidate of all."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        requirements = {
            "samples": (self.samples >= 2, "at least 2"),
            "iterations": (self.iterations >= 1, "at least 1"),
            "elites": (2 <= self.elites <= self.samples, "2 to optimizer.samples"),
            "noise_beta": (self.noise_beta >= 0, "at least 0"),
            "kept": (0 <= self.kept <= 1, "0 to 1"),
            "temperature": (self.temperature > 0, "more than 0"),
            "smallest_std": (self.smallest_std >= 0, "at least 0"),
        }
        for name, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"planner.optimizer.{name} is {getattr(self, name)}, expected {expected}")


OPTIMIZER = tuple(f"optimizer.{option.name}" for option in fields(OptimizerConfig))
"""Its options, by their names in `PlannerConfig`."""


@dataclass
class PlannerConfig:
    """How a plan is made."""

    candidates: Literal["constant", "spline", "steps"] = "spline"
    """Actions. constant: a straight line and one turn at its end, as in the NWM release (motion only); spline: steps
    interpolated between knots; steps: independent steps."""
    knots: int = 3
    """Knots of a spline; 1 repeats the same step, which for motion gives a circular arc."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the best candidate is searched for."""
    cost: str = "lpips"
    """Distance between a predicted frame and the goal: pixels, latents, lpips, dreamsim, steps or distance (learned,
    see `learned`: the remaining steps, and the remaining distance in multiples of the success radius), or
    features:NAME, the cosine distance of features of a timm backbone."""
    learned: str | None = None
    """Folder written by `python -m cdit.plan learn`, or maze, whose goal network ships with the package; used by the
    costs steps and distance, and for proposals."""
    stride: int | None = None
    """Frames per predicted step: 1 predicts every frame from those before it, 4 every fourth frame; by default each
    frame is predicted in one jump."""
    frames: list[int] = field(default_factory=list)
    """Frames that are compared with the goal; by default the last one. The closest counts, and the plan ends there."""
    repeats: int = 1
    """Predictions of each candidate; their costs are averaged."""
    chunk: int = 256
    """Largest number of frames predicted at once; halved when out of memory."""
    guidance: float = 0.1
    """Weight of the prior in guided plans: the cost per squared standard deviation from the proposal of inverse
    dynamics, averaged over steps and their three components."""
    constraint: Literal["none", "forward_first", "turn_first"] = "none"
    """forward_first: walk, then turn; turn_first: turn, then walk. The walk takes five eighths of the time."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""

    @property
    def motions(self) -> str:
        """The kind of candidates, as named in reports."""
        return "arc" if self.candidates == "spline" and self.knots == 1 else self.candidates

    def validate(self, horizon: int) -> None:
        """Checks the values.

        Args:
            horizon: frames of a plan.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        self.optimizer.validate()
        check_cost(self.cost, self.learned)
        stride = 1 if self.stride is None else self.stride
        requirements = {
            "knots": (self.knots >= 1, "at least 1"),
            "repeats": (self.repeats >= 1, "at least 1"),
            "chunk": (self.chunk >= 1, "at least 1"),
            "guidance": (self.guidance >= 0, "at least 0"),
            "stride": (stride >= 1 and horizon % stride == 0, f"a divisor of {horizon}"),
            "frames": (
                stride and all(1 <= t <= horizon and t % stride == 0 for t in self.frames)
                and len(set(self.frames)) == len(self.frames),
                f"different multiples of the stride, 1 to {horizon}",
            ),
        }  # fmt: skip
        for name, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"planner.{name} is {getattr(self, name)}, expected {expected}")

    def validate_last(self, horizon: int) -> None:
        """Checks that plans can be as long as the horizon.

        Raises:
            UserError: they end earlier.
        """
        if max(self.frames, default=horizon) < horizon:
            raise UserError(f"horizon is {horizon}, but plans end at one of planner.frames, {self.frames}")

    def validate_without_motion(self) -> None:
        """Checks that a plan of actions other than motion is possible.

        Raises:
            UserError: an option is for motion only.
        """
        requirements = {
            "candidates": self.candidates != "constant",
            "constraint": self.constraint == "none",
            "learned": self.learned is None,
        }
        for name, holds in requirements.items():
            if not holds:
                raise UserError(
                    f"planner.{name} is {getattr(self, name)}, which needs a world whose actions are motion"
                )


def refuse(planner: PlannerConfig, names: Sequence[str], why: str) -> None:
    """Checks that options which would be ignored have their defaults.

    Args:
        planner: the options.
        names: dotted, such as optimizer.samples.
        why: what replaces them.

    Raises:
        UserError: one is set.
    """
    for name in names:
        value, default = (reduce(getattr, name.split("."), config) for config in (planner, PlannerConfig()))
        if value != default:
            raise UserError(f"planner.{name} is {value}, but {why}")


@dataclass(kw_only=True)
class LearnConfig(OutputOptions, DataOptions, CheckpointOptions):
    """The goal network, and its training."""

    split: str = "train"
    """Split to learn from, the one that the world was trained on."""
    steps: int = 8000
    """Training steps."""
    batch_size: int = 128
    """Pairs of frames per step."""
    learning_rate: float = 1.5e-3
    """Peak learning rate."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes in bfloat16, about twice as fast where the processor has instructions for it."""
    horizon: int = 8
    """Number of steps that the policy proposes."""
    predicted: int = 8192
    """Frames that the world predicts first, so that the network is trained on predicted frames too; 0 for none."""
    jumps: int = 4
    """Frames predicted from each context."""
    shared_coordinates: bool = False
    """Whether the poses of all walks share one coordinate frame, as in one building. Pairs of nearby places then also
    come from two walks, which adds places side by side, and half of the pairs of distant places look alike."""
    radius: float = 0.5
    """Metres within which a goal is reached."""
    degrees: float = 30.0
    """Degrees within which a goal is reached."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""
    seed: NotNegative[int] = 0
    """Seed of the pairs and of the noise."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        for name, least in (("steps", 1), ("batch_size", 1), ("horizon", 1), ("predicted", 0), ("jumps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("learning_rate", "radius", "degrees"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name):g}, expected more than 0")
        if self.jumps > FARTHEST_JUMP:
            raise UserError(f"jumps is {self.jumps}, expected at most {FARTHEST_JUMP}")


@dataclass(kw_only=True)
class OpenLoopConfig(OutputOptions, TextOptions, DataOptions, CheckpointOptions):
    """Recorded episodes, and how plans are made."""

    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """How plans are made."""
    seconds: float = 2.0
    """Seconds from the last seen frame to the goal."""
    episodes: int = 100
    """Number of episodes, evenly spread over the split."""
    index: str | None = None
    """An index file of NWM (navigation_eval.pkl) that lists the episodes instead."""
    prior_split: str = "train"
    """Split whose actions the candidates resemble."""
    seed: NotNegative[int] = 0
    """Seed of candidates, noise and bootstrap."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        if self.seconds <= 0:
            raise UserError(f"seconds is {self.seconds:g}, expected more than 0")
        if self.episodes < 1:
            raise UserError(f"episodes is {self.episodes}, expected at least 1")


@dataclass(kw_only=True)
class OpenConfig(OpenLoopConfig):
    """The open-loop benchmark."""

    nwm_compat: bool = False
    """Plan as the NWM release does: 120 straight lines with a final turn, drawn from a Gaussian, the mean of the 5
    elites of one iteration, every frame predicted, LPIPS of the last one, 3 repeats, 250 denoising steps (or
    planner.sampler.steps). The Gaussian is fitted to the data; the release has hand-tuned ones, and multiplies the
    final turn by π twice."""
    pictures: NotNegative[int] = 6
    """Number of episodes with a picture."""

    def validate(self) -> None:
        """Checks the values; see `OpenLoopConfig.validate`."""
        super().validate()
        if self.nwm_compat:
            given = ("candidates", "cost", "stride", "frames", "repeats", "constraint", *OPTIMIZER)
            refuse(self.planner, given, "nwm_compat determines it")


@dataclass(kw_only=True)
class CurveConfig(OpenLoopConfig):
    """The budgets to compare: all combinations of these lists."""

    samples: list[int] = field(default_factory=lambda: [15, 60, 240])
    """Candidates per iteration."""
    iterations: list[int] = field(default_factory=lambda: [1, 3])
    """Iterations of the optimiser."""
    repeats: list[int] = field(default_factory=lambda: [1])
    """Predictions of each candidate."""
    steps: list[int] = field(default_factory=lambda: [1, 4])
    """Denoising steps."""

    def validate(self) -> None:
        """Checks the values; see `OpenLoopConfig.validate`."""
        super().validate()
        for name, least in (("samples", 4), ("iterations", 1), ("repeats", 1), ("steps", 1)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise UserError(f"{name} is {values}, expected numbers of at least {least}")
        refuse(self.planner, ("optimizer.iterations", "repeats", "sampler.steps"), "curve has lists of its own for it")


@dataclass(kw_only=True)
class DiagnoseConfig(OpenLoopConfig):
    """The costs to compare."""

    costs: list[str] = field(default_factory=lambda: ["pixels", "lpips"])
    """Costs, see planner.cost."""
    candidates: int = 24
    """Candidates per case."""
    noises: int = 3
    """Predictions of each candidate."""

    def validate(self) -> None:
        """Checks the values; see `OpenLoopConfig.validate`."""
        super().validate()
        for name, least in (("candidates", 4), ("noises", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for cost in self.costs:
            check_cost(cost, self.planner.learned)
        refuse(self.planner, ("cost", "frames", "repeats", "guidance", *OPTIMIZER), "diagnose does not use it")


AgentName = Literal[
    "random", "straight", "policy", "ranked", "guided", "world",
    "engine", "world_distance", "engine_distance", "graph", "expert",
]  # fmt: skip
LEARNING = ("random", "straight", "policy", "ranked", "guided", "graph")
"""Agents that need a goal network."""


@dataclass(kw_only=True)
class EpisodesConfig:
    """Episodes of the closed loop."""

    file: str
    """JSON file to write."""
    map: str = "my_way_home"
    """Name of a Doom map."""
    distances: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """Metres along free space from start to goal; each is a stratum."""
    count: int = 100
    """Episodes of each distance with the goal's location in view at the start, and as many without."""
    seed: NotNegative[int] = 0
    """Seed of the episodes."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        if self.count < 1:
            raise UserError(f"count is {self.count}, expected at least 1")
        if not self.distances or min(self.distances) < 1:
            raise UserError(f"distances is {self.distances}, expected numbers of at least 1")


@dataclass(kw_only=True)
class ActConfig(OutputOptions, TextOptions, DataOptions, CheckpointOptions):
    """The closed loop: agents, episodes, and how plans are made."""

    split: str = "train"
    """Split whose motions the candidates resemble, and whose frames form the graph."""
    episodes: str
    """JSON file written by `python -m cdit.plan episodes`."""
    agents: list[AgentName] = field(
        default_factory=lambda: ["random", "straight", "policy", "ranked", "world", "expert"]
    )
    """Agents to run. random: random candidates; straight: straight ahead; policy: inverse dynamics; ranked: its
    proposals, ranked by the world; guided: planned with the world near its proposals; world: planned with the world;
    engine: planned with the engine as a perfect world, by the same cost; world_distance, engine_distance: planned by
    the true distance, with motions as commanded or as the engine executes them; graph: planned with the world from one
    remembered frame to the next; expert: the shortest path on the map."""
    planner: PlannerConfig = field(default_factory=lambda: PlannerConfig(knots=1, frames=[1, 2, 4, 8]))
    """How plans are made. With planner.learned, which random, straight, policy, ranked, guided and graph need, agents
    also stop when it predicts that the goal is reached."""
    horizon: int = 8
    """Steps of a plan."""
    execute: int = 4
    """Steps that are executed before the next plan."""
    arrived: float = 0.7
    """Agents stop above this probability of having arrived, which planner.learned predicts."""
    most: int | None = None
    """Largest number of episodes per stratum; by default all."""
    radius: float = 0.5
    """Metres within which a goal is reached."""
    degrees: float = 30.0
    """Degrees within which a goal is reached."""
    avoid: list[float] = field(default_factory=list)
    """A rectangle of the map that no plan may cross, x1, y1, x2, y2 in metres."""
    graph_frames: int = 1500
    """Approximate number of frames in the graph."""
    videos: int = 2
    """Videos per agent and stratum."""
    seed: NotNegative[int] = 0
    """Seed of candidates and noise."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        self.planner.validate(self.horizon)
        self.planner.validate_last(self.horizon)
        for name in self.agents:
            if self.planner.learned is None and name in LEARNING:
                raise UserError(f"planner.learned: expected the folder of a goal network, which the agent {name} needs")
        if not 1 <= self.execute <= self.horizon:
            raise UserError(f"execute is {self.execute}, expected 1 to {self.horizon}")
        if self.avoid and (len(self.avoid) != 4 or self.avoid[0] >= self.avoid[2] or self.avoid[1] >= self.avoid[3]):
            raise UserError(f"avoid is {self.avoid}, expected x1, y1, x2, y2 with x1 < x2 and y1 < y2")
