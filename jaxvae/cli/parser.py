"""Parser of the command line, generated from the configurations."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jaxvae.components import Config, Registry, field_docs
from jaxvae.errors import InputError
from jaxvae.models.config import CONDITIONS, DTYPES, PRIORS, ModelConfig
from jaxvae.runs.config import RunConfig, as_flag
from jaxvae.runs.data import SPLITS
from jaxvae.training.config import BINARIZATIONS, PARTS, TrainConfig

_GROUPS: dict[str, type[Config]] = {"run": RunConfig, "model": ModelConfig, "training": TrainConfig}
# Taken from the data, or shown as groups of their own fields.
_NO_FLAG = (
    "image_shape", "num_covariates", "model", "train", "covariates", "data_seen", "changes",
)  # fmt: skip
_METAVARS = {
    "data": "NAME|FOLDER|FILE",
    "label_column": "NAME",
    "covariate_columns": "NAME,NAME",
    "conditions": "NAME",
    "data_dir": "DIR",
    "manual_dir": "DIR",
    "resize": "HxW",
    "start_from": "RUN_DIR",
    "trainable": "PART",
}
_CHOICES = {
    "compute_dtype": DTYPES,
    "conditions": CONDITIONS,
    "binarization": BINARIZATIONS,
    "trainable": PARTS,
}
_LISTED = 8  # names of components in the help of a flag
SEVERAL = ("learning_rate", "beta")  # several values start a sweep

_RUN: dict[str, dict[str, Any]] = {
    "--run-dir": {"metavar": "DIR", "help": "directory of the run; default runs/DATE-TIME"},
    "--config": {"type": Path, "metavar": "FILE",
                 "help": "TOML or JSON file with the configuration, such as the config.json of a "
                 "run; flags override it"},
    "--resume": {"action": "store_true", "help": "resume the run in --run-dir"},
    "--new-data": {"action": "store_true",
                   "help": "with --resume: continue with another data set, which is recorded"},
    "--tensorboard": {"action": "store_true",
                      "help": "write TensorBoard files to RUN_DIR/tensorboard"},
    "--mlflow": {"nargs": "?", "const": "", "metavar": "URI",
                 "help": "track the run with MLflow, by default at MLFLOW_TRACKING_URI or in "
                 "mlflow.db"},
    "--wandb": {"nargs": "?", "const": "", "metavar": "PROJECT",
                "help": "track the run with Weights & Biases, by default in WANDB_PROJECT or "
                "the project jaxvae"},
    "--profile": {"action": "store_true",
                  "help": "write a profiler trace of some steps to RUN_DIR/profile"},
    "--callback": {"action": "append", "metavar": "PATH", "dest": "callbacks",
                   "help": "dotted path of a custom callback; may be repeated"},
}  # fmt: skip

_SWEEP = """Several values of --learning-rate or --beta, or --seeds, train a model for every
combination, all at the same time."""

_PROCESSES: dict[str, dict[str, Any]] = {
    "--coordinator": {"metavar": "HOST:PORT", "help": "address of process 0"},
    "--num-processes": {"type": int, "metavar": "N", "help": "number of processes"},
    "--process-id": {"type": int, "metavar": "I", "help": "number of this process, from 0"},
}
_RUN_DIR = "the run directory, or a folder of `jaxvae export --to hub`"
_COMPONENT = """A component NAME may also be the dotted path of your own, such as
mypackage.priors.Laplace."""
_CUSTOM = "If the run was trained with custom components: the same dotted paths."
_FIT_PRIOR = """Fit a new prior to the latents of a trained model. Encoder, decoder and
likelihood do not change. The result is a new run, which all other commands take:
evaluate, sample, figures, explore, export, and train --resume for more epochs."""
_COMPRESS = """Compress images by the model of a run, without loss. Decompression needs the same
parameters, the same versions of JAX and NumPy and the same kind of processor; otherwise it refuses
the file. If the run is trained further, keep its parameters by export --to hub first. Images of a
run with binarization are binarized first, as in evaluation: each pixel is drawn with its grey level
as the probability, by a fixed key."""
_ENCODE = """Write the mean and the log variance of the posterior q(z|x) of every example, in the
order of the data: of a discrete model the codes, and of a flow the center of the posterior. Labels
are written too, where there are any."""
_SCORE = """Write a table with a row for each example, the most unusual first: index (from 0, in the
order of the data), log_likelihood (an estimate of log p(x)), elbo, which is expected_log_likelihood
minus kl, and reconstruction_error. Of images also draw the most and the least unusual ones, in a
.png file beside the table."""
_IMPUTE = """Fill in missing entries, which are NaN, empty cells of a .csv file or nulls, by their
means given the other entries of the example. With --draws also by random draws. For images: floats
in an .npz file, with NaN in the region to fill in."""
_DETECTED = "Detected under SLURM, Open MPI, Kubernetes and on TPUs."

_EXAMPLES = {
    "": """
  jaxvae train                            train on 5,000 digits for ten epochs, and draw figures
  jaxvae evaluate runs/20260131-120000    print its test metrics
  jaxvae explore runs/20260131-120000     write an interactive latent-space explorer
  jaxvae COMMAND --help                   flags and more examples
