"""Output files: refused beforehand, and written whole or not at all."""

from __future__ import annotations

import os
import pathlib
import stat

import pytest
from slipstream.core.files import Draft, check_output, write_beside


def listing(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_new_file_replaces_the_old_one_at_the_end(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with write_beside(target) as file:
        assert (file.parent, file.suffix) == (tmp_path, ".json")
        file.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert listing(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path, error: BaseException) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail() -> None:
        with write_beside(target) as file:
            file.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["a.json"]


def test_links_permissions_and_long_names(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / ("n" * 250 + ".txt")
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "link.txt").symlink_to(real)
    with write_beside(tmp_path / "link.txt") as file:
        file.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    with write_beside(tmp_path / "fresh.txt") as file:
        file.write_text("x")
    (tmp_path / "plain.txt").write_text("x")
    assert (tmp_path / "fresh.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_a_file_that_is_not_whole_replaces_nothing(tmp_path: pathlib.Path) -> None:
    for whole, there, left in ((True, True, "new"), (False, True, "old"), (False, False, "new")):
        target = tmp_path / "a.mkv"
        target.unlink(missing_ok=True)
        if there:
            target.write_text("old")
        draft = Draft(target, visible=True)
        draft.file.write_text("new")
        assert draft.file.name.startswith("a.part-")
        assert draft.settle(whole) == (draft.file if left == "old" else target)
        assert target.read_text() == left
        assert draft.file.exists() == (left == "old")
        draft.discard()


def test_the_file_beside_is_no_link_that_somebody_left_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "0")
    (tmp_path / "victim").write_text("whole")
    (tmp_path / ".part-0.json").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="Could not write"), write_beside(tmp_path / "a.json") as file:
        file.write_text("new")
    assert (tmp_path / "victim").read_text() == "whole"


def test_what_a_killed_process_left_is_deleted_after_a_day(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").write_text("whole")
    left, fresh, named = (
        tmp_path / name for name in (".part-0123456789ab.png", ".part-ba9876543210", "a.part-0123456789ab.mkv")
    )
    for file in (left, fresh, named):
        file.write_text("x")
    (tmp_path / ".part-aaaaaaaaaaaa.png").symlink_to(tmp_path / "other")
    for file in (left, named, tmp_path / ".part-aaaaaaaaaaaa.png"):
        os.utime(file, (1, 1), follow_symlinks=False)
    with write_beside(tmp_path / "a.json") as file:
        file.write_text("new")
    assert listing(tmp_path) == [fresh.name, "a.json", named.name, "other"]
    assert (tmp_path / "other").read_text() == "whole"


def test_a_device_is_written_in_place() -> None:
    with write_beside(os.devnull) as file:
        assert str(file) == os.path.realpath(os.devnull)
    assert not pathlib.Path(os.devnull).is_file()


def test_what_cannot_be_written_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_output("out", tmp_path / "a.json", (".json",)) == tmp_path / "a.json"
    assert check_output("out", tmp_path / "A.JSON", (".json",)) == tmp_path / "A.JSON"
    with pytest.raises(ValueError, match=r"Expected `out` to end in \.json, \.txt, but got 'a\.h5'"):
        check_output("out", tmp_path / "a.h5", (".json", ".txt"))
    with pytest.raises(ValueError, match=r"Expected `out` to be a file, but .* is a folder"):
        check_output("out", tmp_path)
    with pytest.raises(ValueError, match="Expected `out` in an existing folder"):
        check_output("out", tmp_path / "no" / "a.json")
    (tmp_path / "a.json").write_text("x")
    # By hand, because root may write everything.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".json"))
    with pytest.raises(ValueError, match="read-only"):
        check_output("out", tmp_path / "a.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="a folder that can be written"):
        check_output("out", tmp_path / "b.json")
