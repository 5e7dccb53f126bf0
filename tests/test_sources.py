"""Where the Julia sources lie that Julia loads: at one place for all installations that share a depot."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from implicit_rnn.runtime import sources
from implicit_rnn.runtime.environments import JULIA_SOURCES


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources of an installation, which a test may change."""
    folder = tmp_path / "installed" / "julia"
    (folder / "src").mkdir(parents=True)
    (folder / "Project.toml").write_text('name = "ImplicitRNN"')
    (folder / "src" / "ImplicitRNN.jl").write_text("module ImplicitRNN end")
    monkeypatch.setattr(sources, "JULIA_SOURCES", folder)
    return folder


@pytest.fixture
def depot(tmp_path: Path) -> Path:
    return tmp_path / "depot"


def read(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_sources_of_an_installation_are_copied_into_the_first_depot(shipped, depot):
    found = sources.locate([str(depot), "/nowhere"])
    assert found.parent == depot / "packages" / "ImplicitRNN"
    assert read(found) == read(shipped)


def test_installations_with_the_same_sources_share_a_copy_and_others_have_their_own(shipped, depot):
    first = sources.locate([str(depot)])
    assert sources.locate([str(depot)]) == first
    (shipped / "src" / "ImplicitRNN.jl").write_text("module ImplicitRNN # newer\nend")
    second = sources.locate([str(depot)])
    assert second != first
    assert sorted(first.parent.iterdir()) == sorted([first, second])


def test_copy_in_any_depot_is_used_before_another_is_made(shipped, depot, tmp_path):
    first = sources.locate([str(depot)])
    assert sources.locate([str(tmp_path / "own"), str(depot)]) == first
    assert not (tmp_path / "own").exists()


def test_copies_made_again_are_those_that_julia_has_compiled(shipped, depot):
    os.utime(shipped / "Project.toml")
    copy = sources.locate([str(depot)])
    assert {(copy / name).stat().st_mtime for name in read(copy)} == {sources.MODIFIED}


def test_processes_that_copy_at_once_find_the_same_whole_copy(shipped, depot):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(sources.locate, [[str(depot)]] * 32))
    (copy,) = found
    assert read(copy) == read(shipped)
    assert list(copy.parent.iterdir()) == [copy]


def test_installation_goes_on_with_its_own_sources_where_they_cannot_be_copied_or_julia_has_no_depot(shipped, depot):
    depot.write_text("a file where a folder should be")
    assert sources.locate([str(depot)]) == sources.locate([]) == shipped


def test_copy_that_may_not_be_read_is_not_used(shipped, depot, monkeypatch):
    copy, read_bytes = sources.locate([str(depot)]), Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.is_relative_to(copy):
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert sources.locate([str(depot)]) == shipped


def test_copy_that_was_changed_is_not_used(shipped, depot):
    copy = sources.locate([str(depot)])
    (copy / "src" / "ImplicitRNN.jl").write_text("module ImplicitRNN; something_else() = 1; end")
    assert sources.locate([str(depot)]) == shipped


@pytest.mark.skipif(not JULIA_SOURCES.is_symlink(), reason="needs a checkout")
def test_checkout_is_used_as_it_is(depot):
    assert sources.locate([str(depot)]) == JULIA_SOURCES.resolve()
    assert not depot.exists()
