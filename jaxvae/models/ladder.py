"""A deep VAE: groups of convolutional latents at several resolutions, from the top down.

    p(z) = p(z_1) prod_g p(z_g | z_<g)        q(z|x) = prod_g q(z_g | z_<g, x)

The posterior shares the top-down path of the prior. Group 1 is at the coarsest resolution.

References:
  Sonderby et al. (2016), Ladder Variational Autoencoders. Vahdat and Kautz (2020), NVAE. Child
  (2021), Very Deep VAEs.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float, Key

from jaxvae.devices.convolution import block_size, in_blocks
from jaxvae.errors import InputError
from jaxvae.models.distributions import Gaussian
from jaxvae.models.networks import (
    ConvTranspose,
    ResidualBlock,
    conv_3x3,
    dense,
    he,
    he_transposed,
    variance_scaling,
    with_planes,
)
from jaxvae.models.protocols import Draw, Likelihood, Posterior, Prior
from jaxvae.validation import as_floats, at_least_float32, expect_bool, support_of, whole_number

if TYPE_CHECKING:
    from jaxvae.models.config import ModelConfig
    from jaxvae.models.vae import Params

# Log variances of the prior, and of the posterior relative to it, stay within -5 and 5: Vahdat and
# Kautz (2020) clamp them alike to keep the KL finite early in training.
_MAX_LOG_VAR = 5.0


class Level(NamedTuple):
    """The groups of one resolution.

    Attributes:
      factor: height and width of the images over those of the latents, a power of 2.
      groups: number of groups.
      latents: latents of a group at every place.
      width: channels of the features.
    """

    factor: int
    groups: int
    latents: int
    width: int


class Group(NamedTuple):
    """A group of latents, [rows, columns, latents], and the level that it is on."""

    level: int
    rows: int
    columns: int
    latents: int

    @property
    def size(self) -> int:
        """Number of latents in the group."""
        return self.rows * self.columns * self.latents


@dataclass(frozen=True)
class Ladder:
    """Groups of latents at several resolutions, with a shared top-down path: a deep VAE.

    `groups` lists the resolutions from the coarsest to the finest: "8x1+4x2+2x3" is one group at an
    eighth of the images' height and width, two at a quarter and three at a half. "4x2z8w64" has 8
    latents at every place and 64 channels instead of the options `latents` and `width`.

    Attributes:
      groups: FACTORxCOUNT of every resolution, joined by +.
      width: channels of the features.
      latents: latents of a group at every place.
      remat: recompute the activations of each group in the backward pass, to save memory.

    References:
      Child (2021), Very Deep VAEs, figure 3. Vahdat and Kautz (2020), NVAE.
    """

    groups: str = "4x2+2x2"
    width: int = 32
    latents: int = 4
    remat: bool = False
    images_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("width", "latents"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        expect_bool("remat", self.remat)
        object.__setattr__(self, "groups", str(self.groups))
        factors = [level.factor for level in self.levels]
        if sorted(set(factors), reverse=True) != factors:
            raise InputError(
                f"groups is {self.groups!r}: expected each factor once, the largest first, "
                "such as '4x2+2x2'"
            )

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The resolutions, from the coarsest to the finest."""
        levels = []
        for part in self.groups.split("+"):
            match = re.fullmatch(r"(\d+)x(\d+)(?:z([1-9]\d*))?(?:w([1-9]\d*))?", part)
            numbers = [int(n) if n else 0 for n in match.groups()] if match else [0] * 4
            factor, count, latents, width = numbers
            if not 0 < count < 1000 or not 0 < factor < 2**16 or factor & (factor - 1):
                raise InputError(
                    f"groups is {self.groups!r}: expected FACTORxCOUNT joined by +, such as "
                    f"'8x1+4x2+2x3', where each factor is a power of 2; not {part!r}"
                )
            levels.append(Level(factor, count, latents or self.latents, width or self.width))
        return tuple(levels)

    def latent_dim(self, image_shape: tuple[int, int, int]) -> int:
        """Return the number of latents of all groups for images of this shape."""
        return sum(group.size for group in self.groups_of(image_shape))

    def groups_of(self, image_shape: tuple[int, int, int]) -> tuple[Group, ...]:
        """Return the groups for images of this shape, from the top down."""
        height, width, _ = image_shape
        return tuple(
            Group(i, -(-height // level.factor), -(-width // level.factor), level.latents)
            for i, level in enumerate(self.levels)
            for _ in range(level.groups)
        )

    def model(self, config: "ModelConfig") -> "LadderVAE":
        """Return the model of a configuration with this network."""
        return LadderVAE(config)

    def validate(self, config: "ModelConfig") -> None:
        """Raise InputError for another prior or posterior than those of the groups."""
        for name, expected in (("prior", "standard_normal"), ("posterior", "gaussian")):
            if (given := config.specs()[name]) != expected:
                raise InputError(
                    f"{name} is {given!r}, but the network 'ladder' has a {name} of its own: "
                    f"expected {expected!r}, that of each group"
                )


class BottomUp(nn.Module):
    """The encoder: features of the images at every resolution, and the posterior of each group.

    Attributes:
      levels: the resolutions, from the coarsest to the finest.
      groups: the groups, from the top down.
      dtype: of the layers' inputs, kernels and products.
    """

    levels: tuple[Level, ...]
    groups: tuple[Group, ...]
    dtype: Dtype | None = None

    def setup(self) -> None:
        """Define the layers."""
        convs, blocks, factor = [], [], 1
        for i, level in reversed(list(enumerate(self.levels))):
            down: list[nn.Module] = []
            while not down or factor < level.factor:
                stride = 2 if factor < level.factor else 1
                down.append(_conv(level.width, stride, self.dtype, f"down_{i}_{len(down)}"))
                factor *= stride
            convs.append(down)
            blocks.append(
                [ResidualBlock(self.dtype, name=f"block_{i}_{b}") for b in range(level.groups)]
            )
        self.convs, self.blocks = convs, blocks
        self.heads = [
            Head(self.levels[group.level].width, 2 * group.latents, self.dtype, name=f"q_{g}")
            for g, group in enumerate(self.groups)
        ]

    def __call__(self, images: Array, labels: Array | None = None) -> tuple[Array, ...]:
        """Return the features of every resolution, from the coarsest to the finest."""
        x = images if labels is None else with_planes(images, labels)
        features = []
        for level, (down, blocks) in enumerate(zip(self.convs, self.blocks, strict=True)):
            for i, conv in enumerate(down):
                x = conv(nn.relu(x) if level or i else x)
            for block in blocks:
                x = block(x)
            features.append(x)
        return tuple(reversed(features))

    def posterior(self, g: int, h: Array, features: tuple[Array, ...]) -> tuple[Array, Array]:
        """Return the residual mean and log variance of a group: its posterior minus its prior."""
        x = jnp.concatenate([h, features[self.groups[g].level].astype(h.dtype)], axis=-1)
        mean, log_var = jnp.split(self.heads[g](x), 2, axis=-1)
        return mean, log_var


class TopDown(nn.Module):
    """The generative path: the prior of each group, and the outputs for the likelihood.

    Attributes:
      levels: the resolutions, from the coarsest to the finest.
      groups: the groups, from the top down.
      outputs_shape: (height, width, outputs).
      dtype: of the layers' inputs, kernels and products.
    """

    levels: tuple[Level, ...]
    groups: tuple[Group, ...]
    outputs_shape: tuple[int, int, int]
    dtype: Dtype | None = None

    def setup(self) -> None:
        """Define the layers."""
        top = self.groups[0]
        first = top.rows, top.columns, self.levels[0].width
        self.top = self.param("top", nn.initializers.zeros, first, jnp.float32)
        widths = [self.levels[group.level].width for group in self.groups]
        # Group 1 has the prior N(0, I) and no features before it.
        self.heads = [
            Head(width, 2 * group.latents + width, self.dtype, name=f"p_{g}") if g else None
            for g, (group, width) in enumerate(zip(self.groups, widths, strict=True))
        ]
        # The sum over all groups keeps its scale whatever the depth: Child (2021), section 4.
        scale = variance_scaling(1 / len(self.groups), "fan_in", "normal")
        self.projections = [
            dense(width, dtype=self.dtype, name=f"z_{g}", kernel_init=scale)
            for g, width in enumerate(widths)
        ]
        self.blocks = [ResidualBlock(self.dtype, name=f"block_{g}") for g in range(len(widths))]
        ups = []
        for i, level in enumerate(self.levels):
            finer = self.levels[i + 1] if i + 1 < len(self.levels) else Level(1, 0, 0, level.width)
            steps = (level.factor // finer.factor).bit_length() - 1
            ups.append(
                [
                    ConvTranspose(finer.width, 2, self.dtype, he_transposed, name=f"up_{i}_{s}")
                    for s in range(steps)
                ]
            )
        self.ups = ups
        self.conv = conv_3x3(self.outputs_shape[2], dtype=self.dtype, name="conv")

    def start(self, rows: Any) -> Array:
        """Return the features before the first group of `rows` examples, a number or symbolic."""
        return jnp.broadcast_to(self.top, (rows, *self.top.shape))

    def prior(self, g: int, h: Array) -> tuple[Gaussian, Array]:
        """Return p(z_g | z_<g), and the features that the prior's network adds its own to."""
        group = self.groups[g]
        shape = *h.shape[:3], group.latents
        head = self.heads[g]
        if head is None:
            return Gaussian(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)), h
        outputs = head(h)
        mean, log_var, features = jnp.split(outputs, [group.latents, 2 * group.latents], axis=-1)
        mean, log_var = map(at_least_float32, (mean, log_var))
        return Gaussian(mean, bounded(log_var)), h + features

    def update(self, g: int, h: Array, z: Array) -> Array:
        """Return the features after a group; after the last of a resolution, those of the next."""
        h = self.blocks[g](h + self.projections[g](z))
        level = self.groups[g].level
        if g + 1 < len(self.groups) and self.groups[g + 1].level == level:
            return h
        factor = self.levels[level].factor
        for up in self.ups[level]:
            factor //= 2
            # An odd side was rounded up when halved.
            rows, columns = (-(-side // factor) for side in self.outputs_shape[:2])
            h = up(nn.relu(h))[:, :rows, :columns]
        return h

    def outputs(self, h: Array, labels: Array | None = None) -> Array:
        """Return what the likelihood is made of: [batch, height, width, outputs]."""
        h = nn.relu(h)
        return self.conv(h if labels is None else with_planes(h, labels))


class Head(nn.Module):
    """Two convolutions, of which the last starts at 0.

    Posterior and prior of a group then start equal, which keeps the KL of a deep model small at
    first: Vahdat and Kautz (2020), section 3.2.

    Attributes:
      width: channels in between.
      outputs: channels of the result.
      dtype: of the layers' inputs, kernels and products.
    """

    width: int
    outputs: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return [batch, rows, columns, outputs]."""
        x = conv_3x3(self.width, kernel_init=he, dtype=self.dtype, name="conv_1")(nn.relu(x))
        zeros = nn.initializers.zeros
        return conv_3x3(self.outputs, kernel_init=zeros, dtype=self.dtype, name="conv_2")(
            nn.relu(x)
        )


def _conv(width: int, stride: int, dtype: Dtype | None, name: str) -> nn.Conv:
    return conv_3x3(width, stride, kernel_init=he, dtype=dtype, name=name)


def bounded(log_var: Array) -> Array:
    """Bound a log variance softly."""
    return _MAX_LOG_VAR * jnp.tanh(log_var / _MAX_LOG_VAR)


class Terms(NamedTuple):
    """A top-down pass: latents and terms of every group, from the top down, and the features.

    Attributes:
      z: [rows, latent].
      log_prior: log p(z_g | z_<g), [rows, groups].
      log_posterior: log q(z_g | z_<g, x), [rows, groups]; 0 in a pass without images.
      kl: KL(q(z_g | z_<g, x) || p(z_g | z_<g)), [rows, groups]; 0 without images.
      mean: of the posterior, or of the prior in a pass without images: [rows, latent].
      log_var: of the same, [rows, latent].
      features: [rows, height, width, features].
    """

    z: Array
    log_prior: Array
    log_posterior: Array
    kl: Array
    mean: Array
    log_var: Array
    features: Array


@dataclass(frozen=True)
class LadderVAE:
    """The model of a `Ladder` network: `models.protocols.Model`.

    Attributes:
      config: the configuration.
    """

    config: "ModelConfig"

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of latents, from the top down."""
        return self.config.network.groups_of(self.config.image_shape)

    def modules(self) -> tuple[BottomUp, TopDown]:
        """Return the Flax modules: encoder and decoder."""
        config, levels = self.config, self.config.network.levels
        dtype = jnp.bfloat16 if config.compute_dtype == "bfloat16" else None
        down = TopDown(levels, self.groups, config.outputs_shape, dtype)
        return BottomUp(levels, self.groups, dtype), down

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return fresh parameters: the fields of `Params` but for `config`."""
        config = self.config
        encoder, decoder = self.modules()
        encoder_key, decoder_key = jax.random.split(key)
        images = jnp.zeros((1, *config.image_shape), jnp.float32)
        condition = jnp.zeros((1, config.condition_dim), jnp.float32)
        of_encoder, of_decoder = (
            condition if config.conditional(part) else None for part in ("encoder", "decoder")
        )

        def all_of_encoder(module: BottomUp, images: Array, labels: Array | None) -> None:
            features = module(images, labels)
            for g, group in enumerate(module.groups):
                module.posterior(g, features[group.level], features)

        def all_of_decoder(module: TopDown, labels: Array | None) -> Array:
            h = module.start(1)
            for g in range(len(module.groups)):
                p, h = module.prior(g, h)
                h = module.update(g, h, p.mean)
            return module.outputs(h, labels)

        return {
            "encoder": encoder.init(encoder_key, images, of_encoder, method=all_of_encoder)[
                "params"
            ],
            "decoder": decoder.init(decoder_key, of_decoder, method=all_of_decoder)["params"],
            "likelihood": config.likelihood.init(config.image_shape[2]),
            "prior": {},
            "posterior": {},
        }

    def prior(self, params: "Params") -> Prior:
        """Return p(z)."""
        return LadderPrior(params.decoder, self)

    def posterior(
        self, params: "Params", images: jax.Array, labels: jax.Array | None = None
    ) -> Posterior:
        """Return q(z|x) of images, floats in [0, 1], and of their labels."""
        features = self.encoded(params, images, labels)
        return LadderPosterior(features, params.encoder, params.decoder, self)

    def encoded(
        self, params: "Params", images: jax.Array, labels: jax.Array | None = None
    ) -> tuple[Array, ...]:
        """Return the features of images in [0, 1] at every resolution, from `BottomUp`."""
        encoder, _ = self.modules()
        return in_blocks(
            lambda block: encoder.apply({"params": params.encoder}, *block),
            (images, *self.config.condition("encoder", labels)),
            block_size(images.shape[0], params.encoder),
        )

    def likelihood(
        self, params: "Params", z: jax.Array, labels: jax.Array | None = None
    ) -> Likelihood:
        """Return p(x|z) of latents [batch, latent], and of their labels."""
        return self._decoded(params, labels, z=z)

    def likelihood_of_noise(
        self, params: "Params", noise: jax.Array, labels: jax.Array | None = None
    ) -> Likelihood:
        """Return p(x|z) of the latents that the prior makes of noise of N(0, I).

        Noise of 0 is the prior's mean whatever the groups above are, so a group can be changed by
        itself.
        """
        return self._decoded(params, labels, noise=noise)

    def noise_of(self, params: "Params", z: jax.Array) -> jax.Array:
        """Return the noise of which the prior makes these latents, [batch, latent]."""

        def standardized(z: Array) -> Array:
            terms = self.top_down(params.decoder, z=z)
            return (z - terms.mean) * jnp.exp(-terms.log_var / 2)

        return in_blocks(standardized, z, block_size(z.shape[0], params.decoder))

    def draw(
        self,
        params: "Params",
        posterior: "LadderPosterior",
        keys: Key[Array, "samples batch"],
        images: jax.Array,
        labels: jax.Array | None = None,
    ) -> Draw:
        """Sample the posterior and evaluate all terms in one pass, as of `objectives.draw_at`."""
        samples, batch = keys.shape

        def repeated(tree: Any) -> Any:
            def repeat(x: Array) -> Array:
                return jnp.broadcast_to(x, (samples, *x.shape)).reshape(-1, *x.shape[1:])

            return jax.tree.map(repeat, tree)

        noise = jax.vmap(self._noise)(keys.reshape(-1))
        images = as_floats(support_of(params), images)
        rows = noise, repeated(posterior.features), *repeated((images, labels))

        def one_pass(rows: Any) -> tuple[Terms, Array]:
            noise, features, images, labels = rows
            terms = self.top_down(
                posterior.decoder, noise=noise, encoder=posterior.encoder, encoded=features
            )
            log_p_x = self.likelihood_of_features(params, terms.features, labels).log_prob(images)
            return terms._replace(features=jnp.zeros(noise.shape[0])), log_p_x

        terms, log_p_x = in_blocks(one_pass, rows, block_size(samples * batch, params))

        def shaped(x: Array) -> Array:
            return x.reshape(samples, batch, *x.shape[1:])

        kl = shaped(terms.kl)
        return Draw(
            shaped(terms.z),
            shaped(log_p_x),
            shaped(jnp.sum(terms.log_prior, axis=-1)),
            shaped(jnp.sum(terms.log_posterior, axis=-1)),
            jnp.mean(jnp.sum(kl, axis=-1), axis=0),
            posterior,
            kl_per_group=kl,
        )

    def top_down(
        self,
        decoder: Any,
        *,
        z: Array | None = None,
        noise: Array | None = None,
        encoder: Any = None,
        encoded: tuple[Array, ...] | None = None,
    ) -> Terms:
        """Carry out a top-down pass, at given latents or by given noise.

        Args:
          decoder: parameters of `TopDown`.
          z: latents, [rows, latent].
          noise: instead of them, noise of N(0, I), [rows, latent], by which they are drawn: from
            the posterior with `encoded`, else from the prior.
          encoder: parameters of `BottomUp`.
          encoded: features of the images that `BottomUp` returns.

        Returns:
          The latents and the terms of all groups.
        """
        given = z if z is not None else noise
        assert given is not None
        parts = self._split(given)

        def group(g: int, h: Array, part: Array) -> tuple[Array, tuple[Array, ...]]:
            p, h_p = self.group_prior(decoder, g, h)
            r = p if encoded is None else self.group_posterior(encoder, g, p, h, encoded)
            z_g = part if z is not None else r.mean + jnp.exp(r.log_var / 2) * part
            log_p = _total(p.log_prob_per_latent(z_g))
            log_q, kl = jnp.zeros_like(log_p), jnp.zeros_like(log_p)
            if encoded is not None:
                log_q, kl = _total(r.log_prob_per_latent(z_g)), _total(_kl(r, p))
            return self.group_update(decoder, g, h_p, z_g), (
                z_g,
                log_p,
                log_q,
                kl,
                r.mean,
                r.log_var,
            )

        if self.config.network.remat:
            group = jax.checkpoint(group, static_argnums=0)
        h, found = self.start(decoder, given.shape[0]), []
        for g, part in enumerate(parts):
            h, terms = group(g, h, part)
            found.append(terms)
        z_g, *of_groups, mean, log_var = zip(*found, strict=True)
        log_p, log_q, kl = (jnp.stack(x, axis=-1) for x in of_groups)
        return Terms(_flat(z_g), log_p, log_q, kl, _flat(mean), _flat(log_var), h)

    def start(self, decoder: Any, rows: Any) -> Array:
        """Return the features before the first group.

        Args:
          decoder: parameters of `TopDown`.
          rows: number of examples; symbolic while a model is exported.

        Returns:
          The features, [rows, height, width, features].
        """
        return self._generate(decoder).start(rows)

    def group_prior(self, decoder: Any, g: int, h: Array) -> tuple[Gaussian, Array]:
        """Return p(z_g | z_<g), given the features h, and the features for `group_update`."""
        return self._generate(decoder).prior(g, h)

    def group_posterior(
        self, encoder: Any, g: int, p: Gaussian, h: Array, encoded: tuple[Array, ...]
    ) -> Gaussian:
        """Return q(z_g | z_<g, x), relative to the prior p of the group.

            N(mean_p + mean, var_p exp(log_var))

        References:
          Vahdat and Kautz (2020), NVAE, equation 3.
        """
        infer = self.modules()[0].bind({"params": encoder})
        mean, log_var = map(at_least_float32, infer.posterior(g, h, encoded))
        return Gaussian(p.mean + mean, p.log_var + bounded(log_var))

    def group_update(self, decoder: Any, g: int, h: Array, z: Array) -> Array:
        """Return the features after a group, given its latents."""
        return self._generate(decoder).update(g, h, z)

    def likelihood_of_features(
        self, params: "Params", features: Array, labels: Array | None = None
    ) -> Likelihood:
        """Return p(x|z), given the features after the last group."""
        _, decoder = self.modules()
        outputs = in_blocks(
            lambda block: decoder.apply({"params": params.decoder}, *block, method="outputs"),
            (features, *self.config.condition("decoder", labels)),
            block_size(features.shape[0], params.decoder),
        )
        return self.config.likelihood.from_outputs(
            *jax.tree.map(at_least_float32, (outputs, params.likelihood))
        )

    def _generate(self, decoder: Any) -> Any:
        return self.modules()[1].bind({"params": decoder})

    def _decoded(self, params: "Params", labels: Array | None, **given: Array) -> Likelihood:
        (rows,) = given.values()
        features = in_blocks(
            lambda given: self.top_down(params.decoder, **given).features,
            given,
            block_size(rows.shape[0], params.decoder),
        )
        return self.likelihood_of_features(params, features, labels)

    def _noise(self, key: Key[Array, ""]) -> Float[Array, " latent"]:
        return jax.random.normal(key, (self.config.latent_dim,), jnp.float32)

    def _split(self, z: Array) -> list[Array]:
        """Split flat latents into the groups', [rows, rows of places, columns, latents]."""
        ends = list(accumulate(group.size for group in self.groups))[:-1]
        return [
            part.reshape(-1, group.rows, group.columns, group.latents)
            for part, group in zip(jnp.split(z, ends, axis=-1), self.groups, strict=True)
        ]


def _flat(parts: Any) -> Array:
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in parts], axis=-1)


def _total(x: Array) -> Array:
    return jnp.sum(x, axis=(1, 2, 3))


def _kl(q: Gaussian, p: Gaussian) -> Array:
    """Compute KL(q || p) of every latent, in nats.

    KL = 1/2 (log_var_p - log_var_q - 1 + exp(log_var_q - log_var_p)
              + (mean_q - mean_p)^2 exp(-log_var_p))
    """
    ratio = q.log_var - p.log_var
    return 0.5 * (jnp.exp(ratio) - 1 - ratio + (q.mean - p.mean) ** 2 * jnp.exp(-p.log_var))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LadderPrior:
    """p(z) = prod_g p(z_g | z_<g) of flat latents: a pytree.

    Attributes:
      decoder: parameters of `TopDown`.
      model: the model.
    """

    decoder: Any
    model: LadderVAE = field(metadata={"static": True})

    def log_prob(self, z: Float[Array, "*batch latent"]) -> Float[Array, "*batch"]:
        """Compute log p(z) in nats."""
        rows = z.reshape(-1, z.shape[-1])
        log_p = jnp.sum(self.model.top_down(self.decoder, z=rows).log_prior, axis=-1)
        return log_p.reshape(z.shape[:-1])

    def sample(
        self, key: Key[Array, ""], n: int, temperature: float | tuple[float, ...] = 1.0
    ) -> Float[Array, "n latent"]:
        """Draw n latents.

        Args:
          key: PRNG key.
          n: number of draws.
          temperature: factor of the standard deviations, or one for each group from the top down:
            with (1, 1, 0, 0) groups 3 and 4 are at their means.

        Returns:
          The latents.

        Raises:
          InputError: another number of temperatures than groups.
        """
        groups = self.model.groups
        noise = jax.random.normal(key, (n, self.model.config.latent_dim), jnp.float32)
        if temperature != 1.0:
            each = temperature if isinstance(temperature, tuple) else (temperature,) * len(groups)
            if len(each) != len(groups):
                raise InputError(
                    f"temperature has {len(each)} numbers: expected one, or one for each of the "
                    f"{len(groups)} groups"
                )
            factors = np.repeat(np.array(each, np.float32), [group.size for group in groups])
            noise = noise * factors
        return self.model.top_down(self.decoder, noise=noise).z


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LadderPosterior:
    """q(z|x) = prod_g q(z_g | z_<g, x) of a batch: a pytree.

    Attributes:
      features: of the images at every resolution, from `BottomUp`.
      encoder: parameters of `BottomUp`.
      decoder: parameters of `TopDown`.
      model: the model.
    """

    features: tuple[Array, ...]
    encoder: Any
    decoder: Any
    model: LadderVAE = field(metadata={"static": True})

    @property
    def mean(self) -> Float[Array, "batch latent"]:
        """The means of the groups, each given the means of the groups above."""
        return self._at_means().mean

    @property
    def log_var(self) -> Float[Array, "batch latent"]:
        """The log variances of the groups, each given the means of the groups above."""
        return self._at_means().log_var

    @property
    def center(self) -> Float[Array, "batch latent"]:
        """The means, which `reconstruct` decodes."""
        return self.mean

    def log_prob(self, z: Float[Array, "*samples batch latent"]) -> Float[Array, "*samples batch"]:
        """Compute log q(z|x) in nats."""

        def at(z: Array) -> Array:
            return jnp.sum(self.terms(z=z).log_posterior, axis=-1)

        for _ in range(z.ndim - 2):
            at = jax.vmap(at)
        return at(z)

    def sample_and_log_prob(
        self, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, " batch"]]:
        """Draw z by a key for each row; also return log q(z|x) of it, in nats."""
        terms = self.terms(noise=jax.vmap(self.model._noise)(keys))
        return terms.z, jnp.sum(terms.log_posterior, axis=-1)

    def kl(self, prior: Prior) -> None:
        """Return None: the KL divergence of a group depends on the sample of those above."""
        return

    def _at_means(self) -> Terms:
        batch = self.features[0].shape[0]
        return self.terms(noise=jnp.zeros((batch, self.model.config.latent_dim), jnp.float32))

    def terms(self, **given: Array) -> Terms:
        """Carry out the top-down pass with these images, at `z` or by `noise`."""

        def one_pass(block: tuple[dict[str, Array], tuple[Array, ...]]) -> Terms:
            given, features = block
            terms = self.model.top_down(
                self.decoder, **given, encoder=self.encoder, encoded=features
            )
            return terms._replace(features=jnp.zeros(terms.z.shape[0]))

        rows = self.features[0].shape[0]
        return in_blocks(one_pass, (given, self.features), block_size(rows, self.decoder))
