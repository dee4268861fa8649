"""Quality against time: curves whose times to a level are known in closed form."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cdit.common.errors import UserError
from cdit.studies.config import CurveConfig
from cdit.studies.curve import Point, Reached, common_level, draw_curves, points_of, reach
from cdit.studies.history import History

PROBE = {"samples": 4, "final_samples": 4, "offsets": [1, 4]}


def run_of(
    folder: Path, rate: float, lpips: dict[int, float], finished: bool = True, steps: int | None = None, **probe: int
) -> str:
    """A run of so many steps a second with these values of LPIPS by step, at one frame ahead; PSNR is 10 of them."""
    folder.mkdir()
    config = {"batch_size": 2, "data": {"goals": 2}, "log_every": 10, "probe": PROBE | probe}
    config |= {"steps": steps or max(lpips), "stop_at": None, "train_seconds": None, "stop_at_seconds": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for step in range(10, max(lpips) + 10, 10):
        rows.append({"step": step, "train/samples_per_second": 4 * rate})
        if step in lpips:
            values = {"lpips": lpips[step], "psnr": 10 / lpips[step]}
            row = {
                f"probe/{metric}/{method}/{ahead}_frames": value * (0.5 if method == "copy_last" else 1) * ahead
                for metric, value in values.items()
                for method in ("model", "copy_last")
                for ahead in (1, 4)
            }
            rows.append({"step": step, **row})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "last").mkdir()
        (folder / "last" / "world_model.json").write_text("{}")
    return str(folder)


def test_a_level_is_reached_between_two_points():
    falling = [Point(10, 0.8), Point(20, 0.6), Point(40, 0.2)]
    assert reach(falling, 0.6, higher=False) == Reached(20, False)
    assert reach(falling, 0.5, higher=False).seconds == pytest.approx(25)
    assert reach(falling, 0.9, higher=False) == Reached(10, True)
    assert reach(falling, 0.1, higher=False) is None
    rising = [Point(seconds, -value) for seconds, value in falling]
    assert reach(rising, -0.5, higher=True).seconds == pytest.approx(25)
    noisy = [Point(10, 0.8), Point(20, 0.4), Point(30, 0.6), Point(40, 0.3)]
    assert reach(noisy, 0.4, higher=False) == Reached(20, False)


def test_the_level_is_the_best_that_both_reach():
    one, other = [Point(1, 0.5), Point(2, 0.3), Point(3, 0.35)], [Point(1, 0.4), Point(2, 0.1)]
    assert common_level(one, other, higher=False) == common_level(other, one, higher=False) == 0.3
    assert common_level(one, other, higher=True) == 0.4


def test_points_are_those_of_all_runs_by_time(tmp_path: Path):
    name = "probe/lpips/model/1_frames"
    short = History(run_of(tmp_path / "short", 1.0, {20: 0.5, 40: 0.4}))
    long = History(run_of(tmp_path / "long", 2.0, {60: 0.45, 120: 0.3}))
    assert points_of([long, short], name, "probes") == [(20, 0.5), (30, 0.45), (40, 0.4), (60, 0.3)]
    assert points_of([long, short], name, "final") == [(40, 0.4), (60, 0.3)]
    # A last probe of other windows is left out, unless the run goes on.
    other = History(run_of(tmp_path / "other", 1.0, {20: 0.5, 40: 0.4}, final_samples=9))
    assert points_of([other], name, "probes") == [(20, 0.5)]
    going = History(run_of(tmp_path / "going", 1.0, {20: 0.5, 40: 0.4}, finished=False, final_samples=9))
    assert points_of([going], name, "probes") == [(20, 0.5), (40, 0.4)]
    stopped = History(run_of(tmp_path / "stopped", 1.0, {20: 0.5, 40: 0.4}, steps=80, final_samples=9))
    assert points_of([stopped], name, "probes") == [(20, 0.5), (40, 0.4)]


def test_the_last_frame_is_measured_on_the_windows_of_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture):
    a, b = (run_of(tmp_path / name, 1.0, {20: 0.5, 40: 0.4, 60: 0.123}, final_samples=9) for name in "ab")
    draw_curves(CurveConfig(curves={"a": [a], "b": [b]}, metrics=["lpips"], frames=[1], out=str(tmp_path / "out")))
    text = capsys.readouterr().out
    assert "0.200" in text  # half of what the model has at step 40
    assert "0.061" not in text
    assert "0.062" not in text


@pytest.mark.parametrize(
    ("options", "finished"),
    [({}, True), ({"stop_at_seconds": 9.0}, True), ({"stop_at_seconds": 4.0}, False), ({"stop_at": 20}, False)],
)
def test_a_run_of_a_given_time_is_finished_unless_it_was_stopped(tmp_path: Path, options: dict, finished: bool):
    run = Path(run_of(tmp_path / "run", 1.0, {20: 0.5}))
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"steps": 1000, "train_seconds": 9.0} | options
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert History(run).is_finished == finished


@pytest.mark.parametrize("points", ["probes", "final"])
def test_a_recipe_that_learns_four_times_as_fast(tmp_path: Path, points: str, capsys: pytest.CaptureFixture):
    """LPIPS is 1 / (1 + t) and 1 / (1 + 4t) of the minutes t; curves are piecewise linear between probes."""
    minutes = (1, 2, 4, 8, 16)
    runs = {
        name: [
            run_of(tmp_path / f"{name}{i}", 1.0, {60 * t: 1 / (1 + speed * t) for t in times})
            for i, times in enumerate([[t] for t in minutes] if points == "final" else [minutes])
        ]
        for name, speed in (("old", 1), ("new", 4))
    }
    draw_curves(CurveConfig(curves=runs, points=points, out=str(tmp_path / "out")))
    text = (tmp_path / "out" / "curve.md").read_text()
    assert text in capsys.readouterr().out
    assert "| LPIPS, 1 frame ahead | 0.029 | 0.059 | new | 16.0 min | 4.0 min | 4.0 |" in text
    assert "| PSNR, 4 frames ahead | 340.00 | 680.00 | new | 16.0 min | 4.0 min | 4.0 |" in text
    assert Image.open(tmp_path / "out" / "curve.png").size[0] > 500


def test_a_first_point_that_is_better_bounds_the_factor(tmp_path: Path):
    old = run_of(tmp_path / "old", 1.0, {60: 0.5, 120: 0.4})
    new = run_of(tmp_path / "new", 1.0, {60: 0.3, 120: 0.2})
    draw_curves(CurveConfig(curves={"old": [old], "new": [new]}, frames=[1], out=str(tmp_path / "out")))
    assert "| new | 2.0 min | ≤ 1.0 min | at least 2.0 |" in (tmp_path / "out" / "curve.md").read_text()
    config = CurveConfig(curves={"old": [old], "new": [new]}, reference="new", frames=[1], out=str(tmp_path / "out"))
    draw_curves(config)
    assert "| old | ≤ 1.0 min | 2.0 min | at most 0.5 |" in (tmp_path / "out" / "curve.md").read_text()


def test_runs_without_a_decoder_are_compared_by_what_their_probes_measure(tmp_path: Path):
    runs = {name: [run_of(tmp_path / name, 1.0, {60: first, 120: 0.4})] for name, first in (("a", 0.5), ("b", 0.4))}
    for (run,) in runs.values():
        path = Path(run) / "metrics.jsonl"
        path.write_text(path.read_text().replace("psnr", "rank").replace("lpips", "latents"))
    with pytest.raises(UserError, match="no probe/lpips"):
        draw_curves(CurveConfig(curves=runs, out=str(tmp_path / "out")))
    draw_curves(CurveConfig(curves=runs, metrics=["latents", "rank"], frames=[1], out=str(tmp_path / "out")))
    text = (tmp_path / "out" / "curve.md").read_text()
    rest = "b | 2.0 min | ≤ 1.0 min | at least 2.0 |"
    assert f"| Latent MSE, 1 frame ahead | 0.200 | 0.400 | {rest}" in text
    assert f"| Rank of the truth, 1 frame ahead | 12.500 | 25.000 | {rest}" in text


def test_what_cannot_be_drawn(tmp_path: Path):
    run, out = run_of(tmp_path / "run", 1.0, {60: 0.5}), str(tmp_path / "out")
    with pytest.raises(UserError, match="curves is"):
        draw_curves(CurveConfig(curves={}, out=out))
    with pytest.raises(UserError, match="reference is 'b', expected one of a"):
        draw_curves(CurveConfig(curves={"a": [run]}, reference="b", out=out))
    with pytest.raises(UserError, match="no probe/lpips/model/3_frames yet"):
        draw_curves(CurveConfig(curves={"a": [run]}, frames=[3], out=out))
    assert not Path(out).exists()
