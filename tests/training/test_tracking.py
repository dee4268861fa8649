import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from accelerate import Accelerator
from PIL import Image

from cdit.common.errors import UserError
from cdit.training.config import TrainConfig
from cdit.training.durable.checkpoints import RunState
from cdit.training.tracking import Tracker

sys.path.append(str(Path(__file__).parents[1] / "common"))
from wandb_server import WandbServer

TRAIN = Path(__file__).parents[2] / "train.py"
SPEED = "train/samples_per_second"


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
    printed = done.stdout + done.stderr
    lines = [line for line in re.split(r"[\n\r]", printed) if "wandb" in line.lower() or "W&B" in line]
    assert len(lines) == 1, lines
    folder = re.search(r"wandb sync ([^`]+)`", lines[0]).group(1)
    assert (home / folder).resolve() == wandb_run(run).resolve()  # as seen from where it was started
    assert list(wandb_run(run).glob("*.wandb"))
    assert "?" not in printed.replace("?it/s", "").replace("?, ", "").replace("<?", "")
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_or_cannot_be_written_to(
    config: Callable[..., TrainConfig], accelerator: Accelerator, small_disk: Path
):
    """One clear error, and the run that resumes has every row once."""
    settings = config("--output", str(small_disk))
    settings.folder.mkdir(parents=True)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(40000))

    def row(step: int) -> dict[str, float]:
        return {f"value_{i}": step + i / 7 for i in range(10)}

    def fill(tracker: Tracker) -> None:
        for step in range(tracker.rows + 1, 1000):
            tracker.log(row(step), step)

    tracker = Tracker(accelerator, settings, RunState())
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        fill(tracker)
    written = tracker.path.read_bytes()
    assert 10 < tracker.rows < 100
    assert written.count(b"\n") == tracker.rows
    assert not written.endswith(b"\n")  # the row that did not fit

    state = RunState(step=tracker.rows, rows=tracker.rows)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        Tracker(accelerator, settings, state)
    assert tracker.path.read_bytes() == written

    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl.*: cannot be written \(Read-only file system\)"):
        Tracker(accelerator, settings, state)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)

    again = Tracker(accelerator, settings, state)
    again.log(row(state.step + 1), state.step + 1)
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert rows == [{"step": step, **row(step)} for step in range(1, state.step + 2)]


def test_a_kill_while_rows_are_dropped_leaves_them(track: Callable[[int], Tracker], monkeypatch: pytest.MonkeyPatch):
    tracker = track(0)
    for step in (1, 2, 3):
        tracker.log({"value": 1.0}, step)
    before = tracker.path.read_bytes()

    def killed(*_: Any) -> None:
        assert tracker.path.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        track(1)
    assert tracker.path.read_bytes() == before


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl as W&B has them: one for each step."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {"_step": row["step"]}).update(row)
    return [{name: value for name, value in row.items() if name not in ("step", SPEED)} for row in steps.values()]


@pytest.mark.slow
def test_a_resumed_run_goes_on_at_the_server(
    launch: Callable[..., subprocess.CompletedProcess],
    tiny: Path,
    server: WandbServer,
    straight: Path,
    tmp_path: Path,
    rows: Callable[..., list[dict[str, float]]],
):
    """Also with what the server did not get of it: here, the rows of two steps."""
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    options = ("--config", tiny, "--output", tmp_path, "--tracking", "wandb")
    assert launch(TRAIN, *options, "--stop_at", "4", **online).returncode == 0
    (run,) = server.files
    del server.files[run]["wandb-history.jsonl"][2:], server.files[run]["wandb-summary.json"]
    assert launch(TRAIN, *options, "--resume", "auto", "--stop_at", "5", **online).returncode == 0
    assert list(server.files) == [run]
    shown = [{name: value for name, value in row.items() if name != SPEED} for row in server.rows(run)]
    assert shown == by_step([row for row in rows(straight) if row["step"] <= 5])


@pytest.mark.slow
def test_training_goes_on_without_its_process(
    launch: Callable[..., subprocess.CompletedProcess],
    tiny: Path,
    straight: Path,
    tmp_path: Path,
    rows: Callable[..., list[dict[str, float]]],
):
    """W&B's is killed as soon as there is a row; all rows and pictures are there, the same as without W&B."""
    metrics, killed = tmp_path / "tiny" / "metrics.jsonl", []

    def kill() -> None:
        while not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if process.name() == "wandb-core":
                process.kill()
                killed.append(process)

    threading.Thread(target=kill, daemon=True).start()
    done = launch(TRAIN, "--config", tiny, "--output", tmp_path, "--tracking", "wandb")
    assert killed
    assert done.returncode == 0, done.stderr
    assert len(re.findall("warning: W&B failed", done.stderr)) == 1
    assert "Traceback" not in done.stderr
    # The other run is one of another process, whose libraries may sum in another order.
    assert rows(tmp_path / "tiny") == [pytest.approx(row, rel=1e-3) for row in rows(straight)]
    pictures = sorted(path.relative_to(straight) for path in (straight / "probes").rglob("*"))
    assert sorted(path.relative_to(tmp_path / "tiny") for path in (tmp_path / "tiny" / "probes").rglob("*")) == pictures
