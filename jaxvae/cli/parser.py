"""What can be said on the command line: commands, flags, examples."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jaxvae.errors import InputError

# The fields of a run's configuration, as `jaxvae train --help` groups them.
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "data": {
        "--data": {"metavar": "NAME|FOLDER|FILE",
                   "help": "mnist-5k (the default), mnist, tfds:NAME, a folder of pictures or IDX "
                   "files, or an .npz, .npy or IDX file"},
        "--data-dir": {"metavar": "DIR", "help": "where TensorFlow Datasets keeps prepared data"},
        "--manual-dir": {"metavar": "DIR", "help": "where data files fetched by hand lie"},
        "--binarization": {"metavar": "NAME", "help": "none (the default), dynamic or fixed"},
        "--workers": {"type": int, "metavar": "N",
                      "help": "processes that read images on disk; default 0: threads"},
    },
    "model": {
        "--network": {"metavar": "NAME",
                      "help": "notebook (the default), mlp, residual or spatial"},
        "--width": {"type": int, "metavar": "N",
                    "help": "of mlp, residual or spatial; default 200, or 32"},
        "--latent-dim": {"type": int, "metavar": "N", "help": "default 2"},
        "--likelihood": {"metavar": "NAME",
                         "help": "bernoulli (the default), continuous_bernoulli, gaussian or "
                         "discretized_logistic"},
        "--prior": {"metavar": "NAME", "help": "standard_normal (the default), mixture or vamp"},
        "--prior-components": {"type": int, "metavar": "N",
                               "help": "of mixture and vamp; default 500"},
        "--posterior": {"metavar": "NAME", "help": "gaussian (the default) or iaf"},
        "--flow-steps": {"type": int, "metavar": "N", "help": "of iaf; default 2"},
        "--num-classes": {"type": int, "metavar": "N",
                          "help": "of a class-conditional model; default 0: none"},
        "--compute-dtype": {"metavar": "TYPE",
                            "help": "float32 (the default), or bfloat16: mixed precision, for "
                            "accelerators"},
    },
    "objective": {
        "--objective": {"metavar": "NAME",
                        "help": "elbo (the default), stl, iwae, dreg, beta_tc or mmd"},
        "--num-samples": {"type": int, "metavar": "K",
                          "help": "latent samples per image and step, of elbo, stl, iwae and dreg; "
                          "default 1"},
        "--beta": {"type": float, "nargs": "+", "metavar": "X",
                   "help": "weight of the KL term; default 1"},
        "--warmup": {"metavar": "NAME",
                     "help": "of beta: none (the default), linear or cyclical"},
        "--warmup-steps": {"type": int, "metavar": "N", "help": "how long the warm-up takes"},
        "--free-bits": {"type": float, "metavar": "X",
                        "help": "nats per latent, of elbo; default 0"},
        "--mmd-weight": {"type": float, "metavar": "X", "help": "of mmd; default 100"},
    },
    "optimizer": {
        "--epochs": {"type": int, "metavar": "N", "help": "default 10"},
        "--batch-size": {"type": int, "metavar": "N", "help": "default 128"},
        "--optimizer": {"metavar": "NAME", "help": "rmsprop (the default) or adam"},
        "--learning-rate": {"type": float, "nargs": "+", "metavar": "X", "help": "default 0.001"},
        "--schedule": {"metavar": "NAME",
                       "help": "of the learning rate: constant (the default), cosine or burda"},
        "--epsilon": {"type": float, "metavar": "X", "help": "of the optimizer; default 1e-7"},
        "--clip-norm": {"type": float, "metavar": "X",
                        "help": "longest norm of a gradient; default 0: any"},
    },
    "start": {
        "--seed": {"type": int, "metavar": "N", "help": "default 0"},
        "--start-from": {"metavar": "RUN_DIR",
                         "help": "another run, whose parameters to start from"},
        "--divide": {"action": "store_true", "default": None,
                     "help": "every device keeps its part of the parameters instead of all of "
                     "them, for models too large for one"},
    },
}  # fmt: skip
FLAGS = {flag: how for group in FIELDS.values() for flag, how in group.items()}

_RUN: dict[str, dict[str, Any]] = {
    "--run-dir": {"metavar": "DIR", "help": "default runs/DATE-TIME"},
    "--resume": {"action": "store_true", "help": "go on with the run in --run-dir"},
    "--new-data": {"action": "store_true",
                   "help": "with --resume: go on with another data set, and record that"},
    "--tensorboard": {"action": "store_true",
                      "help": "write RUN_DIR/tensorboard, for TensorBoard to show"},
    "--profile": {"action": "store_true",
                  "help": "write a profiler's trace of some steps, RUN_DIR/profile"},
}  # fmt: skip

_MANY = """Several values of --learning-rate or --beta, or --seeds: a model for every combination,
all trained at once."""

_PROCESSES: dict[str, dict[str, Any]] = {
    "--coordinator": {"metavar": "HOST:PORT", "help": "where process 0 of several listens"},
    "--num-processes": {"type": int, "metavar": "N", "help": "how many train one model together"},
    "--process-id": {"type": int, "metavar": "I", "help": "which of them this is, from 0"},
}
_UNASKED = "Not needed under SLURM, Open MPI, Kubernetes or on TPUs."

_EXAMPLES = {
    "": """
  jaxvae train                                   5,000 digits, ten epochs, figures
  jaxvae explore runs/20260131-120000            a page in which to move about its latents
  jaxvae sample runs/20260131-120000 --n 64 --out samples.png
  jaxvae COMMAND --help                          flags, and more examples
