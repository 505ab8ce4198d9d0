"""The wheel: what is in it, and that it runs outside the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxvae

ROOT = Path(__file__).parents[1]
INFO = f"jaxvae-{jaxvae.__version__}.dist-info"


def output_of(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*arguments):
    output_of(sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build folder left in the clone could add old modules."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("jaxvae", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(built))
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """A folder with the installed wheel, and the environment that imports from it."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(folder))
    return folder, os.environ | {"PYTHONPATH": str(folder)}


def test_it_holds_every_file_of_the_package_and_no_tests(wheel):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jaxvae").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {"jaxvae/py.typed", "jaxvae/explorer/page.js"} < package
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {path for path in files if not path.startswith(INFO)} == package
    assert {f"{INFO}/METADATA", f"{INFO}/licenses/LICENSE"} < files


def test_it_runs_outside_the_clone(installed, tmp_path):
    folder, environment = installed
    where = "from importlib.util import find_spec; print(find_spec('jaxvae').origin)"
    for command, expected in [
        ([sys.executable, "-c", where], str(folder / "jaxvae" / "__init__.py")),
        ([sys.executable, "-m", "jaxvae", "summary"], "494,244"),
        ([str(folder / "bin" / "jaxvae"), "--help"], "usage: jaxvae"),
    ]:
        assert expected in output_of(*command, cwd=tmp_path, env=environment)
