"""`python -m cdit.data.encode`: what it writes, against diffusers; resuming, several processes, damage and refusals."""

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cdit.common.errors import UserError
from cdit.data import encode
from cdit.data.config import DataConfig, Source
from cdit.data.latents import LatentCache
from cdit.data.shard_writer import convert
from cdit.data.to_lerobot import to_lerobot
from cdit.data.windows import WindowDataset


def save_kl(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=5,
        scaling_factor=0.7,
        shift_factor=0.3,
    ).save_pretrained(folder)
    return str(folder)


def save_tiny(folder: Path) -> str:
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=6,
        scaling_factor=1.5,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset(dataset: Path) -> Path:
    """With frames of coloured noise: of flat ones, group norms would leave nothing but rounding errors."""
    random = np.random.default_rng(0)
    for file in sorted(dataset.glob("*/*.jpg")):
        Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).save(file)
    return dataset


@pytest.fixture
def autoencoder(tmp_path: Path) -> str:
    return save_kl(tmp_path / "kl")


@pytest.fixture
def arguments(dataset: Path, autoencoder: str) -> list[str]:
    """Frames as they were recorded, 24×32."""
    size = ["--data.image_size", "[24, 32]", "--data.workers", "0"]
    return ["--data.folder", str(dataset), *size, "--codec.kind", "kl", "--codec.name", autoencoder]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["encode", *map(str, arguments)])
        encode.main()

    return command


def recorded(folder: Path) -> Tensor:
    """All frames of a trajectory as Pillow decodes them, float in [-1, 1]."""
    files = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
    frames = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def shards(folder: Path) -> dict[str, bytes]:
    files = (folder / "latents").iterdir()
    return {path.name: path.read_bytes() for path in files}


ALL = {"a.safetensors", "b.safetensors", "c.safetensors", "latents.json"}


@torch.no_grad()
def test_mean_and_deviation_are_those_of_diffusers(dataset, autoencoder, arguments, command):
    command(*arguments, "--precision", "float32", "--batch_size", 7)
    reference = diffusers.AutoencoderKL.from_pretrained(autoencoder)
    assert set(shards(dataset)) == ALL
    for name in "abc":
        posterior = reference.encode(recorded(dataset / name)).latent_dist
        latents = load_file(dataset / "latents" / f"{name}.safetensors")["latents"]
        torch.testing.assert_close(latents, torch.stack((posterior.mean, posterior.std), dim=1), atol=1e-5, rtol=1e-5)
        assert latents[0, 0].std() > 0.1


@torch.no_grad()
def test_half_precision_rounds_to_the_nearest(dataset, autoencoder, arguments, command, capsys):
    command(*arguments)
    reference = diffusers.AutoencoderKL.from_pretrained(autoencoder)
    sums = torch.zeros(3, dtype=torch.float64)
    for name in "abc":
        posterior = reference.encode(recorded(dataset / name)).latent_dist
        exact = torch.stack((posterior.mean, posterior.std), dim=1)
        latents = load_file(dataset / "latents" / f"{name}.safetensors")["latents"]
        assert latents.dtype == torch.float16
        assert ((latents.double() - exact).abs() <= exact.abs() * 2**-11 + 2e-6).all()
        error = (latents[:, 0].double() - posterior.mean).square().sum()
        sums += torch.stack((error, posterior.mean.double().square().sum(), posterior.std.double().square().sum()))
    printed = capsys.readouterr().out
    assert f"{dataset}/latents: 3 trajectories, 45 frames, {45 * 2 * 5 * 12 * 16 * 2 / 1e9:.3g} GB" in printed
    told = re.search(r"float16, an error of (\S+) of the latents' size, (\S+) of their posterior's", printed)
    assert [float(number) for number in told.groups()] == pytest.approx((sums[0] / sums[1:]).sqrt().tolist(), rel=0.05)


