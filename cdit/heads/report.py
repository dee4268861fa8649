"""Reporting: summary.md, the table of heads, scalars to follow over training, and the files of a report."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cdit.common.files import write_json
from cdit.common.statistics import Estimate
from cdit.common.tables import Cell, markdown_table, write_csv
from cdit.heads.choose import Best, best_column, mean_estimates, reporting
from cdit.heads.config import Kind, Mode
from cdit.heads.correspondence import SCORES
from cdit.heads.glossary import explain_types
from cdit.heads.head_statistics import HeadRow
from cdit.heads.importance import Importance, PruningCurve
from cdit.heads.page import AttentionPage

PAGE = "index.html"
NAMES: Mapping[Kind, str] = {"cross": "cross-attention", "self": "self-attention"}
REPLACEMENTS: Mapping[Mode, str] = {"zero": "zeros", "mean": "its mean"}
FIRST = (*SCORES, "loss rise", "LPIPS rise")
"""Measures that come first in the table, because they answer a question by themselves."""


@dataclass
class AttentionReport:
    """A page, figures, a table and scalars. Names begin with `attention/`."""

    summary: str
    images: dict[str, tuple[Image.Image, str]]
    """Figure and caption by name, such as `attention/layer03/t0.25/sample0`."""
    thumbnails: list[Image.Image]
    """One for each row, in the same order; empty if nothing was drawn."""
    rows: list[HeadRow]
    """One for each kind, layer, time and head."""
    page: AttentionPage | None
    """Of cross-attention; None if nothing was drawn."""

    @property
    def table(self) -> tuple[list[str], list[list[Cell]]]:
        """Columns and rows; each mean is followed by the ends of its 95 % interval. None where a row has no value."""
        measures = measure_names(self.rows)
        with_interval = {name for row in self.rows for name, value in row.measures.items() if value.low is not None}
        columns: list[str] = ["kind", "layer", "head", "time", "type", "reason"]
        for name in measures:
            columns += [name, f"{name} low", f"{name} high"] if name in with_interval else [name]
        lines = []
        for row in self.rows:
            cells: list[Cell] = [row.kind, row.layer, row.head, row.time, row.type.name, row.type.reason]
            for name in measures:
                value = row.measures.get(name, Estimate(None, None, None))
                cells += [value.mean, value.low, value.high] if name in with_interval else [value.mean]
            lines.append(cells)
        return columns, lines

    @property
    def scalars(self) -> dict[str, float]:
        """Numbers to follow over training: of each head, means over diffusion times.

        Names are such as `attention/layer03/head2/entropy`; those of self-attention begin with `attention/self/`.
        Value-weighted measures and single offsets are left to the table.
        """
        values: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            for name, value in row.measures.items():
                if not name.startswith("moved ") and name not in ("offset rows", "offset columns"):
                    place = f"{prefix(row.kind)}layer{row.layer:02d}/head{row.head}"
                    values[f"{place}/{name.replace(' ', '_')}"].append(value.mean)
        return {name: _mean(found) for name, found in values.items()}

    def save(self, folder: Path | str) -> None:
        """Writes summary.md, index.html, table.csv, scalars.json (null: not finite), captions.json and figures.

        Figures are called `layer03_t0.25_sample0.png`; those of the table are in thumbnails/.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.md").write_text(self.summary, "utf-8")
        if self.page is not None:
            self.page.save(folder / PAGE)
        captions = {}
        for name, (image, caption) in self.images.items():
            image.save(folder / picture_file(name))
            captions[picture_file(name)] = caption
        if self.thumbnails:
            (folder / "thumbnails").mkdir(exist_ok=True)
            for row, image in zip(self.rows, self.thumbnails, strict=True):
                image.save(folder / thumbnail_file(row))
        write_json(folder / "captions.json", captions)
        write_json(folder / "scalars.json", self.scalars)
        write_csv(folder / "table.csv", *self.table)

    def to_wandb(self, folder: Path | str) -> dict[str, Any]:
        """Input of `wandb.log` besides the scalars: images with captions, the table `attention/heads`, and the page.

        All are read from the folder to which the report was saved.
        """
        import wandb

        folder = Path(folder)
        media: dict[str, Any] = {
            name: wandb.Image(str(folder / picture_file(name)), caption=caption)
            for name, (_, caption) in self.images.items()
        }
        columns, lines = self.table
        if self.thumbnails:
            columns.append("attention of a patch")
            for row, line in zip(self.rows, lines, strict=True):
                line.append(wandb.Image(str(folder / thumbnail_file(row))))
        media["attention/heads"] = wandb.Table(columns=columns, data=lines)
        if self.page is not None:
            media["attention/page"] = wandb.Html((folder / PAGE).read_text("utf-8"), inject=False)
        return media


