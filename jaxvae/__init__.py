"""Variational autoencoders in JAX and Flax."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of `_MODULES` once more, with their types
    from jaxvae.data import load_data as load_data
    from jaxvae.errors import InputError as InputError
    from jaxvae.evaluation.ais import ais as ais
    from jaxvae.evaluation.ais import bidirectional_ais as bidirectional_ais
    from jaxvae.evaluation.impute import Imputation as Imputation
    from jaxvae.evaluation.impute import impute as impute
    from jaxvae.evaluation.log_likelihood import log_likelihood as log_likelihood
    from jaxvae.models.config import ModelConfig as ModelConfig
    from jaxvae.models.distributions import Gaussian as Gaussian
    from jaxvae.models.distributions import reparameterize as reparameterize
    from jaxvae.models.likelihoods import Bernoulli as Bernoulli
    from jaxvae.models.protocols import Elbo as Elbo
    from jaxvae.models.vae import Params as Params
    from jaxvae.models.vae import classify as classify
    from jaxvae.models.vae import decode as decode
    from jaxvae.models.vae import encode as encode
    from jaxvae.models.vae import init as init
    from jaxvae.models.vae import reconstruct as reconstruct
    from jaxvae.models.vae import sample as sample
    from jaxvae.objectives import elbo as elbo
    from jaxvae.runs.callbacks import Callback as Callback
    from jaxvae.runs.checkpoints import load as load
    from jaxvae.runs.checkpoints import restore as restore
    from jaxvae.runs.checkpoints import save as save
    from jaxvae.runs.fit import FitResult as FitResult
    from jaxvae.runs.fit import fit as fit
    from jaxvae.runs.hub import from_pretrained as from_pretrained
    from jaxvae.training.config import TrainConfig as TrainConfig
    from jaxvae.training.state import TrainState as TrainState
    from jaxvae.training.state import create_train_state as create_train_state
    from jaxvae.training.step import train_epoch as train_epoch
    from jaxvae.training.step import train_step as train_step

__version__ = "0.2.0"

# The public names and their modules, in the order a reader meets them.
_MODULES = {
    "ModelConfig": "models.config",
    "Params": "models.vae",
    "init": "models.vae",
    "encode": "models.vae",
    "Gaussian": "models.distributions",
    "reparameterize": "models.distributions",
    "decode": "models.vae",
    "Bernoulli": "models.likelihoods",
    "sample": "models.vae",
    "reconstruct": "models.vae",
    "classify": "models.vae",
    "Elbo": "models.protocols",
    "elbo": "objectives",
    "log_likelihood": "evaluation.log_likelihood",
    "ais": "evaluation.ais",
    "bidirectional_ais": "evaluation.ais",
    "impute": "evaluation.impute",
    "Imputation": "evaluation.impute",
    "TrainConfig": "training.config",
    "TrainState": "training.state",
    "create_train_state": "training.state",
    "train_step": "training.step",
    "train_epoch": "training.step",
    "save": "runs.checkpoints",
    "restore": "runs.checkpoints",
    "load": "runs.checkpoints",
    "from_pretrained": "runs.hub",
    "load_data": "data",
    "fit": "runs.fit",
    "FitResult": "runs.fit",
    "Callback": "runs.callbacks",
    "InputError": "errors",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    # A module is imported with the first of its names that is used. With `import jaxvae` alone,
    # JAX is not: the command line answers for what goes wrong in that, such as a Ctrl-C.
    if name in _MODULES:
        value = getattr(import_module(f"jaxvae.{_MODULES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"jaxvae.{name}"):
        value = import_module(f"jaxvae.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
