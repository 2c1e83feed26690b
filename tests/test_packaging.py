"""The wheel holds the linked packages as real files, and neither a foreign nor a second `passes` is taken."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "cost_model")


def run_python(*arguments: str, cwd: Path, pythonpath: tuple[Path | str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs this interpreter in `cwd` with `pythonpath` and none of the caller's import settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, pythonpath))
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the sdist, which is made from a copy of the sources (links kept as links)."""
    source = tmp_path_factory.mktemp("source") / "graphopt"
    source.mkdir()
    for folder in ("graphopt", *LINKED, "tests"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    out = source.parent / "out"
    # Without --sdist or --wheel, `build` makes the sdist first and the wheel from the unpacked sdist.
    result = run_python(
        "-m",
        "build",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        str(out),
        str(source),
        cwd=out.parent,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(out.glob("*.tar.gz")), "no sdist was made"
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_linked_packages_as_real_files(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("graphopt", *(f"graphopt/{name}" for name in LINKED))
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
        assert archive.read(top_level).decode().split() == ["graphopt"]
        assert {name for name in names if name.endswith(".py")} == expected
        assert {
            "graphopt/py.typed",
            "graphopt/passes/__init__.py",
            "graphopt/cost_model/__init__.py",
        } <= names
        assets = ROOT / "graphopt" / "visualize" / "assets"
        found = {path.relative_to(ROOT).as_posix(): path for path in assets.iterdir()}
        assert {name for name in names if "/assets/" in name} == set(found)
        for name, path in found.items():
            assert archive.read(name) == path.read_bytes()
        for name in LINKED:
            assert archive.read(f"graphopt/{name}/__init__.py") == (ROOT / name / "__init__.py").read_bytes()


def test_wheel_is_imported_beside_a_foreign_passes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    user = tmp_path / "user"
    user.mkdir()
    for name in LINKED:
        (user / f"{name}.py").write_text("OWNER = 'the user'\n")
    program = (
        "import passes, cost_model, graphopt, graphopt.passes, graphopt.cost_model\n"
        "assert passes.OWNER == cost_model.OWNER == 'the user'\n"
        "print(graphopt.__file__, graphopt.passes.__file__, graphopt.cost_model.__file__, sep='\\n')\n"
    )
    # -S leaves out the .pth files, and with them the editable install of this checkout.
    libraries = sysconfig.get_path("purelib"), sysconfig.get_path("platlib")
    result = run_python("-S", "-c", program, cwd=user, pythonpath=(site, *libraries))
    assert result.returncode == 0, result.stderr
    assert [Path(line).relative_to(site).as_posix() for line in result.stdout.split()] == [
        "graphopt/__init__.py",
        "graphopt/passes/__init__.py",
        "graphopt/cost_model/__init__.py",
    ]


@pytest.mark.parametrize("name", LINKED)
def test_importing_the_folder_itself_is_refused(name: str) -> None:
    result = run_python("-c", f"import {name}", cwd=ROOT)
    assert result.returncode != 0
    assert f"ImportError: this folder was imported as '{name}'" in result.stderr
    assert f"use `import graphopt.{name}`" in result.stderr


@pytest.mark.parametrize("name", LINKED)
def test_checkout_without_symbolic_links_says_what_to_do(name: str, tmp_path: Path) -> None:
    package = tmp_path / "graphopt"
    package.mkdir()
    for file in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "graphopt" / file, package / file)
    for linked in LINKED:
        if linked == name:
            (package / linked).write_text(f"../{linked}")
        else:
            (package / linked).mkdir()
    result = run_python("-c", "import graphopt", cwd=tmp_path)
    assert result.returncode != 0
    assert f"ImportError: graphopt/{name} is a text file" in result.stderr
    assert "git config core.symlinks true" in result.stderr
