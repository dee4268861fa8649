"""Muon against torch.optim.Muon and torch.optim.AdamW, and its state through bad steps and checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cdit.model import CDiT
from cdit.training.config import OptimizerConfig, TrainConfig
from cdit.training.muon import Muon, orthogonalised
from cdit.training.setup import build_optimizer

SHAPES = {"wide": (6, 40), "tall": (40, 6), "square": (16, 16), "again": (16, 16), "fused": (32, 16)}
RATES = (0.1, 0.05, 0.2, 0.1)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(draw(shape, i)) for i, (name, shape) in enumerate(SHAPES.items())}


def vectors() -> list[nn.Parameter]:
    return [nn.Parameter(draw((16,), 20)), nn.Parameter(draw((4, 5), 21))]


def muon(weights: dict[str, nn.Parameter], others: list[nn.Parameter]) -> Muon:
    groups = [
        {"params": [p for name, p in weights.items() if name != "fused"], "weight_decay": 0.3},
        {"params": [weights["fused"]], "splits": 2, "weight_decay": 0.3},
    ]
    return Muon(groups, [{"params": others, "weight_decay": 0.2}], momentum=0.9, lr=0.1, betas=(0.8, 0.95))


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int, rate: float) -> None:
    """A step along gradients that belong to the number of the step, of scales that differ."""
    for i, p in enumerate(parameters):
        p.grad = 10.0 ** (i - 2) * draw(p.shape, 100 * number + i)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def test_matrices_step_as_those_of_torchs_muon():
    """Under a changing rate; the fused matrix as its two halves. Products in bfloat16 are rounded differently."""
    ours, others = matrices(), vectors()
    optimizer = muon(ours, others)
    theirs = matrices()
    halves = [nn.Parameter(half.clone()) for half in theirs.pop("fused").detach().chunk(2)]
    reference = torch.optim.Muon(
        [*theirs.values(), *halves], momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    start = {name: p.detach().clone() for name, p in ours.items()}
    for number, rate in enumerate(RATES):
        step([*ours.values(), *others], optimizer, number, rate)
        for group in reference.param_groups:
            group["lr"] = rate
        for name, p in theirs.items():
            p.grad = ours[name].grad.clone()
        for p, gradient in zip(halves, ours["fused"].grad.chunk(2), strict=True):
            p.grad = gradient.clone()
        reference.step()
    expected = {name: p.detach() for name, p in theirs.items()} | {"fused": torch.cat(halves).detach()}
    for name, p in ours.items():
        moved = (expected[name] - start[name]).norm()
        assert moved > 1
        assert (p.detach() - expected[name]).norm() < 0.01 * moved, name
        assert optimizer.state[p].keys() == {"step", "momentum_buffer"}


def test_all_else_is_adamw_to_the_last_bit():
    ours, weights, theirs = vectors(), matrices(), vectors()
    optimizer = muon(weights, ours)
    reference = torch.optim.AdamW(theirs, betas=(0.8, 0.95), weight_decay=0.2, fused=True)
    for number, rate in enumerate(RATES):
        step([*ours, *weights.values()], optimizer, number, rate)
        step(theirs, reference, number, rate)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_step_with_found_inf_changes_nothing():
    weights, others = matrices(), vectors()
    optimizer, parameters = muon(weights, others), [*weights.values(), *others]
    step(parameters, optimizer, 0, 0.1)

    def everything() -> list[Tensor]:
        return [x.detach().clone() for p in parameters for x in (p, *optimizer.state[p].values())]

    before = everything()
    optimizer.found_inf = torch.ones(())
    for p in parameters:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(everything(), before, strict=True))
    optimizer.found_inf = torch.zeros(())
    step(parameters, optimizer, 1, 0.1)
    assert not any(torch.equal(x, y) for x, y in zip(everything(), before, strict=True) if x.ndim)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_orthogonalised_keeps_singular_vectors_and_sets_values_to_about_one(shape):
    """Of a batch; singular values before from 0.03 to 1."""
    size = min(shape)
    u, _, v = torch.linalg.svd(draw((3, *shape), 1), full_matrices=False)
    values = torch.logspace(-1.5, 0, size).flip(0)
    found = orthogonalised(100 * (u * values) @ v).float()
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.65
    assert singular.max() < 1.3
    turned = u.mT @ found @ v.mT
    off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.05  # bfloat16
    assert turned.diagonal(dim1=-2, dim2=-1).min() > 0.6


def test_hidden_matrices_are_muons_and_the_rest_is_adamws():
    network = CDiT((8, 8), 3, 2, hidden_size=32, depth=2, num_heads=2, context_depth=1, extra_kv=True, qk_norm=True,
                   steered_queries=True, output_channels=4, wide_head_depth=1, wide_head_width=64)  # fmt: skip
    optimizer, _ = build_optimizer({"model": network}, OptimizerConfig(name="muon", momentum=0.8), 10)
    mine = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    hidden = {name for name, p in network.named_parameters() if "momentum" in mine[id(p)]}
    layers = [
        *(f"blocks.{i}.{attention}" for i in (0, 1) for attention in ("self_attn", "cross_attn")),
        "context_blocks.0.attn",
        "wide_blocks.0.attn",
    ]
    expected = {f"{layer}.{matrix}.weight" for layer in layers for matrix in ("q", "kv", "out")}
    expected |= {
        f"{block}.mlp.{matrix}.weight"
        for block in ("blocks.0", "blocks.1", "context_blocks.0", "wide_blocks.0")
        for matrix in ("fc1", "fc2")
    }
    assert hidden == expected
    for name, p in network.named_parameters():
        assert mine[id(p)]["weight_decay"] == (0.01 if p.ndim >= 2 else 0.0)
        if name in hidden:
            assert mine[id(p)]["momentum"] == 0.8
            assert mine[id(p)]["splits"] == (2 if ".kv." in name else 1)


def test_another_name_is_refused(config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        config("--optimizer.name", "moun")
    assert stopped.value.code == 2
    assert "optimizer.name" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_last_bit(train: Callable[..., Path], tmp_path: Path):
    options = ("--optimizer.name", "muon", "--steps", "4", "--validation.every", "4", "--probe.final_samples", "1")
    whole = train(tmp_path / "whole", *options)
    train(tmp_path / "pieces", *options, "--stop_at", "2")
    shutil.rmtree(tmp_path / "pieces/tiny/last")
    pieces = train(tmp_path / "pieces", *options, "--resume", "auto")
    for file in ("model", "average", "optimizer"):
        first, second = (load_file(run / f"checkpoints/step_00000004/{file}.safetensors") for run in (whole, pieces))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file
    momenta = {name for name in first if name.endswith("momentum_buffer")}
    assert len(momenta) == 2 * 8
    assert all(first[name].abs().max() > 0 for name in momenta)
