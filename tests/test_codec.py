"""Codecs against the autoencoders they wrap; tiny randomly initialised ones, saved and loaded by folder."""

from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest
import torch

from cdit.codec import AutoencoderCodec, CodecConfig, PixelCodec, TinyCodec, load_codec
from cdit.codec.autoencoder import latent_shape
from cdit.common.errors import UserError


def frames(*leading: int) -> torch.Tensor:
    return torch.rand(*leading, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_kl(folder: Path, shift: float | None = 0.3) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        latent_channels=5,
        scaling_factor=0.7,
        shift_factor=shift,
    ).eval()
    model.save_pretrained(folder)
    return model


def save_tiny(folder: Path) -> diffusers.AutoencoderTiny:
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=6,
        scaling_factor=1.5,
    ).eval()
    model.save_pretrained(folder)
    return model


def test_pixels_are_themselves_and_decode_clips():
    codec = load_codec(CodecConfig())
    x = frames(2, 3)
    assert codec.encode(x, torch.ones_like(x)) is x
    assert torch.equal(codec.decode(x), x)
    assert codec.decode(torch.tensor([-3.0, 0.25, 1.5])).tolist() == [-1.0, 0.25, 1.0]
    assert (codec.channels, codec.downscale) == (3, 1)


@pytest.mark.parametrize("shift", [None, 0.3])
@torch.no_grad()
def test_kl_latents_are_the_posteriors_shifted_and_scaled(tmp_path, shift):
    reference = save_kl(tmp_path, shift)
    codec = load_codec(CodecConfig("kl", str(tmp_path)))
    x = frames(2)
    posterior = reference.encode(x).latent_dist
    offset = shift or 0.0
    torch.testing.assert_close(codec.encode(x), (posterior.mode() - offset) * 0.7)

    draw = posterior.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(codec.encode(x, noise), (draw - offset) * 0.7)
    assert not torch.allclose(draw, posterior.mean, atol=1e-3)

    latents = torch.randn(2, 5, 4, 6)
    expected = reference.decode(latents / 0.7 + offset).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents), expected)
    assert (codec.channels, codec.downscale) == (5, 4)


@torch.no_grad()
def test_tiny_latents_are_the_encoders_scaled(tmp_path):
    reference = save_tiny(tmp_path)
    codec = load_codec(CodecConfig("tiny", str(tmp_path)))
    x = frames(2)
    expected = reference.encode(x).latents * 1.5
    torch.testing.assert_close(codec.encode(x), expected)
    torch.testing.assert_close(codec.encode(x, torch.ones_like(expected)), expected)  # nothing is drawn
    decoded = reference.decode(reference.encode(x).latents).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(expected), decoded)
    assert (codec.channels, codec.downscale) == (6, 4)


