"""Features against timm's own, their statistics against numpy, and worlds without a decoder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from cdit.codec import CodecConfig, FeaturesCodec, load_codec
from cdit.codec.config import MeasureConfig
from cdit.codec.features import FeaturesDescription, build_backbone
from cdit.codec.measure import channel_statistics, measure
from cdit.codec.vit_decoder import VitDecoder
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.data.config import DataConfig
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import spread_cases
from cdit.evaluate.protocols import direct, rollout
from cdit.evaluate.study import Judge, Study
from cdit.training.config import TrainConfig
from cdit.training.setup import build_world

BACKBONE = "test_vit"  # of timm, 64 channels, patches of 16 pixels, 160 pixels a side
CPU = torch.device("cpu")


def options(walks: Path, out: Path, **changes) -> MeasureConfig:
    data = DataConfig(str(walks), train_split="test", image_size=(32, 32), workers=0)
    config = MeasureConfig(out=str(out), data=data, backbone=BACKBONE, random_weights=True, frames=20, gallery=12)
    return replace(config, **changes)


@pytest.fixture(scope="module")
def folder(walks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A features codec of random weights, tokens of 8 pixels."""
    out = tmp_path_factory.mktemp("codecs") / "features"
    measure(options(walks, out, downscale=8), CPU)
    return out


def recorded(walks: Path, count: int) -> torch.Tensor:
    """Frames evenly spread over all of the dataset's, in [-1, 1]."""
    dataset = WindowDataset(DataConfig(str(walks), image_size=(32, 32), workers=0), "test")
    frames = torch.cat([dataset.frames.read(i, range(len(t))) for i, t in enumerate(dataset.trajectories)])
    return to_float(frames[np.linspace(0, len(frames) - 1, count).round().astype(int)])


