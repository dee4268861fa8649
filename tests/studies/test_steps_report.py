"""Which setting is recommended, and that table and picture say what was found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cdit.diffusion import SamplerConfig
from cdit.studies.steps_report import Findings, conclusion, panels, summarize, tables, write

CASES, WALKS = 120, 12
SETTINGS = {  # LPIPS less that of the best, its standard deviation from walk to walk, and calls
    ("euler", 100, 1.0): (0.004, 0.0005, 100),
    ("heun", 8, 1.0): (0.0, 0.0, 15),
    ("dpm", 8, 2.0): (0.0005, 0.004, 8),
    ("euler", 8, 1.0): (0.0004, 0.004, 8),
    ("unipc", 8, 1.0): (0.0002, 0.00005, 8),
    ("euler", 4, 1.0): (0.01, 0.002, 4),
    ("euler", 1, 1.0): (0.3, 0.01, 1),
}


@pytest.fixture
def findings() -> Findings:
    """Walks differ by far more than settings do; two horizons of a case differ, too."""
    random = np.random.default_rng(5)
    walk = np.repeat(np.arange(WALKS), CASES // WALKS)
    difficulty = 0.4 + 0.1 * random.normal(size=WALKS)[walk]
    found = {}
    for i, (mean, spread, calls) in enumerate(SETTINGS.values()):
        change = random.normal(size=WALKS)
        change = mean + spread * (change - change.mean()) / change.std()
        lpips = difficulty + change[walk]
        found[f"{i}/lpips"] = torch.tensor(np.stack([lpips - 0.05, lpips + 0.05], axis=1))
        found[f"{i}/psnr"] = torch.tensor(np.stack([20 - lpips, 20 - lpips], axis=1)) - i
        found[f"{i}/lpips_to_reference"] = torch.full((CASES, 2), 0.01 * i)
        found[f"{i}/calls"] = torch.full((CASES,), calls)
    samplers = [SamplerConfig(*key) for key in SETTINGS]
    return summarize(samplers, found, [f"walk {number}" for number in walk], seed=0)


def test_the_fewest_calls_that_are_not_told_apart_from_the_best(findings: Findings):
    # Four steps are worse by 0.01, which only pairs can tell: the interval of a mean is ± 0.06. With eight calls two
    # settings are indistinguishable from the best; a third one is not, but nearer to it than they are.
    assert findings.best.name == "8 steps of heun"
    assert findings.enough.name == "8 steps of euler"
    assert findings.recommended.name == "8 steps of unipc"
    assert findings.recommended.behind.low > 0
    assert findings.share(findings.recommended) == 0.08
    by_name = {one.name: one for one in findings.settings}
    for (mean, spread, _), one in zip(SETTINGS.values(), findings.settings, strict=True):
        assert one.behind.mean == pytest.approx(mean, abs=1e-9)
        half = 1.96 * spread / WALKS**0.5
        assert one.behind.low == pytest.approx(mean - half, abs=0.3 * half + 1e-9)
        assert one.behind.high == pytest.approx(mean + half, abs=0.3 * half + 1e-9)
    assert by_name["4 steps of euler"].lpips.low < findings.best.lpips.mean
    text = conclusion(findings)
    assert "indistinguishable from the best: 8 (8 steps of euler, +0.0004 [" in text
    assert "**8 steps of unipc** (8 network calls, 8.0% of the reference's; +0.0002 [+0.000" in text
    assert "by PSNR: 100 steps of euler (100 network calls)" in text


def test_the_best_is_recommended_where_all_of_fewer_calls_are_worse(findings: Findings):
    alone = Findings(CASES, WALKS, [one for one in findings.settings if one.calls != 8])
    assert alone.recommended is alone.enough is alone.best


def test_tables(findings: Findings):
    lpips, behind, psnr, reference = tables(findings).split("\n\n")
    assert lpips.splitlines()[0].endswith("| steps | network calls | of the reference | shift 1 | shift 2 |")
    mean = findings.settings[6].lpips
    half = (mean.high - mean.low) / 2
    assert f"| euler | 1 | 1 | 1.0% | {mean.mean:.3f} ± {half:.3f} |  |" in lpips
    assert "| heun | 8 | 15 | 15.0% | +0.000 [+0.000, +0.000] |  |" in behind
    assert "| euler | 100 | 100 | 100.0% | 0.000 ± 0.000 |  |" in reference
    for table in (lpips, behind, psnr, reference):
        (bold,) = (line for line in table.splitlines() if "**" in line)
        assert bold.startswith("| unipc | 8 | 8 |")


def test_lines_of_the_picture(findings: Findings):
    truth, reference = ({line.label: line for line in lines} for lines in panels(findings).values())
    assert truth.keys() == {"euler, shift 1", "heun, shift 1", "dpm, shift 2", "unipc, shift 1", "recommended"}
    assert truth["euler, shift 1"].x == [1, 4, 8, 100]
    assert truth["euler, shift 1"].y == pytest.approx([findings.settings[i].lpips.mean for i in (6, 5, 3, 0)])
    assert truth["recommended"].x == [8]
    assert reference["dpm, shift 2"].y == pytest.approx([0.02])


def test_files(findings: Findings, tmp_path: Path):
    config = {"data": "walks", "split": "test", "time": {"seconds": [0.5, 2.0]}}
    text = write(findings, {"checkpoint": "runs/tiny", "config": config}, tmp_path)
    assert (tmp_path / "results.md").read_text() == text
    assert "runs/tiny on split test of walks, 0.5, 2 s ahead: 120 samples of 12 trajectories" in text
    written = json.loads((tmp_path / "results.json").read_text())
    settings = {"scheduler": "unipc", "steps": 8, "shift": 1.0, "guidance": 1.0, "context_noise": 0.0, "hold": 1}
    assert written["recommended"] == settings
    assert written["reference"]["steps"] == 100
    assert [one["calls"] for one in written["settings"]] == [100, 15, 8, 8, 8, 4, 1]
