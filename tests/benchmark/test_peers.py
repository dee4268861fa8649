"""The peers compute what is published, by a second derivation and by closed forms."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cdit.batch import EncodedBatch
from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.contenders import Concatenated, Contender, Ours, Published, random_batch
from cdit.benchmark.peers import ConcatDiT, PublishedCDiT
from cdit.codec import PixelCodec
from cdit.diffusion import SamplerConfig
from cdit.model import ModelConfig
from cdit.model.describe import counted_flops

sys.path.insert(0, str(Path(__file__).parents[1] / "nwm"))
from published import TINY, published

SIZE = {"size": (4, 6), "channels": 2, "frames": 3, "patch": 2, "width": 24, "depth": 2, "heads": 2}


@torch.no_grad()
@pytest.mark.parametrize("past", [1, 4])
def test_the_published_network(past):
    """Against the one that the tests of cdit.nwm write with torch's own modules."""
    reference = published(TINY)
    side = TINY["side"]
    peer = PublishedCDiT(
        (side, side),
        *(TINY[k] if k != "frames" else 4 for k in ("channels", "frames", "patch", "width", "depth", "heads")),
    )
    peer.load_state_dict(reference.state_dict())
    torch.manual_seed(0)
    frames = torch.randn(2, TINY["channels"], side, side), torch.randn(2, past, TINY["channels"], side, side)
    conditions = torch.tensor([3.0, 900.0]), torch.randn(2, 3), torch.randn(2)
    expected = reference(frames[0], *conditions, frames[1])
    torch.testing.assert_close(peer.eval()(frames[0], *conditions, frames[1]), expected, rtol=1e-4, atol=1e-4)


def test_published_parameters():
    with torch.device("meta"):
        peer = PublishedCDiT((28, 28), 4, 4, 2, 384, 12, 6)
    assert sum(p.numel() for p in peer.parameters()) == pytest.approx(49.2e6, rel=2e-3)


@torch.no_grad()
def test_concatenation_attends_over_all_tokens():
    torch.manual_seed(0)
    dit = ConcatDiT(**SIZE).eval()
    for p in dit.parameters():
        nn.init.normal_(p, std=0.3)
    sample, past = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 2, 4, 6)
    conditions = [torch.randn(1), torch.randn(1, 3), torch.randn(1)]
    out = dit(sample, *conditions, past)
    assert out.shape == (1, 4, 4, 6)
    for frame in range(3):
        other = past.clone()
        other[:, frame] += 1
        assert (dit(sample, *conditions, other) - out).abs().amin() > 0


def small(kind: type[Contender], goals: int, past: int) -> tuple[Contender, EncodedBatch]:
    """A contender, and what it can be asked for."""
    model = ModelConfig(patch_size=2, hidden_size=32, depth=3, num_heads=2)
    config = BenchmarkConfig(image_size=(8, 8), context_frames=past, model=model, mixed_precision="no")
    device = torch.device("cpu")
    return kind(config, device), random_batch(config, device, 1, goals)


def denoising_flops(kind: type[Contender], goals: int, past: int) -> int:
    contender, batch = small(kind, goals, past)
    return counted_flops(contender.denoising(batch))


@pytest.mark.parametrize("past", [1, 4])
def test_flops_of_a_denoising_step_by_hand(past):
    """2 FLOPs per multiply-add; N = 16 patches, d = 32, 3 blocks; the rest does not depend on the past."""
    n, d, blocks = 16, 32, 3
    counted = {kind: denoising_flops(kind, 1, past) for kind in (Ours, Published, Concatenated)}
    alone = {kind: denoising_flops(kind, 1, 8) - counted[kind] for kind in counted}
    more = 8 - past
    products = 2 * 2 * n * n * d  # q·k and weights·v, for each past frame
    assert alone[Ours] == blocks * more * products
    keys_values, embedding = 2 * n * d * 2 * d, 2 * n * 4 * 4 * d  # of each past frame: in every block; once
    assert alone[Published] == blocks * more * (products + keys_values) + more * embedding
    linear = blocks * more * 2 * n * 12 * d * d + more * embedding
    squares = blocks * 2 * 2 * d * n * n * (9**2 - (past + 1) ** 2)
    assert alone[Concatenated] == linear + squares


def test_goals_do_not_multiply_the_context_of_ours():
    grown = {
        kind: counted_flops(lambda c=c, b=b: c.predict(b.clean, torch.zeros(1, 4), b.condition, b.context))
        - denoising_flops(kind, 4, 4)
        for kind in (Ours, Published)
        for c, b in [small(kind, 4, 4)]
    }
    n, d = 16, 32
    assert grown[Published] == 0  # nothing is kept from step to step
    assert grown[Ours] == 4 * (2 * n * 16 * d + 3 * 2 * n * d * 2 * d)  # four past frames, once for four goals


@pytest.mark.parametrize("kind", [Ours, Published, Concatenated])
def test_contenders_learn_and_roll_out(kind):
    contender, batch = small(kind, 2, 3)
    before = [p.detach().clone() for p in contender.network.parameters()]
    contender.training_step(batch)()
    assert any((p != q).any() for p, q in zip(contender.network.parameters(), before, strict=True))
    frames = contender.rollout(
        PixelCodec(), batch.context, torch.randn(1, 5, 4, 3), SamplerConfig(contender.sampler.scheduler, 2)
    )
    assert frames.shape == (1, 5, 4, 4, 8, 8)
    assert frames.isfinite().all()