""",
    "train": """
  jaxvae train --batch-size 16
  jaxvae train --data photos/ --latent-dim 32 --network residual:width=16 --run-dir runs/photos
  jaxvae train --resume --run-dir runs/photos --epochs 50
  jaxvae train --network mlp --latent-dim 50 --binarization dynamic --objective iwae:num_samples=5
  jaxvae train --optimizer adamw:weight_decay=1e-4 --ema 0.999 \\
               --schedule warmup_cosine_decay_schedule:warmup_steps=500
  jaxvae train --prior mixture:components=100 --posterior iaf:steps=4
  jaxvae train --prior mypackage.priors.Laplace:scale=2
  jaxvae train --data cells.h5ad --covariate-columns batch,age --likelihood negative_binomial \\
               --network mlp:log1p=true
  jaxvae train --config runs/photos/config.json --seed 1 --run-dir runs/photos-1
  jaxvae train --beta 0.5 1 4 --seeds 3 --run-dir runs/betas
""",
    "evaluate": """
  jaxvae evaluate runs/photos
  jaxvae evaluate runs/photos --best --num-samples 5000
  jaxvae evaluate runs/photos --method ais --num-steps 500 --num-chains 8
""",
    "sample": """
  jaxvae sample runs/photos --n 64 --out samples.png
  jaxvae sample runs/cells --n 1000 --covariates batch=b2,age=40 --out samples.csv
""",
    "encode": """
  jaxvae encode runs/photos --out latents.npz
  jaxvae encode runs/photos --data more_photos/ --split test --out latents.csv
""",
    "score": """
  jaxvae score runs/photos --data more_photos/ --out scores.csv
  jaxvae score runs/photos --split test --by reconstruction_error --out scores.parquet
""",
    "impute": """
  jaxvae impute runs/table --data incomplete.csv --out complete.csv
  jaxvae impute runs/photos --data masked.npz --draws 5 --out inpainted.npz
""",
    "reconstruct": """
  jaxvae reconstruct runs/photos --split test --out reconstructions.npz
  jaxvae reconstruct runs/photos --data few_photos/ --out grid.png
""",
    "figures": """
  jaxvae figures runs/photos --best
  jaxvae figures runs/photos --format pdf
""",
    "export": """
  jaxvae export runs/photos --to onnx
  jaxvae export runs/photos --to stablehlo safetensors --out model/
  jaxvae export runs/photos --to hub --out shared/
""",
    "explore": """
  jaxvae explore runs/photos
  jaxvae explore runs/photos --best --out latents.html
""",
    "compress": """
  jaxvae compress runs/photos --out photos.jaxvae
  jaxvae compress runs/photos --data more_photos/ --split test --out test.jaxvae
""",
    "decompress": """
  jaxvae decompress runs/photos photos.jaxvae --out photos.npz
  jaxvae decompress runs/photos photos.jaxvae --out pictures/
