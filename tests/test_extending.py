"""Components of the user's own, each written in a few lines and taken through everything."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import KEPT_BY_COMMANDS, refused

import jaxvae
from jaxvae import explorer
from jaxvae.data import Dataset
from jaxvae.interchange.export import export, load_safetensors
from jaxvae.models.distributions import Gaussian
from jaxvae.runs import drawing, evaluation
from jaxvae.runs.config import read_config
from jaxvae.runs.data import load_run_data

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)


# A prior.


@dataclass(frozen=True)
class Laplace:
    """p(z) = prod_j exp(-|z_j| / scale) / (2 scale)."""

    scale: float = 1.0

    def init(self, key, config):
        return {}

    def bind(self, learned, params):
        return LaplacePrior(self.scale, params.config.latent_dim)


@jax.tree_util.register_static
@dataclass(frozen=True)
class LaplacePrior:
    scale: float
    latent_dim: int

    def log_prob(self, z):
        return -jnp.sum(jnp.abs(z) / self.scale + np.log(2 * self.scale), axis=-1)

    def sample(self, key, n):
        return self.scale * jax.random.laplace(key, (n, self.latent_dim))


# A likelihood, with a parameter that it learns.


@dataclass(frozen=True)
class Beta:
    """Pixels with a beta distribution of one learned concentration."""

    start: float = 1.0
    outputs_per_channel = 1
    support = "unit"

    def init(self, channels):
        return {"log_concentration": jnp.float32(self.start)}

    def from_outputs(self, outputs, learned):
        return BetaPixels(outputs, learned["log_concentration"])


class BetaPixels(NamedTuple):
    logits: Any
    log_concentration: Any

    @property
    def mean(self):
        return jax.nn.sigmoid(self.logits)

    def log_prob(self, images):
        x = jnp.clip(jnp.float32(images) / 255, 0.01, 0.99)
        c = 1 + jnp.exp(self.log_concentration)
        a, b = c * self.mean + 0.01, c * (1 - self.mean) + 0.01
        return jnp.sum(jax.scipy.stats.beta.logpdf(x, a, b), axis=(1, 2, 3))

    def sample(self, key):
        c = 1 + jnp.exp(self.log_concentration)
        return jax.random.beta(key, c * self.mean + 0.01, c * (1 - self.mean) + 0.01)


# A flow posterior: one planar-like scaling by a learned matrix.


@dataclass(frozen=True)
class Linear:
    """z = L z_0, with a learned unit lower triangular matrix: its determinant is 1."""

    def init(self, key, encoded):
        latent_dim = encoded[0].shape[-1]
        return {"below": 0.1 * jax.random.normal(key, (latent_dim, latent_dim))}

    def bind(self, learned, encoded):
        return LinearPosterior(*encoded[:2], learned["below"])


class LinearPosterior(NamedTuple):
    mean: Any
    log_var: Any
    below: Any

    @property
    def center(self):
        return self.mean @ self.matrix.T

    @property
    def matrix(self):
        return jnp.tril(self.below, -1) + jnp.eye(self.mean.shape[-1])

    def sample_and_log_prob(self, keys):
        z_0, log_q = Gaussian(self.mean, self.log_var).sample_and_log_prob(keys)
        return z_0 @ self.matrix.T, log_q

    def kl(self, prior):
        return None


# A network, and a whole model built by one.


@dataclass(frozen=True)
class Tiny:
    """One hidden layer each way."""

    width: int = 12

    def modules(self, latent_dim, outputs_shape, dtype):
        return TinyEncoder(latent_dim, self.width), TinyDecoder(outputs_shape, self.width)


class TinyEncoder(nn.Module):
    latent_dim: int
    width: int

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(self.width)(images.reshape(images.shape[0], -1)))
        return nn.Dense(self.latent_dim)(x), nn.Dense(self.latent_dim)(x)


class TinyDecoder(nn.Module):
    shape: tuple[int, int, int]
    width: int

    @nn.compact
    def __call__(self, z):
        x = nn.Dense(int(np.prod(self.shape)))(nn.relu(nn.Dense(self.width)(z)))
        return x.reshape(z.shape[0], *self.shape)


# An objective, with an option and with beta.


@dataclass(frozen=True)
class Annealed:
    """The ELBO, its log-likelihood raised to a power."""

    power: float = 0.5
    num_samples = 1
    across_batch = False

    def __call__(self, params, key, images, labels=None, *, beta=1.0, axis_name=None):
        from jaxvae.objectives import draw

        terms = draw(params, key, images, labels).elbo()
        return beta * terms.kl - self.power * terms.log_likelihood, terms


class Recorder(jaxvae.Callback):
    """A callback."""

    def __init__(self):
        self.epochs = []

    def epoch(self, record, params):
        self.epochs.append(record["epoch"])
        return len(self.epochs) == 3


def circles(n=120):
    """A data source: circles of different sizes, with their size as the label."""
    radius = np.arange(n) % 3 + 1
    y, x = np.mgrid[-4:4, -4:4] + 0.5
    images = 255 * (x**2 + y**2 < (radius[:, None, None] + 0.5) ** 2)
    images = images[..., None].astype(np.uint8)
    return Dataset(images[:80], radius[:80], images[80:], radius[80:])


COMPONENTS = {
    "prior": {"prior": Laplace(0.7)},
    "likelihood": {"likelihood": Beta(start=0.5)},
    "posterior": {"posterior": Linear()},
    "network": {"network": Tiny(width=9)},
    "modules": {"network": (TinyEncoder(2, 5), TinyDecoder((8, 8, 1), 5))},
}


def module_path(name):
    return f"{__name__}.{name}"


@pytest.mark.parametrize("kind", COMPONENTS)
def test_a_component_goes_through_everything(kind, tmp_path):
    fields = {"network": "mlp:width=8"} | COMPONENTS[kind]
    config = jaxvae.ModelConfig(**fields)
    train = jaxvae.TrainConfig(batch_size=16, epochs=2, optimizer="adam", learning_rate=1e-2)
    data = circles()
    result = jaxvae.fit(data, config, train, run_dir=tmp_path / "run", progress=False)
    params, run_dir = result.params, tmp_path / "run"
    assert result.history[1]["test"]["elbo"] > result.history[0]["test"]["elbo"]

    with refused("not registered" if kind != "modules" else "a pair of Flax modules", "pass"):
        jaxvae.load(run_dir)
    own = COMPONENTS[kind]
    loaded = jaxvae.load(run_dir, **own)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    images = jnp.asarray(data.test_images)
    assert jaxvae.sample(loaded, KEY, 3).shape == (3, 8, 8, 1)
    assert jaxvae.reconstruct(loaded, images).shape == images.shape
    assert jnp.isfinite(jaxvae.log_likelihood(loaded, KEY, images, 10)).all()

    # Two more epochs, from the checkpoint.
    longer = jaxvae.TrainConfig(batch_size=16, epochs=4, optimizer="adam", learning_rate=1e-2)
    more = jaxvae.fit(data, config, longer, run_dir=run_dir, progress=False)
    assert [record["epoch"] for record in more.history] == [1, 2, 3, 4]

    run_config = read_config(run_dir, **own)
    assert len(drawing.draw(run_dir, run_config, data, more.params)) >= 10
    explorer.write(run_dir / "explorer.html", more.params, data, "circles")
    paths = export(more.params, tmp_path / "export", ["stablehlo", "safetensors"])
    again = load_safetensors(next(p for p in paths if p.suffix == ".safetensors"), **own)
    np.testing.assert_array_equal(*(jaxvae.encode(p, images).mean for p in (again, more.params)))

    with refused("passed as arrays in Python", "--data"):
        load_run_data(run_config)
    with refused("passed as arrays in Python"):
        evaluation.measure(run_dir, 2, **own)


def test_another_option_than_the_recorded_one_is_refused(tmp_path):
    config = jaxvae.ModelConfig((8, 8, 1), network="mlp:width=8", prior=Laplace(0.7))
    jaxvae.save(tmp_path, jaxvae.create_train_state(KEY, config, jaxvae.TrainConfig()))
    with refused("Laplace:scale=0.7"):
        jaxvae.load(tmp_path, prior=Laplace(0.5))


def test_an_objective_of_ones_own_has_options_and_beta():
    model = jaxvae.ModelConfig(network="mlp:width=8")
    train = jaxvae.TrainConfig(batch_size=16, epochs=2, objective=Annealed(0.3), beta=0.1)
    result = jaxvae.fit(circles(), model, train, progress=False)
    for record in result.history:
        metrics = record["train"]
        loss = 0.1 * metrics["kl"] - 0.3 * metrics["log_likelihood"]
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_plain_function_is_an_objective():
    def mine(params, keys, images):
        terms = jaxvae.elbo(params, keys, images)
        return -terms.value, terms

    model = jaxvae.ModelConfig(network="mlp:width=8")
    train = jaxvae.TrainConfig(batch_size=16, epochs=1, objective=mine)
    ours = jaxvae.fit(circles(), model, train, progress=False)
    theirs = jaxvae.fit(
        circles(), model, jaxvae.TrainConfig(batch_size=16, epochs=1), progress=False
    )
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_optimizer_of_ones_own_trains_and_is_handed_over_to_resume(tmp_path):
    mine = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=1e-3))
    model = jaxvae.ModelConfig(network="mlp:width=8")
    train = jaxvae.TrainConfig(batch_size=16, epochs=2, optimizer=mine)
    result = jaxvae.fit(circles(), model, train, run_dir=tmp_path, progress=False)
    assert result.history[1]["test"]["elbo"] > result.history[0]["test"]["elbo"]
    assert jaxvae.load(tmp_path).config == result.params.config  # to use it, it is not needed
    with refused("optimizer", "pass it as an object"):
        jaxvae.restore(tmp_path)
    state = jaxvae.restore(tmp_path, optimizer=mine)
    state, _ = jaxvae.train_step(state, circles().train_images[:16])
    assert int(state.step) == 11
    with refused("learning_rate", "its own learning rate"):
        jaxvae.train_step(state, circles().train_images[:16], learning_rate=0.1)


def test_a_callback_follows_and_ends_a_training():
    recorder = Recorder()
    train = jaxvae.TrainConfig(batch_size=16, epochs=9)
    model = jaxvae.ModelConfig(network="mlp:width=8")
    result = jaxvae.fit(circles(), model, train, callbacks=[recorder], progress=False)
    assert recorder.epochs == [1, 2, 3]
    assert int(result.state.step) == 15


MODULE = """
from dataclasses import dataclass
import jax, jax.numpy as jnp, numpy as np
import jaxvae
from jaxvae.data import Dataset

