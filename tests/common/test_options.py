import pytest

from cdit.common.errors import UserError
from cdit.common.options import OutputOptions, check_options


def test_results_that_could_not_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    check_options(OutputOptions(out=str(tmp_path / "new" / "folder")))
    assert not (tmp_path / "new").exists()
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match=f"out is {out}, but {tmp_path}/file is not a folder"):
            check_options(OutputOptions(out=str(out)))
