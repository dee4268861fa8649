"""What a person looks at during training: predicted frames, metrics beside baselines, rollouts, attention maps."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import wandb
from accelerate import Accelerator
from PIL import Image

from cdit.common.errors import UserError, writing
from cdit.common.pictures import comparison_grid, rollout_video, save_mp4, strip, to_float
from cdit.common.randomness import generator, seed_of
from cdit.data.loader import collate
from cdit.data.windows import WindowDataset
from cdit.evaluate.horizons import HorizonResult, evaluate_horizons
from cdit.evaluate.metrics import load_metrics
from cdit.evaluate.tables import markdown
from cdit.heads.probe import inspect_attention
from cdit.heads.recording import unwrap
from cdit.heads.truth import true_places
from cdit.loading import spread
from cdit.model import CDiT
from cdit.training.config import TrainConfig
from cdit.training.tracking import Tracker
from cdit.world_model import WorldModel


class Probes:
    """Samples, measures and draws, always from the same windows and noise. The main process does it all.

    Raises:
        UserError: no window reaches as far ahead as `probe.offsets` or `probe.rollout_frames` ask, or the network has
            no such layer or patch as `probe.attention` names.
    """

    def __init__(self, dataset: WindowDataset, cdit: CDiT, config: TrainConfig, accelerator: Accelerator):
        self.dataset, self.config, self.accelerator = dataset, config, accelerator
        self.seed = seed_of(config.seed, 1)
        self.windows = self._reaching(config.probe.offsets, "probe.offsets")
        self.paths = []
        if config.probe.rollouts and config.probe.rollout_frames:
            self.paths = self._reaching([config.probe.rollout_frames], "probe.rollout_frames")
        if config.probe.attention.samples:
            config.probe.attention.resolve(cdit, "probe.attention")  # here, before the training that a mistake costs
        self.metrics = {}
        if accelerator.is_main_process:
            self.metrics = load_metrics(accelerator.device, config.data.image_size)

    def run(self, world: WorldModel | None, tracker: Tracker, step: int, final: bool = False) -> None:
        """Probes the world model as it is; every process must call it.

        Args:
            world: its network holds the weights to look at, in evaluation mode; None where it is not the main process.
            tracker: where to show what is found, beside <run>/probes/<step>/.
            step: the training step.
            final: measure more samples, and print the table.
        """
        if self.accelerator.is_main_process:
            folder = self.config.folder / "probes" / f"step_{step:08d}"
            with writing(folder), self.accelerator.autocast():
                folder.mkdir(parents=True, exist_ok=True)
                self._predictions(world, tracker, step, final, folder)
                self._rollouts(world, tracker, step, folder)
                self._attention(world, tracker, step, folder)
        self.accelerator.wait_for_everyone()

    def _predictions(self, world: WorldModel, tracker: Tracker, step: int, final: bool, folder: Path) -> None:
        probe = self.config.probe
        windows = spread(self.windows, probe.final_samples if final else probe.samples)
        batch = collate([self.dataset.window(window, probe.offsets) for window in windows])
        result = evaluate_horizons(world, batch, self.metrics, self.seed)
        table = markdown(result.rows)
        (folder / "horizons.md").write_text(f"{len(windows)} test windows, step {step}\n\n{table}")
        tracker.log(_scalars(result), step)

        shown = torch.tensor(spread(list(range(len(windows))), probe.rows))
        horizons = [f"{offset / self.dataset.info.fps:+g} s" for offset in probe.offsets]
        grid = comparison_grid(batch["context"][shown], batch["target"][shown], result.predictions[shown], horizons)
        grid.save(folder / "predictions.png")
        rows = [[row.method, row.frames, row.seconds, row.metric, row.mean] for row in result.rows]
        tracker.show(
            lambda: {
                "probe/predictions": wandb.Image(grid, caption=f"test windows, step {step}"),
                "probe/horizons": wandb.Table(["method", "frames ahead", "seconds ahead", "metric", "mean"], rows),
            },
            step,
        )
        if final:
            tracker.print(f"\n{len(windows)} test windows, {self.config.sampler.steps} denoising steps:\n\n{table}")

    def _rollouts(self, world: WorldModel, tracker: Tracker, step: int, folder: Path) -> None:
        length, fps = self.config.probe.rollout_frames, self.dataset.info.fps
        if not self.paths:
            return
        batch = collate(
            [self.dataset.path(window, length) for window in spread(self.paths, self.config.probe.rollouts)]
        )
        device = self.accelerator.device
        prediction = world.rollout(
            to_float(batch["context"].to(device)),
            batch["action"].to(device)[:, None],
            context_mask=batch["context_mask"].to(device),
            action_mask=batch["action_mask"].to(device)[:, None],
            spacing=batch["spacing"],
            generator=generator(self.seed),
        )[:, 0].cpu()
        for i, (context, truth) in enumerate(zip(batch["context"], batch["target"], strict=True)):
            video, picture = folder / f"rollout_{i}.mp4", strip(context, truth, prediction[i], fps)
            save_mp4(rollout_video(context, truth, prediction[i], fps), video, fps)
            picture.save(folder / f"rollout_{i}.png")
            caption = f"autoregressive rollout {i}, step {step}"
            tracker.show(partial(_rollout_media, i, video, picture, caption), step)

    def _attention(self, world: WorldModel, tracker: Tracker, step: int, folder: Path) -> None:
        config, offsets = self.config.probe.attention, self.config.probe.offsets
        if not config.samples:
            return
        windows = spread(self.windows, config.samples)
        batch = collate([self.dataset.window(window, offsets) for window in windows])
        names = [self.dataset.trajectories[self.dataset.locate(window)[0]].name for window in windows]
        try:
            places = true_places(self.dataset, unwrap(world.cdit).grid, windows, offsets)
        except UserError:  # most datasets do not know them
            places = None
        report = inspect_attention(
            world, batch, config, self.seed, names, places, title=f"Attention of {self.config.name} at step {step}"
        )
        report.save(folder / "attention")
        tracker.log(report.scalars, step)
        tracker.show(lambda: report.to_wandb(folder / "attention"), step)

    def _reaching(self, offsets: list[int], field: str) -> list[int]:
        windows = self.dataset.windows_with(offsets)
        if not windows:
            raise UserError(
                f"{field} is {offsets}: no trajectory of split {self.config.data.test_split!r} is long enough for a "
                "full context and these frames"
            )
        return windows


def _rollout_media(number: int, video: Path, picture: Image.Image, caption: str) -> dict[str, Any]:
    return {
        f"probe/rollout_{number}": wandb.Video(str(video), caption=caption, format="mp4"),
        f"probe/rollout_strip_{number}": wandb.Image(picture, caption=caption),
    }


def _scalars(result: HorizonResult) -> dict[str, float]:
    return {f"probe/{row.metric}/{row.method}/{row.frames}_frames": row.mean for row in result.rows}
