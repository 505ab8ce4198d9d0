"""Source distribution and wheel: what is in them, and that the wheel runs outside the clone."""

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
def source(tmp_path_factory):
    """A copy of the clone without hidden files and without what was made in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("CITATION.cff", "LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*.txt")):
        shutil.copy(path, folder)
    made = shutil.ignore_patterns(".*", "__pycache__", "logs")
    for name in ("docs", "experiments", "jaxvae", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=made)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, source):
    """The folder of the source distribution, unpacked."""
    built = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    output_of(sys.executable, "-c", build, str(built), cwd=source)
    (path,) = built.iterdir()
    shutil.unpack_archive(path, built, filter="data")
    return built / f"jaxvae-{jaxvae.__version__}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, sdist):
    """The wheel, built from the source distribution."""
    built = tmp_path_factory.mktemp("built")
    pip("wheel", str(sdist), "--no-build-isolation", "--wheel-dir", str(built))
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """A folder with the installed wheel, and the environment that imports from it."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(folder))
    return folder, os.environ | {"PYTHONPATH": str(folder)}


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_holds_documentation_experiments_and_tests(source, sdist):
    made = {path for path in files_of(sdist) if ".egg-info" in path}
    made |= {"PKG-INFO", "setup.cfg"}
    expected = {path for path in files_of(source) if ".egg-info" not in path}
    assert {"docs/models.md", "experiments/speed/run.py", "tests/conftest.py"} < expected
    assert files_of(sdist) - made == expected


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
