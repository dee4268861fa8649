"""How a run at Weights & Biases starts: online where somebody is logged in, else in its folder, to be synced later."""

import os
from pathlib import Path
from typing import Any

import wandb


def start_options(folder: Path) -> dict[str, Any]:
    """Arguments of `wandb.init`: its files go to `<folder>/wandb`, and it asks and prints nothing."""
    # Where pictures in tables wait for `wandb sync`; by default that would be the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").absolute()))
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    return {"mode": mode, "dir": str(folder), "settings": wandb.Settings(silent=True, console="off")}


def offline_note(run: Any) -> str | None:
    """How to bring a run online that is not."""
    if run.settings.mode != "offline":
        return None
    folder = Path(os.path.relpath(run.dir)).parent
    return f"W&B offline: to see the run, `wandb login` and then `wandb sync {folder}`"
