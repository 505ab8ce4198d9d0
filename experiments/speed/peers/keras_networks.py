"""The networks of jaxvae in Keras, for 28x28 images.

Layers have the names of jaxvae's parameters, with dots: "block_1_0.conv_1".
"""

import keras
from keras import layers, ops

SIDES = 28, 14, 7, 4  # of `residual`; `spatial` ends at 7
CHANNELS = 32, 64, 128, 128
WIDTH, GROUP = 32, 4  # of `ladder`: channels, and latents at a place of a group
GROUP_SIDES = 7, 7, 14, 14
LATENTS = {"spatial": 4 * 7 * 7, "ladder": GROUP * sum(side**2 for side in GROUP_SIDES)}


def conv(name, features, stride=1, size=3, **options):
    return layers.Conv2D(features, size, stride, "same", name=name, **options)


def up(name, x, features, side):
    """A transposed convolution with stride 2, cropped to `side`."""
    x = layers.Conv2DTranspose(features, 3, 2, "same", name=name)(x)
    return x if x.shape[1] == side else x[:, :side, :side]


def block(name, x):
    y = conv(f"{name}.conv_1", x.shape[-1])(ops.relu(x))
    return x + conv(f"{name}.conv_2", x.shape[-1])(ops.relu(y))


def heads(x):
    return [layers.Dense(2, name=name)(x) for name in ("mean", "log_var")]


def conv_encoder(x):
    for layer, (features, stride) in enumerate(((32, 1), (64, 2), (64, 1), (64, 1)), start=1):
        x = conv(f"conv_{layer}", features, stride, activation="relu")(x)
    return heads(layers.Dense(32, activation="relu", name="dense")(layers.Flatten()(x)))


def conv_decoder(z):
    x = layers.Dense(14 * 14 * 64, activation="relu", name="dense")(z)
    x = layers.Reshape((14, 14, 64))(x)
    return conv("conv", 1)(ops.relu(up("conv_transpose", x, 32, 28)))


def hidden(x):
    """Two hidden layers of tanh units."""
    x = layers.Dense(200, activation="tanh", name="dense_1")(x)
    return layers.Dense(200, activation="tanh", name="dense_2")(x)


def mlp_encoder(x):
    return heads(hidden(layers.Flatten()(x)))


def mlp_decoder(z):
    return layers.Reshape((28, 28, 1))(layers.Dense(28 * 28, name="pixels")(hidden(z)))


def down(x, levels):
    """Strided convolutions and residual blocks, through `levels` halvings."""
    x = conv("conv_0", CHANNELS[0])(x)
    for level in range(1, levels + 1):
        x = conv(f"conv_{level}", CHANNELS[level], 2)(ops.relu(x))
        x = block(f"block_{level}_0", x)
    return ops.relu(x)


def outputs(x, levels):
    """Residual blocks and transposed convolutions, through as many doublings."""
    for level in range(levels, 0, -1):
        x = ops.relu(block(f"block_{level}_0", x))
        x = up(f"conv_transpose_{level}", x, CHANNELS[level - 1], SIDES[level - 1])
    return conv("conv", 1)(ops.relu(x))


def residual_encoder(x):
    x = layers.Flatten()(down(x, 3))
    return heads(layers.Dense(256, activation="relu", name="dense")(x))


def residual_decoder(z):
    x = layers.Dense(4 * 4 * CHANNELS[3], name="dense")(z)
    return outputs(layers.Reshape((4, 4, CHANNELS[3]))(x), 3)


def spatial_encoder(x):
    x = down(x, 2)
    return [layers.Flatten()(conv(name, 4)(x)) for name in ("mean", "log_var")]


def spatial_decoder(z):
    x = conv("conv_in", CHANNELS[2])(layers.Reshape((7, 7, 4))(z))
    return outputs(x, 2)


class Top(layers.Layer):
    """The learned features above the first group of a ladder, for every image of x."""

    def build(self, shape):
        size = (GROUP_SIDES[0], GROUP_SIDES[0], WIDTH)
        self.top = self.add_weight(shape=size, initializer="zeros")

    def call(self, x):
        return ops.broadcast_to(self.top, (ops.shape(x)[0], *self.top.shape))

    def compute_output_shape(self, shape):
        return (shape[0], GROUP_SIDES[0], GROUP_SIDES[0], WIDTH)


def head(name, x, features):
    x = conv(f"{name}.conv_1", WIDTH)(ops.relu(x))
    return conv(f"{name}.conv_2", features)(ops.relu(x))


