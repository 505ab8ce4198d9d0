"""Sharing of a trained model, as a folder or through a model hub.

    model.safetensors  the parameters, with the configuration of the model
    config.json        the configuration of the run, without the paths of the machine
    README.md          the model card
    *.png              at most two figures of the run

No file of such a folder is executed, and no component in it is imported.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxvae.errors import InputError
from jaxvae.interchange import export
from jaxvae.models.vae import Params
from jaxvae.runs.checkpoints import Which, load, load_with_step
from jaxvae.runs.config import RunConfig, components, read_config
from jaxvae.runs.evaluation import described
from jaxvae.runs.files import is_number, read_json, read_metrics, version
from jaxvae.storage import read_bytes, refuse_links
from jaxvae.validation import is_image

FORMATS = (*export.FORMATS, "hub")

_CONFIG = "config.json"
_FIGURES = ("manifold_20", "samples", "training")  # none shows examples of the data
_SHOWN = 2  # figures in a model card
_SECONDS = 10  # that a hub has to answer
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def export_run(
    run_dir: str | Path,
    folder: str | Path,
    formats: Sequence[str],
    which: Which = "latest",
    **own: Any,
) -> list[Path]:
    """Write the model of a run to a folder in one or several formats.

    Args:
      run_dir: the run directory.
      folder: created if it does not exist. Files of an earlier export are replaced.
      formats: those of `jaxvae.interchange.export.export`, or "hub": model.safetensors,
        config.json, a model card README.md and at most two figures.
      which: "latest", or "best" by test ELBO.
      own: custom components of the model, by field.

    Returns:
      The paths of the files.

    Raises:
      InputError: as for `jaxvae.load` and `jaxvae.interchange.export.export`; with "hub" also
        where the folder holds other files of these names.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"the format is {name!r}: expected {', '.join(FORMATS)}")
    params, step = load_with_step(run_dir, which, **own)
    contents, problems = export.converted(params, [name for name in formats if name != "hub"])
    if "hub" in formats:
        contents |= _to_share(run_dir, params, step, own)
        taken = [name for name in contents if os.path.lexists(folder / name)]
        if taken and not _is_exported(folder):
            raise InputError(
                f"{folder / taken[0]} exists already, and is not of an earlier export: choose "
                "another folder with --out"
            )
    return export.write_files(folder, contents, problems)


def _is_exported(folder: Path) -> bool:
    """Return whether the files of a folder are of an earlier export, as its card says."""
    try:
        return b"\nlibrary_name: jaxvae\n" in read_bytes(folder / "README.md")
    except OSError:
        return False


def from_pretrained(name: str | Path, network: Any = None, **own: Any) -> Params:
    """Load a model that was shared with `jaxvae export --to hub`.

    A model from a hub is downloaded once, and read from the cache afterwards. The environment
    variable HF_ENDPOINT is the address of the hub, by default https://huggingface.co.

    Args:
      name: a folder, or the name of a model on a hub: `OWNER/NAME` or `OWNER/NAME@REVISION`, where
        the revision is a branch, a tag or a commit.
      network: custom modules (encoder, decoder) of the model.
      own: other custom components of the model, by field.

    Returns:
      The model.

    Raises:
      InputError: there is no such folder or model; the hub does not answer; a file is damaged; the
        model needs custom components that are missing; or a package is not installed.
    """
    return load(_local(name), "latest", network, **own)


def _local(name: str | Path) -> Path:
    """Return the folder of a model, which is downloaded if it is on a hub."""
    if Path(name).exists():
        return Path(name)
    parts = _HUB_NAME.fullmatch(name) if isinstance(name, str) else None
    if parts is None:
        raise InputError(
            f"{name} does not exist: expected a folder of `jaxvae export --to hub`, or the name of "
            "a model on a hub, OWNER/NAME or OWNER/NAME@REVISION"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"there is no folder {name}, and to download models huggingface_hub is not installed: "
            'pip install "jaxvae[hub]"'
        )
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    repository, revision = parts[1], parts[2] or "main"
    needed = [export.WEIGHTS, _CONFIG]
    try:
        try:  # once and not for long: `snapshot_download` has no limit of its own
            HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
            answers = True
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, ValueError):
            raise
        except Exception:  # of any kind, as a network may fail in any way
            answers = False
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=needed,
                local_files_only=not answers,
            )
        )
        missing = [one for one in needed if not (folder / one).exists()]
        problem = f"it has no {missing[0]}" if missing else ""
    except errors.RevisionNotFoundError:
        problem = f"it has no revision {revision}"
    except errors.RepositoryNotFoundError:
        problem = "there is no such model, or you may not read it; to log in: hf auth login"
    except errors.LocalEntryNotFoundError:
        problem = "the hub does not answer"
    except Exception as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    if problem:
        raise InputError(
            f"there is no folder {name}, and it is not a model of jaxvae on {constants.ENDPOINT}: "
            f"{problem}"
        )
    return folder


