"""What only a GPU can show; the rest of the suite runs on the CPU. Training on one: tests/training/test_gpu.py."""

import pytest
import torch

from cdit.batch import Condition
from cdit.codec import PixelCodec
from cdit.diffusion import SamplerConfig
from cdit.heads.record import record_attention
from cdit.model import CDiT
from cdit.model.attention import (
    KeysValues,
    Part,
    attention_weights,
    concatenated,
    joint_attention,
    scaled_dot_product_attention,
)
from cdit.world_model import WorldDescription, WorldModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def randomised_world() -> WorldModel:
    torch.manual_seed(0)
    cdit = CDiT((32, 32), 3, 4, patch_size=4, hidden_size=96, depth=2, num_heads=4, extra_kv=True)
    for parameter in cdit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return WorldModel(cdit, PixelCodec(), WorldDescription((32, 32), 4.0)).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_fused_kernels_agree_with_the_weights_on_masked_rows(dtype: torch.dtype, tolerance: float):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(3, 4, 33, 32, generator=generator, device="cuda").to(dtype) for _ in range(3))
    mask = torch.rand(3, 1, 33, 33, generator=generator, device="cuda") > 0.5
    mask[0] = False
    mask[1, :, 5] = False
    mask[..., 7] = False
    out = scaled_dot_product_attention(q.requires_grad_(), KeysValues(k, v), mask)
    expected = attention_weights(q, k, mask) @ v.float()
    assert (out.float() - expected).abs().max() < tolerance
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    out.float().sum().backward()
    assert q.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 20])  # of the fused kernel, and of none
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_keys_in_parts_agree_with_their_concatenation(dtype: torch.dtype, tolerance: float, width: int):
    """33 queries and 45, 7 and 1 keys, no multiples of any block; masked ones, and a row with none."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(rows: int, tokens: int) -> torch.Tensor:
        return torch.randn(rows, 4, tokens, width, generator=generator, device="cuda").to(dtype)

    q, parts = draw(6, 33), [Part(KeysValues(draw(n, m), draw(n, m))) for n, m in ((2, 45), (6, 7), (1, 1))]
    mask = torch.rand(2, 1, 1, 45, generator=generator, device="cuda") > 0.5
    mask[1] = False
    parts[0] = Part(parts[0].kv, mask)
    kv, joint_mask = concatenated(parts)
    expected = attention_weights(q, kv.k_BHMK, joint_mask) @ kv.v_BHMK.float()
    out = joint_attention(q, parts)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < tolerance
    with torch.enable_grad():  # by two products
        assert (joint_attention(q, parts).float() - expected).abs().max() < tolerance


@torch.no_grad()
def test_candidates_rolled_out_agree_with_the_cpu_and_compiled():
    world = randomised_world()
    context, condition = torch.rand(2, 4, 3, 32, 32) * 2 - 1, Condition(action=torch.randn(2, 3, 6, 3))
    mask = torch.tensor([[False, True, True, True], [True] * 4])

    def rollout(device: str) -> torch.Tensor:
        world.to(device)
        inputs = (x.to(device) for x in (context, condition, mask))
        return world.rollout(*inputs, sampler=SamplerConfig(steps=2), generator=torch.Generator().manual_seed(0)).cpu()

    expected = rollout("cpu")
    assert (rollout("cuda") - expected).abs().max() < 2e-2
    world.compile()
    assert (rollout("cuda") - expected).abs().max() < 2e-2


def test_predictions_agree_with_the_cpu():
    world = randomised_world()
    context = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    mask = torch.tensor([[False, True, True, True], [True] * 4])
    condition = Condition(torch.rand(2, 3), torch.randn(2, 3, 3))

    def predict(device: str) -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        inputs = (x.to(device) for x in (context, condition, mask))
        world.to(device)
        return world.predict(*inputs, sampler=SamplerConfig(steps=2), generator=noise).cpu()

    assert (predict("cpu") - predict("cuda")).abs().max() < 1e-2


def test_recording_leaves_the_output_bit_identical_under_autocast():
    world = randomised_world().to("cuda")
    frames = torch.rand(2, 4, 3, 32, 32, device="cuda")
    condition = {"time_shift": torch.ones(2, 1, device="cuda")}
    inputs = (frames[:, :1], torch.full((2, 1), 500.0, device="cuda"), condition, frames)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        plain = world.cdit(*inputs)
        with record_attention(world.cdit, [0, 1]) as recorded:
            watched = world.cdit(*inputs)
    assert torch.equal(plain, watched)
    assert recorded[1].sum(-1).sub(1).abs().max() < 1e-5
