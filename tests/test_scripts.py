"""Modules and scripts that commands are told."""

import pickle
import subprocess
import sys

import pytest

from graphopt.errors import GraphoptError
from graphopt.scripts import module_of


@pytest.fixture
def places(monkeypatch):
    """What importing adds is taken away again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_script_is_imported_as_a_module_beside_its_neighbours(places, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "its_neighbour.py").write_text("number = 3\n")
    (folder / "some_script.py").write_text("from its_neighbour import number\n\ndef twice():\n    return 2 * number\n")
    monkeypatch.chdir(tmp_path)
    module = module_of("elsewhere/some_script.py")
    assert module.twice() == 6 and module.__name__ == "some_script"
    # Another process that has the same places finds the function by its name.
    code = f"import pickle, sys; sys.path[:0] = {sys.path[:1]!r}; print(pickle.loads({pickle.dumps(module.twice)!r})())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "6\n"


def test_a_module_is_found_in_the_working_directory(places, tmp_path, monkeypatch):
    (tmp_path / "found_here.py").write_text("number = 4\n")
    monkeypatch.chdir(tmp_path)
    assert module_of("found_here").number == 4


def test_what_is_not_there_is_told_from_what_fails_inside(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(GraphoptError, match=r"no file nowhere\.py"):
        module_of("nowhere.py")
    with pytest.raises(GraphoptError, match=r"no module 'nowhere\.at_all'"):
        module_of("nowhere.at_all")
    for place in ("needs_more.py", "needs_more"):
        with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
            module_of(place)