def _to_share(run_dir: Path, params: Params, step: int, own: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of the format "hub", by name."""
    config = read_config(run_dir, **own)
    # As it was recorded, with components of the training that were not passed here.
    recorded = read_json(run_dir / _CONFIG, lambda content: content)
    data = f"./{Path(config.data).name}" if Path(config.data).is_absolute() else config.data
    hidden = dict.fromkeys(("data_dir", "manual_dir", "start_from"))
    shared = {"jaxvae": version(), **recorded, "data": data, **hidden}
    figures = {f"{name}.png": run_dir / "figures" / f"{name}.png" for name in _FIGURES}
    figures = {name: path for name, path in figures.items() if path.exists()}
    figures = dict(list(figures.items())[:_SHOWN])
    refuse_links(run_dir / "figures", *figures.values())
    train = {**config.train.to_dict(), **recorded.get("train", {})}
    metrics = _metrics(run_dir, step, config.data)
    config = replace(config, data=data)
    card = _card(_plain(run_dir.resolve().name), config, train, params, step, metrics, [*figures])
    return {
        **export.to_safetensors(params, step),
        _CONFIG: (json.dumps(shared, indent=2) + "\n").encode(),
        "README.md": card.encode(),
        **{name: read_bytes(path) for name, path in figures.items()},
    }


def _metrics(run_dir: Path, step: int, data: str) -> dict[str, float]:
    """Return the metrics of the parameters of a step: those of its evaluation, or of its epoch."""
    path = run_dir / "evaluation.json"
    if path.exists():
        found, of = read_json(path, _evaluation)
        if found["step"] == step and of in (None, data):
            return found
    epochs = [line["test"] for line in read_metrics(run_dir) if line["step"] == step]
    return epochs[-1] if epochs else {}


def _evaluation(content: Mapping[str, Any]) -> tuple[dict[str, float], Any]:
    """Return the metrics of an evaluation, and its data set, which earlier versions left out."""
    found = {name: value for name, value in content.items() if is_number(value)}
    if missing := {"step", "num_samples"} - found.keys():
        raise ValueError(f"expected a number {min(missing)}")
    return found, content.get("data")


def _card(
    name: str,
    config: RunConfig,
    train: Mapping[str, Any],
    params: Params,
    step: int,
    metrics: Mapping[str, float],
    figures: Sequence[str],
) -> str:
    """Write the model card: front matter as a model hub reads it, then the run in numbers."""
    model, noun, data = config.model, config.model.noun, _plain(config.data.removeprefix("./"))
    rows = described(metrics, noun)
    task = "unconditional-image-generation" if is_image(model.image_shape) else "other"
    sizes = "unknown"
    if config.data_seen:
        seen = config.data_seen[-1]
        sizes = f"{seen.train_images:,} training and {seen.test_images:,} test {noun}s"
    own = ", ".join(f"`{field}`" for field in components(config) if field in model._registries)
    parts = [
        "---\n" + _front_matter(name, data, task, rows) + "---",
        f"# {name}",
        f"A variational autoencoder of {noun}s, trained with jaxvae {version()}.",
        _LOADING,
        f"The model has components of its own: pass {own} to `from_pretrained`." if own else "",
        f"## Data\n\n`{data}`: {sizes}.",
        f"## Model\n\n{sum(x.size for x in jax.tree.leaves(params)):,} parameters.",
        _table("field", "value", ((f"`{n}`", f"`{x}`") for n, x in model.to_dict().items())),
        f"## Training\n\n{step:,} steps of {train['batch_size']:,} {noun}s with the objective "
        f"`{train['objective']}` and the optimizer `{train['optimizer']}`. `{_CONFIG}` has the "
        "whole configuration.",
    ]
    if rows:
        parts += [
            f"## Evaluation\n\nMeans over the test {noun}s, in nats per {noun} where they are "
            "likelihoods or divergences.",
            _table("metric", "value", ((says.strip(), value) for _, says, value in rows)),
        ]
    if figures:
        shown = (f"![{Path(one).stem.replace('_', ' ')}]({one})" for one in figures)
        parts += ["## Figures", *shown]
    return "\n\n".join(filter(None, parts)) + "\n"


_LOADING = """```python
import jax, jaxvae  # pip install "jaxvae[hub]"

params = jaxvae.from_pretrained("OWNER/NAME")  # or the path of this folder
images = jaxvae.sample(params, jax.random.key(0), 16)
```"""


def _front_matter(name: str, data: str, task: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """Return the metadata of a model card, as YAML."""
    text = "library_name: jaxvae\n# license: add the license of the parameters here\n"
    if task != "other":
        text += f"pipeline_tag: {task}\n"
    text += "tags:\n- jaxvae\n- variational-autoencoder\n"
    if rows:
        text += "metrics:\n" + "".join(f"- {metric}\n" for metric, _, _ in rows)
        name, data = (json.dumps(x, ensure_ascii=False) for x in (name, data))  # also YAML
        text += f"model-index:\n- name: {name}\n  results:\n  - task:\n      type: {task}\n"
        text += f"    dataset:\n      name: {data}\n      type: {data}\n"
        text += "    metrics:\n"
        for metric, says, value in rows:
            text += f"    - type: {metric}\n      name: {says.strip()}\n      value: {value}\n"
    return text


def _table(left: str, right: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = [(left, right), ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(x.replace("|", r"\|") for x in row) + " |" for row in cells)


def _plain(text: str) -> str:
    """Return a name for a code span of Markdown."""
    return "".join(c if c.isprintable() and c != "`" else "?" for c in text)
