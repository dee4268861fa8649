"""How few steps do: against a flow that is known in closed form, and as a command."""

import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import alexnet
from tqdm import tqdm

from cdit.codec import PixelCodec
from cdit.common.cli import run
from cdit.common.errors import UserError
from cdit.common.randomness import generator
from cdit.data.windows import WindowDataset
from cdit.diffusion import DDPMConfig, FlowConfig, SamplerConfig
from cdit.evaluate.config import TimeConfig
from cdit.evaluate.evaluation import build_studies
from cdit.evaluate.study import Judge
from cdit.model import CDiT
from cdit.studies import steps
from cdit.studies.__main__ import main
from cdit.studies.config import GridConfig, ReferenceConfig, StepsConfig
from cdit.studies.steps import measure, settings
from cdit.world_model import WorldDescription, WorldModel

SIDE, FPS = 32, 4.0
MEAN, SPREAD = 141 / 127.5 - 1, 0.2  # the mean is a number of 8 bits


class GaussianField(nn.Module):
    """The velocity of a flow from noise to pixels that are N(MEAN, SPREAD²), each by itself: linear in x."""

    def __init__(self):
        super().__init__()
        self.anchor, self.dtype, self.can_push = nn.Parameter(torch.zeros(())), torch.float32, False
        self.config = SimpleNamespace(
            max_context=3, in_channels=3, image_size=(SIDE, SIDE), context_noise=0.0, action_size=3
        )
        self.config.reprojection, self.conditioners = False, nn.ModuleDict()

    def encode_context(self, frames: Tensor, mask: Tensor | None) -> SimpleNamespace:
        return SimpleNamespace(batch=len(frames))

    def forward(self, noisy: Tensor, timesteps: Tensor, *_, **__) -> Tensor:
        t = timesteps[..., None, None, None] / 1000
        return slope(t) * (noisy - (1 - t) * MEAN) - MEAN


def slope(t):
    """E[ε - x0 | x_t] = slope·(x_t - (1 - t)·MEAN) - MEAN, by the covariance of ε - x0 with x_t."""
    return (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2)


def left_of_noise(scheduler: str, count: int, shift: float) -> float:
    """What a solver makes of noise ε is MEAN + this·ε; the exact solution is SPREAD."""
    times = np.linspace(1, 0, count + 1)
    times = shift * times / (1 + (shift - 1) * times)
    left = 1.0
    for now, then in pairwise(times):
        euler = left + (then - now) * slope(now) * left
        last = then == 0  # where diffusers' Heun takes an Euler step
        if scheduler == "euler" or last:
            left = euler
        else:
            left += (then - now) * (slope(now) * left + slope(then) * euler) / 2
    return left


def error(prediction: Tensor, truth: Tensor) -> Tensor:
    return (prediction - truth).square().mean((1, 2, 3))


TRIED = [
    ("euler", 200, 1.0), ("euler", 1, 1.0), ("euler", 2, 1.0), ("euler", 4, 3.0), ("heun", 4, 1.0), ("heun", 3, 2.0),
]  # fmt: skip


def test_errors_are_those_of_the_solvers_on_a_known_flow(dataset: WindowDataset):
    description = WorldDescription((SIDE, SIDE), FPS, flow=FlowConfig(prediction="velocity"))
    world = WorldModel(GaussianField(), PixelCodec(), description).eval()
    config = StepsConfig(checkpoint="", data="", out="", time=TimeConfig([0.5, 2.0], 5), batch_size=3, seed=7)
    (study,) = build_studies(config.evaluation, world, dataset)
    judge = Judge({"lpips": error, "psnr": lambda prediction, truth: (prediction - truth).mean((1, 2, 3))})
    samplers = [SamplerConfig(*values) for values in TRIED]
    batches = [measure(i, study, world, dataset, judge, samplers, tqdm(disable=True)) for i in range(2)]
    found = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    # The same noise for all settings, another for each batch, case and horizon.
    noise = torch.cat([torch.randn(n, 2, 3, SIDE, SIDE, generator=generator(7, i)) for i, n in enumerate((3, 2))])
    cases = [dataset.window(case.window, [2, 8]).target for case in study.cases]
    truth = torch.stack(cases).double() / 127.5 - 1
    left = [left_of_noise(*values) for values in TRIED]
    assert abs(left[0] - SPREAD) < 0.01  # the reference is near the exact solution
    assert left[1] == pytest.approx(0, abs=1e-9)  # one Euler step leads to the mean
    for i in range(len(TRIED)):
        frames = MEAN + left[i] * noise.double()
        expected = {
            "lpips": (frames - truth).square(),
            "psnr": frames - truth,
            "lpips_to_reference": ((left[i] - left[0]) * noise.double()).square(),
        }
        for name, values in expected.items():  # but for 8 bits
            torch.testing.assert_close(found[f"{i}/{name}"].double(), values.mean((2, 3, 4)), atol=1e-4, rtol=1e-3)
    assert found["0/lpips_to_reference"].abs().max() == 0
    assert [int(found[f"{i}/calls"][0]) for i in range(len(TRIED))] == [200, 1, 2, 4, 7, 5]


