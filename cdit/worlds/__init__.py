"""Small trained worlds that ship with the package: `WorldModel.from_pretrained("maze")`. Imports no torch."""

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped() -> list[str]:
    """The names of the worlds."""
    return sorted(path.parent.name for path in FOLDER.glob("*/world_model.json"))


def resolve(checkpoint: Path | str) -> Path:
    """The folder of a checkpoint: a path, or the name of a shipped world where there is no such path."""
    path = Path(checkpoint)
    return FOLDER / path if not path.exists() and str(checkpoint) in shipped() else path


def starts_of(checkpoint: Path | str) -> str | None:
    """The dataset folder with frames to start from that ships with a world; None if there is none."""
    folder = resolve(checkpoint) / "starts"
    return str(folder) if folder.is_dir() else None
