import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from cdit.codec import KLCodec, PixelCodec
from cdit.common.frames import to_float, to_uint8
from cdit.data.config import DataConfig, Source
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import case_of, others, spread_cases
from cdit.evaluate.frechet import Features
from cdit.evaluate.methods import METHODS
from cdit.evaluate.metrics import MAX_PSNR, psnr, ssim
from cdit.evaluate.parts import weights_hash
from cdit.evaluate.protocols import Protocol, direct, rollout
from cdit.evaluate.results import Results, summarize
from cdit.evaluate.study import Judge, Study
from cdit.world_model import WorldModel

METRICS = {"psnr": psnr, "ssim": ssim}


class Knowing(nn.Module):
    """Finds the truth if, and only if, it is asked for the right time with the right motion.

    It reads off a frame which one it is, and looks at the poses itself.
    """

    def __init__(self, dataset: WindowDataset):
        super().__init__()
        self.dataset, self.anchor, self.codec = dataset, nn.Parameter(torch.zeros(())), PixelCodec()
        self.description, self.device = SimpleNamespace(has_actions=True), torch.device("cpu")
        self.noises: list[float] = []

    def ahead(self, frame: Tensor, action: Tensor, seconds: float) -> Tensor:
        pixels = to_uint8(frame).float().mean((1, 2))
        number, now = round(float(pixels[0]) / 60) - 1, round(float(pixels[1]) / 8)
        walk, frames = self.dataset.trajectories[number], seconds * 4
        if abs(frames - round(frames)) > 1e-4:
            return torch.zeros_like(frame)
        goal = now + round(frames)
        dx, dy = walk.position[goal] - walk.position[now]
        angle = math.atan2(dy, dx) - walk.yaw[now]
        expected = [math.hypot(dx, dy) * math.cos(angle), math.hypot(dx, dy) * math.sin(angle)]
        turned = abs((float(action[2]) - (walk.yaw[goal] - walk.yaw[now]) + math.pi) % (2 * math.pi) - math.pi)
        right = torch.allclose(action[:2], torch.tensor(expected, dtype=torch.float32), atol=1e-4) and turned < 1e-4
        return to_float(self.dataset.frames.read(number, [goal])[0]) if right else torch.zeros_like(frame)

    def predict(self, context, condition, mask, sampler, generator, latents) -> Tensor:
        assert bool(condition.known.all())
        assert condition.spacing.tolist() == [0.25] * len(context)
        self.noises.append(float(torch.rand((), generator=generator)))
        goals = [list(zip(*pair, strict=True)) for pair in zip(condition.action, condition.time_shift, strict=True)]
        return torch.stack(
            [torch.stack([self.ahead(c[-1], a, float(s)) for a, s in goals[b]]) for b, c in enumerate(context)]
        )

    def rollout(self, context, condition, mask, fps, sampler, generator, reencode, latents) -> Tensor:
        actions = condition.action
        assert condition.time_shift is None
        assert condition.known.shape == actions.shape[:3]
        assert bool(condition.known.all())
        assert condition.spacing.tolist() == [0.25] * len(context)
        self.noises.append(float(torch.rand((), generator=generator)))
        films = []
        for b, past in enumerate(context):
            frame, film = past[-1], []
            for action in actions[b, 0]:
                frame = self.ahead(frame, action, 1 / fps)
                film.append(frame)
            films.append(torch.stack(film)[None])
        return torch.stack(films)


PROTOCOLS = [direct([0.5, 2.0, 4.0], 4.0), rollout([1.0, 4.0], 1.0, 4.0), rollout([0.5, 4.0], 4.0, 4.0)]


def study(protocol: Protocol, dataset: WindowDataset, samples: int = 9, batch_size: int = 4, seed: int = 0) -> Study:
    cases = spread_cases(dataset, max(protocol.offsets), samples, "seconds")
    return Study(protocol, cases, batch_size, pictures=2, seed=seed)