@pytest.fixture
def compare(
    walks: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process, with results in the folder "out"."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = alexnet(weights=None).features.state_dict()
    save_file({f"features.{name}": tensor for name, tensor in weights.items()}, "alexnet.safetensors")
    monkeypatch.setenv("CDIT_LPIPS_BACKBONE", "alexnet.safetensors")

    def call(*options: str, checkpoint: Path = checkpoint) -> SimpleNamespace:
        always = ["--checkpoint", str(checkpoint), "--data", str(walks), "--out", "out", "--device", "cpu"]
        short = ["--time.samples", "7", "--batch_size", "4", "--reference.steps", "12"]
        monkeypatch.setattr(sys, "argv", ["studies", "steps", *always, *short, *options])
        code = 0
        try:
            run(main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call


def test_what_it_leaves(compare: Callable, monkeypatch: pytest.MonkeyPatch):
    forward, batches = CDiT.forward, []

    def noted(self: CDiT, noisy: Tensor, *arguments, **options) -> Tensor:
        batches.append(len(noisy))
        return forward(self, noisy, *arguments, **options)

    monkeypatch.setattr(CDiT, "forward", noted)
    done = compare("--sampler.steps", "[1,3,12]", "--sampler.shift", "[1,2]")
    assert done.code == 0, done.err
    found = json.loads(Path("out/results.json").read_text())
    tried = {(one["sampler"]["scheduler"], one["sampler"]["steps"], one["sampler"]["shift"]): one
             for one in found["settings"]}  # fmt: skip
    schedulers = ("euler", "heun", "dpm", "unipc")
    assert tried.keys() == {(name, count, shift) for name in schedulers for count in (1, 3, 12) for shift in (1, 2)}
    assert len(found["settings"]) == len(tried)  # the reference, 12 steps of Euler, is there once
    for (name, count, _), one in tried.items():
        assert one["calls"] == (2 * count - 1 if name == "heun" else count)
        assert one["share"] == pytest.approx(one["calls"] / 12)
    calls = sum(one["calls"] for one in tried.values())
    assert sorted(batches) == [3] * calls + [4] * calls  # seven cases, four at a time
    reference = tried["euler", 12, 1]["lpips_to_reference"]
    assert reference == {"mean": 0, "low": 0, "high": 0}
    assert all(one["lpips_to_reference"]["mean"] > 0 for key, one in tried.items() if key != ("euler", 12, 1))
    # With one step all schedulers but one of another first sigma say the same.
    assert tried["heun", 1, 2]["lpips"] == tried["euler", 1, 1]["lpips"]
    text = Path("out/results.md").read_text()
    assert text in done.out
    one = tried["heun", 3, 2]["lpips"]
    assert re.search(
        rf"\| heun \| 3 \| 5 \| 41.7% \| .* \| \**{one['mean']:.3f} ± {(one['high'] - one['low']) / 2:.3f}\** \|", text
    )
    assert Path("out/steps.png").read_bytes()[:4] == b"\x89PNG"

    # The same command draws anew, and computes nothing; another one is refused.
    batches.clear()
    assert compare("--sampler.steps", "[1,3,12]", "--sampler.shift", "[1,2]").code == 0
    assert not batches
    assert json.loads(Path("out/results.json").read_text()) == found
    other = compare("--sampler.steps", "[1,3]", "--sampler.shift", "[1,2]")
    assert (other.code, batches) == (2, [])
    assert "parts of another evaluation (other settings)" in other.err


def test_an_interrupted_study_goes_on(compare: Callable, monkeypatch: pytest.MonkeyPatch):
    options = ("--sampler.steps", "[2]", "--sampler.scheduler", "[dpm]")
    batches, whole = [], steps.measure

    def stops(batch: int, *arguments) -> dict[str, Tensor]:
        batches.append(batch)
        if batches == [0, 1]:
            raise KeyboardInterrupt
        return whole(batch, *arguments)

    monkeypatch.setattr(steps, "measure", stops)
    assert compare(*options).code == 130
    assert not Path("out/results.json").exists()
    assert compare(*options).code == 0
    assert batches == [0, 1, 1]


def test_a_ddpm(compare: Callable, tmp_path: Path):
    torch.manual_seed(0)
    cdit = CDiT((SIDE, SIDE), max_context=3, in_channels=3, patch_size=8, hidden_size=16, depth=1, num_heads=2)
    own = SamplerConfig("ddpm", 4)
    description = WorldDescription(
        (SIDE, SIDE), FPS, objective="ddpm", ddpm=DDPMConfig(learn_variance=False), sampler=own
    )
    WorldModel(cdit, PixelCodec(), description).save_pretrained(tmp_path / "ddpm")
    done = compare("--sampler.steps", "[1,3]", checkpoint=tmp_path / "ddpm")
    assert done.code == 0, done.err
    found = json.loads(Path("out/results.json").read_text())
    assert found["reference"] == {
        "scheduler": "ddim",
        "steps": 12,
        "shift": 1.0,
        "guidance": 1.0,
        "context_noise": 0.0,
        "hold": 1,
    }
    calls = {(one["sampler"]["scheduler"], one["calls"]) for one in found["settings"]}
    assert calls == {("ddim", 12), *((name, n) for name in ("ddpm", "ddim", "dpm", "unipc") for n in (1, 3))}
    assert "| LPIPS to the truth ↓ | steps | network calls | of the reference | mean |" in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler.scheduler", "[ddim]"], "sampler.scheduler is ddim, expected one of euler, heun, dpm, unipc"),
        (["--sampler.scheduler", "[]"], "sampler.scheduler is [], expected at least one"),
        (["--sampler.steps", "[4,0]"], "sampler.steps is 0, expected more than 0"),
        (["--sampler.steps", "[2,2]"], "sampler.steps is [2, 2], expected at least one, each of them once"),
        (["--sampler.shift", "[-1]"], "sampler.shift is -1.0, expected more than 0"),
        (["--reference.steps", "0"], "reference.steps is 0, expected more than 0"),
        (["--reference.scheduler", "ddim"], "reference: sampler.scheduler is ddim, expected one of euler"),
        (["--reference.scheduler", "ddpm"], "reference.scheduler"),
        (["--time.samples", "1"], "time: the cases are of one trajectory"),
        (["--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_what_cannot_be_compared(compare: Callable, options: list[str], message: str):
    done = compare(*options)
    assert done.code == 2
    assert message in done.err
    assert not Path("out").exists()


def settings_of(objective: str, reference: ReferenceConfig = ReferenceConfig(), **grid) -> list[tuple]:  # noqa: B008
    config = StepsConfig(checkpoint="", data="", out="", sampler=GridConfig(**grid), reference=reference)
    own = SamplerConfig("ddpm" if objective == "ddpm" else "euler", 5, guidance=1.0)
    description = WorldDescription((SIDE, SIDE), FPS, objective=objective, sampler=own)
    return [(one.scheduler, one.steps, one.shift) for one in settings(config, description)]


def test_a_ddpm_has_settings_of_its_own():
    found = settings_of("ddpm", steps=[2, 250])
    assert found[0] == ("ddim", 250, 1.0)
    assert sorted(found) == sorted((name, n, 1.0) for name in ("ddpm", "ddim", "dpm", "unipc") for n in (2, 250))
    for grid, message in (
        ({"scheduler": ["heun"]}, "sampler.scheduler is heun, expected one of ddpm, ddim, dpm, unipc for a ddpm"),
        ({"scheduler": ["ddim"], "steps": [1000]}, "sampler.steps is 1000, expected at most 999 with ddim"),
        ({"shift": [2.0]}, r"sampler.shift is \[2.0\], but the model is a ddpm"),
    ):
        with pytest.raises(UserError, match=message):
            settings_of("ddpm", **grid)


def test_few_step_objectives_are_flows():
    """An average velocity may be shifted, that of a shortcut not."""
    flows, shifts = {"euler", "heun", "dpm", "unipc"}, {0.5, 1.0, 2.0, 3.0}
    for objective, own in (("shortcut", {1.0}), ("mean_flow", shifts), ("self_rollout", set())):
        found = settings_of(objective, steps=[2])
        assert found[0] == ("euler", 250, 1.0)
        names = flows | ({"average"} if own else set())
        expected = {(name, shift) for name in names for shift in (own if name == "average" else shifts)}
        assert {(name, shift) for name, _, shift in found[1:]} == expected
    for order in (["average", "unipc"], ["unipc", "average"]):
        assert settings_of("shortcut", scheduler=order, steps=[2])[0] == ("euler", 250, 1.0)
    assert ("average", 2, 3.0) in settings_of("mean_flow", steps=[2], shift=[3.0])
    with pytest.raises(UserError, match=r"sampler\.shift is 3.0, expected 1 for a shortcut"):
        settings_of("shortcut", shift=[3.0])


def test_by_default_a_flow_is_sampled_by_all_there_is():
    found = settings_of("flow")
    assert found[0] == ("euler", 250, 1.0)
    assert len(found) == 1 + 4 * 6 * 4
    assert {scheduler for scheduler, *_ in found} == {"euler", "heun", "dpm", "unipc"}
