"""The report of a study of few-step sampling: the recommended setting, tables and a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cdit.common.charts import Line, line_chart
from cdit.common.files import write_json
from cdit.common.statistics import Estimate, estimates, paired_difference
from cdit.common.tables import markdown_table
from cdit.diffusion import SamplerConfig
from cdit.evaluate.results import RESULTS

COLOURS = {"euler": "#1b78b7", "heun": "#d94801", "dpm": "#238b45", "unipc": "#8856a7",
           "ddpm": "#a6761d", "ddim": "#cb4747"}  # fmt: skip
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Setting:
    """Results of one sampler; intervals are over trajectories."""

    sampler: SamplerConfig
    calls: int
    lpips: Estimate
    behind: Estimate
    """Its difference to the LPIPS of the best setting, case by case."""
    psnr: Estimate
    """PSNR to the truth, in dB."""
    lpips_to_reference: Estimate
    """LPIPS to the frames of the reference from the same noise."""

    @property
    def name(self) -> str:
        """Such as `8 steps of dpm, shift 2`."""
        one = self.sampler
        shift = "" if one.shift == 1 else f", shift {one.shift:g}"
        return f"{one.steps} {'step' if one.steps == 1 else 'steps'} of {one.scheduler}{shift}"


@dataclass(frozen=True)
class Findings:
    """Results of all settings."""

    cases: int
    trajectories: int
    settings: list[Setting]
    """The reference is the first."""

    @property
    def reference(self) -> Setting:
        """The setting of many steps."""
        return self.settings[0]

    @property
    def best(self) -> Setting:
        """The setting with the lowest LPIPS to the truth."""
        return min(self.settings, key=lambda setting: setting.lpips.mean)

    @property
    def enough(self) -> Setting:
        """The setting with the fewest calls whose LPIPS is statistically indistinguishable from the best one."""
        as_good = [setting for setting in self.settings if setting.behind.low <= 0]
        return min(as_good, key=lambda setting: (setting.calls, setting.lpips.mean))

    @property
    def recommended(self) -> Setting:
        """The setting with the lowest LPIPS to the truth with at most as many calls as `enough`.

        It differs from `enough` if it is nearer to the best, but consistently enough behind it for a significant
        difference.
        """
        as_few = [setting for setting in self.settings if setting.calls <= self.enough.calls]
        return min(as_few, key=lambda setting: setting.lpips.mean)

    def share(self, setting: Setting) -> float:
        """The setting's network calls over those of the reference."""
        return setting.calls / self.reference.calls


def summarize(
    samplers: Sequence[SamplerConfig], found: Mapping[str, Tensor], trajectories: Sequence[str], seed: int
) -> Findings:
    """Means with intervals, for each case over its horizons.

    Args:
        samplers: the settings, the reference first.
        found: results of `measure` for all N cases.
        trajectories: names of the N cases' trajectories, at least two of them different.
    """
    lpips, psnr, to_reference = (
        np.stack([found[f"{i}/{name}"].double().mean(1).numpy() for i in range(len(samplers))], axis=1)
        for name in ("lpips", "psnr", "lpips_to_reference")
    )
    best = lpips[:, [lpips.mean(0).argmin()]]
    columns = (
        estimates(lpips, trajectories, seed),
        paired_difference(lpips, np.broadcast_to(best, lpips.shape), trajectories, seed),
        estimates(psnr, trajectories, seed),
        estimates(to_reference, trajectories, seed),
    )
    calls = [int(found[f"{i}/calls"][0]) for i in range(len(samplers))]
    settings = [Setting(*row) for row in zip(samplers, calls, *columns, strict=True)]
    return Findings(len(lpips), len(set(trajectories)), settings)


def write(findings: Findings, about: Mapping[str, Any], folder: Path) -> str:
    """Writes results.json, results.md and steps.png into a folder, and returns the second."""
    config = about["config"]
    horizons = ", ".join(f"{seconds:g}" for seconds in config["time"]["seconds"])
    text = (
        f"# Few-step sampling\n\n{about['checkpoint']} on split {config['split']} of {config['data']}, {horizons} s "
        f"ahead: {findings.cases} samples of {findings.trajectories} trajectories; ± is half the width of the 95 % "
        f"interval (bootstrap over trajectories). The reference is {findings.reference.name}.\n\n"
        f"{tables(findings)}\n{conclusion(findings)}\n"
    )
    rows = [asdict(setting) | {"share": findings.share(setting)} for setting in findings.settings]
    found = {
        "samples": findings.cases,
        "trajectories": findings.trajectories,
        "settings": rows,
        **{name: asdict(getattr(findings, name).sampler) for name in ("reference", "best", "enough", "recommended")},
    }
    line_chart(panels(findings), "network calls for a frame", log=True).save(folder / "steps.png")
    (folder / "results.md").write_text(text)
    write_json(folder / RESULTS, {**about, **found}, indent=1)
    return text


