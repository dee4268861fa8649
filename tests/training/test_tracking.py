import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from cdit.training.checkpoints import RunState
from cdit.training.config import TrainConfig
from cdit.training.tracking import Tracker


def wandb_run(run: Path) -> Path:
    (folder,) = run.glob("wandb/offline-run-*")
    return folder


@pytest.mark.slow
def test_without_a_login_the_run_is_kept_offline(
    offline: tuple[subprocess.CompletedProcess, Path], home: Path, environment: dict[str, str]
):
    """Nothing is asked, and one line says how to see it."""
    done, run = offline
    assert "WANDB_API_KEY" not in environment
    said = done.stdout + done.stderr
    lines = [line for line in re.split(r"[\n\r]", said) if "wandb" in line.lower() or "W&B" in line]
    assert len(lines) == 1, lines
    folder = re.search(r"wandb sync ([^`]+)`", lines[0]).group(1)
    assert (home / folder).resolve() == wandb_run(run).resolve()  # as seen from where it was started
    assert list(wandb_run(run).glob("*.wandb"))
    assert "?" not in said.replace("?it/s", "").replace("?, ", "").replace("<?", "")
    assert not (home / "wandb").exists()


@pytest.mark.slow
def test_the_tracker_gets_the_pictures_of_the_folder(offline: tuple[subprocess.CompletedProcess, Path]):
    run = offline[1]
    media, probes = wandb_run(run) / "files" / "media", run / "probes"
    shown = {picture: np.asarray(Image.open(picture).convert("RGB")) for picture in (media / "images").rglob("*.png")}
    pictures = [*probes.rglob("predictions.png"), *probes.rglob("rollout_*.png"), *probes.rglob("attention/*.png")]
    assert len(pictures) == len(shown)
    for name in ("predictions", "rollout_0", "layer01_t0.5_sample0", "types", "measures_entropy"):
        assert sum(picture.stem == name for picture in pictures) == 3  # steps
    for picture in pictures:
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert any(np.array_equal(pixels, other) for other in shown.values()), picture
    videos = {path.read_bytes() for path in (media / "videos").rglob("*.mp4")}
    assert videos == {path.read_bytes() for path in probes.rglob("*.mp4")}
    assert len(videos) == 3
    pages = {path.read_bytes() for path in (media / "html").rglob("*.html")}
    assert pages == {path.read_bytes() for path in probes.rglob("attention/index.html")}
    assert len(pages) == 3
    tables = [json.loads(path.read_text()) for path in (media / "table").rglob("horizons*.table.json")]
    assert len(tables) == 3
    assert {row[0] for table in tables for row in table["data"]} >= {"model", "copy_last"}


def test_no_tracker_leaves_no_trace(straight: Path):
    names = {path.name for path in straight.iterdir()}
    assert names == {"best", "last", "checkpoints", "probes", "config.yaml", "metrics.jsonl"}


def test_metrics_are_rows_of_their_step(straight: Path):
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert set(training[0]) == {"step"} | {
        f"train/{name}"
        for name in ("loss", "gradient_norm", "learning_rate", "samples_per_second", "bad_steps", "skipped_samples")
    }
    assert [row["step"] for row in rows if "validation/loss" in row] == [2, 4, 6]
    assert len({row["train/loss"] for row in training}) == 6


@pytest.fixture
def track(config: Callable[..., TrainConfig], accelerator: Accelerator) -> Callable[[int], Tracker]:
    settings = config()
    settings.folder.mkdir(parents=True)
    return lambda rows: Tracker(accelerator, settings, RunState(step=rows, rows=rows))


def test_rows_after_the_checkpoint_are_written_anew(track: Callable[[int], Tracker]):
    """Also those of its own step, such as a validation's, that came after it."""
    tracker = track(0)
    for step in (1, 2, 2, 2, 3):
        tracker.log({"value": 10.0 * step}, step)
    assert tracker.rows == 5
    again = track(3)
    assert again.rows == 3
    again.log({"value": -1.0}, 2)
    assert again.rows == 4
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [(row["step"], row["value"]) for row in rows] == [(1, 10.0), (2, 20.0), (2, 20.0), (2, -1.0)]
    track(0)
    assert again.path.read_text() == ""


def test_a_row_cut_short_by_a_kill_is_dropped(track: Callable[[int], Tracker]):
    tracker = track(0)
    tracker.log({"value": 1.0}, 1)
    with tracker.path.open("a") as file:
        file.write('{"step": 2, "val')
    again = track(1)
    again.log({"value": 2.0}, 2)
    assert [json.loads(line)["value"] for line in again.path.read_text().splitlines()] == [1.0, 2.0]


def test_what_is_not_finite_is_null(track: Callable[[int], Tracker]):
    """JSON has no other word for it."""
    tracker = track(0)
    tracker.log({"a": float("inf"), "b": float("nan"), "c": 1.5}, 1)
    assert tracker.path.read_text() == '{"step": 1, "a": null, "b": null, "c": 1.5}\n'
