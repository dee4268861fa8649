"""The bytes derived on paper against those that are kept, counted tensor by tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cdit.model.attention
from cdit.common.errors import UserError
from cdit.model import PRESETS, CDiT
from cdit.model.activations import activation_bytes, block_bytes, wide_block_bytes

OPTIONS = {
    "native": {},
    "extra_kv": {"extra_kv": True},
    "learned": {"position": "learned"},
    "modulated": {"context_modulation": True},
    "published": {"position": "learned", "context_modulation": True, "extra_kv": True},
    "narrow": {"mlp_ratio": 2.5, "patch_size": 4},
    "learned_keys": {"context_norm": "keys", "position": "learned", "extra_kv": True},
    "modulated_none": {"context_norm": "none", "context_modulation": True},
    "levers": {"steered_queries": True, "context_norm": "none", "extra_kv": True, "output_channels": 32},
    "levers_keys": {"steered_queries": True, "context_norm": "keys", "output_channels": 32},
    "wide": {"wide_head_depth": 2, "wide_head_width": 512},
}


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Autocast of CPUs leaves LayerNorm and addcmul as they are, and bfloat16 attention there is not the fused one."""
    layer_norm, addcmul = F.layer_norm, torch.addcmul

    def widest(*tensors: Tensor) -> Tensor:
        dtype = torch.float32 if any(x.dtype == torch.float32 for x in tensors) else torch.bfloat16
        return addcmul(*(x.to(dtype) for x in tensors))

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))
    monkeypatch.setattr(torch, "addcmul", widest)
    monkeypatch.setattr(cdit.model.attention, "_fused", fused)


def kept_bytes(cdit: CDiT, contexts: int, goals: int, frames: int) -> int:
    """What a forward pass under autocast keeps, each storage once, without weights."""
    known = {p.untyped_storage().data_ptr() for p in cdit.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> None:  # nothing is unpacked; a tensor kept by its own graph would never be freed
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage

    def keep_inputs(_: object, inputs: tuple) -> None:
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor):
                pack(x)

    if cdit.gradient_checkpointing:  # a block's inputs, also those in lists, are kept for it to be run again
        for block in (*cdit.blocks, *cdit.wide_blocks):
            block.register_forward_pre_hook(keep_inputs)
    sample, context = torch.randn(contexts, goals, 4, 28, 28), torch.randn(contexts, frames, 4, 28, 28)
    scalar = torch.rand(contexts, goals)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        cdit(sample, scalar, {"action": torch.randn(contexts, goals, 3), "time_shift": scalar}, context)
    return sum(storage.nbytes() for storage in kept.values())


def counted(depth: int, contexts: int, goals: int, frames: int, checkpointing: bool = False, **options) -> int:
    """Of a CDiT-S of another depth on 28×28×4 latents; the weights are those of its initialisation."""
    cdit = CDiT((28, 28), 4, frames, **(PRESETS["S"] | {"depth": depth} | options))
    if checkpointing:
        cdit.enable_gradient_checkpointing()
    return kept_bytes(cdit, contexts, goals, frames)


def derived(depth: int, **options) -> CDiT:
    with torch.device("meta"):
        return CDiT((28, 28), 4, 4, **(PRESETS["S"] | {"depth": depth} | options))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(("goals", "frames"), [(1, 4), (4, 2)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_block_keeps_what_was_derived(name, goals, frames):
    """One block more, one context more: what remains are the extra keys, in less than a thousandth."""

    def block(contexts: int) -> int:
        return counted(2, contexts, goals, frames, **OPTIONS[name]) - counted(
            1, contexts, goals, frames, **OPTIONS[name]
        )

    assert block(2) - block(1) == pytest.approx(block_bytes(derived(1, **OPTIONS[name]), frames, goals), rel=1e-3)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_block_of_the_wide_head_keeps_what_was_derived(position):
    found = [
        counted(1, contexts, 2, 3, position=position, wide_head_depth=depth, wide_head_width=512)
        for contexts, depth in ((2, 2), (2, 1), (1, 2), (1, 1))
    ]
    expected = wide_block_bytes(derived(1, position=position, wide_head_depth=1, wide_head_width=512), 2)
    assert found[0] - found[1] - found[2] + found[3] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", ["native", "published", "levers", "levers_keys", "wide"])
def test_the_network_keeps_what_was_derived(name):
    """CDiT-S, four past frames and two goals: within 1 %, which is what lies before the first block."""
    options, shape = OPTIONS[name], {"goals": 2, "frames": 4}
    whole = activation_bytes(derived(12, **options), 4, 2, False)
    assert counted(12, 2, **shape, **options) - counted(12, 1, **shape, **options) == pytest.approx(whole, rel=0.01)
    # A checkpointed forward pass keeps all but the block that is made again in the backward pass.
    model = derived(12, **options)
    again = max(block_bytes(model, 4, 2), wide_block_bytes(model, 2) if model.wide_blocks else 0)
    expected = activation_bytes(model, 4, 2, True) - again
    found = counted(12, 2, checkpointing=True, **shape, **options) - counted(
        12, 1, checkpointing=True, **shape, **options
    )
    assert found == pytest.approx(expected, rel=0.02)
    assert expected < whole / 10


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"qk_norm": True}, r"model\.qk_norm is True: activations are derived for False"),
        ({"norm": "post"}, r"model\.norm is post"),
        ({"dropout": 0.1}, r"model\.dropout is 0\.1"),
        ({"context_depth": 2}, r"model\.context_depth is 2"),
    ],
)
def test_what_was_not_derived_is_named(option, message):
    with pytest.raises(UserError, match=message):
        block_bytes(derived(1, **option), 4, 4)
