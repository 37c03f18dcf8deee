"""Files and sets of files that appear whole or not at all, and what is said where they cannot."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest

from collapse_probe import files
from collapse_probe.errors import OutputError
from collapse_probe.files import check_writable, staged, write_atomically
from collapse_probe.result import Analysis
from tests.analysis_factory import make_analysis


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def entries(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def old(tmp_path):
    """A folder with results, one of them in a folder of its own, and something that is not ours."""
    for name in ("a", "figures/b", "mine"):
        write_atomically(tmp_path / name, f"old {name}")
    return tmp_path


def write_set(folder):
    with staged(folder) as stage:
        for name in ("a", "figures/b", "c"):
            write_atomically(stage / name, f"new {name}")


def test_a_set_takes_the_place_of_the_old_one(old):
    inside = []
    with staged(old) as stage:
        write_atomically(stage / "a", "new")
        inside.append(contents(old)["a"])
    assert inside == ["old a"]
    write_set(old)
    assert contents(old) == {"a": "new a", "figures/b": "new figures/b", "c": "new c", "mine": "old mine"}
    assert entries(old) == {"a", "figures", "figures/b", "c", "mine"}


@pytest.mark.parametrize("error", [OutputError("full"), KeyboardInterrupt(), ZeroDivisionError()])
def test_nothing_changes_where_the_set_is_not_finished(old, error):
    before = contents(old)

    def broken_off():
        with staged(old) as stage:
            write_atomically(stage / "a", "new")
            raise error

    with pytest.raises(type(error)):
        broken_off()
    assert contents(old) == before
    assert entries(old) == {"a", "figures", "figures/b", "mine"}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failure_in_the_middle_of_moving_brings_the_old_set_back(old, monkeypatch, at, links):
    before, replace, count = contents(old), type(old).replace, []

    def failing(self, target):
        if ".writing" in str(self) and ".replaced" not in str(self) and ".replaced" not in str(target):
            count.append(target)
            if len(count) == at + 4:  # the files themselves came first
                raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr(type(old), "replace", failing)
    with pytest.raises(OutputError, match="No space left on device"):
        write_set(old)
    assert len(count) == at + 4
    assert contents(old) == before
    assert entries(old) == {"a", "figures", "figures/b", "mine"}


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    write_atomically(tmp_path / "a", "old a")
    write_atomically(tmp_path / "c" / "mine", "not ours")
    with pytest.raises(OutputError, match=f"^Cannot write {tmp_path}/c: Is a directory"):
        write_set(tmp_path)
    assert contents(tmp_path) == {"a": "old a", "c/mine": "not ours"}


def test_a_file_where_a_folder_is_needed(tmp_path):
    write_atomically(tmp_path / "figures", "old")
    with pytest.raises(OutputError, match="Cannot write"):
        write_set(tmp_path)
    assert contents(tmp_path) == {"figures": "old"}


def test_links_are_replaced_and_what_they_lead_to_is_not(tmp_path):
    write_atomically(tmp_path / "elsewhere", "kept")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    write_set(tmp_path)
    assert contents(tmp_path)["a"] == "new a"
    assert contents(tmp_path)["elsewhere"] == "kept"


def test_what_an_older_set_left_goes_with_it(old):
    with staged(old, optional=("a", "figures/b", "figures/never")) as stage:
        write_atomically(stage / "a", "new a")
    assert contents(old) == {"a": "new a", "mine": "old mine"}


def test_what_an_older_set_left_stays_where_the_new_one_fails(old):
    (old / "figures" / "c").mkdir()
    before = contents(old)
    with pytest.raises(OutputError), staged(old, optional=("a", "figures/b")) as stage:
        write_atomically(stage / "figures" / "c", "new")
    assert contents(old) == before


def test_messages_name_the_folder_that_was_asked_for(tmp_path):
    def below_a_file():
        with staged(tmp_path / "run") as stage:
            write_atomically(stage / "file", "x")
            write_atomically(stage / "file" / "below", "x")

    with pytest.raises(OutputError) as caught:
        below_a_file()
    assert f"Cannot write {tmp_path / 'run' / 'file' / 'below'}" in str(caught.value)


def test_an_analysis_is_saved_as_a_set(tmp_path, monkeypatch):
    make_analysis(3).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Analysis, "to_dict", lambda _: (_ for _ in ()).throw(OutputError("full")))
    with pytest.raises(OutputError):
        make_analysis(5).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs limits on the size of files")
def test_a_disk_that_is_full_in_the_middle(tmp_path):
    """Files of more than some bytes cannot be written: the larger ones of a set fail after the smaller ones."""
    make_analysis(2).save(tmp_path / "run")
    before = contents_of_bytes(tmp_path / "run")
    code = f"""
        import resource
        from tests.analysis_factory import make_analysis
        analysis = make_analysis(12)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        try:
            analysis.save({str(tmp_path / "run")!r})
        except Exception as error:
            print(type(error).__name__, error)
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.stdout.startswith("OutputError Cannot write"), done
    assert "File too large" in done.stdout
    assert contents_of_bytes(tmp_path / "run") == before


def contents_of_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- before a run ------------------------------------------------------------------------------------------------------


def places(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    return {
        "file": (tmp_path / "file", "/file is a file"),
        "below a file": (tmp_path / "file" / "run", "/file is a file"),
        "dangling link": (tmp_path / "dangling", "/dangling is a link to something that does not exist"),
        "below a dangling link": (tmp_path / "dangling" / "run", "/dangling is a link to something that does not"),
        "long name": (tmp_path / ("x" * 300), "File name too long"),
    }


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "below a dangling link", "long name"])
def test_folders_that_cannot_be(tmp_path, kind):
    path, words = places(tmp_path)[kind]
    before = entries(tmp_path)
    with pytest.raises(OutputError, match=rf"(?s)^Cannot write to .*({words}).* Choose another --out folder\.$"):
        check_writable(path)
    assert entries(tmp_path) == before


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refused(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    with pytest.raises(OutputError, match="Read-only file system"):
        check_writable(tmp_path)


@pytest.mark.parametrize(("free", "fits"), [(0, False), (49 << 20, False), (50 << 20, True)])
def test_free_space(tmp_path, monkeypatch, free, fits):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(free))
    if fits:
        assert check_writable(tmp_path) == tmp_path
    else:
        with pytest.raises(OutputError, match=rf"^Only {free / 2**20:.1f} MiB are free where .* need up to 50 MiB"):
            check_writable(tmp_path)
