"""That the benchmark runs and prints its tables; what they say depends on the machine."""

import re

import pytest

from cdit.benchmark import PARTS, main
from cdit.errors import UserError

SMALL = [
    "--device=cpu", "--rounds=2", "--min_seconds=0", "--image_size=[8, 16]", "--batch_size=1", "--goals=2", "--steps=2",
    "--context_frames=2", "--past_frames=[1, 3]", "--compile=false", "--model.patch_size=4", "--model.hidden_size=16",
    "--model.depth=1", "--model.num_heads=2", "--latents.image_size=[16, 16]", "--latents.recorded_size=[24, 32]",
    "--latents.blocks=[32, 32]", "--latents.model.hidden_size=16", "--latents.model.depth=1",
    "--latents.model.num_heads=2",
]  # fmt: skip
TABLES = {"attention": 1, "forward": 4, "training": 1, "checkpoints": 1, "probes": 1, "sampling": 1, "latents": 1}
TABLES["all"] = sum(TABLES.values()) - TABLES["latents"]


def test_every_part_is_known():
    assert set(TABLES) == {*PARTS, "all"}


@pytest.mark.parametrize("part", TABLES)
def test_each_part_prints_its_tables(part, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", part, *SMALL])
    main()
    machine, *lines = capsys.readouterr().out.splitlines()
    assert re.search(r"threads, torch \d+\.\d+", machine)
    assert sum(line.startswith("### ") for line in lines) == TABLES[part]
    tables = [block.splitlines() for block in "\n".join(lines).split("\n\n") if block.lstrip().startswith("|")]
    assert len(tables) == TABLES[part]
    for header, _, *rows in tables:
        assert rows
        assert {row.count("|") for row in rows} == {header.count("|")}
        numbers = [float(cell.split()[0]) for row in rows for cell in row.strip("| ").split(" | ")[1:]]
        assert all(number > 0 for number in numbers)


def test_an_unknown_part_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", "speed"])
    with pytest.raises(UserError, match=r"'speed': expected one of attention, .*, latents or all"):
        main()
