"""The options of sample.py. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.errors import UserError
from cdit.common.limits import NotNegative, Positive
from cdit.common.options import CheckpointOptions, DataOptions, OutputOptions, TextOptions, check_options
from cdit.diffusion.config import SamplerOptions
from cdit.heads.config import AttentionConfig
from cdit.worlds import starts_of


@dataclass(kw_only=True)
class SampleConfig(TextOptions, DataOptions, OutputOptions, CheckpointOptions):
    """What to sample, and from what."""

    data: str | None = None
    """The dataset folder: contexts come from it, and the truth is shown beside the predictions. By default, if actions
    are given, the frames to start from that ship with the world."""
    image: str | None = None
    """An image file as the only past frame, instead of a dataset; needs actions."""
    history: Literal["auto", "missing", "still"] = "auto"
    """With image, the frames before it: missing, or the same view with the camera standing still. By default missing
    for a model that was trained with data.min_history 1, otherwise still."""
    samples: Positive[int] = 4
    """Number of samples: contexts spread over the split, or futures of the image that differ in their noise."""
    length: Positive[int] = 16
    """Number of frames to predict; if actions are given, one frame is predicted for each."""
    actions: str | None = None
    """Actions to take instead of the recorded ones, one per frame: words such as forward*8,turn_left*4, or a file.
    Words: forward, back, left, right, which take metres, as in forward(0.5) (by default the spacing of the dataset or
    model); turn_left, turn_right, which take degrees, as in turn_left(30) (by default 15); stay. forward+turn_left(5)*8
    does both at once. Files: .csv, .json or .npy with rows dx, dy, dyaw in metres and radians (x forward, y left, yaw
    counter-clockwise). If the model's actions are other numbers: their names, as in arm(0.3)+grip(1)*8, or a file with
    a column for each."""
    horizons: list[Positive[int]] = field(default_factory=lambda: [1, 2, 4, 8])
    """Frames ahead to predict in one jump, up to the length. Best within the offsets that the model was trained on
    (data.max_offset)."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""
    fps: Positive[float] | None = None
    """Frame rate of the videos; by default the model's, which is real time."""
    attention: bool = False
    """Also write what each head attends to while the first frame is denoised, to OUT/attention (see cdit.heads)."""
    inspect: AttentionConfig = field(default_factory=AttentionConfig)
    """With attention: what to inspect."""
    compile: bool = False
    """Compile the network: slow to start, faster for many samples."""
    seed: NotNegative[int] = 0
    """Seed of the noise; the same seed gives the same pictures."""

    def __post_init__(self) -> None:
        if self.data is None and self.image is None and self.actions is not None:
            self.data = starts_of(self.checkpoint)

    def check(self) -> None:
        """Finds mistakes before anything is loaded.

        Raises:
            UserError: naming the option.
        """
        if (self.data is None) == (self.image is None):
            raise UserError(
                "give either data, a dataset folder, or image, an image file; worlds that ship with start frames"
                " need only actions"
            )
        if self.image is not None and self.actions is None:
            raise UserError('an image has no recorded actions: give actions, such as --actions "forward*8"')
        if self.image is None and self.history != "auto":
            raise UserError("history is an option of image; a dataset has its own past frames")
        if self.attention and self.inspect.samples < 1:
            raise UserError(f"inspect.samples is {self.inspect.samples}, expected at least 1")
        check_options(self)