@torch.no_grad()
def test_the_last_layer_is_what_timm_computes():
    torch.manual_seed(0)
    reference = timm.create_model(BACKBONE, dynamic_img_size=True).eval()
    frames = torch.rand(2, 3, 32, 48) * 2 - 1
    config = reference.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    tokens = reference.forward_features(((frames + 1) / 2 - mean) / std)[:, reference.num_prefix_tokens :]

    torch.manual_seed(0)
    codec = codec_of(build_backbone(BACKBONE, -1), len(reference.blocks) - 1, config)
    assert (codec.channels, codec.downscale) == (reference.embed_dim, 16)
    found = codec.moments(frames)
    assert found.shape == (2, 1, reference.embed_dim, 2, 3)
    torch.testing.assert_close(found[:, 0].flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(codec.encode(frames[:, None])[:, 0], found[:, 0])  # not normalised yet


@torch.no_grad()
def test_an_inner_layer_is_that_block_s_output():
    torch.manual_seed(0)
    reference = timm.create_model(BACKBONE, dynamic_img_size=True).eval()
    outputs: list[torch.Tensor] = []
    reference.blocks[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    frames = torch.rand(1, 3, 32, 32) * 2 - 1
    config = reference.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    reference.forward_features(((frames + 1) / 2 - mean) / std)
    expected = reference.norm(outputs[0])[:, reference.num_prefix_tokens :]
    backbone = build_backbone(BACKBONE, 2)
    backbone.load_state_dict(reference.state_dict(), strict=False)
    assert len(backbone.blocks) == 3  # the later ones are gone
    found = codec_of(backbone, 2, config).encode(frames)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)


def codec_of(backbone: torch.nn.Module, layer: int, config: dict, downscale: int = 16) -> FeaturesCodec:
    about = FeaturesDescription(BACKBONE, "random", layer, downscale, tuple(config["mean"]), tuple(config["std"]))
    return FeaturesCodec(backbone, about, (1, 32, 32))


@torch.no_grad()
def test_statistics_are_numpy_s(folder: Path, walks: Path):
    codec = load_codec(CodecConfig("features", str(folder)))
    features = codec.moments(recorded(walks, 20))[:, 0].double().numpy()
    np.testing.assert_allclose(codec.mean.flatten(), features.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(codec.std.flatten(), features.std(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    latents = codec.encode(recorded(walks, 20)).double().numpy()
    np.testing.assert_allclose(latents.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std(axis=(0, 2, 3)), 1, atol=1e-3)


def test_statistics_do_not_depend_on_the_parts():
    features = torch.randn(7, 5, 2, 3) * 3 + 100
    mean, std = channel_statistics(features.split(2))
    np.testing.assert_allclose(mean.flatten(), features.double().mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std.flatten(), features.double().std((0, 2, 3), unbiased=False), rtol=1e-9)


def test_a_saved_codec_is_the_same(folder: Path, walks: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    codec = load_codec(CodecConfig("features", str(folder)))
    assert "random" in capsys.readouterr().err
    codec.save(tmp_path / "again")
    again = load_codec(CodecConfig("features", str(tmp_path / "again")))
    frames = recorded(walks, 5)
    latents = codec.encode(frames)
    assert torch.equal(again.encode(frames), latents)
    assert torch.equal(again.decode(latents), codec.decode(latents))
    assert again.fingerprint() == codec.fingerprint()
    next(again.backbone.parameters()).data.add_(1e-3)
    assert again.fingerprint() != codec.fingerprint()
    assert codec.latent_shape((32, 32)) == latents.shape[1:] == (64, 4, 4)


@torch.no_grad()
def test_a_vit_decoder_is_a_transformer_of_torch():
    torch.manual_seed(0)
    decoder = VitDecoder(5, patch=3, width=128, depth=2, grid=(2, 4)).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    latents = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    layer = torch.nn.TransformerEncoderLayer(
        128, 2, 512, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    reference = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    for ours, theirs in zip(decoder.blocks, reference.layers, strict=True):
        for name, other in names.items():
            theirs.get_submodule(other).load_state_dict(ours.get_submodule(name).state_dict())
        theirs.self_attn.in_proj_weight.copy_(ours.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(ours.attn.qkv.bias)
    tokens = torch.stack([latents[:, :, i, j] for i in range(2) for j in range(4)], dim=1)
    pixels = decoder.to_pixels(decoder.norm(reference(decoder.embed(tokens) + decoder.pos_embed)))
    frames = decoder(latents)
    assert frames.shape == (3, 3, 6, 12)
    for i in range(2):
        for j in range(4):
            patch = frames[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].flatten(1)
            torch.testing.assert_close(patch, pixels[:, 4 * i + j])
    assert decoder(torch.zeros(1, 5, 3, 7, dtype=torch.float64)).shape == (1, 3, 9, 21)


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_a_saved_vit_decoder_is_the_same_at_any_downscale(size: tuple[int, int], tmp_path: Path):
    torch.manual_seed(0)
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    codec = codec_of(build_backbone(BACKBONE, 1), 1, config, downscale=8 if size == (32, 32) else 6)
    codec.add_decoder(64, 2, codec.latent_shape(size)[1:])
    codec.save(tmp_path)
    again = FeaturesCodec.load(str(tmp_path))
    frames = torch.rand(2, 3, *size) * 2 - 1
    decoded = codec.decode(codec.encode(frames))
    assert decoded.shape == frames.shape
    assert torch.equal(again.decode(again.encode(frames)), decoded)


def test_without_a_decoder_the_nearest_recorded_frame_is_shown(folder: Path, walks: Path):
    codec = load_codec(CodecConfig("features", str(folder)))
    assert not codec.has_decoder
    kept = recorded(walks, 12)
    order = torch.tensor([[3, 11], [0, 7]])
    latents = codec.encode(kept[order])
    noisy = latents + 0.01 * torch.randn_like(latents)
    torch.testing.assert_close(codec.decode(noisy), kept[order])


def test_similar_frames_are_told_apart_under_autocast(folder: Path, walks: Path):
    codec = FeaturesCodec.load(str(folder))
    near = codec.encode(recorded(walks, 4))
    near = near + 1e-3 * torch.randn(near.shape, generator=torch.manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = codec.similarity(near)
    gallery = codec.encode(to_float(codec.gallery)).flatten(1)
    expected = torch.cosine_similarity(near.flatten(1)[:, None], gallery[None], dim=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_folder_that_is_none(tmp_path: Path):
    for name in (None, str(tmp_path), "nobody/nothing"):
        with pytest.raises(UserError, match=r"codec\.name .*no features codec"):
            load_codec(CodecConfig("features", name))


@pytest.mark.parametrize(
    "values",
    [{"backbone": "hf-hub:owner/name"}, {"backbone": "vit_7b_patch16_dinov3"}, {"layer": 3}, {"layer": -1},
     {"decoder_width": 64}, {"decoder_width": 64, "decoder_depth": 1},
     {"downscale": 0}, {"pixel_std": [1]}, {"unknown": 1}, {"version": 2}],
)  # fmt: skip
def test_hostile_configs_are_refused(folder: Path, tmp_path: Path, values: dict):
    shutil.copytree(folder, tmp_path / "codec")
    path = tmp_path / "codec" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match="not a readable features codec"):
        load_codec(CodecConfig("features", str(tmp_path / "codec")))


def test_weights_from_a_local_folder(walks: Path, tmp_path: Path):
    torch.manual_seed(5)
    model = timm.create_model(BACKBONE, img_size=96)
    weights = tmp_path / "weights"
    weights.mkdir()
    safetensors.torch.save_file(model.state_dict(), weights / "model.safetensors")
    about = {
        "architecture": BACKBONE,
        "num_classes": 1000,
        "model_args": {"img_size": 96},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    (weights / "config.json").write_text(json.dumps(about))
    codec = measure(options(walks, tmp_path / "out", backbone=str(weights), random_weights=False), CPU)
    assert codec.description.weights == str(weights)
    assert codec.description.pixel_mean == (0.1, 0.2, 0.3)
    assert torch.equal(codec.backbone.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert load_codec(CodecConfig("features", str(tmp_path / "out"))).description.backbone == BACKBONE


def test_weights_that_are_not_available(walks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in (f"{BACKBONE}.r160_in1k", str(tmp_path)):
        with pytest.raises(UserError, match=r"backbone is .*random_weights"):
            measure(options(walks, tmp_path / "out", backbone=name, random_weights=False), CPU)


def test_layers_that_do_not_exist(walks: Path, tmp_path: Path):
    with pytest.raises(UserError, match="layer is 99, expected"):
        measure(options(walks, tmp_path / "out", layer=99), CPU)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_other_backbones_give_features(name: str):
    backbone = build_backbone(name, 1)
    info = backbone.feature_info[1]
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    codec = codec_of(backbone, 1, config, info["reduction"])
    side = 64 // info["reduction"]
    assert codec.encode(torch.zeros(1, 3, 64, 64)).shape == (1, info["num_chs"], side, side)


@pytest.mark.parametrize("protocol", [direct([0.5, 1.0], 4.0), rollout([0.5, 1.0], 4.0, 4.0)], ids=lambda p: p.name)
def test_a_world_without_a_decoder_is_measured_in_latents(folder: Path, walks: Path, world, protocol):
    codec = load_codec(CodecConfig("features", str(folder)))
    features_world = world(codec, patch_size=1)
    dataset = WindowDataset(DataConfig(str(walks), image_size=(32, 32), context_frames=3, workers=0), "test")
    study = Study(protocol, spread_cases(dataset, 4, 4, "seconds"), 4, 1, 0)
    found = study.compute(0, features_world, dataset, Judge.without_decoder(codec))
    windows = [dataset.window(case.window, [2, 4]) for case in study.cases]
    truth = torch.stack([codec.encode(to_float(window.target)) for window in windows])
    last = torch.stack([codec.encode(to_float(window.context[-1:])) for window in windows])
    torch.testing.assert_close(
        found["copy_last/latents"], (last - truth).square().mean((2, 3, 4)), rtol=1e-3, atol=1e-4
    )
    assert found["model/latents"].shape == (4, 2)
    assert bool((found["model/latents"] > 0).all())
    kept = codec.encode(to_float(codec.gallery))
    cosines = [
        torch.cosine_similarity(last[:, :, None].flatten(3), x.flatten(3), dim=3)
        for x in (kept[None, None], truth[:, :, None])
    ]
    for slack in (-1e-4, 1e-4):  # some truths are in the gallery
        share = (cosines[0] < cosines[1] + slack).float().mean(2)
        assert bool(((share - found["copy_last/rank"]) * slack >= 0).all())
    assert 0 < found["copy_last/rank"].mean() < 1
    gallery = {frame.numpy().tobytes() for frame in codec.gallery}
    assert all(frame.numpy().tobytes() in gallery for frame in found["shown/model"].flatten(0, 1))


def test_a_gallery_of_another_size_is_resized(folder: Path, walks: Path):
    codec = load_codec(CodecConfig("features", str(folder)))
    frames = recorded(walks, 5)
    for size in ((48, 64), (32, 32), (48, 64), (64, 48)):  # what is known of one size is not used for another
        kept = to_float(codec.gallery)
        if size != (32, 32):
            kept = F.interpolate(kept, size, mode="bilinear", antialias=True)
        latents = codec.encode(F.interpolate(frames, size, mode="bilinear", antialias=True))
        cosine = F.cosine_similarity(latents.flatten(1)[:, None], codec.encode(kept).flatten(1)[None], dim=2)
        torch.testing.assert_close(codec.similarity(latents), cosine, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(codec.decode(latents), kept[codec.similarity(latents).argmax(1)].clamp(-1, 1))


def test_a_perceptual_loss_needs_a_decoder(folder: Path, walks: Path):
    config = TrainConfig()
    config.data = DataConfig(str(walks), train_split="test", image_size=(32, 32), workers=0)
    config.codec = CodecConfig("features", str(folder))
    config.model.patch_size, config.flow.perceptual.weight = 1, 1.0
    with pytest.raises(UserError, match=r"flow\.perceptual\.weight: the codec has no decoder"):
        build_world(config, WindowDataset(config.data, "test"))
