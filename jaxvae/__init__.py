"""Variational autoencoders in JAX: pure functions over parameters that know their model."""
from jaxvae.config import ModelConfig, TrainConfig
from jaxvae.errors import InputError
from jaxvae.distributions import reparameterize
from jaxvae.model import Params, decode, encode, init, reconstruct, sample
from jaxvae.objectives import elbo, log_likelihood
from jaxvae.training import create_train_state, train_epoch, train_step
from jaxvae.data import load_data