@pytest.mark.parametrize(("kind", "name"), [("kl", "stabilityai/sd-vae-ft-ema"), ("tiny", "madebyollin/taesd")])
def test_each_kind_has_weights_of_its_own(kind, name, monkeypatch):
    """Not those of the other architecture, which cannot be loaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=name):
        load_codec(CodecConfig(kind))


@pytest.mark.parametrize(("kind", "save", "channels"), [("kl", save_kl, 5), ("tiny", save_tiny, 6)])
def test_leading_dimensions_pass_through(kind, save, channels, tmp_path):
    save(tmp_path)
    codec = load_codec(CodecConfig(kind, str(tmp_path)))
    x = frames(2, 3)
    noise = torch.randn(2, 3, channels, 4, 6)
    latents = codec.encode(x, noise)
    assert latents.shape == (2, 3, channels, 4, 6)
    torch.testing.assert_close(latents[1, 2], codec.encode(x[1, 2][None], noise[1, 2][None])[0], atol=1e-5, rtol=1e-4)
    decoded = codec.decode(5 * latents)
    assert decoded.shape == x.shape
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded[0, 1], codec.decode(5 * latents[0, 1][None])[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_moments_are_the_posteriors_and_latents_are_drawn_from_them(tmp_path):
    reference = save_kl(tmp_path)
    codec = load_codec(CodecConfig("kl", str(tmp_path)))
    posterior = reference.encode(frames(6)).latent_dist
    moments = codec.moments(frames(6).reshape(2, 3, 3, 16, 24))
    assert moments.shape == (2, 3, 2, 5, 4, 6)
    torch.testing.assert_close(moments.flatten(0, 1), torch.stack((posterior.mean, posterior.std), dim=1))
    noise = torch.full((2, 3, 5, 4, 6), 2.0)
    drawn = (posterior.mean + 2 * posterior.std - 0.3) * 0.7
    torch.testing.assert_close(codec.draw(moments, noise).flatten(0, 1), drawn)
    torch.testing.assert_close(codec.draw(moments).flatten(0, 1), (posterior.mean - 0.3) * 0.7)


def test_moments_of_a_codec_without_posterior(tmp_path):
    save_tiny(tmp_path)
    codec = load_codec(CodecConfig("tiny", str(tmp_path)))
    moments = codec.moments(frames(2, 3))
    assert moments.shape == (2, 3, 1, 6, 4, 6)
    assert torch.equal(codec.draw(moments, torch.ones(2, 3, 6, 4, 6)), codec.encode(frames(2, 3)))


def kl_fingerprint(folder: Path, change=lambda autoencoder: None) -> str:
    """Of the autoencoder after a change, saved and loaded again."""
    autoencoder = save_kl(folder / "original")
    change(autoencoder)
    autoencoder.save_pretrained(folder / "changed")
    return load_codec(CodecConfig("kl", str(folder / "changed"))).fingerprint()


def test_a_fingerprint_is_that_of_what_encodes(tmp_path):
    original = kl_fingerprint(tmp_path)
    assert len(original) == 64
    assert kl_fingerprint(tmp_path / "again") == original

    def other_decoder(autoencoder):
        autoencoder.decoder.conv_in.weight.data += 1
        autoencoder.register_to_config(scaling_factor=0.2)

    assert kl_fingerprint(tmp_path / "decoder", other_decoder) == original


@pytest.mark.parametrize(
    "change",
    [
        lambda autoencoder: autoencoder.encoder.conv_in.weight.data[0, 0, 0, 0].mul_(1 + 1e-6),
        lambda autoencoder: autoencoder.quant_conv.bias.data[-1].add_(1e-6),
        lambda autoencoder: autoencoder.register_to_config(act_fn="relu"),
        lambda autoencoder: autoencoder.register_to_config(norm_num_groups=1),
    ],
)
def test_another_encoder_has_another_fingerprint(change, tmp_path):
    assert kl_fingerprint(tmp_path / "other", change) != kl_fingerprint(tmp_path)


def test_fingerprints_tell_the_kinds_apart(tmp_path):
    save_tiny(tmp_path)
    first = load_codec(CodecConfig("tiny", str(tmp_path)))
    again = load_codec(CodecConfig("tiny", str(tmp_path)))
    assert first.fingerprint() == again.fingerprint()
    next(again.autoencoder.encoder.parameters()).data.add_(1e-3)
    assert first.fingerprint() != again.fingerprint()


@pytest.mark.parametrize("size", [(14, 24), (16, 22)])
def test_frames_have_to_shrink_evenly(size, tmp_path):
    save_kl(tmp_path)
    codec = load_codec(CodecConfig("kl", str(tmp_path)))
    assert codec.latent_shape((16, 24)) == (5, 4, 6)
    with pytest.raises(UserError, match=r"data\.image_size is \d+×\d+, expected multiples of the codec's 4"):
        codec.latent_shape(size)


@pytest.mark.parametrize(("kind", "save", "channels"), [("kl", save_kl, 5), ("tiny", save_tiny, 6)])
def test_the_shape_of_latents_is_known_without_the_weights(kind, save, channels, tmp_path):
    save(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    assert latent_shape(CodecConfig(kind, str(tmp_path)), (16, 24)) == (channels, 4, 6)
    assert latent_shape(CodecConfig("pixels"), (16, 24)) == (3, 16, 24)


def test_a_kind_alone_stands_for_its_default_weights(monkeypatch):
    """madebyollin/taesd holds an AutoencoderTiny; the KL repository does not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for kind, weights in {"kl": "stabilityai/sd-vae-ft-ema", "tiny": "madebyollin/taesd"}.items():
        assert latent_shape(CodecConfig(kind), (64, 32)) == (4, 8, 4)
        with pytest.raises(UserError, match=f"codec.name '{weights}'"):
            load_codec(CodecConfig(kind))


def test_decoding_passes_gradients_to_latents(tmp_path):
    save_tiny(tmp_path)
    codec = load_codec(CodecConfig("tiny", str(tmp_path))).double()
    latents = codec.encode(frames(1, 2).double()).requires_grad_()
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), dtype=latents.dtype)
    (gradient,) = torch.autograd.grad(codec.decode(latents).sum(), latents)
    ahead, behind = (codec.decode(latents.detach() + step * direction).sum() for step in (1e-6, -1e-6))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def test_autoencoders_are_frozen(tmp_path):
    save_kl(tmp_path)
    codec = load_codec(CodecConfig("kl", str(tmp_path)))
    assert isinstance(codec, AutoencoderCodec)
    assert not codec.autoencoder.training
    assert not any(p.requires_grad for p in codec.parameters())
    assert not codec.encode(frames(1).requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_weights_that_are_not_available(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"codec.name 'nobody/no-such-autoencoder': no Autoencoder\w+ weights from the"):
        load_codec(CodecConfig(kind, "nobody/no-such-autoencoder"))
    with pytest.raises(UserError, match="from that folder"):
        load_codec(CodecConfig(kind, str(tmp_path)))


def test_an_autoencoder_of_the_other_kind_is_refused(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(UserError, match=r"codec\.name"):
        load_codec(CodecConfig("kl", str(tmp_path)))


def test_what_was_sampled_joins_the_past_as_recorded_frames_would():
    """Pixels in their range; latents have none."""
    far = torch.linspace(-3, 3, 12).view(1, 3, 2, 2)
    assert torch.equal(PixelCodec().as_past(far), far.clip(-1, 1))
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), num_encoder_blocks=(1,),
        num_decoder_blocks=(1,), latent_channels=3,
    )  # fmt: skip
    assert torch.equal(TinyCodec(tiny).as_past(far), far)