@torch.no_grad()
def test_a_codec_without_posterior_has_one_number(dataset, tmp_path, arguments, command):
    name = save_tiny(tmp_path / "tiny")
    command(*arguments, "--codec.kind", "tiny", "--codec.name", name, "--precision", "float32")
    expected = diffusers.AutoencoderTiny.from_pretrained(name).encode(recorded(dataset / "b")).latents
    latents = load_file(dataset / "latents" / "b.safetensors")["latents"]
    torch.testing.assert_close(latents, expected[:, None], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_frames_are_cropped_and_resized_first(dataset, autoencoder, arguments, command):
    command(*arguments, "--data.image_size", "[24, 24]", "--data.crop", "aspect", "--precision", "float32")
    centre = recorded(dataset / "a")[..., 4:28]
    mean = diffusers.AutoencoderKL.from_pretrained(autoencoder).encode(centre).latent_dist.mean
    latents = load_file(dataset / "latents" / "a.safetensors")["latents"][:, 0]
    torch.testing.assert_close(latents, mean, atol=1e-5, rtol=1e-5)
    whole = diffusers.AutoencoderKL.from_pretrained(autoencoder).encode(recorded(dataset / "a")).latent_dist.mean
    assert not torch.allclose(latents, F.interpolate(whole, (12, 12)), atol=1e-2)


def test_loader_processes_change_nothing(dataset, arguments, command):
    command(*arguments)
    alone = shards(dataset)
    for name in alone:
        (dataset / "latents" / name).unlink()
    command(*arguments, "--data.workers", 2)
    assert shards(dataset) == alone


def test_chosen_splits(dataset, arguments, command):
    command(*arguments, "--split", "test")
    assert set(shards(dataset)) == {"c.safetensors", "latents.json"}


def test_splits_kept_elsewhere(dataset, tmp_path, arguments, command):
    (dataset / "splits").rename(tmp_path / "lists")
    command(*arguments, "--data.splits", tmp_path / "lists")
    assert set(shards(dataset)) == ALL


def test_all_datasets_of_a_mix(dataset, video_dataset, autoencoder, tmp_path, command):
    """As a training config says it, whose other sections are of no concern here."""
    config = tmp_path / "mix.yaml"
    config.write_text(
        f"name: mixed\nbatch_size: 3\nmodel: {{preset: S}}\n"
        f"data: {{mix: [{{folder: {dataset}}}, {{folder: {video_dataset}}}], image_size: [24, 32], workers: 0}}\n"
        f"codec: {{kind: kl, name: {autoencoder}}}\n"
    )
    command("--config", config)
    for folder in (dataset, video_dataset):
        assert set(shards(folder)) == ALL
    command("--config", config, "--verify", "true")


def test_what_is_missing_or_damaged_is_made_again(dataset, arguments, command):
    command(*arguments)
    first = shards(dataset)
    untouched = dataset / "latents" / "c.safetensors"
    times = untouched.stat().st_mtime_ns
    flipped = bytearray(first["a.safetensors"])
    flipped[-1000] ^= 4
    for a, b in ((bytes(flipped), None), (first["a.safetensors"][:-7], b""), (first["b.safetensors"], b"{}")):
        (dataset / "latents" / "a.safetensors").write_bytes(a)
        if b is None:
            (dataset / "latents" / "b.safetensors").unlink()
        else:
            (dataset / "latents" / "b.safetensors").write_bytes(b)
        with pytest.raises(UserError, match=r"2 of 3 must be encoded again\n.*a\.safetensors: .*\n.*b\.safetensors: "):
            command(*arguments, "--verify", "true")
        command(*arguments)
        assert shards(dataset) == first
        command(*arguments, "--verify", "true")
    assert untouched.stat().st_mtime_ns == times


def test_broken_frames_end_it_and_later_it_goes_on(dataset, arguments, command):
    arguments = [*arguments, "--batch_size", "4"]
    command(*arguments)
    first = shards(dataset)
    for name in first:
        (dataset / "latents" / name).unlink()
    frame = dataset / "b" / "6.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(whole[:-100])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"b/6\.jpg: not a readable image"):
            command(*arguments, "--data.workers", workers)
        assert set(shards(dataset)) == ALL - {"b.safetensors"}
    frame.write_bytes(whole)
    command(*arguments)
    assert shards(dataset) == first


@pytest.mark.slow
def test_two_processes_write_what_one_does(dataset, arguments, command):
    command(*arguments)
    first = shards(dataset)
    for name in first:
        (dataset / "latents" / name).unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launcher, "-m", "cdit.data.encode", *arguments], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"share 1 of 2" in done.stderr
    assert shards(dataset) == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--data.image_size", "[24, 24]"), r"frames of 24×32, crop aspect; expected .*frames of 24×24"),
        (("--data.crop", "none"), r"crop aspect; expected .*crop none"),
        (("--precision", "float32"), r"holds float16, expected float32"),
        (("--codec.name", "OTHER"), r"made with kl .*/kl \(encoder .*\).*; expected kl .*/other \(encoder "),
    ],
)
def test_another_cache_is_not_overwritten(dataset, tmp_path, arguments, command, changed, message):
    command(*arguments)
    first = shards(dataset)
    changed = [save_kl(tmp_path / "other", seed=1) if value == "OTHER" else value for value in changed]
    with pytest.raises(UserError, match=message):
        command(*arguments, *changed)
    assert shards(dataset) == first


def test_latents_that_training_reads_only_from_shards(dataset, tmp_path, arguments, command, capsys):
    pytest.importorskip("pyarrow")
    to_lerobot(Source(str(dataset)), tmp_path / "walks")
    command(*arguments, "--data.folder", str(tmp_path / "walks"), "--data.source", "lerobot")
    assert "training does not read latents of source lerobot from here" in capsys.readouterr().err
    convert(Source(str(tmp_path / "walks"), source="lerobot"), tmp_path / "shards", ["train"], "both")
    windows = WindowDataset(DataConfig(str(tmp_path / "shards"), image_size=(24, 32), workers=0), "train")
    windows.use_latents(LatentCache.open(tmp_path / "walks").info.encoding)
    assert windows[0].context.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--codec.kind", "pixels"), r"codec\.kind is pixels"),
        (("--data.image_size", "[25, 32]"), r"image_size is 25×32, expected multiples of the codec's 2"),
        (("--batch_size", "0"), r"batch_size is 0"),
        (("--split", "nowhere"), r"split 'nowhere' cannot be"),
        (("--data.folder", "nowhere"), r"nowhere: no such dataset folder"),
        (("--verify", "true"), r"no latents here"),
    ],
)
def test_mistakes_leave_nothing_behind(dataset, arguments, command, changed, message):
    with pytest.raises(UserError, match=message):
        command(*arguments, *changed)
    assert not (dataset / "latents").exists()
