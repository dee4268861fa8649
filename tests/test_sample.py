import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cdit.codec import PixelCodec
from cdit.common.cli import run
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.diffusion import SamplerConfig
from cdit.model import CDiT
from cdit.model.conditioners import CONDITIONERS
from cdit.world_model import WorldDescription, WorldModel
from cdit.worlds import starts_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny worlds with random weights, datasets with poses, without, and without dataset.json, and an image."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    for name, position in (("world", "rotary"), ("slots", "learned"), ("blind", "rotary"), ("mixed", "rotary")):
        cdit = CDiT((16, 24), max_context=3, patch_size=8, hidden_size=16, depth=1, num_heads=2, position=position)
        for parameter in cdit.parameters():
            nn.init.normal_(parameter, std=0.1)
        description = WorldDescription((16, 24), fps=5.0, sampler=SamplerConfig(steps=2), has_actions=name != "blind")
        description.units.spacing = None if name == "mixed" else 1.0
        WorldModel(cdit, PixelCodec(), description).save_pretrained(place / name / "best")
    random = np.random.default_rng(0)
    for name in ("walks", "video", "bare"):
        for trajectory, length in (("a", 12), ("b", 9)):
            frames = random.integers(256, size=(length, 20, 30, 3), dtype=np.uint8)
            poses = (random.normal(size=(length, 2)), random.normal(size=length)) if name != "video" else ()
            write_trajectory(place / name, trajectory, frames, *poses)
        write_split(place / name, "test", ["a", "b"])
        spacing = 0.5 if name == "walks" else None
        if name != "bare":
            DatasetInfo(name, fps=5.0, metric_waypoint_spacing=spacing, has_actions=name == "walks").save(place / name)
    Image.fromarray(random.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(place / "view.png")
    return place


class Done(NamedTuple):
    returncode: int
    stderr: str


@pytest.fixture
def sample(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """Runs sample.py with these arguments, in this process for speed."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sample", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(place)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        try:
            run(module.main)
        except SystemExit as end:
            return Done(end.code, capsys.readouterr().err)
        return Done(0, capsys.readouterr().err)

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frame_count(path: Path) -> int:
    with av.open(str(path)) as container:
        return len(list(container.decode(video=0)))


def test_dataset_to_videos_and_pictures_twice_the_same(place: Path, sample):
    arguments = ["--checkpoint", "world", "--data", "walks", "--samples", "2", "--length", "4", "--horizons", "[1,4,8]"]
    command = [sys.executable, str(ROOT / "sample.py"), *arguments, "--out", "one/below", "--attention"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it in their last bits
    subprocess.run(command, cwd=place, check=True, timeout=120, env=os.environ | threads)
    assert sample(*arguments, "--out", "two", "--attention").returncode == 0
    written, before = files(place / "two"), files(place / "one/below")
    assert written.keys() == before.keys()
    for name in written:  # x264 may encode the same frames into other bytes
        assert name.endswith(".mp4") or written[name] == before[name], name
    names = [taken["name"] for taken in json.loads(written["samples.json"])["samples"]]
    assert len(names) == 2
    assert {"direct.png", *(f"{n}.{kind}" for n in names for kind in ("mp4", "gif", "png"))} < set(written)
    assert any(name.startswith("attention/") and name.endswith(".png") for name in written)
    for name in names:
        assert frame_count(place / "two" / f"{name}.mp4") == 3 + 4  # context and future
        with Image.open(place / "two" / f"{name}.gif") as gif:
            assert gif.n_frames == 7
    summary = json.loads(written["samples.json"])
    assert summary["config"]["sampler"]["steps"] == 2
    assert [len(taken["psnr"]) for taken in summary["samples"]] == [4, 4]


@pytest.mark.parametrize(("checkpoint", "history"), [("world", "missing"), ("slots", "still")])
def test_one_image_and_actions(place: Path, sample, checkpoint: str, history: str):
    out = f"image_{history}"
    chosen = ["--image", "view.png", "--actions", "forward*2,turn_left(30)", "--samples", "2", "--history", history]
    done = sample("--checkpoint", checkpoint, *chosen, "--out", out, "--sampler.steps=1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    summary = json.loads((place / out / "samples.json").read_text())
    expected = [[1.0, 0, 0], [1.0, 0, 0], [0, 0, np.pi / 6]]  # a step is the spacing of the model
    for taken in summary["samples"]:
        np.testing.assert_allclose(taken["actions"], expected, rtol=1e-6)
    assert summary["config"]["sampler"]["steps"] == 1
    videos = [(place / out / f"0{i}_view.mp4").read_bytes() for i in range(2)]
    assert videos[0] != videos[1]
    assert frame_count(place / out / "00_view.mp4") == (1 if history == "missing" else 3) + 3


def test_a_shipped_world_starts_from_its_own_frames(place: Path, sample):
    arguments = ["--checkpoint", "maze", "--actions", "forward,turn_left", "--samples", "2", "--sampler.steps", "1"]
    assert sample(*arguments, "--out", "shipped").returncode == 0
    summary = json.loads((place / "shipped/samples.json").read_text())
    assert summary["config"]["data"] == starts_of("maze")
    assert len({taken["name"] for taken in summary["samples"]}) == 2
    spacing = DatasetInfo.load(Path(starts_of("maze"))).metric_waypoint_spacing
    assert summary["samples"][0]["actions"][0] == pytest.approx([spacing, 0, 0])


def test_the_network_is_compiled_when_asked(sample, monkeypatch: pytest.MonkeyPatch):
    """The flag reaches the world model; what compiling does is tested there."""
    compiled = []
    monkeypatch.setattr(WorldModel, "compile", lambda world: compiled.append(world))
    arguments = [*WALKS, "--samples", "1", "--length", "2", "--horizons", "[]"]
    assert sample(*arguments, "--out", "plain").returncode == 0
    assert not compiled
    for flag in (["--compile"], ["--compile", "true"]):
        assert sample(*arguments, *flag, "--out", "compiled").returncode == 0
    assert len(compiled) == 2


def test_given_actions_take_their_step_from_the_dataset(place: Path, sample):
    done = sample("--checkpoint", "world", "--data", "walks", "--actions", "forward*20", "--out", "given")
    assert done.returncode == 0, done.stderr
    taken = json.loads((place / "given/samples.json").read_text())["samples"]
    assert len(taken) == 4
    assert taken[0]["actions"] == [[0.5, 0, 0]] * 20
    assert "psnr" not in taken[0]


def test_actions_take_their_step_from_what_is_known_of_the_spacing(place: Path, sample):
    view = ["--image", "view.png", "--actions", "forward", "--samples", "1", "--horizons", "[]", "--sampler.steps", "1"]
    cases = {
        ("world", "--image", "view.png"): 1.0,
        ("mixed", "--image", "view.png", "--spacing", "0.25"): 0.25,
        ("world", "--data", "walks"): 0.5,
        ("world", "--data", "walks", "--spacing", "0.75"): 0.75,
        ("world", "--data", "bare"): 1.0,
    }
    for (checkpoint, *chosen), step in cases.items():
        done = sample("--checkpoint", checkpoint, *chosen, *view[2:], "--out", "step")
        assert done.returncode == 0, done.stderr
        (taken,) = json.loads((place / "step/samples.json").read_text())["samples"]
        assert taken["actions"] == [[step, 0, 0]]


def test_a_dataset_without_poses(place: Path, sample):
    chosen = ["--data", "video", "--samples", "1", "--length", "2", "--out", "no_poses"]
    done = sample("--checkpoint", "world", *chosen)
    assert done.returncode == 0, done.stderr
    (taken,) = json.loads((place / "no_poses/samples.json").read_text())["samples"]
    assert taken["actions"] is None
    assert len(taken["psnr"]) == 2


def test_a_model_without_actions_is_told_none(place: Path, sample):
    done = sample("--checkpoint", "blind", "--data", "walks", "--samples", "1", "--length", "2", "--out", "untold")
    assert done.returncode == 0, done.stderr
    (taken,) = json.loads((place / "untold/samples.json").read_text())["samples"]
    assert taken["actions"] is None


def test_a_spacing_is_asked_for_where_it_counts(place: Path, sample):
    """By a model of several, of what nothing says it of: not of a dataset that says it, and not without actions."""
    asked = ["--checkpoint", "mixed", "--samples", "1", "--length", "1", "--horizons", "[]", "--out", "spaced"]
    acts, view = ["--actions", "forward"], ["--image", "view.png", "--actions", "forward"]
    for chosen in (["--data", "bare"], ["--data", "bare", *acts], ["--data", "video", *acts], view):
        done = sample(*asked, *chosen)
        assert done.returncode == 2
        assert done.stderr.count("error: ") == 1
        assert "different spacings" in done.stderr
        assert not (place / "spaced").exists()
    for chosen in (["--data", "bare", "--spacing", "0.5"], [*view, "--spacing", "0.5"], ["--data", "walks"]):
        assert sample(*asked, *chosen).returncode == 0
    assert sample(*asked, "--data", "video").returncode == 0


def test_the_spacing_is_the_unit_of_actions(place: Path, sample):
    """What is one spacing ahead looks the same in any: the same files, and others for other actions."""
    often = ["--checkpoint", "mixed", "--image", "view.png", "--samples", "1", "--sampler.steps", "1"]
    runs = {"one": ("0.5", "forward(0.5)"), "two": ("2", "forward(2)"), "three": ("2", "forward(0.5)")}
    for out, (spacing, action) in runs.items():
        assert sample(*often, "--spacing", spacing, "--actions", action, "--out", out).returncode == 0
    one, two, three = ({name: files(place / out)[name] for name in ("00_view.png", "direct.png")} for out in runs)
    assert one == two
    assert one["00_view.png"] != three["00_view.png"]
    assert one["direct.png"] != three["direct.png"]


WALKS = ["--checkpoint", "world", "--data", "walks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "world"], "either data"),
        (["--checkpoint", "world", "--actions", "forward"], "either data"),
        (["--checkpoint", "maze"], "either data"),
        (["--checkpoint", "walks", "--data", "walks"], "no world model here"),
        (["--checkpoint", "world", "--image", "view.png"], "actions"),
        ([*WALKS, "--history", "still"], "history is an option of image"),
        (["--checkpoint", "nowhere", "--data", "walks"], "checkpoint is nowhere"),
        (["--checkpoint", "world", "--data", "nowhere"], "data is nowhere"),
        ([*WALKS, "--actions", "hop*3"], "'hop*3'"),
        ([*WALKS, "--actions", "rows.csv"], "rows.csv"),
        ([*WALKS, "--length", "11"], "length is 11"),
        ([*WALKS, "--length", "many"], "length is many, expected int"),
        ([*WALKS, "--split", "valid"], "'valid'"),
        ([*WALKS, "--sampler.steps", "0"], "sampler.steps is 0"),
        ([*WALKS, "--sampler.guidance", "2"], "without action_dropout"),
        (["--checkpoint", "blind", "--data", "walks", "--actions", "forward*3"], "without actions"),
        ([*WALKS, "--horizons", "[0]"], "horizons is 0"),
        ([*WALKS, "--fps", "0"], "fps is 0"),
        (["--checkpoint", "mixed", "--image", "view.png", "--actions", "stay", "--spacing", "0"], "spacing is 0"),
        ([*WALKS, "--device", "abacus"], "'abacus'"),
        ([*WALKS, "--attention", "--inspect.layers", "[5]", "--length", "1"], "inspect.layers is [5]"),
        ([*WALKS, "--lenght", "3"], "--lenght"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_written(place: Path, sample, arguments: list[str], message: str):
    done = sample(*arguments, "--out", "mistake")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "mistake").exists()


def test_out_that_is_a_file(place: Path, sample):
    done = sample(*WALKS, "--length", "1", "--out", "view.png")
    assert done.returncode == 2
    assert "out is view.png" in done.stderr


@CONDITIONERS.register("tests.light")
class Light(nn.Module):
    """Takes `light`, and keeps what it was given."""

    given: list[list[float]] = []  # noqa: RUF012

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, D)."""
        self.given.append(condition["light"].flatten().tolist())
        return condition["light"].float().reshape(-1, 1) * self.weight


@pytest.mark.parametrize(
    ("options", "lights"),
    [
        # Recorded ones: the strip's last frames, and then the same in jumps.
        (["--length", "2", "--horizons", "[2]"], [[30.0], [40.0], [40.0]]),
        # With given actions, those of the last past frame.
        (["--actions", "forward*2", "--horizons", "[2]"], [[20.0], [20.0], [20.0]]),
    ],
)
def test_recorded_conditions_reach_the_network(sample, tmp_path, monkeypatch, options, lights):
    torch.manual_seed(0)
    cdit = CDiT((16, 24), 3, 3, 8, 16, 1, 2, extra_conditioners={"light": "tests.light"})
    description = WorldDescription((16, 24), fps=5.0, sampler=SamplerConfig(steps=1))
    WorldModel(cdit, PixelCodec(), description).save_pretrained(tmp_path / "world")
    frames = np.zeros((5 if "--length" in options else 4, 20, 30, 3), np.uint8)
    poses = {"position": np.zeros((len(frames), 2)), "yaw": np.zeros(len(frames))}
    write_trajectory(tmp_path / "lit", "a", frames, **poses)
    light = 10.0 * np.arange(len(frames))
    (tmp_path / "lit" / "a" / "traj_data.pkl").write_bytes(pickle.dumps({**poses, "light": light}))
    write_split(tmp_path / "lit", "test", ["a"])
    DatasetInfo("lit", fps=5.0, metric_waypoint_spacing=0.5).save(tmp_path / "lit")
    Light.given.clear()
    done = sample("--checkpoint", str(tmp_path / "world"), "--data", str(tmp_path / "lit"), "--out", "lit", *options)
    assert done.returncode == 0, done.stderr
    assert Light.given == lights
