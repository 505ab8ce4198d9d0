"""The inverse autoregressive flow against Jacobians, its numerical inverse and its own draws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy import stats

from jaxvae.models.distributions import Gaussian, reparameterize
from jaxvae.models.flows import AutoregressiveNetwork, FlowPosterior, InverseAutoregressiveFlow

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
CONTEXT = 3


def random_params(module, latents):
    """Parameters of which none is zero, so that all that may depend on something does."""
    zeros = jnp.zeros(latents), jnp.zeros(CONTEXT)
    shapes = jax.eval_shape(lambda: module.init(KEY, *zeros)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.float32(rng.normal(size=leaf.shape) * 1.5 / np.sqrt(leaf.shape[0])), shapes
    )


def jacobian(module, params, z, context, result=0, argument=0):
    def apply(*arguments):
        return module.apply({"params": params}, *arguments)[result]

    return np.asarray(jax.jit(jax.jacfwd(apply, argument))(z, context))


def posterior(batch, latents=2, steps=2):
    """Rows of different Gaussians and contexts, through one flow."""
    flow = InverseAutoregressiveFlow(steps, hidden=16)
    mean, log_var, context = (
        jax.random.normal(jax.random.fold_in(KEY, i), (batch, size))
        for i, size in enumerate((latents, latents, CONTEXT))
    )
    return FlowPosterior(mean, log_var - 1, context, random_params(flow, latents), flow)


def copies(batch):
    """One row, so many times."""
    q = posterior(1)
    rows = (jnp.repeat(x, batch, axis=0) for x in (q.mean, q.log_var, q.context))
    return FlowPosterior(*rows, q.params, q.flow)


def inverse(q, z_T):
    """z_0 of every z_T, and the Jacobian there.

    A step is undone by so many rounds as there are latents, each of which sets one more right.
    """

    def forward(z, context):
        return q.flow.apply({"params": params}, z, context)[0]

    @jax.jit
    def undo(z, context):
        for t in reversed(range(q.flow.steps)):
            network = AutoregressiveNetwork(q.flow.hidden, backwards=t % 2 == 1)
            after = z
            for _ in range(z.shape[1]):
                m, s = network.apply({"params": params[f"step_{t + 1}"]}, z, context)
                sigma = 1 / (1 + jnp.exp(-s - 2))
                z = (after - (1 - sigma) * m) / sigma
        return z, jax.vmap(jax.jacfwd(forward))(z, context), forward(z, context)

    params, context, z_T = jax.tree.map(jnp.float64, (q.params, q.context, z_T))
    z_0, jacobians, again = undo(z_T, context)
    np.testing.assert_allclose(again, z_T, atol=1e-8)
    return np.asarray(z_0), np.asarray(jacobians)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("latents", [1, 2, 3, 8])
def test_log_det_is_the_jacobians(latents, steps):
    flow = InverseAutoregressiveFlow(steps, hidden=16)
    rng = np.random.default_rng(latents)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, random_params(flow, latents))
        for z, context in zip(
            jnp.asarray(rng.normal(size=(3, latents))),
            jnp.asarray(rng.normal(size=(3, CONTEXT))),
            strict=True,
        ):
            _, log_det = flow.apply({"params": params}, z, context)
            sign, expected = np.linalg.slogdet(jacobian(flow, params, z, context))
            assert sign == 1
            np.testing.assert_allclose(log_det, expected, rtol=1e-10)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("result", [0, 1])
def test_a_latents_numbers_depend_on_those_before_it_and_on_no_other(backwards, result):
    network = AutoregressiveNetwork(16, backwards)
    params = random_params(network, 5)
    found = jacobian(network, params, jnp.ones(5), jnp.ones(CONTEXT), result) != 0
    before = np.tril(np.ones((5, 5), bool), -1)
    np.testing.assert_array_equal(found, before.T if backwards else before)


def test_fewer_units_than_latents_keep_the_order():
    network = AutoregressiveNetwork(3)
    found = jacobian(network, random_params(network, 5), jnp.ones(5), jnp.ones(CONTEXT)) != 0
    assert np.any(found)
    assert not np.any(np.triu(found))


@pytest.mark.parametrize("latents", [1, 2, 5])
@pytest.mark.parametrize("result", [0, 1])
def test_every_latents_numbers_depend_on_the_context(latents, result):
    network = AutoregressiveNetwork(16)
    params, z, context = random_params(network, latents), jnp.ones(latents), jnp.ones(CONTEXT)
    assert np.all(jacobian(network, params, z, context, result, argument=1) != 0)


def test_every_other_step_runs_backwards():
    flow = InverseAutoregressiveFlow(2, hidden=16)
    params, z, context = random_params(flow, 4), jnp.ones(4), jnp.ones(CONTEXT)
    lower = np.tril(np.ones((4, 4), bool))
    for step, expected in (("step_1", lower), ("step_2", lower.T)):
        alone = jax.tree.map(jnp.zeros_like, params) | {step: params[step]}
        np.testing.assert_array_equal(jacobian(flow, alone, z, context) != 0, expected)
    assert np.all(jacobian(flow, params, z, context) != 0)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_fresh_flow_only_scales_whatever_the_context(steps):
    z, context = jax.random.normal(KEY, (6, 3)), 100 * jax.random.normal(KEY, (6, CONTEXT))
    (z_T, log_det), _ = InverseAutoregressiveFlow(steps).init_with_output(KEY, z, context)
    np.testing.assert_allclose(z_T, 0.880797**steps * z, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.full(6, 3 * steps * np.log(0.880797)), rtol=1e-5)


def test_log_prob_of_a_draw_is_its_density_by_the_inverse():
    q = posterior(batch=50, latents=3, steps=3)
    z, log_q = q.sample_and_log_prob(jax.random.split(KEY, 50))
    with jax.enable_x64(True):
        z_0, jacobians = inverse(q, z)
    base = stats.norm.logpdf(z_0, q.mean, np.exp(np.float64(q.log_var) / 2)).sum(1)
    expected = base - np.log(np.linalg.det(jacobians))
    np.testing.assert_allclose(log_q, expected, rtol=1e-4, atol=1e-4)


def test_density_integrates_to_one_and_is_that_of_the_draws():
    n = (side := 100) ** 2
    q = copies(n)
    draws = np.asarray(q.sample(KEY))
    low, high = draws.min(0) - 1, draws.max(0) + 1
    cell = (high - low) / side
    corners = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
    with jax.enable_x64(True):
        z_0, jacobians = inverse(q, low + cell * (corners.reshape(n, 2) + 0.5))
    base = stats.norm.pdf(z_0, q.mean, np.exp(q.log_var / 2)).prod(1)
    mass = (base / np.linalg.det(jacobians) * cell.prod()).reshape(side, side)
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-3)
    in_parts = n * mass.reshape(10, side // 10, 10, side // 10).sum((1, 3))
    counts, _, _ = np.histogram2d(*draws.T, bins=10, range=np.stack([low, high], axis=1))
    assert np.all(np.abs(counts - in_parts) < 5 * np.sqrt(in_parts) + 2)


def test_weights_of_draws_average_to_the_integral_of_another_density():
    """E_q[f(z) / q(z)] is the integral of f, by the posterior's own draws and densities alone."""
    n = 20_000
    z, log_q = copies(n).sample_and_log_prob(jax.random.split(KEY, n))
    narrow = Gaussian(jnp.mean(z, axis=0), jnp.log(jnp.var(z, axis=0)) - 2)
    weights = np.exp(np.float64(narrow.log_prob(z) - log_q))
    error = weights.std() / np.sqrt(n)
    assert error < 0.02
    assert abs(weights.mean() - 1) < 5 * error


