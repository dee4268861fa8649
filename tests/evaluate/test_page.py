import os
import re
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from cdit.common.pictures import comparison_grid, strip
from cdit.diffusion.config import FlowConfig, PerceptualConfig
from cdit.evaluate.evaluation import trained_on
from cdit.evaluate.page import draw, write_markdown, write_page
from cdit.evaluate.protocols import direct, rollout
from cdit.evaluate.results import ProtocolResult, Results
from cdit.evaluate.tables import Row
from cdit.world_model import WorldDescription

RANDOM = np.random.default_rng(0)


def frames(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.integers(256, size=(*shape, 3, 16, 16), dtype=np.uint8))


def shown(goals: int) -> dict[str, torch.Tensor]:
    found = {"context": frames(2, 3), "truth": frames(2, goals), "model": frames(2, goals)}
    found["context_mask"] = torch.tensor([[False, True, True], [True, True, True]])
    return {f"shown/{name}": value for name, value in found.items()}


def same(file: Path, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(Image.open(file)), np.asarray(image))


def test_a_grid_shows_the_horizons_and_strips_all(tmp_path: Path):
    for rate, past in ((4.0, 3), (1.0, 1)):
        protocol = rollout([1.0, 2.0, 4.0], rate, 4.0)
        found = shown(len(protocol.offsets))
        context, truth, model, mask = (found[f"shown/{name}"] for name in ("context", "truth", "model", "context_mask"))
        draw(protocol, found, tmp_path)
        at = [round(seconds * rate) - 1 for seconds in (1, 2, 4)]
        grid = comparison_grid(context, truth[:, at], model[:, at], ["+1 s", "+2 s", "+4 s"])
        assert same(tmp_path / f"rollout_{rate:g}fps.png", grid)
        for i in range(2):
            expected = strip(context[i][-past:], truth[i], model[i], rate, context_mask=mask[i][-past:])
            assert same(tmp_path / f"rollout_{rate:g}fps_{i}.png", expected)
            with av.open(str(tmp_path / f"rollout_{rate:g}fps_{i}.mp4")) as video:
                existing = int(mask[i][-past:].sum())
                assert len(list(video.decode(video=0))) == existing + len(protocol.offsets)


def test_nothing_to_show(tmp_path: Path):
    assert draw(direct([1.0], 4.0), {}, tmp_path) == {}


def test_names_are_not_taken_for_html(tmp_path: Path):
    config = {"split": "<b>", "data": "a&b", "seed": 0, "mixed_precision": "no", "nwm_compat": False}
    sampler = {"steps": 2, "scheduler": "euler", "guidance": 1.0}
    rows = [Row("model", 1.0, 4, "fid", 12.34), Row("model", 1.0, 4, "psnr", 20.0, None, 19.0, 21.5)]
    result = ProtocolResult("time", 4.0, [("x", 1), ("y", 1)], rows)
    results = Results({"checkpoint": "<script>", "config": config, "sampler": sampler}, {"time": result})
    write_page(results, {"time": {"it's <i>": tmp_path / "pictures" / "a.png"}}, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert not re.search("<script>|<b>|<i>|a&b", page)
    assert 'src="pictures/a.png"' in page
    assert "<td>12.3</td>" in page
    assert "<td>20.00 ± 1.25</td>" in page
    assert "FID and FVD of these 2 samples" in page


def test_a_metric_that_was_trained_on_is_named():
    config = {"split": "test", "data": "x", "seed": 0, "mixed_precision": "no", "nwm_compat": False}
    sampler = {"steps": 2, "scheduler": "euler", "guidance": 1.0}
    for flow, named in (
        (FlowConfig(), None),
        (FlowConfig(perceptual=PerceptualConfig(0.1)), "LPIPS,"),
        (FlowConfig(perceptual=PerceptualConfig(0.1, "vgg")), "LPIPS_VGG,"),
    ):
        about = {"checkpoint": "run", "config": config, "sampler": sampler}
        about["trained_on"] = trained_on(WorldDescription((8, 8), 4.0, flow=flow))
        text = write_markdown(Results(about, {}), Path(os.devnull))
        assert ("trained on" in text) is (named is not None)
        assert named is None or named in text
