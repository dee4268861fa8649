"""Training of autoencoders and decoders: what is saved loads, resuming changes nothing, and it learns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdit.codec import CodecConfig, load_codec
from cdit.codec.config import CodecTrainConfig, MeasureConfig
from cdit.codec.measure import measure
from cdit.codec.recorded import RecordedFrames, StepSampler
from cdit.codec.training import TrainedAutoencoder, train_codec
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.data.config import DataConfig

CPU = torch.device("cpu")
VIT = {"decoder": "vit", "width": 64, "depth": 2}


def options(walks: Path, out: Path, **changes) -> CodecTrainConfig:
    data = DataConfig(str(walks), train_split="test", image_size=(32, 32), workers=0)
    config = CodecTrainConfig(
        out=str(out), data=data, width=4, downscale=4, perceptual=0.0, steps=4, batch_size=3, every=2, samples=5
    )
    return replace(config, **changes)


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdit.codec.training._lpips", lambda config, device: None)


def weights(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_codec(CodecConfig(kind, str(folder))).state_dict()


def features(walks: Path, out: Path) -> str:
    data = DataConfig(str(walks), train_split="test", image_size=(32, 32), workers=0)
    measured = MeasureConfig(
        out=str(out), data=data, backbone="test_vit", random_weights=True, downscale=8, frames=8, gallery=4
    )
    measure(measured, CPU)
    return str(out)


@pytest.mark.parametrize(("kind", "changes"), [("tiny", {}), ("kl", {}), ("features", {}), ("features", VIT)])
def test_a_resumed_training_is_the_same_bit_for_bit(kind: str, changes: dict, walks: Path, tmp_path: Path):
    given = {"kind": kind, "latent_noise": 0.5, **changes}
    if kind == "features":
        given["features"] = features(walks, tmp_path / "measured")
    train_codec(options(walks, tmp_path / "whole", **given), CPU)
    train_codec(options(walks, tmp_path / "parts", **given, stop_at=2), CPU)
    train_codec(options(walks, tmp_path / "parts", **given, resume="auto"), CPU)
    whole, parts = weights(tmp_path / "whole", kind), weights(tmp_path / "parts", kind)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [json.loads(line)["step"] for line in rows[0].splitlines()] == [2, 4]
    assert len(list((tmp_path / "parts" / "pictures").iterdir())) == 2


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_have_zero_mean_and_unit_variance(kind: str, walks: Path, tmp_path: Path):
    train_codec(options(walks, tmp_path, kind=kind), CPU)
    codec = load_codec(CodecConfig(kind, str(tmp_path)))
    frames = RecordedFrames(options(walks, tmp_path).data, "test")
    latents = codec.encode(to_float(frames.spread(len(frames))))
    assert codec.latent_shape((32, 32)) == latents.shape[1:] == (4, 8, 8)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)


def test_the_penalty_of_a_kl_is_the_mean_divergence_of_a_latent():
    torch.manual_seed(0)
    trained = TrainedAutoencoder(CodecTrainConfig(out="", kind="kl", width=4, downscale=4, kl=0.3))
    frames = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents, penalty = trained.encode(frames, torch.Generator().manual_seed(2))
        found = trained.network.encode(frames).latent_dist
    posterior = torch.distributions.Normal(found.mean, found.std)
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(penalty, 0.3 * expected)
    assert ((latents - posterior.mean) / posterior.stddev).std().item() == pytest.approx(1, abs=0.1)  # 512 numbers


def test_it_learns(walks: Path, tmp_path: Path):
    train_codec(options(walks, tmp_path, width=16, steps=150, every=150, batch_size=8, learning_rate=3e-3), CPU)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    frames = to_float(RecordedFrames(options(walks, tmp_path).data, "test").spread(5))
    constant = (10 * (4 / (frames - frames.mean((0, 2, 3), keepdim=True)).square().mean((1, 2, 3))).log10()).mean()
    assert row["test/psnr"] > constant + 3


def test_a_vit_decoder_learns(walks: Path, tmp_path: Path):
    measured = features(walks, tmp_path / "measured")
    changes = VIT | {"kind": "features", "features": measured, "steps": 100, "every": 20, "batch_size": 8}
    train_codec(options(walks, tmp_path / "out", **changes), CPU)
    losses = [json.loads(line)["train/l1"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("changes", [{}, VIT], ids=["conv", "vit"])
def test_a_decoder_does_not_change_the_features(changes: dict, walks: Path, tmp_path: Path):
    measured = features(walks, tmp_path / "measured")
    train_codec(options(walks, tmp_path / "out", kind="features", features=measured, **changes), CPU)
    before, after = (load_codec(CodecConfig("features", str(f))) for f in (measured, tmp_path / "out"))
    assert (before.has_decoder, after.has_decoder) == (False, True)
    assert before.fingerprint() == after.fingerprint()
    frames = to_float(RecordedFrames(options(walks, tmp_path).data, "test").spread(3))
    latents = after.encode(frames)
    assert torch.equal(before.encode(frames), latents)
    assert after.decode(latents).shape == frames.shape
    latents.requires_grad_()
    assert torch.autograd.grad(after.decode(latents).sum(), latents)[0].abs().sum() > 0


def test_steps_draw_their_own_frames():
    whole = list(StepSampler(100, 3, seed=0, start=0, stop=6))
    assert list(StepSampler(100, 3, seed=0, start=4, stop=6)) == whole[4:]
    assert whole != list(StepSampler(100, 3, seed=1, start=0, stop=6))
    assert all(0 <= index < 100 for step in whole for index in step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "resume auto"),
        ({"resume": "auto", "width": 8}, "another width"),
        ({"resume": "auto", "learning_rate": 0.1}, "another learning_rate"),
    ],
)
def test_a_folder_that_holds_a_training(walks: Path, tmp_path: Path, changes: dict, message: str):
    train_codec(options(walks, tmp_path, stop_at=1), CPU)
    with pytest.raises(UserError, match=message):
        train_codec(options(walks, tmp_path, **changes), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downscale": 6}, "downscale is 6, expected a power of two"),
        ({"downscale": 64}, "data.image_size is 32×32, expected multiples of the codec's 64"),
        ({"kind": "features"}, "features: expected"),
        ({"decoder": "vit"}, "decoder is vit, expected conv for kind tiny"),
    ],
)
def test_options_that_do_not_fit(walks: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        train_codec(options(walks, tmp_path, **changes), CPU)


def test_a_vit_needs_a_width_of_whole_heads(walks: Path, tmp_path: Path):
    measured = features(walks, tmp_path / "measured")
    with pytest.raises(UserError, match="width is 65, expected a multiple of 64"):
        train_codec(options(walks, tmp_path / "out", kind="features", features=measured, **VIT | {"width": 65}), CPU)


def test_a_checkpoint_from_before_an_option_existed_continues(walks: Path, tmp_path: Path):
    train_codec(options(walks, tmp_path, stop_at=2), CPU)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del saved["options"]["decoder"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    train_codec(options(walks, tmp_path, resume="auto"), CPU)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