""",
    "train": """
  jaxvae train --batch-size 16
  jaxvae train --data photos/ --latent-dim 32 --network residual --run-dir runs/photos
  jaxvae train --resume --run-dir runs/photos --epochs 50
  jaxvae train --network mlp --latent-dim 50 --binarization dynamic --objective iwae --num-samples 5
  jaxvae train --beta 0.5 1 4 --seeds 3 --run-dir runs/betas
""",
    "evaluate": """
  jaxvae evaluate runs/photos
  jaxvae evaluate runs/photos --best --num-samples 5000
""",
    "sample": """
  jaxvae sample runs/photos --n 64 --out samples.png
""",
    "figures": """
  jaxvae figures runs/photos --best
  jaxvae figures runs/photos --format pdf
""",
    "export": """
  jaxvae export runs/photos --to onnx
  jaxvae export runs/photos --to stablehlo safetensors --out model/
""",
    "explore": """
  jaxvae explore runs/photos
  jaxvae explore runs/photos --best --out latents.html
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
SHELLS = ("bash", "zsh", "tcsh")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _with_examples(name: str) -> dict[str, Any]:
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
    epilog = f"examples:{_EXAMPLES[name].rstrip()}" if name in _EXAMPLES else None
    return {"epilog": epilog, "formatter_class": form}


def make_parser(
    functions: Mapping[str, Callable[[argparse.Namespace], None]],
) -> argparse.ArgumentParser:
    """The parser of the command line; what it returns has the chosen function as `command`."""
    from jaxvae import __version__

    parser = _Parser(
        prog="jaxvae", description="Variational autoencoders in JAX.", **_with_examples("")
    )
    parser.add_argument("--version", action="version", version=f"jaxvae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, says: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=says, description=says, allow_abbrev=False, **_with_examples(name)
        )
        one.set_defaults(command=functions[name])
        return one

    def group(title: str, flags: dict[str, dict[str, Any]], says: str | None = None) -> None:
        one = train.add_argument_group(title, says)
        for flag, how in flags.items():
            one.add_argument(flag, **how)

    train = command("train", "train a model and draw its figures")
    group("run", _RUN)
    for title, flags in FIELDS.items():
        group(title, flags)
    seeds = {"--seeds": {"type": int, "metavar": "N", "help": "seeds from --seed on; default 1"}}
    group("many models", seeds, _MANY)
    group("several processes", _PROCESSES, _UNASKED)

    evaluate = command("evaluate", "print the test metrics of a run")
    evaluate.add_argument("--num-samples", type=int, default=100, metavar="K",
                          help="importance samples for log p(x); default 100")  # fmt: skip
    sample = command("sample", "draw samples of a run's model into a picture")
    sample.add_argument("--n", type=int, required=True, metavar="N", help="how many")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    sample.add_argument("--seed", type=int, metavar="N", help="default: the run's")
    figures = command("figures", "draw the figures of a run again")
    figures.add_argument("--format", choices=["png", "svg", "pdf"], default="png",
                         help="default png; the film is a GIF in any case")  # fmt: skip
    export = command("export", "write a run's model for other programs")
    export.add_argument("--to", nargs="+", required=True, metavar="FORMAT",
                        help="stablehlo, onnx or safetensors, or several of them")  # fmt: skip
    export.add_argument("--out", type=Path, metavar="DIR", help="default RUN_DIR/export")
    explore = command("explore", "write a page in which to explore the latents of a run")
    explore.add_argument("--out", type=Path, metavar="FILE.html",
                         help="default RUN_DIR/explorer.html")  # fmt: skip
    for one in (evaluate, sample, figures, explore, export):
        one.add_argument("run", type=Path, metavar="RUN_DIR", help="made by `jaxvae train`")
        one.add_argument("--best", action="store_true",
                         help="the epoch of the best test ELBO instead of the latest")  # fmt: skip

    keras = command("import", "make a run of the notebook's model, trained with Keras")
    keras.add_argument("file", type=Path, metavar="FILE", help="a .keras, .weights.h5 or .h5 file")
    keras.add_argument("--decoder", type=Path, metavar="FILE",
                       help="where the decoder is in a file of its own")  # fmt: skip
    keras.add_argument("--run-dir", type=Path, required=True, metavar="DIR")
    keras.add_argument("--data", default="mnist-5k", **FLAGS["--data"])

    summary = command("summary", "print the layer table of a run, or of the default model")
    summary.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR")
    command("benchmark", "time the step against plain Flax, in one run")
    completion = command("completion", "print what lets a shell complete commands and flags")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell, one of SHELLS, has to read to complete the parser's command lines."""
    import shtab

    from jaxvae.config import CHOICES, NETWORKS

    choices = {name: c for kind in CHOICES.values() for name, c in kind.items()}
    choices |= {"network": NETWORKS, "to": ("stablehlo", "onnx", "safetensors")}
    paths = {"DIR": shtab.DIRECTORY, "RUN_DIR": shtab.DIRECTORY, "FILE.png": shtab.FILE}
    paths |= {"FILE": shtab.FILE, "FILE.html": shtab.FILE, "NAME|FOLDER|FILE": shtab.FILE}
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
