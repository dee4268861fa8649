import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from cdit.common.errors import UserError
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import spread_cases
from cdit.evaluate.metrics import psnr
from cdit.evaluate.protocols import direct
from cdit.evaluate.study import Judge, Study
from cdit.training.config import TrainConfig
from cdit.training.probes import Probes
from cdit.world_model import WorldModel


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_probe_leaves_its_pictures(offline: tuple[subprocess.CompletedProcess, Path]):
    probes = offline[1] / "probes"
    assert sorted(p.name for p in probes.iterdir()) == [f"step_{step:08d}" for step in (2, 4, 6)]
    for folder in probes.iterdir():
        found = files(folder)
        assert {"predictions.png", "horizons.md", "rollout_0.mp4", "rollout_0.png"} <= found
        assert "attention/layer01_t0.5_sample0.png" in found
        for picture in folder.rglob("*.png"):
            assert np.asarray(Image.open(picture).convert("RGB")).std() > 5  # something is drawn


@pytest.mark.slow
def test_a_rollout_shows_past_and_future(offline: tuple[subprocess.CompletedProcess, Path]):
    with av.open(str(offline[1] / "probes/step_00000006/rollout_0.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 5
        assert len(list(video.decode(stream))) == 3 + 3  # context_frames + rollout_frames


@pytest.mark.slow
def test_the_table_says_what_was_measured(
    offline: tuple[subprocess.CompletedProcess, Path], rows: Callable[..., list[dict[str, float]]]
):
    """Three windows on the way and four at the end; the numbers of metrics.jsonl, two horizons at 5 frames a second."""
    done, run = offline
    for step, windows in {2: 3, 4: 3, 6: 4}.items():
        text = (run / f"probes/step_{step:08d}/horizons.md").read_text()
        assert text.startswith(f"Step {step}: {windows} samples of 2 trajectories")
        logged = next(row for row in rows(run, "probe/psnr/model/1_frames") if row["step"] == step)
        for method, label in {"model": "model", "copy_last": "last context frame"}.items():
            line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
            shown = [float(number) for number in re.findall(r"(\d+\.\d+) ±", line)]
            expected = [logged[f"probe/psnr/{method}/{frames}_frames"] for frames in (1, 2)]
            assert shown == pytest.approx(expected, abs=0.006)
    assert "| PSNR ↑ | 0.2 s | 0.4 s |" in text
    assert text.partition(": ")[2].strip() in done.stdout  # the last one is printed, too


@pytest.mark.slow
def test_the_copied_frame_scores_what_it_should(
    offline: tuple[subprocess.CompletedProcess, Path],
    test_set: WindowDataset,
    rows: Callable[..., list[dict[str, float]]],
):
    """The baseline needs no model: over windows of full context, evenly spread, it can be computed by hand."""
    windows = [
        (trajectory, now)
        for trajectory, length in enumerate((13, 11))
        for now in range(2, length - 2)  # two frames before for the context, two after for the goals
    ]
    chosen = [windows[round((i + 0.5) * len(windows) / 4 - 0.5)] for i in range(4)]
    last = rows(offline[1], "probe/psnr/model/1_frames")[-1]
    for ahead in (1, 2):
        scores = []
        for trajectory, now in chosen:
            a, b = test_set.frames.read(trajectory, [now, now + ahead]).double().unbind()
            scores.append(10 * np.log10(255**2 / (a - b).square().mean().item()))
        assert last[f"probe/psnr/copy_last/{ahead}_frames"] == pytest.approx(np.mean(scores), rel=1e-4)


def test_a_probe_measures_what_an_evaluation_does(
    config: Callable[..., TrainConfig],
    test_set: WindowDataset,
    world: WorldModel,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
):
    """Frames of 8 bits, and the actions of another trajectory, not only of another window."""
    monkeypatch.setattr("cdit.training.probes.load_metrics", lambda *_: {"psnr": psnr})
    tracker = Recorder()
    probes = Probes(test_set, world.cdit, config("--probe.offsets", "[1, 2]"), accelerator)
    probes.run(world, tracker, 1)
    protocol = direct([1 / test_set.info.fps, 2 / test_set.info.fps], test_set.info.fps)
    cases = spread_cases(test_set, 2, probes.config.probe.samples, "")
    study = Study(replace(protocol, name="predictions"), cases, batch_size=32, pictures=0, seed=probes.seed)
    found = study.compute(0, world, test_set, Judge({"psnr": psnr}))
    for method in ("model", "copy_last", "shuffled_actions"):
        for i, frames in enumerate((1, 2)):
            logged = tracker.values[f"probe/psnr/{method}/{frames}_frames"]
            assert logged == pytest.approx(float(found[f"{method}/psnr"][:, i].mean()))


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        (["--probe.rollout_frames", "0", "--probe.attention.samples", "0"], ["rollout_0.mp4", "attention"]),
        (["--probe.rollouts", "0"], ["rollout_0.mp4"]),
    ],
)
def test_probes_that_are_not_wanted(train: Callable[..., Path], tmp_path: Path, options: list[str], absent: list[str]):
    run = train(tmp_path, "--steps", "1", *options)
    names = {path.name for path in (run / "probes/step_00000001").iterdir()}
    assert "predictions.png" in names
    assert not names & set(absent)
    assert ("attention" in names) is ("attention" not in absent)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--probe.offsets", "[1, 40]"], r"probe\.offsets is \[1, 40\].*'test'"),
        (["--probe.offsets", "[-40]"], r"probe\.offsets is \[-40\]"),
        (["--probe.rollout_frames", "40"], r"probe\.rollout_frames"),
        (["--probe.attention.layers", "[0, 2]"], r"probe\.attention\.layers"),
        (["--probe.attention.times", "[1.0]"], r"probe\.attention\.times"),
        (["--probe.attention.patch", "[0, 4]"], r"probe\.attention\.patch.*4 × 4"),
    ],
)
def test_what_cannot_be_probed_is_named_at_the_start(
    config: Callable[..., TrainConfig],
    test_set: WindowDataset,
    world: WorldModel,
    accelerator: Accelerator,
    options: list[str],
    field: str,
):
    with pytest.raises(UserError, match=field):
        Probes(test_set, world.cdit, config(*options), accelerator)


