"""What an inspection found, for a folder and for W&B."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cdit.heads.page import AttentionPage
from cdit.heads.table import Cell

PAGE = "index.html"


@dataclass
class AttentionReport:
    """A page, figures, a table and scalars. Names begin with `attention/`."""

    summary: str
    """Markdown."""
    images: dict[str, tuple[Image.Image, str]]
    """Figure and caption by name, such as `attention/layer03/t0.25/sample0`."""
    thumbnails: dict[str, Image.Image]
    """By file, one for each row of the table, in their order; none where nothing was drawn."""
    columns: list[str]
    """Of the table."""
    rows: list[list[Cell]]
    """One for each kind, layer, head and time."""
    scalars: dict[str, float]
    """Per head, means over times, by name, such as `attention/layer03/head2/entropy`."""
    page: AttentionPage | None
    """Of cross-attention; None where nothing was drawn."""

    def save(self, folder: Path | str) -> None:
        """Writes summary.md, index.html, table.csv, scalars.json (null: not finite), captions.json and figures.

        Figures are called `layer03_t0.25_sample0.png`, and those of the table lie in thumbnails/.
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
        for file, image in self.thumbnails.items():
            (folder / file).parent.mkdir(exist_ok=True)
            image.save(folder / file)
        (folder / "captions.json").write_text(json.dumps(captions, indent=2, ensure_ascii=False) + "\n", "utf-8")
        finite = {name: value if math.isfinite(value) else None for name, value in self.scalars.items()}
        (folder / "scalars.json").write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n", "utf-8")
        with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])

    def to_wandb(self, folder: Path | str) -> dict[str, Any]:
        """What `wandb.log` takes beside the scalars: images with captions, the table `attention/heads`, and the page.

        Args:
            folder: where the report was saved; its very files are shown.
        """
        import wandb

        folder = Path(folder)
        media: dict[str, Any] = {
            name: wandb.Image(str(folder / picture_file(name)), caption=caption)
            for name, (_, caption) in self.images.items()
        }
        if self.thumbnails:
            pictures = [wandb.Image(str(folder / file)) for file in self.thumbnails]
            rows = [[*row, picture] for row, picture in zip(self.rows, pictures, strict=True)]
            media["attention/heads"] = wandb.Table(columns=[*self.columns, "where a patch looks"], data=rows)
        else:
            media["attention/heads"] = wandb.Table(columns=self.columns, data=self.rows)
        if self.page is not None:
            media["attention/page"] = wandb.Html((folder / PAGE).read_text("utf-8"), inject=False)
        return media


def picture_file(name: str) -> str:
    """The file of a figure."""
    return name.removeprefix("attention/").replace("/", "_").replace(" ", "_") + ".png"
