"""The network compiles as one graph, as it samples and as it trains, to what it is uncompiled."""

import pytest
import torch
from dialects import batch, build, call, masks

from cdit.model import CDiT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: CDiT, backend: str):
    """Raises where a graph would break."""
    return torch.compile(model.forward, fullgraph=True, backend=backend)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", ["native", "modulated_rotary", "levers", "steered_sink"])
@torch.no_grad()
def test_a_cached_context_of_one_part_and_of_two(dialect, masked):
    model, data, mask = build(dialect), batch(), masks()
    network = compiled(model, "eager")
    cache = model.encode_context(data.pop("context"), mask["context_mask"] if masked else None)
    told = mask["action_mask"] if masked else None
    for parts in (1, 2):
        assert len(cache.parts) == parts
        expected = call(model, **data, context=cache, action_mask=told)
        torch.testing.assert_close(call(network, **data, context=cache, action_mask=told), expected, atol=1e-6, rtol=0)
        cache = model.push_context(cache, torch.randn(6, 2, 4, 6, generator=torch.Generator().manual_seed(2)))


@torch.no_grad()
def test_a_cached_context_of_the_published_dialect():
    model, data = build("nwm"), batch()
    cache = model.encode_context(data.pop("context"), masks()["context_mask"])
    torch.testing.assert_close(
        call(compiled(model, "eager"), **data, context=cache), call(model, **data, context=cache)
    )


@pytest.mark.parametrize("dialect", ["native", "nwm", "levers", "modulated_levers"])
def test_training_with_its_gradients(dialect):
    model, data = build(dialect).train(), batch() | masks()
    found = []
    for network in (model, compiled(model, "aot_eager")):
        model.zero_grad()
        out = call(network, **data)
        out.square().sum().backward()
        found.append([out, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_gradients_through_two_parts():
    """Of the frames that candidates share and of their own."""
    model, data = build("native"), batch()
    shared = data.pop("context").requires_grad_()
    own = torch.randn(6, 2, 4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = []
    for network in (model, compiled(model, "aot_eager")):
        cache = model.push_context(model.encode_context(shared), own)
        assert len(cache.parts) == 2
        found.append(torch.autograd.grad(call(network, **data, context=cache).square().sum(), (shared, own)))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    window = torch.cat((shared.repeat_interleave(3, 0)[:, 1:], own[:, None]), dim=1)
    goals = {name: x.flatten(0, 1) for name, x in data.items()}
    alone = torch.autograd.grad(call(model, **goals, context=window).square().sum(), (shared, own))
    torch.testing.assert_close(found[0], alone, atol=1e-4, rtol=1e-4)