def bounded(log_var):
    return 5 * ops.tanh(log_var / 5)


def ladder(x, eps):
    """Logits of the pixels, and the KL of each image; eps has a group after the other."""
    fine = conv("down_1_0", WIDTH, 2)(x)
    fine = block("block_1_1", block("block_1_0", fine))
    coarse = conv("down_0_0", WIDTH, 2)(ops.relu(fine))
    coarse = block("block_0_1", block("block_0_0", coarse))
    h, kl, first = Top(name="top")(x), 0.0, 0
    for g, side in enumerate(GROUP_SIDES):
        part = layers.Reshape((side, side, GROUP))(eps[:, first : first + GROUP * side**2])
        first += GROUP * side**2
        h_p, mean_p, log_var_p = h, 0.0 * part, 0.0 * part
        if g:
            p = head(f"p_{g}", h, 2 * GROUP + WIDTH)
            mean_p, log_var_p = p[..., :GROUP], bounded(p[..., GROUP : 2 * GROUP])
            h_p = h + p[..., 2 * GROUP :]
        features = ops.concatenate([h, coarse if side == 7 else fine], axis=-1)
        q = head(f"q_{g}", features, 2 * GROUP)
        mean, log_var = q[..., :GROUP], bounded(q[..., GROUP:])
        z = mean_p + mean + ops.exp((log_var_p + log_var) / 2) * part
        each = ops.exp(log_var) - 1 - log_var + mean**2 * ops.exp(-log_var_p)
        kl = kl + 0.5 * ops.sum(each, axis=(1, 2, 3))
        h = block(f"decoder.block_{g}", h_p + conv(f"z_{g}", WIDTH, size=1)(z))
        if g in (1, 3):
            h = up("up_0_0" if g == 1 else "up_1_0", ops.relu(h), WIDTH, 2 * side)
    return conv("conv", 1)(ops.relu(h)), kl


MODULES = {
    "conv": (conv_encoder, conv_decoder),
    "mlp": (mlp_encoder, mlp_decoder),
    "residual": (residual_encoder, residual_decoder),
    "spatial": (spatial_encoder, spatial_decoder),
}


class Network:
    """A network of jaxvae: the model (x, eps) -> (logits, KL) and its parts.

    Attributes:
      model: the Keras model.
      encoder: the encoder as a model, or None for a ladder, whose parts depend on each other.
      decoder: the decoder as a model, or None.
    """

    def __init__(self, network):
        x, eps = keras.Input((28, 28, 1)), keras.Input((LATENTS.get(network, 2),))
        self.encoder = self.decoder = None
        if network == "ladder":
            self.model = keras.Model([x, eps], ladder(x, eps))
            return
        encode, decode = MODULES[network]
        z = keras.Input(eps.shape[1:])
        self.encoder, self.decoder = keras.Model(x, encode(x)), keras.Model(z, decode(z))
        mean, log_var = self.encoder(x)
        kl = -0.5 * ops.sum(1 + log_var - ops.square(mean) - ops.exp(log_var), axis=1)
        logits = self.decoder(mean + ops.exp(log_var / 2) * eps)
        self.model = keras.Model([x, eps], [logits, kl])

    def parts(self):
        """Return the layers of encoder and decoder."""
        if self.encoder:
            return {"encoder": self.encoder.layers, "decoder": self.decoder.layers}
        parts = {"encoder": [], "decoder": []}
        for layer in self.model.layers:
            encoder = layer.name.startswith(("q_", "down_", "block_"))
            parts["encoder" if encoder else "decoder"].append(layer)
        return parts

    def load(self, weights):
        """Set the weights from those of jaxvae, by name; return the sizes of the two parts."""
        sizes = []
        for part, owned in self.parts().items():
            owned = [layer for layer in owned if layer.weights]
            for layer in owned:
                path = f"{part}/{layer.name.removeprefix('decoder.').replace('.', '/')}"
                layer.set_weights(_values(layer, path, weights))
            sizes.append(sum(layer.count_params() for layer in owned))
        return sizes


def _values(layer, path, weights):
    if isinstance(layer, Top):
        return [weights[path].reshape(layer.top.shape)]
    kernel, bias = weights[f"{path}/kernel"], weights[f"{path}/bias"]
    if isinstance(layer, layers.Conv2DTranspose):  # convolves where jaxvae correlates
        kernel = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return [kernel.reshape(layer.kernel.shape), bias]
