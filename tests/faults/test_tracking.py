"""W&B fails: the run goes on, to the same bits."""

from pathlib import Path

import pytest
from harness import Table, Trainer, differing_bits

UNREACHABLE = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}


@pytest.mark.parametrize(
    ("name", "environment", "faults"),
    [
        ("W&B's process killed", {}, [{"act": "kill_children", "argument": "wandb", "phase": "step", "entry": 5}]),
        pytest.param("W&B unreachable", UNREACHABLE, [], marks=pytest.mark.faults("all")),
    ],
)
def test_the_run_goes_on_without_wandb(
    trainer: Trainer, table: Table, tmp_path: Path, name: str, environment: dict[str, str], faults: list[dict]
):
    table.injected(name)
    options = ("--tracking", "wandb", "--probe.every", "0")
    ended = trainer.run(tmp_path, *options, faults=faults, environment=environment)
    assert ended.code == 0, ended.printed
    assert "W&B" in ended.printed
    assert list((tmp_path / "run" / "wandb").iterdir())
    bits = differing_bits(tmp_path / "run", trainer.reference("--probe.every", "0"))
    table.recovered(name, bits, note="trains on")
    assert bits == 0
