"""Semi-supervised classification of MNIST with 100 labels: the models M2 and M1+M2.

    python experiments/semi_supervised/run.py MNIST [SEED]

MNIST is a folder with the four IDX files. The results of a seed are added to results.json beside
this file after each model, and printed. Kingma, Rezende, Mohamed and Welling (2014),
Semi-supervised Learning with Deep Generative Models, table 1.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import jaxvae
from jaxvae.data import load_dataset
from jaxvae.runs.config import RunConfig
from jaxvae.runs.data import train_conditions

LABELS = 100  # in every batch of 200 are 20 of them
ALPHA = 100
EPOCHS = {"M1": 20, "M1+M2": 30, "M2": 12}
RESULTS = Path(__file__).with_name("results.json")
M1 = jaxvae.ModelConfig(latent_dim=50, network="mlp:width=600,layers=2,activation=softplus")
M2 = jaxvae.ModelConfig(
    latent_dim=50,
    network="mlp:width=500,layers=1,activation=softplus",
    num_classes=10,
    classifier=True,
)
M2_OF_LATENTS = jaxvae.ModelConfig(
    image_shape=(50,),
    latent_dim=50,
    network="mlp:width=500,layers=1,activation=softplus",
    likelihood="gaussian:scale=feature",
    num_classes=10,
    classifier=True,
)


def training(objective: str, batch_size: int, binarization: str = "none") -> jaxvae.TrainConfig:
    """Return the configuration of a training by Adam."""
    return jaxvae.TrainConfig(
        batch_size, learning_rate=1e-3, optimizer="adam", objective=objective,
        binarization=binarization,
    )  # fmt: skip


def epochs(
    key: jax.Array,
    model: jaxvae.ModelConfig,
    train: jaxvae.TrainConfig,
    images_of: Callable[[int], jax.Array | np.ndarray],
    labels: np.ndarray | None,
    count: int,
) -> Iterator[tuple[int, jaxvae.Params]]:
    """Train, and yield the number of each epoch and the parameters after it."""
    state = jaxvae.create_train_state(key, model, train)
    for epoch in range(1, count + 1):
        state, metrics = jaxvae.train_epoch(state, images_of(epoch), labels)
        print(epoch, {name: round(float(x), 2) for name, x in metrics.items()}, flush=True)
        yield epoch, state.params


def error(params: jaxvae.Params, images: jax.Array | np.ndarray, labels: np.ndarray) -> float:
    """Return the error of q(y|x), in percent."""
    classes = np.argmax(jaxvae.classify(params, images), axis=1)
    return round(100 * float(np.mean(classes != labels)), 2)


def record(seed: int, name: str, found: dict[str, object]) -> None:
    """Add a result to results.json, and print it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(str(seed), {})[name] = found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"seed {seed}, {name}: {found}", flush=True)


def main(folder: str, seed: int = 0) -> None:
    """Measure the error of every model."""
    data = load_dataset(folder)
    x, test_x, test_y = np.asarray(data.train_images[:]), data.test_images, data.test_labels
    # As `jaxvae train --labelled 100 --seed SEED`.
    few = train_conditions(data, RunConfig(labelled=LABELS, seed=seed, model=M2))
    rows, key = few >= 0, jax.random.key(seed)

    flat, flat_test = (images.reshape(len(images), -1) / 255 for images in (x[rows], test_x))
    neighbors = KNeighborsClassifier(1).fit(flat, few[rows])
    nearest = 100 * (1 - neighbors.score(flat_test, test_y))
    record(seed, "1 nearest neighbour of pixels", {"error": round(nearest, 2)})

    began = time.process_time()
    train = training("elbo", 200, "dynamic")
    *_, (_, m1) = epochs(key, M1, train, lambda _: x, None, EPOCHS["M1"])
    posterior, test_posterior = jaxvae.encode(m1, x), jaxvae.encode(m1, test_x)
    probe = LogisticRegression(max_iter=1000).fit(posterior.mean[rows], few[rows])
    wrong = 100 * (1 - probe.score(test_posterior.mean, test_y))
    found = {"error": round(wrong, 2), "seconds": round(time.process_time() - began)}
    record(seed, "M1, logistic regression", found)

    def latents(epoch: int) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, epoch), posterior.mean.shape)
        return posterior.mean + jnp.exp(posterior.log_var / 2) * noise

    train_m2 = training(f"m2:alpha={ALPHA}", 200)
    train_images = training(f"m2:alpha={ALPHA}", 200, "dynamic")
    for name, model, train, images_of, test in (
        ("M1+M2", M2_OF_LATENTS, train_m2, latents, test_posterior.mean),
        ("M2", M2, train_images, lambda _: x, test_x),
    ):
        began, errors = time.process_time(), []
        for _, params in epochs(key, model, train, images_of, few, EPOCHS[name]):
            errors.append(error(params, test, test_y))
            print(name, errors[-1], flush=True)
        found = {"error": errors[-1], "errors by epoch": errors,
                 "seconds": round(time.process_time() - began)}  # fmt: skip
        record(seed, name, found)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