def test_sample_and_center_are_the_flows_of_the_gaussians():
    q = posterior(batch=4)
    z_0 = reparameterize(KEY, q.mean, q.log_var)
    for found, start in ((q.sample(KEY), z_0), (q.center, q.mean)):
        expected, _ = q.flow.apply({"params": q.params}, start, q.context)
        np.testing.assert_array_equal(found, expected)


def test_a_rows_draw_is_its_keys_whatever_the_batch():
    q, keys = posterior(batch=7), jax.random.split(KEY, 7)
    draw = jax.jit(FlowPosterior.sample_and_log_prob)
    z, log_q = draw(q, keys)
    assert len(np.unique(z[:, 0])) == 7
    rows = np.array([5, 0, 3])
    some = FlowPosterior(q.mean[rows], q.log_var[rows], q.context[rows], q.params, q.flow)
    some_z, some_log_q = draw(some, keys[rows])
    np.testing.assert_allclose(some_z, z[rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(some_log_q, log_q[rows], rtol=1e-5, atol=1e-5)


def test_the_posterior_goes_through_jit_and_vmap():
    q, keys = posterior(batch=4), jax.random.split(KEY, 4)
    through = jax.jit(lambda q: q)(q)
    assert isinstance(through, FlowPosterior)
    assert through.flow == q.flow
    inside = jax.jit(FlowPosterior.sample_and_log_prob)(q, keys)
    models = jax.tree.map(lambda x: jnp.stack([x, x]), q)
    mapped = jax.vmap(lambda q: q.sample_and_log_prob(keys))(models)
    for found, expected in zip(inside, through.sample_and_log_prob(keys), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for found, expected in zip(mapped, inside, strict=True):
        np.testing.assert_allclose(found, np.stack([expected] * 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("latents", [1, 3])
def test_gradients_equal_finite_differences(latents):
    with jax.enable_x64(True):
        q = jax.tree.map(jnp.float64, posterior(batch=2, latents=latents))
        keys = jax.random.split(KEY, 2)
        draw = jax.jit(lambda q: q.sample_and_log_prob(keys))
        check_grads(draw, (q,), order=1, modes=["rev"])


def test_gradients_are_finite_where_the_sigmoid_saturates():
    q = posterior(batch=4)
    q = FlowPosterior(q.mean, q.log_var, 1e4 * q.context, q.params, q.flow)

    @jax.jit
    @jax.value_and_grad
    def total(q):
        z, log_q = q.sample_and_log_prob(jax.random.split(KEY, 4))
        return jnp.sum(z) + jnp.sum(log_q)

    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(total(q)))


def test_bfloat16_is_of_the_layers_alone():
    q = posterior(batch=20, latents=4)
    flow = InverseAutoregressiveFlow(2, hidden=16, dtype=jnp.bfloat16)
    for found, expected in zip(
        flow.apply({"params": q.params}, q.mean, q.context),
        q.flow.apply({"params": q.params}, q.mean, q.context),
        strict=True,
    ):
        assert found.dtype == jnp.float32
        assert np.max(np.abs(found - expected)) > 1e-5
        np.testing.assert_allclose(found, expected, atol=0.05)


def test_a_flow_learns_what_no_gaussian_can():
    """A banana, z_1 ~ N(0, 1), z_2 ~ N(z_1^2, 0.3^2): KL(q || p) goes far below a Gaussian's."""
    n, flow = 256, InverseAutoregressiveFlow(2, hidden=32)
    zeros = jnp.zeros(2)
    start = flow.init(KEY, zeros, jnp.zeros(1))["params"]
    rate = optax.adam(1e-2)

    def kl(params, key, n, with_flow):
        rows = (jnp.broadcast_to(x, (n, 2)) for x in params[:2])
        if with_flow:
            q = FlowPosterior(*rows, jnp.zeros((n, 1)), params[2], flow)
            z, log_q = q.sample_and_log_prob(jax.random.split(key, n))
        else:
            q = Gaussian(*rows)
            z = q.sample(key)
            log_q = q.log_prob(z)
        banana = Gaussian(jnp.stack([0 * z[:, 0], z[:, 0] ** 2], 1), jnp.log(jnp.array([1, 0.09])))
        return jnp.mean(log_q - banana.log_prob(z))

    @jax.jit(static_argnums=0)
    def fitted(with_flow):
        def step(carry, key):
            params, moments = carry
            gradient = jax.grad(kl)(params, key, n, with_flow)
            updates, moments = rate.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), None

        params = (zeros, zeros, start)
        keys = jax.random.split(KEY, 600)
        (params, _), _ = jax.lax.scan(step, (params, rate.init(params)), keys)
        return kl(params, jax.random.fold_in(KEY, 1), 20_000, with_flow)

    assert fitted(True) < 0.3 * fitted(False)
