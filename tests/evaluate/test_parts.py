from pathlib import Path

import pytest
import torch

from cdit.common.errors import UserError
from cdit.evaluate.parts import Parts


def test_batches_one_after_the_other(tmp_path: Path):
    parts = Parts(tmp_path / "time", {"seed": 0}, 3)
    assert parts.missing() == [0, 1, 2]
    parts.begin()
    for batch in (2, 0, 1):
        shown = {"shown": torch.full((1,), batch)} if batch != 1 else {}
        parts.write(batch, {"a": torch.arange(2) + 2 * batch, **shown})
    assert parts.missing() == []
    found = Parts(tmp_path / "time", {"seed": 0}, 3).read()
    assert found["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["shown"].tolist() == [0, 2]


def test_a_batch_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = Parts(tmp_path, {}, 1)
    parts.begin()

    def full_disk(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        parts.write(0, {"a": torch.zeros(1)})
    assert parts.missing() == [0]


def test_parts_of_something_else(tmp_path: Path):
    Parts(tmp_path, {"seed": 0, "cases": [("a", 1)]}, 1).begin()
    Parts(tmp_path, {"seed": 0, "cases": [("a", 1)]}, 1).check()
    for other in ({"seed": 0, "cases": [("a", 2)]}, {"seed": 0}, {"seed": 0, "cases": [("a", 1)], "new": 1}):
        with pytest.raises(UserError, match=r"\(other (cases|new)\)"):
            Parts(tmp_path, other, 1).check()
    Parts(tmp_path, {}, 1).clear()
    Parts(tmp_path, {"seed": 1}, 1).check()
