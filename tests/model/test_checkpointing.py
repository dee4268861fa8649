"""Activation checkpointing: the same numbers from less memory."""

from functools import partial

import pytest
import torch
from dialects import DIALECTS, batch, build, call, masks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdit.model import CDiT
from cdit.model.attention import MultiHeadAttention

D, PATCHES = 32, 6  # of the small networks


def enable(model: CDiT) -> CDiT:
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    return model


def gradients(
    model: nn.Module, inputs: dict[str, Tensor | None], bfloat16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and every parameter's gradient of a loss in which all outputs matter differently."""
    torch.manual_seed(7)  # what dropout draws from
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = call(model, **inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    (weights * out.float() + 0.1 * out.float().square()).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To the last bit; gradients that are all zero would prove nothing."""
    assert torch.equal(first[0], second[0])
    for (name, one), other in zip(first[1].items(), second[1].values(), strict=True):
        assert torch.equal(one, other), name
        assert one.abs().max() > 0, name


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_outputs_and_gradients_are_bit_equal(dialect, bfloat16):
    model, data = build(dialect, dropout=0.3).train(), batch() | masks()
    if model.config.context_noise:
        data["noise_level"] = torch.full((2, 3), 0.3)
    plain = gradients(model, data, bfloat16)
    assert_equal(plain, gradients(enable(model), data, bfloat16))
    model.disable_gradient_checkpointing()
    assert_equal(plain, gradients(model, data, bfloat16))


@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_a_context_encoded_beforehand_has_its_gradient(dialect):
    model, data = build(dialect), batch()
    frames = data.pop("context").requires_grad_()

    def context_gradient() -> Tensor:
        frames.grad = None
        call(model, **data, context=model.encode_context(frames)).square().sum().backward()
        return frames.grad

    expected = context_gradient()
    enable(model)
    assert torch.equal(context_gradient(), expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("dialect", ["native", "encoder", "nwm", "levers"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_too(dialect):
    """As dynamo traces it and autograd is made ahead of time; the kernels are then those of the bare network."""
    model, data = build(dialect, dropout=0.3).train(), batch() | masks()
    torch._dynamo.reset()
    plain = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), data)
    enable(model)
    torch._dynamo.reset()
    assert_equal(plain, gradients(torch.compile(model, backend="aot_eager", fullgraph=True), data))


def saved_bytes(model: CDiT, data: dict[str, Tensor | None]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding them keeps an address from being given out twice

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(model, **data)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(("contexts", "goals", "frames"), [(2, 3, 3), (1, 1, 2)])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_block_keeps_its_input_and_nothing_else(dialect, contexts, goals, frames):
    """Keys and values of the context are not kept, nor tokens once per block: one block more is one input more."""

    def kept(depth: int, context_depth: int, checkpointing: bool) -> int:
        model = build(dialect, depth=depth, context_depth=context_depth)
        if checkpointing:
            enable(model)
        return saved_bytes(model, batch(contexts, goals, frames) | masks(contexts, goals, frames))

    block_input, frame_input = 4 * contexts * goals * PATCHES * D, 4 * contexts * frames * PATCHES * D
    assert kept(3, 1, True) - kept(2, 1, True) == block_input
    assert kept(2, 2, True) - kept(2, 1, True) == frame_input
    assert kept(3, 1, False) - kept(2, 1, False) > 10 * block_input
    assert kept(2, 2, False) - kept(2, 1, False) > 10 * frame_input


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sampling_keeps_its_cached_context(dialect):
    """Without gradients nothing is made anew: keys and values once per context, each attention once per call."""
    model, data = enable(build(dialect)), batch() | masks()
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.observer = lambda observation: seen.append(observation.weights())
    with torch.no_grad():
        cache = model.encode_context(data["context"], data["context_mask"])
        watched = call(model, **data)
    assert len(cache.parts[0].keys_values) == (0 if model.config.context_modulation else 2)
    once = model.config.wide_head_depth + 4
    assert len(seen) == 2 * model.config.context_depth + once  # the context is encoded twice here

    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.observer = None
    model.disable_gradient_checkpointing()
    assert torch.equal(call(model, **data), watched)


@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_attention_watched_in_training_is_the_same(dialect):
    def watched(model: CDiT) -> tuple[list[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        seen: list[Tensor] = []
        for block in model.blocks:
            block.cross_attn.observer = lambda observation: seen.append(observation.weights().detach())
        return seen, gradients(model, batch() | masks())

    plain_seen, plain = watched(build(dialect))
    seen, checkpointed = watched(enable(build(dialect)))
    assert_equal(plain, checkpointed)
    # The backward pass runs the blocks again, last one first, and what is watched then is the same.
    assert len(seen) == 2 * len(plain_seen) == 4
    for again, index in zip(seen, (0, 1, 1, 0), strict=True):
        assert torch.equal(again, plain_seen[index])
