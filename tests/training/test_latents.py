"""Training on cached latents is training on the images: the same draws, losses and pictures, and no frame decoded."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from noised import Noised, noised

from cdit.batch import Batch, KeyedDraws
from cdit.data import encode, frames
from cdit.data.windows import WindowDataset, WindowKey
from cdit.training.config import TrainConfig
from cdit.training.setup import build_world, use_latents
from cdit.world_model import WorldModel

TRAIN = Path(__file__).parents[2] / "train.py"
KEYS = [WindowKey(3, 1, 0), WindowKey(27, 1, 1), WindowKey(0, 1, 2), WindowKey(9, 5, 3)]


@pytest.fixture
def recordings(dataset: Path, tmp_path: Path) -> Path:
    """A dataset of its own, to leave latents in."""
    return Path(shutil.copytree(dataset, tmp_path / "recordings"))


@pytest.fixture
def arguments(recordings: Path, tmp_path: Path) -> list[str]:
    """Of a config whose codec is a small random AutoencoderKL."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        ).save_pretrained(tmp_path / "autoencoder")
    codec = ["--codec.kind", "kl", "--codec.name", str(tmp_path / "autoencoder")]
    return ["--data.folder", str(recordings), *codec]


@pytest.fixture
def cache(arguments: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Encodes the dataset as a person would, with the config of the training."""

    def cache(*options: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["encode", "--config", str(tiny), *arguments, *options])
            encode.main()

    return cache


def trained_on(settings: TrainConfig, cached: bool, keys: list[WindowKey] = KEYS) -> tuple[WorldModel, Noised]:
    dataset = WindowDataset(settings.data, "train", settings.seed)
    world = build_world(settings, dataset)
    if cached:
        use_latents([dataset], world.codec, settings)
    windows = Batch.collate([dataset[key] for key in keys])
    assert windows.context.dtype == (torch.float32 if cached else torch.uint8)
    return world, noised(world, windows, action_dropout=0.5)


def test_a_batch_of_latents_is_that_of_the_images(config: Callable[..., TrainConfig], arguments, cache):
    cache("--precision", "float32")
    world, expected = trained_on(config(*arguments), cached=False)
    _, found = trained_on(config(*arguments), cached=True)
    for name in ("timestep", "time", "mask", "noise"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert set(found.condition) == {"action", "action_known", "time_shift"}
    for name, value in found.condition.items():
        assert torch.equal(value, expected.condition[name]), name
    there = expected.mask  # latents of frames that do not exist are nobody's
    assert not there.all()
    torch.testing.assert_close(found.context[there], expected.context[there], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.clean, expected.clean, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.sample, expected.sample, atol=2e-6, rtol=1e-5)
    losses = [
        world.objective.loss(world.cdit, noisy.batch, KeyedDraws(torch.arange(4), world.device))
        for noisy in (expected, found)
    ]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)


def test_half_precision_is_off_by_its_rounding(config: Callable[..., TrainConfig], arguments, cache):
    """A latent is scale (mean + deviation · noise - shift), mean and deviation each off by 2^-11 of themselves."""
    cache()
    world, expected = trained_on(config(*arguments), cached=False)
    _, found = trained_on(config(*arguments), cached=True)
    dataset = WindowDataset(config(*arguments).data, "train", 0)
    goals = Batch.collate([dataset[key] for key in KEYS]).target.float() / 127.5 - 1
    with torch.no_grad():
        posterior = world.codec.autoencoder.encode(goals.flatten(0, 1)).latent_dist
    mean, deviation = (x.unflatten(0, (4, 2)) for x in (posterior.mean, posterior.std))
    noise = (expected.clean / 0.5 + 0.25 - mean) / deviation
    bound = 0.5 * 2**-11 * (mean.abs() + deviation * noise.abs()) + 5e-6
    difference = (found.clean - expected.clean).abs()
    assert (difference <= bound).all()
    assert difference.max() > 2e-5  # or nothing was rounded


def test_each_step_samples_the_posterior_anew(config: Callable[..., TrainConfig], arguments, cache):
    cache()
    keys = [WindowKey(9, step, 0) for step in (1, 2)]
    world, batch = trained_on(config(*arguments), True, keys)
    first, second = batch.context
    frame = WindowDataset(config(*arguments).data, "train", 0)[9].context.float() / 127.5 - 1
    with torch.no_grad():
        deviation = world.codec.autoencoder.encode(frame).latent_dist.std
    draws = (first - second) / 0.5 / deviation  # the difference of two independent draws: variance 2
    assert abs(draws.std().item() / 2**0.5 - 1) < 0.05  # 3072 numbers
    assert abs(draws.mean().item()) < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_size", "[16, 16]"], r"frames of 32×32.*expected .*frames of 16×16"),
        (["--data.crop", "none"], r"crop aspect.*expected .*crop none"),
    ],
)
def test_training_refuses_another_cache(
    train: Callable[..., Path], arguments, cache, tmp_path, capsys, options, message
):
    cache()
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, *arguments, *options)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: .*{message}", error)
    assert not (tmp_path / "tiny").exists()


def test_pixels_do_not_mind_a_cache(config: Callable[..., TrainConfig], arguments, recordings, cache):
    cache()
    settings = config("--data.folder", str(recordings))
    dataset = WindowDataset(settings.data, "train", 0)
    use_latents([dataset], build_world(settings, dataset).codec, settings)
    assert dataset[0].context.dtype == torch.uint8


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trajectories whose frames are decoded from now on in this process."""
    trajectories: list[str] = []
    decode = frames.decode
    monkeypatch.setattr(frames, "decode", lambda path: trajectories.append(path.parent.name) or decode(path))
    return trajectories


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("float16", 2e-3)])
def test_runs_with_and_without_latents_learn_the_same(
    train: Callable[..., Path], arguments, cache, rows, tmp_path, monkeypatch, precision, tolerance
):
    cache("--precision", precision)
    counted = decoded(monkeypatch)
    cached = train(tmp_path, *arguments, "--stop_at", "4", name="cached")
    assert counted == []  # neither training nor validation
    plain = train(tmp_path, *arguments, "--stop_at", "4", "--data.latents", "no", name="plain")
    assert {"a", "b", "c"} <= set(counted)
    for field in ("train/loss", "validation/loss"):
        ours, theirs = rows(cached, field), rows(plain, field)
        assert [row[field] for row in ours] == pytest.approx([row[field] for row in theirs], rel=tolerance)
        assert len(ours) == {"train/loss": 4, "validation/loss": 2}[field]

    counted.clear()
    train(tmp_path, *arguments, "--resume", "auto", "--data.latents", "auto", name="plain")  # may change on the way
    assert set(counted) <= {"c", "d"}  # the last probe looks at test frames
    assert counted
    assert (plain / "probes/step_00000006/predictions.png").is_file()


@pytest.mark.slow
def test_launched_processes_train_without_the_images(
    launch: Callable[..., subprocess.CompletedProcess], arguments, recordings, cache, tiny, rows, tmp_path
):
    """Frames of the training split are there by name only."""
    cache()
    for trajectory in ("a", "b"):
        for frame in (recordings / trajectory).glob("*.jpg"):
            frame.write_bytes(b"")
    options = ("--output", tmp_path / "runs", "--data.workers", "1")
    done = launch(TRAIN, "--config", tiny, *arguments, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "runs" / "tiny", "train/loss")) == 6
    done = launch(TRAIN, "--config", tiny, *arguments, *options, "--name", "images", "--data.latents", "no")
    assert done.returncode == 2
    assert "not a readable image" in done.stderr