def conclusion(findings: Findings) -> str:
    """The best setting, the fewest calls that are enough, and the recommended setting, in a few sentences."""
    best, enough, chosen = findings.best, findings.enough, findings.recommended
    nearest = max(findings.settings, key=lambda setting: setting.psnr.mean)
    return (
        f"Nearest to the truth by LPIPS: {best.name} ({_calls(best)}), {best.lpips.mean:.3f}; "
        f"by PSNR: {nearest.name} ({_calls(nearest)}), {nearest.psnr.mean:.2f} dB.\n\n"
        f"The fewest calls whose LPIPS is indistinguishable from the best: {enough.calls} "
        f"({enough.name}, {_behind(enough, 4)}).\n\n"
        f"Recommended, the lowest LPIPS with no more calls: **{chosen.name}** ({_calls(chosen)}, "
        f"{findings.share(chosen):.1%} of the reference's; {_behind(chosen, 4)})."
    )


def tables(findings: Findings) -> str:
    """For each measure a Markdown table, schedulers and steps down and shifts across; the recommended one is bold."""
    shifts = sorted({setting.sampler.shift for setting in findings.settings})
    groups: dict[tuple[str, int], dict[float, Setting]] = {}
    for setting in findings.settings[1:] + findings.settings[:1]:
        groups.setdefault((setting.sampler.scheduler, setting.sampler.steps), {})[setting.sampler.shift] = setting
    measures: dict[str, Callable[[Setting], str]] = {
        "LPIPS to the truth ↓": lambda setting: f"{setting.lpips:.3f}",
        "LPIPS to the truth minus the best": lambda setting: _behind(setting, 3),
        "PSNR to the truth ↑": lambda setting: f"{setting.psnr:.2f}",
        "LPIPS to the reference ↓": lambda setting: f"{setting.lpips_to_reference:.3f}",
    }
    texts = []
    for title, cell in measures.items():
        across = [f"shift {shift:g}" for shift in shifts] if len(shifts) > 1 else ["mean"]
        lines = []
        for (scheduler, steps), row in groups.items():
            one = next(iter(row.values()))
            cells = [scheduler, str(steps), str(one.calls), f"{findings.share(one):.1%}"]
            for shift in shifts:
                shown = cell(row[shift]) if shift in row else ""
                cells.append(f"**{shown}**" if row.get(shift) is findings.recommended else shown)
            lines.append(cells)
        texts.append(markdown_table([title, "steps", "network calls", "of the reference", *across], lines))
    return "\n".join(texts)


def panels(findings: Findings) -> dict[str, list[Line]]:
    """LPIPS to the truth and to the reference against network calls, a line for each scheduler and shift."""
    shifts = sorted({setting.sampler.shift for setting in findings.settings}, key=lambda shift: (shift != 1, shift))
    lines: dict[tuple[str, float], list[Setting]] = {}
    for setting in sorted(findings.settings, key=lambda setting: setting.calls):
        lines.setdefault((setting.sampler.scheduler, setting.sampler.shift), []).append(setting)
    found = {}
    for measure, title in (
        ("lpips", "LPIPS to the truth"),
        ("lpips_to_reference", f"LPIPS to {findings.reference.name} from the same noise"),
    ):
        chosen = findings.recommended
        found[title] = [
            Line("recommended", [chosen.calls], [getattr(chosen, measure).mean], "#ffd33d", "o", marker_size=11)
        ]
        for (scheduler, shift), line in sorted(lines.items()):
            found[title].append(
                Line(
                    scheduler if len(shifts) == 1 else f"{scheduler}, shift {shift:g}",
                    [setting.calls for setting in line],
                    [getattr(setting, measure).mean for setting in line],
                    COLOURS.get(scheduler, "#6e7781"),
                    f"o{DASHES[shifts.index(shift) % len(DASHES)]}",
                    marker_size=3,
                )
            )
    return found


def _behind(setting: Setting, digits: int) -> str:
    one = setting.behind
    return f"{one.mean:+.{digits}f} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"


def _calls(setting: Setting) -> str:
    return f"{setting.calls} network {'call' if setting.calls == 1 else 'calls'}"