""",
    "fit-prior": """
  jaxvae fit-prior runs/photos --prior mixture:components=100
  jaxvae fit-prior runs/photos --prior realnvp --out runs/photos-flow --epochs 50
  jaxvae sample runs/photos-mixture --n 64 --out samples.png
""",
    "import": """
  jaxvae import vae.keras --run-dir runs/old
  jaxvae import encoder.h5 --decoder decoder.h5 --run-dir runs/old
  jaxvae train --start-from runs/old --run-dir runs/new
""",
    "summary": """
  jaxvae summary
  jaxvae summary runs/photos
""",
    "completion": """
  jaxvae completion bash > ~/.local/share/bash-completion/completions/jaxvae
  jaxvae completion zsh > ~/.zfunc/_jaxvae
""",
}
_SCORES = ("log_likelihood", "elbo", "reconstruction_error")
METHODS = ("importance", "ais")
_AIS = {
    "--num-images": "number of test images and of simulated images; default 100",
    "--num-steps": "steps from the prior to the posterior; default 500",
    "--num-chains": "chains for each image; default 4",
}
SHELLS = ("bash", "zsh", "tcsh")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def config_fields() -> dict[str, Registry[Any] | None]:
    """Return the fields that have a flag, each with the registry of its components, if any."""
    return {
        field.name: config._registries.get(field.name)
        for config in _GROUPS.values()
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
        if field.name not in _NO_FLAG
    }


def _flags(config: type[Config]) -> dict[str, dict[str, Any]]:
    """Return the flags of a configuration's fields, with the options of `add_argument`."""
    docs = field_docs(config)
    flags: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in _NO_FLAG:
            continue
        text = docs[field.name].replace("%", "%%")
        how: dict[str, Any] = {"default": None}
        registry = config._registries.get(field.name)
        if registry is not None:
            names = list(registry)
            listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
            how["metavar"], text = "NAME[:KEY=VALUE,...]", f"{text}: {listed}"
        elif field.type in (bool, "bool"):
            how["action"] = "store_true"
        else:
            how["metavar"] = _METAVARS.get(field.name, "N" if field.type in (int, "int") else "X")
            if field.name in _CHOICES:
                how["metavar"] = _METAVARS.get(field.name, "NAME")
            if field.type in (int, float):
                how["type"] = field.type
            if field.name in SEVERAL or field.name == "trainable":
                how["nargs"] = "+"
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            text = f"{text}; default {field.default}"
        flags[as_flag(field.name)] = how | {"help": text}
    return flags


def _with_examples(name: str) -> dict[str, Any]:
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
    epilog = f"examples:{_EXAMPLES[name].rstrip()}" if name in _EXAMPLES else None
    return {"epilog": epilog, "formatter_class": form}


