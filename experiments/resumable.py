"""Results by name, measured one by one and kept in a file: a killed call goes on where it was."""

import json
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from jaxvae.devices.processes import pass_over_missing_tpu
from jaxvae.devices.sharding import make_cores_devices
from jaxvae.errors import InputError, Preempted, TrainingFailed


def measure_missing(
    path: Path, chosen: list[str], names: Collection[str], measure: Callable[[str], dict]
) -> dict:
    """Measure what the JSON file `path` lacks of `chosen`; return all of its results by name.

    With no name chosen, all `names` are measured. `measure` returns the results of one name, by
    their own names. The file is written after each.
    """
    if unknown := [name for name in chosen if name not in names]:
        sys.exit(f"unknown name {unknown[0]!r}: expected one of {', '.join(map(repr, names))}")
    path.parent.mkdir(parents=True, exist_ok=True)

    def read() -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    for name in chosen or names:
        if name not in read():
            found = measure(name)
            # Read again: another call may have written to the file meanwhile.
            path.write_text(json.dumps(read() | found, indent=1) + "\n")
    return read()


def compare(
    usage: str,
    names: Collection[str],
    measure: Callable[..., dict],
    table: Callable[[dict], str],
    file: str = "results.json",
) -> None:
    """Take `MNIST OUT [NAME...]` as arguments: measure what OUT/`file` lacks, print the table.

    `measure` takes a name, MNIST as `mnist` and OUT as `out`.
    """
    if len(sys.argv) < 3:
        sys.exit(usage)
    mnist, out, *chosen = sys.argv[1:]
    pass_over_missing_tpu()
    make_cores_devices()
    one = partial(measure, mnist=mnist, out=Path(out))
    try:
        print(table(measure_missing(Path(out) / file, chosen, names, one)))
    except (InputError, Preempted, TrainingFailed) as error:
        sys.exit(str(error))