def compute(study: Study, *arguments) -> dict[str, Tensor]:
    parts = [study.compute(batch, *arguments) for batch in range(len(study.batches))]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_whoever_knows_the_world_is_always_right_and_wrong_actions_never(protocol: Protocol, dataset: WindowDataset):
    this = study(protocol, dataset)
    world = Knowing(dataset)
    found = compute(this, world, dataset, Judge(METRICS))
    horizons = len(protocol.seconds)
    assert found["model/psnr"].shape == (9, horizons)
    assert bool((found["model/psnr"] == MAX_PSNR).all())
    assert bool((found["shuffled_actions/psnr"] < 20).all())
    assert "reconstruction/psnr" not in found  # pixels are what they are
    for i, case in enumerate(this.cases):
        frames = dataset.frames.read(case.trajectory, [case.now + round(s * 4) for s in [0, *protocol.seconds]])
        copied = psnr(to_float(frames[:1]).expand(horizons, -1, -1, -1), to_float(frames[1:]))
        torch.testing.assert_close(found["copy_last/psnr"][i], copied)

    # Every batch has a noise of its own, and all methods the same.
    assert world.noises[::2] == world.noises[1::2]
    assert len(set(world.noises)) == len(this.batches) == 3

    rows = summarize(protocol, this.cases, found, seed=0).rows
    chosen = [row for row in rows if (row.method, row.metric) == ("copy_last", "psnr")]
    assert [(row.seconds, row.frames) for row in chosen] == [(s, round(4 * s)) for s in protocol.seconds]
    assert [row.mean for row in chosen] == pytest.approx(found["copy_last/psnr"].mean(0).tolist())
    assert all(row.low < row.mean < row.high for row in chosen)


def test_batches_without_poses_have_all_methods(walks: Path, world: Callable[..., WorldModel], tmp_path: Path):
    """Some datasets of a mix may have none, and windows come dataset after dataset."""
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    write_trajectory(tmp_path / "video", "a", frames)
    write_split(tmp_path / "video", "test", ["a"])
    DatasetInfo("video", fps=4.0, has_actions=False).save(tmp_path / "video")
    mix = [Source(str(walks)), Source(str(tmp_path / "video"))]
    mixed = WindowDataset(DataConfig(mix=mix, image_size=(32, 32), context_frames=3, workers=0), "test")
    model = world()
    model.description.units.spacing = None
    this = study(direct([0.5], 4.0), mixed)
    found = compute(this, model, mixed, Judge({"psnr": psnr}))
    assert mixed.trajectories[this.cases[-1].trajectory].position is None
    assert found["shuffled_actions/psnr"].shape == found["model/psnr"].shape == (len(this.cases), 1)


def test_values_that_are_not_finite_are_read_again(dataset: WindowDataset, tmp_path: Path):
    this = study(direct([0.5], 4.0), dataset, samples=3)
    found = {"model/latents": torch.tensor([[1.0], [math.nan], [2.0]])}
    Results({}, {"time": summarize(this.protocol, this.cases, found, seed=0)}).save(tmp_path)
    again = Results.load(tmp_path).protocols["time"].values("model", "latents", 0.5)
    np.testing.assert_array_equal(again, [1.0, math.nan, 2.0])


def test_the_shown_cases_are_what_was_measured(dataset: WindowDataset):
    this = study(PROTOCOLS[0], dataset)
    found = compute(this, Knowing(dataset), dataset, Judge(METRICS))
    shown = [this.cases[2], this.cases[6]]  # in the middle of each half of nine
    for i, case in enumerate(shown):
        window = dataset.window(case.window, [2, 8, 16])
        for name, tensor in {"context": window.context, "context_mask": window.mask, "truth": window.target}.items():
            assert torch.equal(found[f"shown/{name}"][i], tensor)
    assert torch.equal(found["shown/model"], found["shown/truth"])
    assert len(found["shown/model"]) == 2


