"""Results by name, measured one by one and kept in a file: a killed call goes on where it was."""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path


def measure_missing(path: Path, names: Iterable[str], measure: Callable[[str], dict]) -> dict:
    """Measure what the JSON file `path` lacks of `names`; return all of its results by name.

    `measure` returns the results of one name, by their own names. The file is written after each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def read() -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    for name in names:
        if name not in read():
            found = measure(name)
            # Read again: another call may have written to the file meanwhile.
            path.write_text(json.dumps(read() | found, indent=1) + "\n")
    return read()


def compare(
    usage: str,
    names: Iterable[str],
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
    one = partial(measure, mnist=mnist, out=Path(out))
    print(table(measure_missing(Path(out) / file, chosen or names, one)))
