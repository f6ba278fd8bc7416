from pathlib import Path

import pytest

from nldist.files import replacing, write_text


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    write_text(file, "old")

    def fail_halfway() -> None:
        with replacing(file) as aside:
            aside.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert file.read_text() == "old"
    with replacing(file) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"


def test_two_that_write_at_once_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    with replacing(file) as one, replacing(file) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert file.read_text() == "1", "the last to be renamed"
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "nowhere" / "x") as aside:
        aside.write_text("")
