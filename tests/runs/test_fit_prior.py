"""A new prior for a trained model."""

import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SignalAt, refused

import jaxvae
from jaxvae.cli.commands import main
from jaxvae.data import load_dataset
from jaxvae.errors import Preempted
from jaxvae.models.config import ModelConfig
from jaxvae.models.priors import Mixture, Vamp
from jaxvae.models.vae import prior
from jaxvae.objectives import ELBO, PriorFit
from jaxvae.runs import directory, sweep
from jaxvae.runs.config import configured, read_config
from jaxvae.runs.data import load_run_data
from jaxvae.runs.files import read_metrics
from jaxvae.runs.fit_prior import fit_prior
from jaxvae.training.step import train_step

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
PRIOR = "mixture:components=8"
EPOCHS = 5


@pytest.fixture(scope="module")
def trained(npz, tmp_path_factory):
    """A run whose KL had little weight, so that its latents are far from N(0, I)."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    model = jaxvae.ModelConfig(network="mlp:width=16")
    train = jaxvae.TrainConfig(epochs=5, batch_size=32, beta=0.1, optimizer="adam")
    jaxvae.fit(str(npz), model, train, run_dir=run_dir, progress=False)
    return run_dir


@pytest.fixture(scope="module")
def fitted(trained):
    """The mixture at its default place, beside the trained run."""
    return fit_prior(trained, PRIOR, epochs=EPOCHS, learning_rate=1e-2, progress=False)


def assert_leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_everything_but_the_prior_is_unchanged_and_the_elbo_rises(trained, fitted):
    before, after = jaxvae.load(trained), jaxvae.load(fitted.run_dir)
    assert fitted.run_dir == trained.with_name("run-mixture")
    assert_leaves_equal(after, fitted.params)
    for part in ("encoder", "decoder", "likelihood", "posterior"):
        assert_leaves_equal(getattr(after, part), getattr(before, part))
    assert after.config.prior == Mixture(8)
    assert fitted.after["elbo"] > fitted.before["elbo"] + 0.2
    assert fitted.after["log_likelihood"] == pytest.approx(fitted.before["log_likelihood"])
    assert fitted.before == pytest.approx(read_metrics(trained)[-1]["test"], rel=1e-5)
    assert fitted.after == fitted.history[-1]["test"]


def test_its_epochs_are_recorded_as_of_any_run(fitted):
    history = read_metrics(fitted.run_dir)
    assert history == fitted.history
    assert [line["epoch"] for line in history] == list(range(1, EPOCHS + 1))
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]
    for line in history:  # the log-likelihood of training images is near that of test images
        train, test = line["train"], line["test"]
        assert train["elbo"] == pytest.approx(train["log_likelihood"] - train["kl"], rel=1e-4)
        assert train["log_likelihood"] == pytest.approx(test["log_likelihood"], rel=0.2)
    config = read_config(fitted.run_dir)
    assert config.train.trainable == ("prior",)
    assert isinstance(config.train.objective, PriorFit)


def test_samples_come_from_the_prior_which_is_near_the_latents(trained, fitted, npz):
    params = fitted.params
    z = prior(params).sample(KEY, 2000)
    images = jaxvae.sample(params, KEY, 4)
    drawn = jaxvae.decode(params, prior(params).sample(KEY, 4)).mean
    np.testing.assert_allclose(images, drawn, rtol=1e-5)
    test_images = load_dataset(str(npz)).test_images
    latents = jaxvae.encode(params, test_images).sample(KEY)
    old = prior(jaxvae.load(trained)).sample(KEY, 2000)
    spread = jnp.std(latents, axis=0)
    near, far = (jnp.max(jnp.abs(jnp.std(x, axis=0) / spread - 1)) for x in (z, old))
    assert near < far


def test_a_stopped_fit_is_resumed_bit_for_bit(trained, fitted, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Preempted, match="stopped and saved after step"):
        fit_prior(
            trained, PRIOR, out=out, epochs=EPOCHS, learning_rate=1e-2, progress=False,
            callbacks=[SignalAt(2)],
        )  # fmt: skip
    assert main(["train", "--resume", "--run-dir", str(out)]) == 0
    assert_leaves_equal(jaxvae.load(out), fitted.params)


def test_the_command_prints_the_test_elbo_before_and_after(trained, tmp_path, capsys):
    out = tmp_path / "vamp"
    command = ["fit-prior", str(trained), "--prior", "vamp:components=5", "--epochs", "2",
               "--out", str(out), "--batch-size", "16"]  # fmt: skip
    assert main(command) == 0
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("test ELBO before -")
    assert before.endswith("prior standard_normal")
    assert after.startswith("test ELBO after  -")
    assert after.endswith("prior vamp:components=5")
    assert (out / "figures" / "training.png").exists()
    assert read_config(out).train.batch_size == 16
    for rest in (["evaluate", "RUN", "--num-samples", "2"], ["explore", "RUN"],
                 ["sample", "RUN", "--n", "4", "--out", str(tmp_path / "a.png")],
                 ["export", "RUN", "--to", "safetensors"]):  # fmt: skip
        assert main([str(out) if word == "RUN" else word for word in rest]) == 0
    encoder = jaxvae.load(trained).encoder
    assert_leaves_equal(jaxvae.load(out).encoder, encoder)


@pytest.fixture(scope="module")
def models(npz, tmp_path_factory):
    """The directory of a sweep, as its start leaves it."""
    run_dir = tmp_path_factory.mktemp("sweep") / "runs"
    flags = {"data": str(npz), "network": "mlp:width=4"}
    configs = sweep.configured(flags, 2)
    sweep.start(run_dir, configs, load_run_data(configured(flags)), resume=False)
    return run_dir


def test_what_cannot_be_fitted_is_refused_in_one_line(trained, fitted, models, tmp_path, capsys):
    content = sorted(fitted.run_dir.rglob("*"))
    for arguments, says in [
        ([tmp_path / "nowhere", PRIOR], f"{tmp_path / 'nowhere'} is not a run directory"),
        ([models, PRIOR], f"{models} is a sweep: expected the run directory of one"),
        ([fitted.run_dir, "mixture:components=9"],
         f"{fitted.run_dir} has the prior 'mixture:components=8' already"),
        ([trained, "standard_normal"], "has the prior 'standard_normal' already"),
        ([fitted.run_dir, "standard_normal"], "which has no parameters to fit"),
        ([trained, PRIOR], f"{fitted.run_dir} exists already: choose another directory"),
        ([trained, "realnvp", "--out", trained], f"{trained} exists already"),
        ([trained, "gaussian"], "prior is 'gaussian': expected"),
        ([trained, "vamp", "--batch-size", "0"], "batch_size is 0"),
    ]:  # fmt: skip
        run, name, *more = map(str, arguments)
        assert main(["fit-prior", run, "--prior", name, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert sorted(fitted.run_dir.rglob("*")) == content
    assert not trained.with_name("run-vamp").exists()


def test_only_the_objective_of_a_fit_starts_from_another_prior(trained, npz):
    flags = {"data": str(npz), "start_from": str(trained), "prior": PRIOR,
             "network": "mlp:width=16", "trainable": "prior", "batch_size": 32}  # fmt: skip
    with refused("has a model with prior standard_normal: expected mixture:components=8"):
        directory.start(trained.with_name("other"), configured(flags),
                                    load_dataset(str(npz)), resume=False)  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"num_classes": 3},
        {"posterior": "iaf:steps=1,hidden=8"},
    ],
)
@pytest.mark.parametrize("components", [5, 100])
def test_a_mixture_starts_from_the_latents(fields, components):
    """More components than images are draws of the same posteriors, but differ."""
    config = ModelConfig((8, 8, 1), 3, network="mlp:width=8", prior=Mixture(components), **fields)
    params = jaxvae.init(KEY, config)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    labels = jnp.arange(40) % 3 if config.num_classes else None
    learned = Mixture(components).init_from(KEY, params, jnp.asarray(images), labels)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), learned) == jax.tree.map(
        lambda x: (x.shape, x.dtype), dict(params.prior)
    )
    assert len(np.unique(learned["mean"], axis=0)) == components
    center = jaxvae.encode(params, images, labels).center
    distance = jnp.linalg.norm(jnp.mean(learned["mean"], axis=0) - jnp.mean(center, axis=0))
    assert distance < 6 * jnp.sqrt(3 / components)


def test_a_mixture_starts_from_the_latents_of_counts_that_are_not_scaled():
    config = ModelConfig((2, 2, 1), 1, network="mlp:width=4", likelihood="poisson:size=0")
    params, counts = jaxvae.init(KEY, config), np.random.default_rng(0).poisson(3, (9, 2, 2, 1))
    of_bytes, of_floats = (
        Mixture(2).init_from(KEY, params, jnp.asarray(counts, dtype), None)
        for dtype in (jnp.uint8, jnp.float32)
    )
    np.testing.assert_allclose(of_bytes["mean"], of_floats["mean"])


def test_a_vamp_prior_starts_from_images():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    config = ModelConfig((8, 8, 1), 2, network="mlp:width=8", prior=Vamp(6))
    params = jaxvae.init(KEY, config)
    learned = Vamp(6).init_from(KEY, params, jnp.asarray(images), None)
    shown = jax.nn.sigmoid(learned["pseudo_inputs"])
    np.testing.assert_allclose(shown, images[[0, 1, 2, 3, 0, 1]] / 255, atol=0.021)


def test_the_objective_is_the_priors_part_of_the_elbo_without_the_decoder(images):
    config = ModelConfig((8, 8, 1), 2, network="mlp:width=8", prior=PRIOR)
    params = jaxvae.init(KEY, config)

    def slope(objective):
        return jax.grad(lambda params: jnp.mean(objective(params, KEY, images)[0]))(params)

    ours, elbos = slope(PriorFit()), slope(ELBO())
    for a, b in zip(jax.tree.leaves(ours.prior), jax.tree.leaves(elbos.prior), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(jnp.all(x == 0) for x in jax.tree.leaves((ours.encoder, ours.decoder)))
    _, terms = PriorFit(log_likelihood=-7)(params, KEY, images)
    np.testing.assert_allclose(terms.kl, ELBO()(params, KEY, images)[1].kl, rtol=1e-5)
    np.testing.assert_allclose(terms.value, -7 - terms.kl, rtol=1e-6)
    train = jaxvae.TrainConfig(objective="prior", trainable="prior", optimizer="sgd")
    state = jaxvae.create_train_state(KEY, config, train)
    step = jax.jit(train_step).lower(state, images).compile().as_text()
    assert "MlpEncoder/" in step
    assert "MlpDecoder/" not in step
    with refused("log_likelihood is 'high': expected a number of nats"):
        PriorFit(log_likelihood="high")


@dataclass(frozen=True)
class Scaled:
    """N(0, s^2 I) with one learned scale, as a user writes a prior."""

    def init(self, key, config):
        return {"log_scale": jnp.zeros(())}

    def bind(self, learned, params):
        return ScaledNormal(learned["log_scale"])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaledNormal:
    log_scale: jax.Array

    def log_prob(self, z):
        terms = jax.scipy.stats.norm.logpdf(z, scale=jnp.exp(self.log_scale))
        return jnp.sum(terms, axis=-1)

    def sample(self, key, n):
        return jnp.exp(self.log_scale) * jax.random.normal(key, (n, 2))


def test_a_prior_of_ones_own_is_fitted_from_arrays(trained, npz, tmp_path):
    data = load_dataset(str(npz))
    run_dir = shutil.copytree(trained, tmp_path / "run")
    fitted = fit_prior(run_dir, Scaled(), data=data, epochs=2, progress=False)
    assert fitted.run_dir == tmp_path / "run-scaled"
    assert fitted.after["elbo"] > fitted.before["elbo"]
    again = jaxvae.load(fitted.run_dir, prior=Scaled())
    assert again.prior["log_scale"] == fitted.params.prior["log_scale"] != 0
