"""What goes wrong before a command starts ends in one line, without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

import jaxvae

# `python -m jaxvae`, with a Ctrl-C in the midst of importing a library.
INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
runpy.run_module("jaxvae", run_name="__main__", alter_sys=True)
"""


def started(*arguments, **environment):
    """The exit code of a command in a process of its own, and what it says."""
    ours = {"PYTHONPATH": str(Path(jaxvae.__file__).parents[1]), "MPLCONFIGDIR": mpl.get_cachedir()}
    theirs = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=theirs | ours | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["jax", "jaxlib.xla_client", "optax"])
def test_ctrl_c_during_the_imports_is_one_line(name):
    code, told = started("-c", INTERRUPTED.format(name=name), "summary")
    assert (code, told) == (1, "jaxvae: interrupted\n")


def test_a_wrong_variable_of_jax_is_one_line():
    code, told = started("-m", "jaxvae", "summary", JAX_ENABLE_X64="maybe")
    assert code == 2
    assert told.startswith("jaxvae: ")
    assert "JAX_ENABLE_X64" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_platform_without_a_device_is_one_line(platforms):
    code, told = started("-m", "jaxvae", "benchmark", JAX_PLATFORMS=platforms)
    if code == 0 or "CUDA" in told:
        pytest.skip("there is one")
    assert code == 2
    assert told.startswith(f"jaxvae: JAX finds no device, as JAX_PLATFORMS is "
                           f"{platforms!r}: ")  # fmt: skip
    assert told.count("\n") == 1


def test_an_unknown_backend_of_matplotlib_does_not_matter():
    """As figures are drawn into files."""
    command = "from jaxvae.cli.commands import main; main(['summary']); import jaxvae.figures"
    assert started("-c", command, MPLBACKEND="nonsense") == (0, "")
