"""`python -m cdit.heads` on tiny worlds: a dataset, one recorded in Doom's way, a published checkpoint, images."""

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("doom", "nwm")]
from published import TINY, published, write_checkpoint  # noqa: E402
from rooms import two_rooms  # noqa: E402

from cdit.codec import PixelCodec  # noqa: E402
from cdit.common.cli import run  # noqa: E402
from cdit.common.errors import UserError  # noqa: E402
from cdit.common.statistics import Estimate  # noqa: E402
from cdit.data.actions import parse_actions  # noqa: E402
from cdit.data.layout import Camera, DatasetInfo, write_split, write_trajectory  # noqa: E402
from cdit.data.motion import compose  # noqa: E402
from cdit.diffusion import SamplerConfig  # noqa: E402
from cdit.heads.__main__ import main  # noqa: E402
from cdit.heads.importance import Head, Importance, PruningCurve  # noqa: E402
from cdit.heads.inspection import initial  # noqa: E402
from cdit.heads.report import importance_section  # noqa: E402
from cdit.heads.sources import images_source  # noqa: E402
from cdit.model import CDiT  # noqa: E402
from cdit.world_model import WorldDescription, WorldModel  # noqa: E402

SIDE, FPS = 32, 4.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny world, three walks, the same walks on a map of Doom, and eight images."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    cdit = CDiT((SIDE, SIDE), max_context=3, patch_size=8, hidden_size=16, depth=2, num_heads=2)
    for parameter in cdit.parameters():
        nn.init.normal_(parameter, std=0.2)
    WorldModel(cdit, PixelCodec(), WorldDescription((SIDE, SIDE), FPS, sampler=SamplerConfig(steps=2))).save_pretrained(
        place / "world" / "best"
    )
    random = np.random.default_rng(0)
    camera = Camera(SIDE, SIDE, 2 * math.atan(0.75), eye_height=1.5)
    for name in ("walks", "doom"):
        for i in range(3):
            frames = random.integers(256, size=(9, SIDE, SIDE, 3), dtype=np.uint8)
            position = np.stack((2 + 0.4 * np.arange(9), np.full(9, 3.0 + i)), axis=1)
            write_trajectory(place / name, f"hall_{i:04}", frames, position, 0.05 * np.arange(9))
        write_split(place / name, "test", [f"hall_{i:04}" for i in range(3)])
        DatasetInfo(name, fps=FPS, metric_waypoint_spacing=0.4, camera=camera).save(place / name)
    two_rooms((0, 4), (0.5, 4)).save(place / "doom" / "maps" / "hall.npz")
    (place / "images").mkdir()
    for i in range(8):  # 10 comes after 9
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(place / "images" / f"view{i + 5}.png")
    (place / "images" / "notes.txt").write_text("no image")
    return place


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def inspect(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., Done]:
    """Runs the command in this process; results go to the folder "out" of a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)

    def call(*options: str | Path, checkpoint: str | Path = place / "world", tracking: str = "none") -> Done:
        always = ["--checkpoint", checkpoint, "--out", "out", "--tracking", tracking, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["inspect", *map(str, [*always, *options])])
        try:
            run(main)
        except SystemExit as end:
            return Done(end.code, *capsys.readouterr())
        return Done(0, *capsys.readouterr())

    return call


def rows() -> list[dict[str, str]]:
    with Path("out/table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def page() -> dict:
    return json.loads(re.search(r'type="application/json">(.*?)</script>', Path("out/index.html").read_text())[1])


def test_a_dataset_without_true_places(inspect, place):
    done = inspect("--data", place / "walks", "--samples", "5", "--drawn", "2", "--offsets", "[1, 3]")
    assert done.code == 0, done.err
    summary = Path("out/summary.md").read_text()
    assert summary in done.out
    assert "5 samples of 3 trajectories, 2 goals each, diffusion times 0.25, 0.75" in summary
    assert "True places are unknown: " in summary
    assert "untrained" not in summary
    table = rows()
    assert [(row["kind"], row["layer"], row["time"], row["head"]) for row in table] == [
        (kind, layer, time, head)
        for kind in ("cross", "self") for layer in "01" for time in ("0.25", "0.75") for head in "01"
    ]  # fmt: skip
    shown = page()
    assert [sample["name"] for sample in shown["samples"]] == [
        f"sample {i}, goal {goal}" for i in (0, 1) for goal in ("+0.25 s", "+0.75 s")
    ]
    assert all(sample["prediction"] for sample in shown["samples"])
    cross = [row for row in table if row["kind"] == "cross"]
    for line, row in zip(shown["table"], cross, strict=True):
        assert (str(line["layer"]), str(line["head"]), line["type"]) == (row["layer"], row["head"], row["type"])
        for name, value in line["measures"].items():
            assert row[name] in ("", "nan") if value is None else float(row[name]) == value
    counted = re.search(r"\| 1 \| (.*?) \| (.*?) \|", summary)
    for cell, time in zip(counted.groups(), ("0.25", "0.75"), strict=True):
        types = [row["type"] for row in cross if (row["layer"], row["time"]) == ("1", time)]
        assert set(cell.split(", ")) == {f"{types.count(name)} {name}" for name in types}
    pictures = {file.name for file in Path("out").glob("*.png")}
    assert {"types.png", "self_types.png", "layer01_t0.75_sample1.png", "self_layer00_t0.25_sample0.png"} <= pictures


def test_a_dataset_of_doom_knows_true_places(inspect, place):
    done = inspect("--data", place / "doom", "--samples", "6", "--offsets", "[1, 4]", "--kinds", "[cross]")
    assert done.code == 0, done.err
    _, _, section = Path("out/summary.md").read_text().partition("## Do heads attend")
    table, _, by_row = section.partition("Accuracy by row")
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ")]
    assert [re.sub(r" \(.*", "", name) for name in names[2:]] == [
        *("best head", "untrained, best head", "mean of all heads", "untrained, mean of all heads"),
        *("same place", "uniform"),
    ]
    rows_of_patches = [line.split(" | ")[0].strip("| ") for line in by_row.splitlines() if line.startswith("| ")]
    assert rows_of_patches[2:] == ["0", "1", "2", "3", "all"]
    assert Image.open("out/accuracy_by_patch.png").size[0] > 100
    assert all(float(row["correspondence lift"]) > 0 for row in rows())
    places = [place for patch in page()["samples"][0]["correspondence"] for place in patch]
    assert any(place is not None for place in places)
    assert all(0 <= x <= 4 for place in places if place for x in place)

    done = inspect("--data", place / "doom", "--kinds", "[cross]", "--offsets", "[1]", "--untrained", "false")
    assert done.code == 0, done.err
    assert "untrained" not in Path("out/summary.md").read_text()


def test_which_heads_are_needed(inspect, place):
    done = inspect("--data", place / "walks", "--samples", "6", "--offsets", "[1]", "--times", "[0.5]",
                   "--importance", "loss", "--ablation", "mean", "--drawn", "0")  # fmt: skip
    assert done.code == 0, done.err
    _, _, section = Path("out/summary.md").read_text().partition("## Which heads are needed?")
    assert len(re.findall(r"^\| (?:cross|self) \| [01] \| head [01] \|", section, re.MULTILINE)) == 4
    assert "| 8 of 8 |" in section
    assert Image.open("out/importance_pruning.png").size[0] > 500
    table = rows()
    assert all(np.isfinite(float(row["loss rise"])) and float(row["contribution"]) > 0 for row in table)
    assert not Path("out/index.html").exists()


def test_needed_heads_are_reported_on_samples_that_did_not_choose():
    """On the half that chooses, head 1 is the most needed; on the other, its loss rise is 0.25."""
    heads = [Head(0, "cross", number) for number in range(3)]
    rises = np.array([[0.1, 0.9, -0.1], [0.1, 0.9, -0.1], [0.5, 0.25, 0.75], [0.5, 0.25, 0.75]])
    measured = Importance(heads, np.ones(4), rises, np.ones((4, 3)), None)
    estimate = Estimate(1.0, None, None)
    curve = PruningCurve([0, 3], [estimate] * 2, [estimate] * 2)
    text = importance_section(measured, curve, np.array([True, True, False, False]), ["a", "b", "c", "d"], 0)
    assert "| cross | 0 | head 1 | 0.25 (0.25 … 0.25) | head 2 | 0.75 (0.75 … 0.75) |" in text


def test_a_published_checkpoint(inspect, place, tmp_path):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        latent_channels=TINY["channels"],
    ).save_pretrained(tmp_path / "vae")
    file = write_checkpoint(tmp_path / "theirs.pth.tar", published(TINY).state_dict())
    options = ["--data", place / "walks", "--codec", tmp_path / "vae", "--num_heads", "3", "--samples", "2"]
    done = inspect(*options, "--sampler.scheduler", "ddim", "--sampler.steps", "2", "--offsets", "[1]", checkpoint=file)
    assert done.code == 0, done.err
    cross = [row for row in rows() if row["kind"] == "cross"]
    assert len(cross) == 2 * 2 * 3  # layers, times, heads
    assert all(0 < float(row["mass extra"]) < 1 for row in cross)
    assert page()["extra"]
    assert inspect(*options, checkpoint=place / "images" / "notes.txt").code == 2


def test_a_folder_of_images(inspect, place):
    done = inspect("--frames", place / "images", "--samples", "3", "--actions", "forward(0.5)*6,turn_left(30)")
    assert done.code == 0, done.err
    assert "3 samples of 1 trajectory, 1 goal each" in Path("out/summary.md").read_text()
    assert len(rows()) == 16


def test_images_come_in_order_with_the_motion_between_them(place):
    world = WorldModel.from_pretrained(place / "world")
    words = "forward(0.5)*4,forward(0.5)+turn_left(30)*3"
    source = images_source(place / "images", world, [1, 2], 9, words, None)
    batch = source.batch
    assert len(source.trajectories) == 4  # the current image is the third to the sixth of eight
    assert batch.context[:, :, 0, 0, 0].tolist() == [[20 * (i + j) for j in range(3)] for i in range(4)]
    assert batch.target[:, :, 0, 0, 0].tolist() == [[20 * (i + 3), 20 * (i + 4)] for i in range(4)]
    assert batch.mask.all()
    assert batch.condition.known.all()
    steps = parse_actions(words)
    for i in range(4):
        np.testing.assert_allclose(batch.condition.action[i], compose(steps[i + 2 : i + 4]), rtol=1e-5, atol=1e-6)
    assert batch.condition.time_shift.tolist() == [[0.25, 0.5]] * 4

    for given, metres in ((None, world.description.units.spacing), (0.4, 0.4)):  # of a word without a number
        batch = images_source(place / "images", world, [1], 9, "forward*7", given).batch
        assert batch.condition.action[:, 0, 0].tolist() == pytest.approx([metres] * len(batch))

    few = images_source(place / "images", world, [6], 9, None, None).batch
    assert few.mask.tolist() == [[False, True, True]]  # eight images leave two as the past
    assert not few.condition.known.any()


def test_actions_that_a_model_cannot_take(place):
    world = WorldModel.from_pretrained(place / "world")
    arguments = (place / "images", world, [1], 9, "stay*7", None)
    world.description.units.spacing = None
    with pytest.raises(UserError, match=r"spacing: .* several spacings"):
        images_source(*arguments)
    assert images_source(*arguments[:-1], 0.4).batch.condition.spacing.tolist() == pytest.approx([0.4] * 5)
    world.description.has_actions = False
    with pytest.raises(UserError, match="trained without actions"):
        images_source(*arguments)


def test_wandb_has_what_the_folder_has(inspect, place, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--data", place / "walks", "--samples", "2", "--offsets", "[1]", "--times", "[0.5]", "--drawn", "1"]
    done = inspect(*options, tracking="wandb")
    assert done.code == 0, done.err
    assert "wandb sync" in done.out

    def digests(folder: Path) -> set[str]:
        return {hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}

    (media,) = Path("out/wandb").glob("offline-run-*/files/media")
    shown, staged = digests(media), digests(Path("out/wandb/artifacts"))
    for file in [Path("out/index.html"), *Path("out").glob("*.png")]:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in shown, file
    assert digests(Path("out/thumbnails")) <= staged


def test_the_untrained_network_is_another_of_the_same_kind(place):
    world, state = WorldModel.from_pretrained(place / "world"), torch.get_rng_state()
    ours, first, again, other = (
        model.cdit.blocks[0].cross_attn.q.weight for model in (world, *(initial(world, seed) for seed in (0, 0, 1)))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either data, a dataset folder, or frames"),
        (["--data", "walks", "--frames", "images"], "either data, a dataset folder, or frames"),
        (["--data", "walks", "--actions", "forward"], "actions can only be given with frames"),
        (["--data", "walks", "--weights", "model"], "weights can only be given with a published checkpoint"),
        (["--data", "walks", "--num_heads", "2"], "num_heads can only be given with a published checkpoint"),
        (["--data", "walks", "--ablation", "mean"], "ablation can only be given with importance"),
        (["--data", "walks", "--layers", "[0,0]"], "layers is [0, 0]"),
        (["--data", "walks", "--samples", "0"], "samples is 0, expected more than 0"),
        (["--data", "walks", "--layers", "[2]"], "error: layers is [2], expected numbers from 0 to 1"),
        (["--data", "walks", "--offsets", "[0]"], "offsets is [0]"),
        (["--data", "walks", "--offsets", "[30]"], "offsets is [30]: no trajectory of split 'test'"),
        (["--data", "walks", "--device", "abacus"], "device 'abacus'"),
        (["--frames", "nowhere"], "frames is"),
        (["--frames", "images", "--offsets", "[-1]"], "at least 1"),
        (["--frames", "images", "--offsets", "[8]"], "8 images, expected at least 9: 1 past frames and 8 after"),
        (["--frames", "images", "--actions", "forward*3"], "actions has 3 steps, expected 7"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(inspect, place, options, message):
    options = [place / value if value in ("walks", "images", "nowhere") else value for value in options]
    done = inspect(*options)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not Path("out").exists()
