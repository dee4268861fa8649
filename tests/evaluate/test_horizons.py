from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cdit.codec import PixelCodec
from cdit.common.pictures import to_float
from cdit.diffusion import SamplerConfig
from cdit.evaluate.horizons import evaluate_horizons
from cdit.evaluate.metrics import MAX_PSNR, psnr, ssim
from cdit.evaluate.tables import markdown
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel

METRICS = {"psnr": psnr, "ssim": ssim}
B, T, G, H, W = 5, 2, 3, 16, 16


class Fake(nn.Module):
    """A world whose prediction is a function of context, actions and time shift."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.anchor = answer, nn.Parameter(torch.zeros(()))
        self.description = SimpleNamespace(fps=4.0)

    def predict(self, context, actions, time_shift, context_mask, action_mask, spacing, sampler, generator) -> Tensor:
        return self.answer(context, actions, time_shift)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (B, T + G, 3, H, W), generator=random, dtype=torch.uint8)
    frames = frames.float().mean(dim=2, keepdim=True).expand(-1, -1, 3, -1, -1).byte()
    return {
        "context": frames[:, :T],
        "context_mask": torch.ones(B, T, dtype=torch.bool),
        "target": frames[:, T:],
        "action": torch.randn(B, G, 3, generator=random),
        "action_mask": torch.ones(B, G, dtype=torch.bool),
        "time_shift": torch.tensor([0.25, 0.5, 2.0]).expand(B, G).clone(),
        "spacing": torch.ones(B),
    }


def all_knowing(batch: dict[str, Tensor]) -> Fake:
    """Finds the truth by context and action."""

    def answer(context: Tensor, actions: Tensor, time_shift: Tensor) -> Tensor:
        def find(b: int, g: int) -> Tensor:
            known_context = (to_float(batch["context"]) == context[b]).flatten(1).all(1)
            known_action = (batch["action"][:, g] == actions[b, g]).all(1)
            both = (known_context & known_action).nonzero()
            return to_float(batch["target"][int(both), g]) if len(both) else torch.zeros(3, H, W)

        return torch.stack([torch.stack([find(b, g) for g in range(G)]) for b in range(len(context))])

    return Fake(answer)


def test_the_truth_scores_perfectly_and_wrong_conditions_lose(batch: dict[str, Tensor]):
    result = evaluate_horizons(all_knowing(batch), batch, METRICS, seed=0)
    assert result.mean("model", "psnr") == [MAX_PSNR] * G
    assert result.mean("model", "ssim") == pytest.approx([1] * G)
    assert torch.equal(result.predictions, to_float(batch["target"]))
    for method in ("shuffled_actions", "shuffled_contexts"):  # every sample got another's
        worst = [float(row.values.max()) for row in result.rows if (row.method, row.metric) == (method, "psnr")]
        assert max(worst) < 20


def test_copy_last_is_the_last_context_frame(batch: dict[str, Tensor]):
    result = evaluate_horizons(all_knowing(batch), batch, METRICS, seed=0)
    last, target = to_float(batch["context"][:, -1]), to_float(batch["target"])
    rows = {(row.seconds, row.metric): row for row in result.rows if row.method == "copy_last"}
    for goal, (seconds, frames) in enumerate([(0.25, 1), (0.5, 2), (2.0, 8)]):
        for name, metric in METRICS.items():
            row = rows[seconds, name]
            assert row.frames == frames
            torch.testing.assert_close(row.values, metric(last, target[:, goal]))
            assert row.mean == pytest.approx(float(row.values.mean()))


def test_a_model_that_ignores_actions_does_not_lose_by_wrong_ones(batch: dict[str, Tensor]):
    fake = Fake(lambda context, actions, time_shift: context[:, -1:] * (1 - 0.1 * time_shift[..., None, None, None]))
    result = evaluate_horizons(fake, batch, METRICS, seed=0)
    for metric in METRICS:
        assert result.mean("shuffled_actions", metric) == result.mean("model", metric)
        assert result.mean("shuffled_contexts", metric) != result.mean("model", metric)


def test_masks_stay_with_what_they_mask(batch: dict[str, Tensor]):
    """Samples without history and actions that are unknown, wherever they are shuffled to."""
    batch["context_mask"][:2, 0] = False
    batch["action_mask"][1, 0] = batch["action_mask"][4, 1:] = False
    seen = []

    class Looking(Fake):
        def predict(self, context, actions, time_shift, context_mask, action_mask, **options) -> Tensor:
            call = []
            for b in range(len(context)):
                whose = int((to_float(batch["context"]) == context[b]).flatten(1).all(1).nonzero())
                assert torch.equal(context_mask[b], batch["context_mask"][whose])
                whose_actions = int((batch["action"] == actions[b]).flatten(1).all(1).nonzero())
                assert torch.equal(action_mask[b], batch["action_mask"][whose_actions])
                call.append((whose, whose_actions))
            seen.append(call)
            return context[:, -1:].expand(-1, G, -1, -1, -1)

    evaluate_horizons(Looking(None), batch, METRICS, seed=0, chunk=2)
    own, actions, contexts = (list(chain(*seen[method::3])) for method in range(3))
    assert len(own) == len(actions) == len(contexts) == B
    assert own == [(b, b) for b in range(B)]
    assert all(context == b != other for b, (context, other) in enumerate(actions))
    assert all(context != b == other for b, (context, other) in enumerate(contexts))


def test_methods_that_cannot_be(batch: dict[str, Tensor]):
    def methods(batch: dict[str, Tensor]) -> set[str]:
        return {row.method for row in evaluate_horizons(fake, batch, METRICS, seed=0).rows}

    fake = Fake(lambda context, actions, time_shift: context[:, -1:].expand(-1, G, -1, -1, -1))
    unknown = batch | {"action_mask": torch.zeros(B, G, dtype=torch.bool)}
    assert methods(unknown) == {"model", "copy_last", "shuffled_contexts"}
    assert methods({key: value[:1] for key, value in batch.items()}) == {"model", "copy_last"}
    batch["time_shift"][2, 1] = 0.75
    with pytest.raises(ValueError, match="same horizons"):
        methods(batch)


@pytest.fixture
def world() -> WorldModel:
    torch.manual_seed(0)
    cdit = CDiT((H, W), max_context=T, patch_size=8, hidden_size=16, depth=1, num_heads=2)
    for parameter in cdit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return WorldModel(cdit, PixelCodec(), WorldDescription((H, W), 4.0, sampler=SamplerConfig(steps=2))).eval()


def test_a_world_model_with_the_same_noise_in_every_chunk_and_method(world: WorldModel, batch: dict[str, Tensor]):
    whole = evaluate_horizons(world, batch, METRICS, seed=3)
    parts = evaluate_horizons(world, batch, METRICS, seed=3, chunk=2)
    other = evaluate_horizons(world, batch, METRICS, seed=4)
    torch.testing.assert_close(parts.predictions, whole.predictions)
    assert not torch.allclose(other.predictions, whole.predictions)
    # With all samples alike the shuffled rows differ from the model's by their noise alone: not at all.
    alike = {key: value[:1].expand_as(value).clone() for key, value in batch.items()}
    result = evaluate_horizons(world, alike, METRICS, seed=3, chunk=2)
    assert result.mean("shuffled_actions", "psnr") == pytest.approx(result.mean("model", "psnr"))
    assert result.mean("shuffled_contexts", "psnr") == pytest.approx(result.mean("model", "psnr"))


def test_markdown(batch: dict[str, Tensor]):
    table = markdown(evaluate_horizons(all_knowing(batch), batch, METRICS, seed=0).rows)
    assert table.startswith(
        "| PSNR ↑ | 0.25 s | 0.5 s | 2 s |\n| --- | ---: | ---: | ---: |\n| model | 100.00 | 100.00 |"
    )
    assert "| SSIM ↑ |" in table
    assert table.count("| last context frame |") == 2
