"""The command line."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from jaxvae.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 the input was wrong, 1 anything else."""
    try:
        options = _parser().parse_args(arguments)
        options.command(options)
    except InputError as error:
        print(f"jaxvae: {error}", file=sys.stderr)
        return 2
    return 0


def _train(options: argparse.Namespace) -> None:
    from jaxvae import run
    from jaxvae.config import ModelConfig, TrainConfig
    from jaxvae.progress import Progress

    config = run.RunConfig(
        data=options.data or "mnist-5k", data_dir=options.data_dir, manual_dir=options.manual_dir,
        seed=options.seed or 0,
        train=TrainConfig(batch_size=options.batch_size or 128, epochs=options.epochs or 10),
    )
    data = run.load_run_data(config)
    config = replace(config, model=ModelConfig(image_shape=data.train_images.shape[1:]))
    run_dir = Path(options.run_dir or time.strftime("runs/%Y%m%d-%H%M%S"))
    if not options.resume:
        run.start(run_dir, config)
    run.train(run_dir, config, data, progress=Progress())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxvae")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train")
    train.set_defaults(command=_train)
    for n in ("data","data-dir","manual-dir","run-dir"): train.add_argument("--"+n)
    for n in ("epochs","batch-size","seed"): train.add_argument("--"+n,type=int)
    train.add_argument("--resume", action="store_true")
    return parser

if __name__ == "__main__":
    sys.exit(main())
