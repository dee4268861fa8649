"""Published checkpoints as world models: their units, and the command lines both ways."""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from published import TINY, published, write_checkpoint

from cdit.batch import Condition
from cdit.codec import PixelCodec
from cdit.common.cli import run
from cdit.common.errors import UserError
from cdit.diffusion import SamplerConfig
from cdit.model import CDiT
from cdit.nwm.__main__ import main
from cdit.nwm.normalization import normalization
from cdit.nwm.tensors import cdit_arguments
from cdit.nwm.world import published_world
from cdit.world_model import WorldDescription, WorldModel


@pytest.fixture
def codec(tmp_path: Path) -> str:
    """A folder with an AutoencoderKL of 3 channels, a fourth of the frame's size."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        latent_channels=TINY["channels"],
    ).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "theirs.pth.tar", published(TINY).state_dict()))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    def call(*argv: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["cdit.nwm", *map(str, argv)])
        main()

    return call


def read(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


# --- units ---


@pytest.mark.parametrize("spacing", [0.25, 0.72])
def test_actions_are_normalised_as_published(spacing):
    """-2.5 … 5 spacings forward and ±4 to the left become ±1; yaw stays; nothing is clipped."""
    motion = torch.tensor([[[-2.5, -4, -3.0], [5, 4, 3], [0, 0, 0], [64, 1, 0.5]]]) * torch.tensor([spacing] * 2 + [1])
    seconds = torch.tensor([[-16.0, 16.0, 0.25, 1.0]])
    units = normalization()
    action, time = units.normalize(motion, spacing), seconds * units.time_scale
    expected = torch.tensor([[[-1, -1, -3], [1, 1, 3], [-1 / 3, 0, 0], [16 + 11 / 15, 0.25, 0.5]]])
    torch.testing.assert_close(action, expected)
    torch.testing.assert_close(time, torch.tensor([[-0.5, 0.5, 1 / 128, 4 / 128]]))
    torch.testing.assert_close(normalization(spacing=spacing).normalize(motion), expected)
    with pytest.raises(UserError, match="spacing of this dataset"):
        normalization().normalize(motion)


def test_time_is_in_frames_whatever_the_rate():
    """A frame ahead is 1/128, at 4 or at 10 frames a second."""
    for fps in (4.0, 10.0):
        assert normalization(fps).time_scale / fps == pytest.approx(1 / 128)


# --- there ---


def test_convert_writes_a_world_model(checkpoint, codec, command, tmp_path, capsys):
    command("convert", checkpoint, tmp_path / "world", "--codec", codec, "--num_heads", "3")
    assert "2 blocks of width 48, 4 past frames of 16×16 pixels" in capsys.readouterr().out
    world = WorldModel.from_pretrained(tmp_path / "world")
    description = world.description
    assert (tuple(description.image_size), description.fps, description.crop, description.min_history) == (
        (16, 16),
        4.0,
        "4:3",
        4,
    )
    assert (description.objective, description.ddpm.learn_variance) == ("ddpm", True)
    assert description.sampler == SamplerConfig(scheduler="ddpm", steps=250)
    assert description.has_actions
    assert description.units == replace(normalization(), spacing=None)
    assert torch.equal(world.cdit.pos_embed, read(Path(checkpoint))["ema"]["pos_embed"])
    reference = diffusers.AutoencoderKL.from_pretrained(codec).state_dict()
    assert all(torch.equal(x, reference[name]) for name, x in world.codec.autoencoder.state_dict().items())

    context = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    actions, seconds = torch.randn(2, 3, 3), torch.tensor([[0.25, 4.0, -2.0]] * 2)
    few = replace(description.sampler, steps=3)
    draws = [
        world.predict(
            context,
            Condition(seconds, actions, spacing=torch.full((2,), s)),
            sampler=few,
            generator=torch.Generator().manual_seed(0),
        )
        for s in (0.25, 0.25, 0.72)
    ]
    assert draws[0].shape == (2, 3, 3, 16, 16)
    assert draws[0].isfinite().all()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(UserError, match="spacing"):
        world.predict(context, Condition(seconds, actions), sampler=few)


@torch.no_grad()
def test_the_converted_network_is_told_published_numbers(checkpoint, codec, command, tmp_path):
    """From frames, metres and seconds to the first prediction, beside the published network on its own inputs."""
    command("convert", checkpoint, tmp_path / "it", "--codec", codec, "--num_heads", "3", "--spacing", "0.25")
    world = WorldModel.from_pretrained(tmp_path / "it")
    context = torch.rand(1, 4, 3, 16, 16) * 2 - 1
    seen = []
    hook = world.cdit.register_forward_hook(lambda _, args, kwargs, out: seen.append((args, out)), with_kwargs=True)
    condition = Condition(torch.tensor([[-2.0]]), torch.tensor([[[0.5, -0.25, 0.3]]]))
    world.predict(context, condition, sampler=SamplerConfig("ddpm", 2))
    hook.remove()
    latents = world.codec.encode(context)
    action, shift = torch.tensor([[2 * 2 / 7.5 - 1 / 3, -1 / 4, 0.3]]), torch.tensor([-8 / 128])
    for (args, out), timestep in zip(seen, (999.0, 0.0), strict=True):
        expected = published(TINY)(args[0][:, 0], torch.tensor([timestep]), action, shift, latents)
        torch.testing.assert_close(out[:, 0], expected, atol=1e-4, rtol=0)


def test_convert_options(checkpoint, codec, command, tmp_path):
    options = ("--codec", codec, "--num_heads", "3", "--spacing", "0.25", "--weights", "model")
    command("convert", checkpoint, tmp_path / "world", *options)
    world = WorldModel.from_pretrained(tmp_path / "world")
    assert world.description.units.spacing == 0.25
    assert torch.equal(world.cdit.pos_embed, read(Path(checkpoint))["model"]["_orig_mod.pos_embed"])


def test_convert_replaces_world_models_only(checkpoint, codec, command, tmp_path):
    options = ("--codec", codec, "--num_heads", "3")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("words")
    for taken in ("full", "full/thesis.txt"):
        with pytest.raises(UserError, match=rf"{taken}: exists, and is not a world model"):
            command("convert", checkpoint, tmp_path / taken, *options)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    command("convert", checkpoint, tmp_path / "empty", *options)
    command("convert", checkpoint, tmp_path / "empty", *options, "--weights", "model")
    found = WorldModel.from_pretrained(tmp_path / "empty").cdit.pos_embed
    assert torch.equal(found, read(Path(checkpoint))["model"]["_orig_mod.pos_embed"])


@pytest.mark.parametrize("argv", [("--help",), ("-h",)])
def test_help_names_both_commands(argv, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "convert CHECKPOINT OUT" in printed
    assert "export WORLD OUT" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "convert,export"),
        (("explain",), "'explain'"),
        (("convert", "theirs.pth.tar"), "required: convert.out"),
        (("convert", "theirs.pth.tar", "world"), "num_heads"),
        (("convert", "nothing.pth.tar", "world"), r"nothing\.pth\.tar: No such file"),
        (("convert", "theirs.pth.tar", "world", "--num_heads", "3", "--spacing", "0"), "spacing is 0"),
        (("convert", "theirs.pth.tar", "world", "--num_heads", "3", "--codec", "nowhere/vae"), r"codec\.name"),
        (("convert", "theirs.pth.tar", "world", "--weights", "best"), "weights"),
        (("convert", "theirs.pth.tar", "theirs.pth.tar/world", "--num_heads", "3", "--codec", "vae"), "cannot be writ"),
        (("export", "vae", "ours.pth.tar"), "vae: no world model here"),
    ],
)
def test_mistakes_end_with_a_line_and_code_2(argv, message, checkpoint, codec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cdit.nwm", *argv])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs.pth.tar", "vae"]


def test_latents_of_another_kind_are_refused(codec):
    arguments = cdit_arguments(published(TINY).state_dict(), 3)
    with pytest.raises(UserError, match="codec: its latents have 3 channels, expected the network's 4"):
        published_world(CDiT(**arguments | {"in_channels": 4}), PixelCodec())


# --- and back ---


@pytest.mark.parametrize("run_folder", [False, True])
def test_export_gives_back_the_checkpoint(run_folder, checkpoint, codec, command, tmp_path):
    """From a world model's folder, or from a training run's, which has one in best/."""
    world = tmp_path / "it" / "best" if run_folder else tmp_path / "it"
    command("convert", checkpoint, world, "--codec", codec, "--num_heads", "3")
    command("export", tmp_path / "it", tmp_path / "ours.pth.tar")
    theirs, ours = read(Path(checkpoint)), read(tmp_path / "ours.pth.tar")
    for key in ("model", "ema"):
        assert ours[key].keys() == theirs["ema"].keys()
        assert all(torch.equal(ours[key][name], theirs["ema"][name]) for name in theirs["ema"])


def test_other_models_are_not_exported(command, tmp_path):
    """All settings that differ are listed, the objective among them."""
    cdit = CDiT((8, 8), hidden_size=32, depth=1, num_heads=2, extra_kv=True)
    WorldModel(cdit, PixelCodec(), WorldDescription((8, 8), 4.0)).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError) as caught:
        command("export", tmp_path / "ours", tmp_path / "it.pth.tar")
    assert str(caught.value) == (
        f"{tmp_path}/ours: not a model of NWM: context_modulation is False, not True; position is rotary, not learned; "
        "embedding_scale is 30.0, not 1.0; learn_variance is False, not True; objective is flow, not ddpm"
    )
    assert not (tmp_path / "it.pth.tar").exists()


def test_a_flow_in_the_published_network_is_not_exported(checkpoint, codec, command, tmp_path):
    command("convert", checkpoint, tmp_path / "it", "--codec", codec, "--num_heads", "3")
    description = json.loads((tmp_path / "it" / "world_model.json").read_text())
    description |= {"objective": "flow", "sampler": {"scheduler": "euler", "steps": 4}}
    (tmp_path / "it" / "world_model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"it: not a model of NWM: objective is flow, not ddpm$"):
        command("export", tmp_path / "it", tmp_path / "it.pth.tar")
