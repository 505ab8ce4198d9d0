"""The public names of jaxvae, which `import jaxvae` gives at their first use."""

from jaxvae.data import load_data
from jaxvae.errors import InputError
from jaxvae.evaluation.log_likelihood import log_likelihood
from jaxvae.models.config import ModelConfig
from jaxvae.models.distributions import Gaussian, reparameterize
from jaxvae.models.likelihoods import Bernoulli
from jaxvae.models.vae import Params, decode, encode, init, reconstruct, sample
from jaxvae.objectives import Elbo, elbo
from jaxvae.runs.callbacks import Callback
from jaxvae.runs.checkpoints import load, restore, save
from jaxvae.runs.fit import FitResult, fit
from jaxvae.training.config import TrainConfig
from jaxvae.training.state import TrainState, create_train_state
from jaxvae.training.step import train_epoch, train_step

# In the order a reader meets them.
__all__ = [
    "ModelConfig",
    "Params",
    "init",
    "encode",
    "Gaussian",
    "reparameterize",
    "decode",
    "Bernoulli",
    "sample",
    "reconstruct",
    "Elbo",
    "elbo",
    "log_likelihood",
    "TrainConfig",
    "TrainState",
    "create_train_state",
    "train_step",
    "train_epoch",
    "save",
    "restore",
    "load",
    "load_data",
    "fit",
    "FitResult",
    "Callback",
    "InputError",
]
