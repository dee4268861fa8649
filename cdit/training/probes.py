"""Probes during training: predicted frames, metrics next to baselines, rollouts, attention maps."""

from functools import partial
from pathlib import Path
from typing import Any

import wandb
from accelerate import Accelerator
from torch import Tensor

from cdit.batch import Batch
from cdit.common.errors import UserError, writing
from cdit.common.randomness import seed_of
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import case_of
from cdit.evaluate.methods import METHODS
from cdit.evaluate.metrics import load_metrics
from cdit.evaluate.page import describe_samples, draw, draw_rollouts
from cdit.evaluate.protocols import Direct, Protocol, Rollout
from cdit.evaluate.results import ProtocolResult, summarize
from cdit.evaluate.study import Judge, Study, joined
from cdit.evaluate.tables import markdown
from cdit.heads.correspondence import true_places
from cdit.heads.inspection import inspect_attention
from cdit.loading import spread
from cdit.model import CDiT
from cdit.training.config import TrainConfig
from cdit.training.sharding import whole_world
from cdit.training.tracking import Tracker
from cdit.world_model import WorldModel

BATCH = 32
"""Windows predicted at a time; the noise depends on it."""


class Probes:
    """Samples, measures and draws, always from the same windows and noise, on the main process.

    Predictions are computed and measured by the engine of `python -m cdit.evaluate`.

    Raises:
        UserError: no window reaches as far ahead as `probe.offsets` or `probe.rollout_frames`, or `probe.attention`
            names a layer or patch that does not exist.
    """

    def __init__(self, dataset: WindowDataset, cdit: CDiT, config: TrainConfig, accelerator: Accelerator):
        self.dataset, self.config, self.accelerator = dataset, config, accelerator
        self.seed = seed_of(config.seed, 1)
        self.windows = self._reaching(config.probe.offsets, "probe.offsets")
        self.paths = []
        if config.probe.rollouts and config.probe.rollout_frames:
            self.paths = self._reaching([config.probe.rollout_frames], "probe.rollout_frames")
        if config.probe.attention.samples:
            config.probe.attention.resolve(cdit, "probe.attention")  # now, so that a mistake does not cost a training
        self.metrics = {}
        if accelerator.is_main_process:
            self.metrics = load_metrics(accelerator.device, config.data.image_size)

    def run(self, world: WorldModel, tracker: Tracker, step: int, final: bool = False) -> None:
        """Probes the world model, in evaluation mode, with its current weights; every process must call it.

        If `final`, more samples are measured and the table is printed.
        """
        if world := whole_world(world, self.accelerator):
            folder = self.config.folder / "probes" / f"step_{step:08d}"
            with writing(folder), self.accelerator.autocast():
                folder.mkdir(parents=True, exist_ok=True)
                self._predictions(world, tracker, step, final, folder)
                self._rollouts(world, tracker, step, folder)
                self._attention(world, tracker, step, folder)
        self.accelerator.wait_for_everyone()

    def _predictions(self, world: WorldModel, tracker: Tracker, step: int, final: bool, folder: Path) -> None:
        probe, fps = self.config.probe, self.dataset.info.fps
        windows = spread(self.windows, probe.final_samples if final else probe.samples)
        protocol = Direct("predictions", [offset / fps for offset in probe.offsets], fps, probe.offsets)
        study = self._study(protocol, windows, probe.rows, tuple(METHODS))
        judge = Judge(self.metrics) if world.codec.has_decoder else Judge.without_decoder(world.codec)
        found = self._compute(study, world, judge)
        result = summarize(protocol, study.cases, found, self.seed)
        text = f"{describe_samples(result)}\n\n{markdown(result.rows)}"
        (folder / "horizons.md").write_text(f"Step {step}: {text}")
        tracker.log(_scalars(result), step)
        ((caption, picture),) = draw(protocol, found, folder).items()
        columns = ["method", "frames ahead", "seconds ahead", "metric", "mean", "low", "high"]
        rows = [[row.method, row.frames, row.seconds, row.metric, row.mean, row.low, row.high] for row in result.rows]
        tracker.show(
            lambda: {
                "probe/predictions": wandb.Image(str(picture), caption=caption),
                "probe/horizons": wandb.Table(columns, rows),
            },
            step,
        )
        if final:
            tracker.print(f"\n{self.config.sampler.steps} denoising steps; {text}")

    def _rollouts(self, world: WorldModel, tracker: Tracker, step: int, folder: Path) -> None:
        length, fps = self.config.probe.rollout_frames, self.dataset.info.fps
        if not self.paths:
            return
        windows = spread(self.paths, self.config.probe.rollouts)
        protocol = Rollout("rollout", [length / fps], fps, list(range(1, length + 1)))
        study = self._study(protocol, windows, len(windows), ("model",))
        draw_rollouts(protocol, self._compute(study, world, Judge({})), folder)
        for i in range(len(windows)):
            tracker.show(partial(_rollout_media, i, folder, f"autoregressive rollout {i}, step {step}"), step)

    def _attention(self, world: WorldModel, tracker: Tracker, step: int, folder: Path) -> None:
        config, offsets = self.config.probe.attention, self.config.probe.offsets
        if not config.samples:
            return
        windows = spread(self.windows, config.samples)
        batch = Batch.collate([self.dataset.window(window, offsets) for window in windows])
        names = [self.dataset.trajectories[self.dataset.locate(window)[0]].name for window in windows]
        try:
            places = true_places(self.dataset, world.cdit.grid, windows, offsets)
        except UserError:  # unknown for most datasets
            places = None
        report = inspect_attention(
            world, batch, config, self.seed, names, places, title=f"Attention of {self.config.name} at step {step}"
        )
        report.save(folder / "attention")
        tracker.log(report.scalars, step)
        tracker.show(lambda: report.to_wandb(folder / "attention"), step)

    def _study(self, protocol: Protocol, windows: list[int], shown: int, methods: tuple[str, ...]) -> Study:
        return Study(protocol, [case_of(self.dataset, window) for window in windows], BATCH, shown, self.seed, methods)

    def _compute(self, study: Study, world: WorldModel, judge: Judge) -> dict[str, Tensor]:
        return joined([study.compute(batch, world, self.dataset, judge) for batch in range(len(study.batches))])

    def _reaching(self, offsets: list[int], field: str) -> list[int]:
        windows = self.dataset.windows_with(offsets)
        if not windows:
            raise UserError(
                f"{field} is {offsets}: no trajectory of split {self.config.data.test_split!r} is long enough for a "
                "full context and these frames"
            )
        return windows


def _rollout_media(number: int, folder: Path, caption: str) -> dict[str, Any]:
    file = folder / f"rollout_{number}"
    return {
        f"probe/rollout_{number}": wandb.Video(f"{file}.mp4", caption=caption, format="mp4"),
        f"probe/rollout_strip_{number}": wandb.Image(f"{file}.png", caption=caption),
    }


def _scalars(result: ProtocolResult) -> dict[str, float]:
    return {
        f"probe/{row.metric}/{row.method}/{row.frames}_frames": row.mean for row in result.rows if row.method in METHODS
    }
