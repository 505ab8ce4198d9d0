"""Keras 3 on the backend that KERAS_BACKEND names: tensorflow, jax or torch.

The argument "nojit" leaves XLA out: TensorFlow then runs its graph with its own kernels.
"""

import sys

import keras
import numpy as np
import protocol
from keras import ops
from keras_networks import Network
from protocol import Timed

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as framework

    DEVICES = framework.config.list_physical_devices("GPU")
elif BACKEND == "jax":
    import jax as framework

    DEVICES = [device for device in framework.devices() if device.platform == "gpu"]
else:
    import torch as framework

    DEVICES = list(range(framework.cuda.device_count()))
    framework.set_float32_matmul_precision("high")  # TF32, as the others do by default
JIT = False if sys.argv[1:] == ["nojit"] else "auto"
AT_ONCE = 10_000 if DEVICES else 500  # images, when only run forward


class VAE(keras.Model):
    """Keras's own `train_step` calls `call`, then `compute_loss`, on every backend."""

    def __init__(self, network):
        super().__init__()
        self.network = Network(network)
        self.model = self.network.model  # so that Keras finds its variables
        self.seed_generator = keras.random.SeedGenerator(0)

    def terms(self, x, eps):
        """log p(x|z) and KL of each image, nats."""
        logits, kl = self.model([x, eps])
        cross_entropy = ops.binary_crossentropy(x, logits, from_logits=True)
        return -ops.sum(cross_entropy, axis=(1, 2, 3)), kl

    def call(self, images):
        x = images
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(images.dtype)):
            x = ops.cast(images, "float32") / 255
        latents = self.model.inputs[1].shape[1]
        eps = keras.random.normal((ops.shape(x)[0], latents), seed=self.seed_generator)
        return self.terms(x, eps)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        log_p_x, kl = y_pred
        return ops.mean(kl - log_p_x)


def new_model(network="conv"):
    model = VAE(network)
    model.compile(optimizer=keras.optimizers.RMSprop(1e-3, rho=0.9, epsilon=1e-7), jit_compile=JIT)
    model(np.zeros((1, 28, 28, 1), np.float32))
    model.optimizer.build(model.trainable_variables)
    return model


def wait(result):
    if BACKEND == "jax":
        framework.block_until_ready(result)
    elif BACKEND == "tensorflow" and DEVICES:
        framework.test.experimental.sync_devices()
    elif BACKEND == "torch" and DEVICES:
        framework.cuda.synchronize()


def trainer(model):
    """Keras's train_step, compiled as its trainer does, without the loop around it."""
    if BACKEND == "torch":
        return lambda x: model.train_step((x,))
    if BACKEND == "tensorflow":
        return framework.function(lambda x: model.train_step((x,)), jit_compile=model.jit_compile)
    train_step = framework.jit(model.train_step, donate_argnums=0)
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([variable.value for variable in part] for part in variables)

    def train(x):
        nonlocal state
        logs, state = train_step(state, (x,))
        return logs

    return train


def step(batch, network="conv"):
    train = trainer(new_model(network))
    x = ops.convert_to_tensor(protocol.float_images(batch))

    def run(n):
        for _ in range(n):
            result = train(x)
        wait(result)

    return Timed(run, batch)


def epoch(batch, images):
    model, x = new_model(), protocol.make_images(images)

    def run(n):
        for _ in range(n):
            model.fit(x, batch_size=batch, shuffle=True, verbose=0)

    return Timed(run, images)


def compiled(model, function):
    """function(x), which calls `model`, compiled where the backend compiles."""
    if BACKEND == "torch":
        return framework.inference_mode()(function)
    if BACKEND == "tensorflow":
        return framework.function(function, jit_compile=JIT is not False)
    weights = [variable.value for variable in model.trainable_variables]

    @framework.jit
    def run(weights, x):
        with keras.StatelessScope(list(zip(model.trainable_variables, weights, strict=True))):
            return function(x)

    return lambda x: run(weights, x)


def forward(function, x):
    """Time function(x), AT_ONCE rows at a time."""

    def run(n):
        for _ in range(n):
            parts = [function(x[i : i + AT_ONCE]) for i in range(0, len(x), AT_ONCE)]
        wait(parts)

    return Timed(run, len(x))


def sample(images):
    decoder = new_model().network.decoder
    decode = compiled(decoder, lambda z: ops.sigmoid(decoder(z)))
    return forward(decode, keras.random.normal((images, 2), seed=0))


def encode(images):
    encoder = new_model().network.encoder
    x = ops.convert_to_tensor(protocol.float_images(images))
    return forward(compiled(encoder, lambda x: encoder(x)), x)


def check(path, network="conv"):
    weights, images, eps = protocol.load_check(path)
    model = new_model(network)
    sizes = model.network.load(weights)
    allow_tf32(False)
    terms = model.terms(
        ops.convert_to_tensor(images.astype(np.float32) / 255), ops.convert_to_tensor(eps)
    )
    allow_tf32(True)
    return protocol.check_answer(*map(ops.convert_to_numpy, terms), *sizes)


def allow_tf32(allow):
    if BACKEND == "tensorflow":
        framework.config.experimental.enable_tensor_float_32_execution(allow)
    elif BACKEND == "jax":
        framework.config.update("jax_default_matmul_precision", None if allow else "highest")
    else:
        framework.set_float32_matmul_precision("high" if allow else "highest")
        framework.backends.cudnn.allow_tf32 = allow


def info():
    versions = {"keras": keras.__version__, BACKEND: framework.__version__}
    return {"device": f"{len(DEVICES)} GPU" if DEVICES else "cpu", "versions": versions}


def device_peak():
    if not DEVICES:
        return None
    if BACKEND == "tensorflow":
        return framework.config.experimental.get_memory_info("GPU:0")["peak"]
    if BACKEND == "jax":
        return DEVICES[0].memory_stats()["peak_bytes_in_use"]
    return framework.cuda.max_memory_allocated()


if __name__ == "__main__":
    protocol.serve(
        {
            "info": info,
            "check": check,
            "step": step,
            "epoch": epoch,
            "sample": sample,
            "encode": encode,
        },
        device_peak,
    )