def _add_custom(command: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add the flags of custom components that a run was trained with."""
    group = command.add_argument_group("custom components", _CUSTOM)
    for name in names:
        group.add_argument(as_flag(name), metavar="PATH[:KEY=VALUE,...]")


def make_parser(
    functions: Mapping[str, Callable[[argparse.Namespace], None]],
) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
      functions: the function of each command, which becomes `command` of the parsed arguments.

    Returns:
      The parser.
    """
    from jaxvae import __version__

    parser = _Parser(
        prog="jaxvae", description="Variational autoencoders in JAX.", **_with_examples("")
    )
    parser.add_argument("--version", action="version", version=f"jaxvae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, **_with_examples(name)
        )
        one.set_defaults(command=functions[name])
        return one

    def group(title: str, flags: dict[str, dict[str, Any]], text: str | None = None) -> None:
        one = train.add_argument_group(title, text)
        for flag, how in flags.items():
            one.add_argument(flag, **how)

    train = command("train", "train a model and draw its figures")
    group("run", _RUN)
    for title, config in _GROUPS.items():
        note = None if config is RunConfig else _COMPONENT
        group(title if title != "run" else "data and initialisation", _flags(config), note)
    seeds = {
        "--seeds": {
            "type": int,
            "metavar": "N",
            "help": "number of seeds from --seed up; default 1",
        }
    }
    group("sweep", seeds, _SWEEP)
    group("several processes", _PROCESSES, _DETECTED)

    evaluate = command("evaluate", "evaluate a run on its test images")
    evaluate.add_argument("--num-samples", type=int, default=100, metavar="K",
                          help="importance samples for log p(x); default 100")  # fmt: skip
    evaluate.add_argument("--method", choices=METHODS, default="importance",
                          help="importance: all metrics, with log p(x) by importance sampling, the "
                          "default; ais: bounds on log p(x) by annealed importance sampling, also "
                          "from above for images simulated from the model")  # fmt: skip
    for flag, says in _AIS.items():
        evaluate.add_argument(flag, type=int, metavar="N", help=f"with --method ais: {says}")
    sample = command("sample", "draw samples from the model of a run")
    sample.add_argument("--n", type=int, required=True, metavar="N", help="number of samples")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.png",
                        help="the image file, a grid of all samples; of examples that are no "
                             "images a .npz or .csv file")  # fmt: skip
    sample.add_argument("--seed", type=int, metavar="N", help="default: the seed of the run")
    sample.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="X",
                        help="factor of the prior's standard deviations; of a ladder also one for "
                             "each group, from the top down")  # fmt: skip
    sample.add_argument("--covariates", metavar="NAME=VALUE,...",
                        help="values of covariate columns; the others are those of random training "
                             "examples")  # fmt: skip
    encode = command("encode", "encode a data set by the model of a run")
    encode.description = _ENCODE
    encode.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="an .npz, .csv or .parquet file")  # fmt: skip
    score = command("score", "score the examples of a data set by how unusual they are")
    score.description = _SCORE
    score.add_argument("--out", type=Path, required=True, metavar="FILE",
                       help="a .csv, .parquet or .npz file")  # fmt: skip
    score.add_argument("--by", choices=_SCORES, default="log_likelihood",
                       help="the order of the table; default log_likelihood, log p(x)")  # fmt: skip
    score.add_argument("--num-samples", type=int, default=100, metavar="K",
                       help="importance samples for log p(x); default 100")  # fmt: skip
    impute = command("impute", "fill in the missing entries of a data set")
    impute.description = _IMPUTE
    impute.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="an .npz file; of vectors also a .csv or .parquet file")  # fmt: skip
    impute.add_argument("--num-samples", type=int, default=1000, metavar="K",
                        help="importance samples; default 1000")  # fmt: skip
    impute.add_argument("--draws", type=int, default=0, metavar="N",
                        help="number of draws, in an .npz file; default 0")  # fmt: skip
    reconstruct = command("reconstruct", "encode and decode a data set by the model of a run")
    reconstruct.add_argument("--out", type=Path, required=True, metavar="FILE",
                             help="an .npz file; of images also a .png file, a grid of all; of "
                                  "vectors also a .csv or .parquet file")  # fmt: skip
    figures = command("figures", "draw the figures of a run")
    figures.add_argument("--format", choices=["png", "svg", "pdf"], default="png",
                         help="default png; the animation is always a GIF")  # fmt: skip
    export = command("export", "export the model of a run to other formats")
    export.add_argument("--to", nargs="+", required=True, metavar="FORMAT",
                        help="stablehlo, onnx, safetensors, or hub: a folder with parameters, "
                        "configuration and model card, to share the model")  # fmt: skip
    export.add_argument("--out", type=Path, metavar="DIR", help="default RUN_DIR/export")
    explore = command("explore", "write an interactive latent-space explorer (an HTML page)")
    explore.add_argument("--out", type=Path, metavar="FILE.html",
                         help="default RUN_DIR/explorer.html")  # fmt: skip
    compress = command("compress", "compress images by the model of a run, without loss")
    compress.description = _COMPRESS
    compress.add_argument("--out", type=Path, required=True, metavar="FILE",
                          help="the compressed file")  # fmt: skip
    decompress = command("decompress", "restore the images of a compressed file")
    decompress.add_argument("--out", type=Path, required=True, metavar="FOLDER|FILE",
                            help="an .npz or .npy file, or a new folder of PNG files")  # fmt: skip
    of_a_data_set = (encode, score, impute, reconstruct, compress)
    for one in of_a_data_set:
        one.add_argument("--split", choices=SPLITS, default="all",
                         help="which part of the data; default all, in the order of the data: if "
                              "they have a test split, it comes last")  # fmt: skip
    for one in (evaluate, sample, figures, explore, export, decompress, *of_a_data_set):
        one.add_argument("run", type=Path, metavar="RUN_DIR", help=_RUN_DIR)
        one.add_argument("--best", action="store_true",
                         help="use the epoch of the best test ELBO, not the latest")  # fmt: skip
        _add_custom(one, ModelConfig._registries)
    decompress.add_argument("file", type=Path, metavar="FILE", help="the compressed file")

    fit_prior = command("fit-prior", "fit a new prior to the latents of a trained model")
    fit_prior.description = _FIT_PRIOR
    fit_prior.add_argument("run", type=Path, metavar="RUN_DIR", help=_RUN_DIR)
    learned = ", ".join(name for name in PRIORS if name != "standard_normal")
    fit_prior.add_argument("--prior", required=True, metavar="NAME[:KEY=VALUE,...]",
                           help=f"the new prior: {learned}, or a dotted path")  # fmt: skip
    fit_prior.add_argument("--out", type=Path, metavar="DIR",
                           help="directory of the new run; default RUN_DIR-PRIOR, such as "
                           "runs/photos-mixture")  # fmt: skip
    fit_prior.add_argument("--epochs", type=int, default=20, metavar="N",
                           help="passes over the training images; default 20")  # fmt: skip
    fit_prior.add_argument("--learning-rate", type=float, default=3e-3, metavar="X",
                           help="learning rate of Adam; default 0.003")  # fmt: skip
    fit_prior.add_argument("--batch-size", type=int, metavar="N",
                           help="images per step; default: that of the run")  # fmt: skip
    _add_custom(fit_prior, [name for name in ModelConfig._registries if name != "prior"])

    data = _flags(RunConfig)["--data"]
    for one in (evaluate, sample, figures, explore, fit_prior, *of_a_data_set):
        one.add_argument("--data", **data | {"help": "default: the data of the run"})

    keras = command("import", "import the notebook's model from Keras as a run")
    keras.add_argument("file", type=Path, metavar="FILE", help="a .keras, .weights.h5 or .h5 file")
    keras.add_argument("--decoder", type=Path, metavar="FILE",
                       help="file of the decoder, if it is a separate file")  # fmt: skip
    keras.add_argument("--run-dir", type=Path, required=True, metavar="DIR",
                       help="directory of the run to make")  # fmt: skip
    keras.add_argument("--data", **data | {"default": "mnist-5k"})

    summary = command("summary", "print the layers of a model and their parameter counts")
    summary.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR",
                         help=f"{_RUN_DIR}; default: the default model")  # fmt: skip
    _add_custom(summary, ModelConfig._registries)
    command("benchmark", "compare the speed of the training step with plain Flax")
    completion = command("completion", "print a shell script that completes commands and flags")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser.

    Args:
      parser: the parser.
      shell: one of `SHELLS`.

    Returns:
      The script.
    """
    import shtab

    choices = {name: tuple(r) for name, r in config_fields().items() if r is not None}
    choices |= _CHOICES | {"to": ("stablehlo", "onnx", "safetensors", "hub")}
    paths = {"DIR": shtab.DIRECTORY, "RUN_DIR": shtab.DIRECTORY, "FILE.png": shtab.FILE}
    paths |= {
        "FOLDER|FILE": shtab.FILE,
        "FILE": shtab.FILE,
        "FILE.html": shtab.FILE,
        "NAME|FOLDER|FILE": shtab.FILE,
    }
    for action in _actions(parser):
        if action.dest in choices:
            action.choices = choices[action.dest]
        elif action.metavar in paths:
            action.complete = paths[action.metavar]  # type: ignore[attr-defined, index]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found: list[argparse.Action] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found += _actions(one)
    return found
