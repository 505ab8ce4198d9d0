"""One model of jaxvae, trained on counts and measured on test examples: see run.py.

python ours.py train DATA.npz OPTIONS        OPTIONS is JSON; the answer, JSON, is the last line
python ours.py log_prob PARAMETERS.npz OUT.npy
"""

import json
import sys
import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxvae
from jaxvae.models.counts import Counts

# PyTorch's initialisation of a linear layer, here without that of the biases, which start at 0.
dense = partial(nn.Dense, kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


def hidden(x):
    """One hidden layer of 128 units as in scvi-tools: layer norm and relu."""
    return nn.relu(nn.LayerNorm()(dense(128)(x)))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, labels=None):
        features = hidden(jnp.log1p(x))
        return dense(10)(features), dense(10)(features), features


class Decoder(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, z, labels=None):
        return dense(self.outputs)(hidden(z))


def train(data, *, seed, batch_size, epochs, eps, network, draws, num_samples):
    """Train a model, and measure its bounds on the test examples, in nats per example."""
    arrays = np.load(data)
    x_train, x_test = jnp.asarray(arrays["x_train"]), jnp.asarray(arrays["x_test"])
    if network == "relu":
        network = Encoder(), Decoder(2 * x_train.shape[1])
    model = jaxvae.ModelConfig(
        image_shape=x_train.shape[1:],
        latent_dim=10,
        network=network,
        likelihood="zero_inflated_negative_binomial",
    )
    config = jaxvae.TrainConfig(
        batch_size=batch_size, epochs=epochs, optimizer=f"adam:eps={eps}", learning_rate=1e-3
    )
    began, used = time.perf_counter(), time.process_time()
    state = jaxvae.create_train_state(jax.random.key(seed), model, config)
    ends = []
    for _ in range(epochs):
        state, metrics = jaxvae.train_epoch(state, x_train)
        jax.block_until_ready(metrics)
        ends.append((time.perf_counter() - began, time.process_time() - used))
    elbo_key, log_p_key = jax.random.split(jax.random.key(1))
    elbos = jax.lax.map(
        lambda key: jaxvae.elbo(state.params, key, x_test), jax.random.split(elbo_key, draws)
    )
    log_p = jaxvae.log_likelihood(state.params, log_p_key, x_test, num_samples=num_samples)
    return {
        "negative_elbo": -float(elbos.value.mean()),
        "kl": float(elbos.kl.mean()),
        "log_p_x": float(log_p.mean()),
        "train_negative_elbo": -float(metrics["elbo"]),
        "seconds": ends[-1][0],
        "processor_seconds": ends[-1][1],
        "processor_seconds_of_first_epoch": ends[0][1],  # it compiles
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }


def log_prob(parameters, out):
    """Write log ZINB(x; m, theta, pi) of every entry."""
    p = {name: jnp.asarray(value[:, None]) for name, value in np.load(parameters).items()}
    found = Counts(p["log_mean"], None, p["log_theta"], p["zero_logits"]).log_prob(p["x"])
    np.save(out, found)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        print(json.dumps(train(sys.argv[2], **json.loads(sys.argv[3]))))
    else:
        log_prob(*sys.argv[2:])
