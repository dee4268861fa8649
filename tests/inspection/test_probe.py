import csv
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cdit.codec import AutoencoderCodec
from cdit.errors import UserError
from cdit.inspection import AttentionConfig, inspect_attention, measures, record_attention
from cdit.inspection.measures import Layout
from cdit.randomness import generator


def test_the_report_names_and_captions_what_it_shows(make_world, make_batch):
    config = AttentionConfig(layers=[0, 2], times=[0.25, 0.75], samples=2, patch=(1, 2))
    report = inspect_attention(make_world(extra_kv=True), make_batch(), config, seed=0)
    assert set(report.images) == {
        f"attention/layer{layer}/t{time}/sample{i}" for layer in ("00", "02") for time in (0.25, 0.75) for i in (0, 1)
    }
    image, caption = report.images["attention/layer02/t0.75/sample1"]
    assert isinstance(image, Image.Image)
    for words in (
        "layer 2",
        "heads 0 to 3",
        "time 0.75",
        "frames −2 to 0",
        "row 1, column 2",
        "24 patches",
        "extra key",
    ):
        assert words in caption
    assert report.columns == [
        *("layer", "head", "time", "entropy", "effective tokens", "distance"),
        *("mass frame -2", "mass frame -1", "mass frame 0", "mass extra"),
    ]
    assert [row[:3] for row in report.rows] == [
        [layer, head, t] for layer in (0, 2) for t in (0.25, 0.75) for head in range(4)
    ]
    for row in report.rows:
        assert sum(row[6:]) == pytest.approx(1, abs=1e-5)
    assert len(report.scalars) == 2 * 4 * 7
    rows = [row for row in report.rows if row[:2] == [2, 1]]
    assert report.scalars["attention/layer02/head1/entropy"] == pytest.approx(np.mean([row[3] for row in rows]))
    assert report.scalars["attention/layer02/head1/mass_frame_-2"] == pytest.approx(np.mean([row[6] for row in rows]))


@torch.no_grad()
def test_numbers_are_means_over_the_batch(make_world, make_batch):
    world, batch = make_world(), make_batch()
    report = inspect_attention(world, batch, AttentionConfig(layers=[1], times=[0.4]), seed=5)
    frames = {name: batch[name].float() / 127.5 - 1 for name in ("context", "target")}
    noise = torch.cat([torch.randn((1, *frames["target"].shape[1:]), generator=generator(5, i)) for i in range(2)])
    times = torch.full((2, 2), 0.4)
    noisy = world.objective.add_noise(frames["target"], noise, times)
    with record_attention(world.cdit, [1]) as recording:
        world.cdit(noisy, times * 1000, batch["action"], batch["time_shift"], frames["context"], batch["context_mask"])
    layout = Layout(3, 4, 6)
    expected = torch.stack([
        measures.entropy(recording[1]).mean((0, 1, 3)),
        measures.effective_tokens(recording[1]).mean((0, 1, 3)),
        measures.mean_distance(recording[1], layout).mean((0, 1, 3)),
        *measures.frame_mass(recording[1], layout).mean((0, 1, 3)).unbind(-1),
    ], dim=1)  # fmt: skip
    torch.testing.assert_close(torch.tensor([row[3:] for row in report.rows]), expected, atol=1e-5, rtol=1e-4)


def test_defaults_are_first_middle_and_last_layer_and_one_sample(make_world, make_batch):
    report = inspect_attention(make_world(depth=5), make_batch(), AttentionConfig(), seed=0)
    assert {name.split("/")[1] for name in report.images} == {"layer00", "layer02", "layer04"}
    assert len(report.images) == 6


def test_it_is_repeatable_and_leaves_the_model_and_global_randomness_alone(make_world, make_batch):
    world, batch = make_world(dropout=0.5).train(), make_batch()
    state = torch.get_rng_state()
    first, second = (inspect_attention(world, batch, AttentionConfig(), seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.scalars == second.scalars
    assert all(first.images[name][0].tobytes() == second.images[name][0].tobytes() for name in first.images)
    assert world.cdit.training
    assert first.scalars != inspect_attention(world, batch, AttentionConfig(), seed=4).scalars


def test_latents_of_an_autoencoder_are_drawn_over_the_frames(make_world, make_batch):
    autoencoder = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    world = make_world(AutoencoderCodec("tiny", autoencoder), (32, 48))
    assert world.cdit.grid == (4, 6)
    pixels = inspect_attention(
        make_world(image_size=(32, 48), patch_size=8), make_batch((32, 48)), AttentionConfig(), 0
    )
    latents = inspect_attention(world, make_batch((32, 48)), AttentionConfig(), 0)
    assert [image.size for image, _ in latents.images.values()] == [image.size for image, _ in pixels.images.values()]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_any_number_of_past_frames(make_world, make_batch, frames):
    report = inspect_attention(make_world(), make_batch(frames=frames), AttentionConfig(layers=[0], times=[0.5]), 0)
    assert sum(column.startswith("mass frame") for column in report.columns) == min(frames, 3)


def test_a_wrapped_model_is_looked_at_as_it_is(make_world, make_batch, tmp_path):
    world, batch = make_world(), make_batch()
    plain = inspect_attention(world, batch, AttentionConfig(), 0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        world.cdit = torch.compile(nn.parallel.DistributedDataParallel(world.cdit))
        assert inspect_attention(world, batch, AttentionConfig(), 0).scalars == plain.scalars
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(layers=[0, 7]), r"attention\.layers is .* numbers from 0 to 2"),
        (AttentionConfig(times=[0.5, 1.0]), r"attention\.times is .*1\.0.*between 0 and 1"),
        (AttentionConfig(patch=(4, 0)), r"attention\.patch is \(4, 0\).*4 × 6 patches"),
    ],
)
def test_mistakes_are_named(make_world, make_batch, config, message):
    with pytest.raises(UserError, match=message):
        inspect_attention(make_world(), make_batch(), config, 0)


def test_a_folder_holds_pictures_captions_table_and_scalars(make_world, make_batch, tmp_path):
    report = inspect_attention(make_world(), make_batch(), AttentionConfig(layers=[1], times=[0.5]), 0)
    report.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    image, caption = report.images["attention/layer01/t0.5/sample0"]
    assert np.array_equal(np.asarray(Image.open(folder / "layer01_t0.5_sample0.png")), np.asarray(image))
    assert json.loads((folder / "captions.json").read_text("utf-8")) == {"layer01_t0.5_sample0.png": caption}
    assert json.loads((folder / "scalars.json").read_text()) == report.scalars
    with (folder / "table.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == report.columns
    assert [[float(x) for x in row] for row in table[1:]] == report.rows


def test_wandb_keeps_the_same_pictures(make_world, make_batch, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report = inspect_attention(make_world(), make_batch(), AttentionConfig(layers=[0, 1], times=[0.5]), 0)
    run = wandb.init(project="test", dir=tmp_path)
    run.log(report.to_wandb(), step=3)
    run.finish()
    media = next(tmp_path.glob("wandb/offline-run-*/files/media"))
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(media.glob("images/**/*.png"))]
    expected = [np.asarray(report.images[name][0]) for name in sorted(report.images)]
    assert len(pictures) == 2
    assert all(np.array_equal(a, b) for a, b in zip(pictures, expected, strict=True))
    table = json.loads(next(media.glob("table/**/*.json")).read_text())
    assert table["columns"] == report.columns
    np.testing.assert_allclose(table["data"], report.rows)