def prefix(kind: Kind) -> str:
    """Beginning of the names of figures and scalars."""
    return "attention/" if kind == "cross" else "attention/self/"


def picture_file(name: str) -> str:
    """The file of a figure."""
    return name.removeprefix("attention/").replace("/", "_").replace(" ", "_") + ".png"


def thumbnail_file(row: HeadRow) -> str:
    """The file of a row's small picture."""
    return f"thumbnails/{row.kind}_layer{row.layer:02d}_head{row.head}_t{row.time:g}.png"


def measure_names(rows: Iterable[HeadRow]) -> list[str]:
    """The measures of any row, `FIRST` first and value-weighted ones last."""
    names = dict.fromkeys(name for row in rows for name in row.measures)
    return sorted(names, key=lambda name: (name.startswith("moved "), name not in FIRST))


def _mean(values: Sequence[float]) -> float:
    finite = np.array(values)[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


# ---- sections of summary.md ----


def shown(estimate: Estimate, digits: int = 3) -> str:
    """A mean with its interval."""
    if not np.isfinite(estimate.mean):
        return "–"
    text = f"{estimate.mean:.{digits}g}"
    if estimate.low is None:
        return text
    return f"{text} ({estimate.low:.{digits}g} … {estimate.high:.{digits}g})"


def samples_section(trajectories: Sequence[str], goals: int, times: Sequence[float]) -> str:
    """What the numbers are means over."""

    def number(count: int, one: str, more: str) -> str:
        return f"{count} {one if count == 1 else more}"

    several = len(set(trajectories)) > 1
    return (
        f"{number(len(trajectories), 'sample', 'samples')} of "
        f"{number(len(set(trajectories)), 'trajectory', 'trajectories')}, {number(goals, 'goal', 'goals')} each, "
        f"diffusion times {', '.join(f'{time:g}' for time in times)}. "
        + ("In brackets: 95 % intervals, by bootstrap over trajectories." if several else
           "With one trajectory there are no intervals.")
    )  # fmt: skip


def types_section(rows: Sequence[HeadRow]) -> str:
    """How many heads of each layer are of each type, at each diffusion time, and the definition of these types."""
    times, layers = (sorted({getattr(row, name) for row in rows}) for name in ("time", "layer"))

    def cell(layer: int, time: float) -> str:
        counts = Counter(row.type.name for row in rows if (row.layer, row.time) == (layer, time))
        return ", ".join(f"{count} {name}" for name, count in counts.most_common())

    lines = [[str(layer), *(cell(layer, time) for time in times)] for layer in layers]
    table = markdown_table(["layer", *(f"t = {time:g}" for time in times)], lines, left=3)
    meanings = [f"- *{name}*: {text}" for name, text in explain_types(row.type.name for row in rows).items()]
    return "\n".join([f"## Types of heads, {NAMES[rows[0].kind]}", "", table, *meanings])


def best_section(kind: Kind, found: Sequence[tuple[str, str, str, Best]], choosing: np.ndarray) -> str:
    """The best head at each of `QUESTIONS`, from `best_heads`."""
    lines = [
        [question, name, measure, f"{best.chosen_at:.3g}", shown(best.estimate)]
        for question, measure, name, best in found
    ]
    note = (
        f"Chosen among all heads and times on {int(choosing.sum())} samples, reported on the other "
        f"{int((~choosing).sum())}. The last column is unbiased; the one before favours the winner."
    )
    columns = ["which head …", "head", "measure", "where it was chosen", "on the other half"]
    return "\n".join([f"## Best heads, {NAMES[kind]}", "", note, "", markdown_table(columns, lines, left=3)]).rstrip()


def correspondence_section(
    scores: Mapping[str, Sequence[Estimate]], by_row: Sequence[tuple[float, str, float]], reported: int
) -> str:
    """`SCORES` of heads and baselines by name, and `accuracy_by_row`, on the half that reports."""
    lines = [[name, *map(shown, values)] for name, values in scores.items()]
    note = (
        "For each target patch, the true place of what it shows is known in each past frame from poses and map. Lift: "
        "attention on it (neighbours included) relative to an even spread within each frame, 1 is chance. Share: "
        "attention on it, over all past frames. Accuracy: how often the largest weight is on it. The best head is the "
        f"one with the highest lift on one half; all numbers are of the other half, {reported} samples."
    )
    table = markdown_table(["", *(score.removeprefix("correspondence ") for score in SCORES)], lines)
    text = ["## Do heads attend to where the same surface was?", "", note, "", table]
    if by_row:
        rows = [*map(str, range(len(by_row) - 1)), "all"]
        lines = [[row, f"{one:.2f}", head, f"{its:.2f}"] for row, (one, head, its) in zip(rows, by_row, strict=True)]
        columns = ["row of patches, from the top", "best head", "most accurate head in this row", "its accuracy"]
        note = (
            "Accuracy by row, over all visible patches. The most accurate head of a row is chosen on one half as well."
        )
        text += [note, ""]
        text.append(markdown_table(columns, lines))
    return "\n".join(text).rstrip()


def importance_section(
    measured: Importance,
    curve: PruningCurve,
    choosing: np.ndarray,
    trajectories: Sequence[str],
    seed: int,
    mode: Mode = "zero",
) -> str:
    """The most and the least needed head of each layer, and the loss as more and more heads are ablated."""
    lines = []
    for kind, layer in sorted({(head.kind, head.layer) for head in measured.heads}):
        columns = measured.of(layer, kind)
        cells = [kind, str(layer)]
        for most in (True, False):
            best = best_column(measured.loss_rise[:, columns], choosing, trajectories, most, seed)
            cells += [f"head {measured.heads[columns[best.column]].number}", shown(best.estimate, 2)]
        lines.append(cells)
    others = reporting(trajectories, choosing)
    (loss,) = mean_estimates(measured.loss[~choosing, None], others, seed)
    text = (
        f"Each head is ablated by itself, its output replaced by {REPLACEMENTS[mode]}; the loss of the whole network "
        f"is {shown(loss)}. Heads are chosen on {int(choosing.sum())} samples; their loss rise is that on the other "
        f"{len(others)}. A negative rise means that the network is better without the head."
    )
    curve_lines = [
        [f"{count} of {curve.counts[-1]}", shown(ordered), shown(random)]
        for count, ordered, random in zip(curve.counts, curve.ordered, curve.random, strict=True)
    ]
    pruned = "Loss with more and more heads ablated, on samples that did not choose the order (importance_pruning.png):"
    return "\n".join([
        "## Which heads are needed?", "", text, "",
        markdown_table(["attention", "layer", "most needed", "loss rise", "least needed", "loss rise"], lines), pruned,
        "", markdown_table(["ablated heads", "least needed first", "in random order"], curve_lines),
    ]).rstrip()  # fmt: skip