{prior}

{bound}

class Counter(jaxvae.Callback):
    def epoch(self, record, params):
        print("epoch", record["epoch"], "was counted")

def squares():
    images = np.zeros((100, 6, 6, 1), np.uint8)
    images[:, 2:4, 2:4] = 255
    return Dataset(images[:80], None, images[80:], None)
"""


def test_the_command_line_takes_dotted_paths_and_a_file_never_does(tmp_path):
    import inspect

    source = MODULE.format(
        prior="@dataclass(frozen=True)\n" + inspect.getsource(Laplace).partition("\n")[2],
        bound="@jax.tree_util.register_static\n@dataclass(frozen=True)\n"
        + inspect.getsource(LaplacePrior).split("\n", 2)[2],
    )
    (tmp_path / "mine.py").write_text(source)

    def jaxvae_command(*words):
        path = f"{tmp_path}:{Path(jaxvae.__file__).parents[1]}"
        return subprocess.run(
            [sys.executable, "-m", "jaxvae", *words],
            capture_output=True, text=True, cwd=tmp_path,
            env={"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), "PATH": "",
                 "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **KEPT_BY_COMMANDS},
        )  # fmt: skip

    words = "--network mlp:width=8 --batch-size 16 --epochs 1 --run-dir run --data mine.squares"
    prior = ("--prior", "mine.Laplace:scale=2")
    done = jaxvae_command("train", *words.split(), *prior, "--callback", "mine.Counter")
    assert done.returncode == 0, done.stderr
    assert "epoch 1 was counted" in done.stdout
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["model"]["prior"] == "mine.Laplace:scale=2"
    assert recorded["data"] == "mine.squares"
    without = jaxvae_command("sample", "run", "--n", "4", "--out", "a.png")
    assert without.returncode == 2
    assert "mine.Laplace:scale=2" in without.stderr
    assert "--prior" in without.stderr
    assert without.stderr.count("\n") == 1
    given = jaxvae_command("sample", "run", "--n", "4", "--out", "a.png", *prior)
    assert given.returncode == 0, given.stderr
