"""The README's example, as a newcomer would run it, but with a few images."""

import re
from pathlib import Path

import pytest

import jaxvae

pytestmark = pytest.mark.usefixtures("compile_quickly")

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    few = tuple(images[:32] for images in jaxvae.load_data("mnist-5k"))
    fit = jaxvae.fit
    monkeypatch.setattr(jaxvae, "load_data", {"mnist-5k": few}.get)
    monkeypatch.setattr(jaxvae, "fit", lambda name, **how: fit({"mnist-5k": few}[name], **how))
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(import jax\n.*?)```", README.read_text(), re.S)[1]
    found = {}
    exec(example, found)
    assert capsys.readouterr().out.count("\n") == 1  # the test ELBO
    assert [line["epoch"] for line in found["history"]] == [1, 2, 3]
    assert found["images"].shape == (16, 28, 28, 1)
    assert found["posterior"].mean.shape == (32, 2)
    assert found["log_px"].shape == (10,)
    assert (tmp_path / "runs" / "mine").is_dir()