class Recorder:
    """A tracker that keeps the names that it is given."""

    def __init__(self):
        self.logged, self.shown, self.values = [], [], {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged += metrics
        self.values |= metrics

    def show(self, media: Callable[[], dict[str, object]], step: int) -> None:
        self.shown += media()

    def print(self, text: str) -> None:
        """Not used."""


def test_nothing_is_tracked_twice(
    config: Callable[..., TrainConfig],
    test_set: WindowDataset,
    world: WorldModel,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("cdit.training.probes.load_metrics", lambda *_: {"psnr": psnr})
    tracker = Recorder()
    Probes(test_set, world.cdit, config(), accelerator).run(world, tracker, 1)
    names = tracker.logged + tracker.shown
    assert len(set(names)) == len(names)
    assert any(name.startswith("attention/") for name in tracker.logged)
    assert any(name.startswith("attention/") for name in tracker.shown)


def test_metrics_are_those_that_the_frames_are_large_enough_for(
    config: Callable[..., TrainConfig],
    test_set: WindowDataset,
    world: WorldModel,
    accelerator: Accelerator,
    capsys: pytest.CaptureFixture[str],
):
    settings = config("--data.image_size", "[24, 64]")
    probes = Probes(test_set, world.cdit, settings, accelerator)
    assert set(probes.metrics) == {"psnr", "ssim"}
    assert capsys.readouterr().err == "left out for frames of 24×64 pixels: LPIPS needs 32 a side\n"


def test_a_rollout_without_poses_is_told_no_actions(
    config: Callable[..., TrainConfig], world: WorldModel, test_set: WindowDataset, accelerator: Accelerator,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """An unknown action is not a known one of zero, which would say that the camera stands still."""
    told = []
    rollout = world.rollout

    def spy(context, condition, **options):
        told.append(condition.known)
        return rollout(context, condition, **options)

    monkeypatch.setattr(world, "rollout", spy)
    shown = SimpleNamespace(show=lambda media, step: None)
    probes = Probes(test_set, world.cdit, config(), accelerator)
    probes._rollouts(world, shown, 1, tmp_path)
    test_set.trajectories = [replace(trajectory, position=None, yaw=None) for trajectory in test_set.trajectories]
    probes._rollouts(world, shown, 1, tmp_path)
    assert told[0].all()
    assert not told[1].any()
    assert (tmp_path / "rollout_0.mp4").is_file()