def test_each_is_given_the_actions_of_its_other(dataset: WindowDataset):
    this = study(PROTOCOLS[0], dataset)
    asked: list[Tensor] = []

    class Asked(Knowing):
        def predict(self, context, condition, **options) -> Tensor:
            asked.append(condition.action)
            return super().predict(context, condition, **options)

    compute(this, Asked(dataset), dataset, Judge(METRICS))
    shuffled = torch.cat(asked[1::2])
    for i, other in enumerate(others(this.cases)):
        assert this.cases[other].trajectory != this.cases[i].trajectory
        expected = dataset.window(this.cases[other].window, [2, 8, 16]).condition.action
        torch.testing.assert_close(shuffled[i], expected)


def test_each_is_given_the_context_of_its_other(dataset: WindowDataset):
    this = replace(study(PROTOCOLS[2], dataset, samples=5), methods=("model", "shuffled_contexts"))
    this.cases[0] = case_of(dataset, 0)  # its past has begun only just
    asked: list[tuple[Tensor, ...]] = []

    class Asked(Knowing):
        def rollout(self, context, condition, mask, **options) -> Tensor:
            asked.append((context, mask, condition.action))
            return super().rollout(context, condition, mask, **options)

    found = compute(this, Asked(dataset), dataset, Judge(METRICS))
    assert {name.partition("/")[0] for name in found} == {"model", "shuffled_contexts", "shown"}
    contexts, masks, actions = (torch.cat(tensors) for tensors in zip(*asked[1::2], strict=True))
    _, own_masks, own_actions = (torch.cat(tensors) for tensors in zip(*asked[::2], strict=True))
    assert torch.equal(actions, own_actions)
    assert not own_masks.all()
    for i, other in enumerate(others(this.cases)):
        window = dataset.window(this.cases[other].window, [1])
        torch.testing.assert_close(contexts[i], to_float(window.context))
        assert torch.equal(masks[i], window.mask)


def test_a_single_case_has_no_other(dataset: WindowDataset):
    this = replace(study(PROTOCOLS[0], dataset, samples=1), methods=tuple(METHODS))
    found = compute(this, Knowing(dataset), dataset, Judge(METRICS))
    assert {name.partition("/")[0] for name in found} == {"model", "copy_last", "shown"}


def test_actions_are_not_shuffled_for_a_model_without_them(dataset: WindowDataset):
    class Blind(Knowing):
        def predict(self, context, condition, **options) -> Tensor:
            return context[:, -1:].expand(-1, condition.time_shift.shape[1], -1, -1, -1)

    world = Blind(dataset)
    world.description.has_actions = False
    found = compute(study(PROTOCOLS[0], dataset), world, dataset, Judge(METRICS))
    assert {name.partition("/")[0] for name in found} == {"model", "copy_last", "shown"}
    assert torch.equal(found["model/psnr"], found["copy_last/psnr"])


def test_eight_bits():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    for judge in (Judge(METRICS), Judge(METRICS, truncate=True)):
        assert torch.equal(judge.eight_bits(to_float(every)), every)
        extreme = torch.tensor([-1.2, -1.0, 1.0, 1.2]).reshape(1, 1, 1, 4)
        assert judge.eight_bits(extreme).flatten().tolist() == [0, 0, 255, 255]
    between = torch.tensor([100.4, 100.6]).reshape(1, 1, 1, 2) / 127.5 - 1
    assert Judge(METRICS).eight_bits(between).flatten().tolist() == [100, 101]
    assert Judge(METRICS, truncate=True).eight_bits(between).flatten().tolist() == [100, 100]


