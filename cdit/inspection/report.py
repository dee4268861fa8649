"""What an inspection found, for a folder and for W&B."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class AttentionReport:
    """Figures, a table and scalars. Names begin with `attention/`."""

    images: dict[str, tuple[Image.Image, str]]
    """Figure and caption by name, such as `attention/layer03/t0.25/sample0`."""
    columns: list[str]
    """Of the table."""
    rows: list[list[float]]
    """One for each layer, head and time."""
    scalars: dict[str, float]
    """Per head, means over times, by name, such as `attention/layer03/head2/entropy`."""

    def save(self, folder: Path | str) -> None:
        """Writes the figures as `layer03_t0.25_sample0.png`, their captions.json, table.csv and scalars.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        captions = {}
        for name, (image, caption) in self.images.items():
            file = name.removeprefix("attention/").replace("/", "_") + ".png"
            image.save(folder / file)
            captions[file] = caption
        (folder / "captions.json").write_text(json.dumps(captions, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "scalars.json").write_text(json.dumps(self.scalars, indent=2) + "\n", "utf-8")
        with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])

    def to_wandb(self) -> dict[str, Any]:
        """What `wandb.log` takes: images with captions, the table `attention/heads`, and the scalars."""
        import wandb

        images = {name: wandb.Image(image, caption=caption) for name, (image, caption) in self.images.items()}
        return {**images, "attention/heads": wandb.Table(columns=self.columns, data=self.rows), **self.scalars}
