"""Checkpoints that were damaged on the disk: named, kept, and an older one taken."""

import json
import random
import shutil
from pathlib import Path

import pytest
from harness import Table, Trainer, differing_bits

from cdit.training.durable.checkpoints import checkpoints

FILES = ["model", "average", "optimizer"]
FILES = [f"{name}.safetensors" for name in FILES] + ["state.json", "config.yaml", "process_00000.json", "manifest.json"]


@pytest.fixture(scope="module")
def stopped(trainer: Trainer) -> Path:
    """A run that was killed at step 11, with checkpoints of steps 6 and 9."""
    output = trainer.folder / "stopped"
    fault = {"act": "kill", "phase": "step", "entry": 12}
    ended = trainer.run(output, "--checkpoint.background", "false", faults=[fault])
    assert ended.code < 0
    assert [folder.name for folder in checkpoints(output / "run")] == ["step_00000006", "step_00000009"]
    return output


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit, anywhere."""
    data, draws = bytearray(path.read_bytes()), random.Random(path.name)
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)


def swap(path: Path) -> None:
    """The file of the checkpoint before: sound in itself."""
    shutil.copy(path.parent.with_name("step_00000006") / path.name, path)


def lie(path: Path) -> None:
    """A manifest of the right form with a wrong checksum."""
    manifest = json.loads(path.read_text())
    manifest["files"]["state.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


def lead_out(path: Path) -> None:
    """A manifest that names files outside of the folder."""
    manifest = json.loads(path.read_text())
    manifest["files"]["../../config.yaml"] = manifest["files"]["config.yaml"]
    path.write_text(json.dumps(manifest))


CASES = [(damage, file) for damage in (truncate, flip, Path.unlink) for file in FILES]
CASES += [
    (empty, "manifest.json"),
    (lie, "manifest.json"),
    (lead_out, "manifest.json"),
    (swap, "optimizer.safetensors"),
]
SHORT = [(truncate, "optimizer.safetensors"), (flip, "model.safetensors"), (Path.unlink, "state.json")]
SHORT += [(lie, "manifest.json"), (Path.unlink, "manifest.json")]
NAMES = {truncate: "truncated", flip: "a bit flipped", Path.unlink: "missing", empty: "empty", swap: "of another step"}


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        pytest.param(damage, file, marks=[] if (damage, file) in SHORT else pytest.mark.faults("all"))
        for damage, file in CASES
    ],
)
def test_a_damaged_checkpoint_is_named_kept_and_left(
    trainer: Trainer, table: Table, stopped: Path, tmp_path: Path, damage, file: str
):
    run = shutil.copytree(stopped / "run", tmp_path / "run", symlinks=True)
    newest = run / "checkpoints" / "step_00000009"
    damage(newest / file)
    what = "wrong" if damage in (lie, lead_out) else NAMES[damage]
    name = f"checkpoint damaged: {'manifest' if file == 'manifest.json' else 'file'} {what}"
    table.injected(name)
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    ended = trainer.run(tmp_path)
    assert ended.code == 0, ended.printed
    (line,) = [line for line in ended.printed.splitlines() if "is damaged" in line]
    assert str(newest) in line
    assert (file if damage not in (lie, lead_out) else "") in line
    kept = newest.with_name("step_00000009.damaged")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    bits = differing_bits(run, trainer.reference())
    table.recovered(name, bits, note="an older one taken")
    assert bits == 0


def test_all_damaged(trainer: Trainer, stopped: Path, tmp_path: Path):
    """Nothing to continue from: an error, and no training over what may still be rescued."""
    run = shutil.copytree(stopped / "run", tmp_path / "run", symlinks=True)
    for folder in checkpoints(run):
        flip(folder / "model.safetensors")
    for _ in range(2):
        ended = trainer.run(tmp_path)
        assert ended.code == 2
        assert "damaged" in ended.message
        assert len(list((run / "checkpoints").glob("*.damaged"))) == 2
        assert not checkpoints(run)