def test_truncated_predictions_are_measured_truncated(dataset: WindowDataset):
    class Above(Knowing):
        def ahead(self, *arguments) -> Tensor:
            return super().ahead(*arguments) + 0.7 / 127.5  # rounded it is one off, truncated right

    scores = [
        compute(study(PROTOCOLS[0], dataset), Above(dataset), dataset, Judge(METRICS, truncate=truncate))["model/psnr"]
        for truncate in (False, True)
    ]
    torch.testing.assert_close(scores[0], torch.full((9, 3), 20 * math.log10(255)), atol=0.1, rtol=0)
    assert bool((scores[1] == MAX_PSNR).all())


def small_codec() -> KLCodec:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    autoencoder = AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks)
    return KLCodec(autoencoder)


def test_what_the_codec_makes_of_the_truth(dataset: WindowDataset, world: Callable[..., WorldModel]):
    codec = small_codec()
    this = study(PROTOCOLS[2], dataset, samples=3)
    found = compute(this, world(codec), dataset, Judge(METRICS))
    for i, case in enumerate(this.cases):
        truth = to_float(dataset.window(case.window, [2, 16]).target)
        expected = psnr(to_float(to_uint8(codec.decode(codec.encode(truth)))), truth)
        torch.testing.assert_close(found["reconstruction/psnr"][i], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_a_batch_has_the_same_results_wherever_it_is_computed(
    protocol: Protocol, dataset: WindowDataset, world: Callable[..., WorldModel]
):
    this, model, judge = study(protocol, dataset), world(), Judge(METRICS)
    first = [this.compute(batch, model, dataset, judge) for batch in range(3)]
    for batch in (2, 0):
        again = this.compute(batch, model, dataset, judge)
        assert again.keys() == first[batch].keys()
        assert all(torch.equal(again[name], first[batch][name]) for name in again)
    other = study(protocol, dataset, seed=1).compute(0, model, dataset, judge)
    assert not torch.equal(other["model/psnr"], first[0]["model/psnr"])
    assert torch.equal(other["copy_last/psnr"], first[0]["copy_last/psnr"])


def test_features_of_horizons_and_films(dataset: WindowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "class Means(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.mean((-2, -1)).flatten(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    network = Features("my_networks:Means", "fid_network")
    judge = Judge(METRICS, images=network, videos=network)
    assert judge.names == ["psnr", "ssim", "fid", "fvd"]
    this = study(PROTOCOLS[2], dataset)
    found = compute(this, Knowing(dataset), dataset, judge)
    assert found["truth/fid"].shape == (9, 2, 3)
    assert found["truth/fvd"].shape == (9, 16 * 3)
    for i, case in enumerate(this.cases):
        film = to_float(dataset.window(case.window, list(range(1, 17))).target).mean((-2, -1))
        torch.testing.assert_close(found["truth/fvd"][i], film.flatten())
        torch.testing.assert_close(found["truth/fid"][i], film[[1, 15]])
    torch.testing.assert_close(found["model/fid"], found["truth/fid"])
    rows = summarize(this.protocol, this.cases, found, seed=0).rows
    distances = {(row.method, row.metric, row.seconds): row for row in rows if row.metric in ("fid", "fvd")}
    assert {key[1:] for key in distances} == {("fid", 0.5), ("fid", 4.0), ("fvd", 4.0)}
    for (method, *_), row in distances.items():
        assert row.low is row.high is row.values is None
        assert (abs(row.mean) < 1e-6) == (method == "model")
    assert "truth/fvd" not in compute(study(PROTOCOLS[0], dataset), Knowing(dataset), dataset, judge)
    network.min_frames = 17  # one more than there are
    assert "truth/fvd" not in compute(this, Knowing(dataset), dataset, judge)


def test_the_hash_of_weights_sees_every_one(world: Callable[..., WorldModel]):
    assert weights_hash(world()) == weights_hash(world())
    changed = world(small_codec())
    before = weights_hash(changed)
    with torch.no_grad():
        list(changed.codec.parameters())[-1].view(-1)[0] += 1e-3
    after = weights_hash(changed)
    changed.description.fps = 5.0
    assert len({before, after, weights_hash(changed)}) == 3
