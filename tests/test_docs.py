"""The examples of README.md and docs/*.md, as a newcomer would run them, but with a few images."""

import inspect
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import jax
import pytest
from PIL import Image

import jaxvae
import jaxvae.data
import jaxvae.data.tfds
from jaxvae.cli.commands import _COMMANDS, main
from jaxvae.cli.parser import config_fields, make_parser
from jaxvae.components import is_dotted_path
from jaxvae.data.dataset import Dataset
from jaxvae.interchange.export import export
from jaxvae.models.config import ModelConfig
from jaxvae.runs.sweep import configured
from jaxvae.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
# In examples in Python, what would take long.
SMALLER = {
    "residual:width=16": "mlp:width=4",
    "components=100": "components=3",
    "mlp:width=500": "mlp:width=4",
    'posterior="iaf"': 'posterior="iaf:steps=1,hidden=4"',
    "warmup_steps=500": "warmup_steps=1",
    "ladder:groups=4x2+2x2": "ladder:groups=4x2+2x2,width=4,latents=1",
    'network="spatial"': 'network="mlp:width=4"',
    'prior="autoregressive"': 'prior="autoregressive:width=8,layers=1"',
    "num_samples=5000": "num_samples=5",
    "num_samples=1000": "num_samples=10",
    "num_samples=500": "num_samples=5",
    "num_steps=500": "num_steps=2",
    '"realnvp", epochs=50': '"mixture:components=2", epochs=1',
}
PLACEHOLDERS = {
    "N": "1", "I": "0", "$i": "0", "$resume": "", "${hosts[0]}:7000": "a:1", "${#hosts[@]}": "3",
    "&": "", "...": "",
}  # fmt: skip


def blocks(page, language):
    """The fenced blocks of a page in a language, which is empty for the shell."""
    fenced = re.findall(r"^```(.*?)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [text for named, text in fenced if named == language]


def commands(page):
    """The arguments of every `jaxvae ...` of a page."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if called := re.search(r"(?<![\w/.~-])jaxvae ([a-z-]+ .*|[a-z]+$)", line):
                words = shlex.split(called[1].rstrip('"'), comments=True)
                yield list(filter(None, (PLACEHOLDERS.get(word, word) for word in words)))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page):
    parser = make_parser(_COMMANDS)
    for words in commands(page):
        options = parser.parse_args(words)  # raises InputError
        if words[0] == "train":
            flags = {name: value for name in config_fields()
                     if (value := getattr(options, name)) is not None}  # fmt: skip
            configured({name: value for name, value in flags.items() if not is_dotted_path(value)})


def reference(directives):
    """The full names that the API reference describes with some of Sphinx's directives."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md")))
    return re.findall(rf"^\.\. auto(?:{directives}):: (\S+)$", text, re.M)


@pytest.fixture(scope="module")
def described():
    """The objects that the API reference describes."""
    found = [resolve_name(name) for name in reference("class|function|module")]
    for module in map(resolve_name, reference("module")):
        own = [
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        ]
        found += [getattr(module, name) for name in getattr(module, "__all__", own)]
    return found


def test_the_reference_has_every_public_name_once_and_in_its_list(described):
    names = reference("class|function")
    public = [f"jaxvae.{name}" for name in jaxvae.__all__]
    assert sorted(name for name in names if name.count(".") == 1) == sorted(public)
    listed = re.findall(r"^   (jaxvae\.\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert len(listed) == len({*listed})
    assert {*listed} >= {*public}
    assert all(resolve_name(name) in described for name in listed)


def test_the_reference_has_every_component(described):
    for config in (jaxvae.ModelConfig, TrainConfig):
        for registry in config._registries.values():
            for entry in registry.entries.values():
                assert entry in described or not inspect.isclass(entry), entry


def test_the_reference_has_what_examples_import(described):
    program = "\n".join("\n".join(blocks(page, "python")) for page in PAGES)
    imports = re.findall(r"^from (jaxvae\S*) import (.+)$", program, re.M)
    names = {f"{module}.{name}" for module, some in imports for name in some.split(", ")}
    assert names
    for name in names:
        assert resolve_name(name) in described, name


@pytest.mark.parametrize("language", ["", "python"])
def test_the_korean_readme_has_the_same_examples(language):
    found = blocks("README.ko.md", language)
    assert found
    assert set(found) <= set(blocks("README.md", language))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the pages suppose, of few images, in which their examples run."""
    data = jaxvae.data.load_dataset("mnist-5k")
    few = Dataset(*(array[::100] for array in data[:4]))
    folder = tmp_path_factory.mktemp("docs")
    for name in ("photos", "pictures"):
        (folder / name).mkdir()
        for i, image in enumerate(few.train_images[:40]):
            Image.fromarray(image[..., 0]).save(folder / name / f"{i:02}.png")
    fit = jaxvae.fit

    def fit_quickly(data, model=None, train=None, **how):
        train = replace(train or jaxvae.TrainConfig(), batch_size=16, epochs=1)
        return fit(data, model or jaxvae.ModelConfig(), train, progress=False, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("jaxvae.cli.commands._enable_compilation_cache", lambda: None)
        patch.setattr("jaxvae.devices.sharding.make_cores_devices", lambda: None)
        patch.setattr("jaxvae.data._mnist_5k", lambda: few)
        patch.setattr("jaxvae.data.tfds.load", lambda name, **where: few)
        patch.setattr(jaxvae, "fit", fit_quickly)
        patch.setattr(jaxvae, "ModelConfig", partial(jaxvae.ModelConfig, network="mlp:width=4"))
        patch.setattr(jaxvae, "TrainConfig", partial(jaxvae.TrainConfig, batch_size=16))
        yield folder


def run_python(page):
    """Run the examples in Python of a page, in order, as one program; return its names."""
    program = "\n".join(blocks(page, "python"))
    for large, small in SMALLER.items():
        program = program.replace(large, small)
    found = {"__name__": "__main__"}
    exec(compile(program, page, "exec"), found)
    return found


@pytest.fixture(scope="module")
def readme(folder):
    return run_python("README.md")


def test_the_readmes_example_gives_what_it_says(folder, readme):
    assert readme["images"].shape == (16, 28, 28, 1)
    assert readme["posterior"].mean.shape == (5, 2)
    assert readme["log_px"].shape == (5,)
    assert readme["metrics"]["elbo"].shape == (3,)
    assert jaxvae.load("runs/mine").config.latent_dim == 2
    for words in (["evaluate", "runs/mine", "--num-samples", "5"], ["explore", "runs/mine"]):
        assert main([*words, "--data", "mnist-5k"]) == 0


@pytest.fixture(scope="module")
def run_dir(folder):
    """The run of the README's first list of commands, which all succeed, in order."""
    for words in commands("README.md"):
        if words[0] in ("benchmark", "import"):  # take minutes, and a file of Keras
            continue
        if words[0] == "train":
            words = ["train", "--run-dir", "RUN_DIR", *words[1:]]
            words += ["--network", "mlp:width=4", "--batch-size", "16", "--epochs", "1"]
        assert main([word.replace("RUN_DIR", "runs/mnist") for word in words]) == 0, words
        if words[0] == "completion":
            break
    assert main(["score", "runs/mnist", "--num-samples", "5", "--out", "scores.csv"]) == 0
    return folder / "runs/mnist"


def test_the_readmes_commands_write_what_they_say(folder, run_dir):
    written = {path.name for path in [*folder.iterdir(), *run_dir.iterdir()]}
    assert written >= {
        "samples.png", "latents.npz", "photos.jaxvae", "scores.csv", "scores.png", "config.json",
        "metrics.jsonl", "figures", "evaluation.json", "explorer.html", "export",
    }  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")])
def test_the_examples_in_python_run(page, folder, readme, run_dir):
    if page == "docs/export.md":
        params = jaxvae.init(jax.random.key(0), ModelConfig())
        export(params, "runs/mine/export", ["stablehlo", "onnx", "safetensors"])
    if page == "docs/sharing.md":  # a local folder comes before the hub
        shutil.copytree("shared", "OWNER/NAME")
    run_python(page)
    if page == "docs/gallery.md":  # the code that draws each picture is on the page
        pictures = re.findall(r"^!\[.+\]\(gallery/(.+)\)$", (ROOT / page).read_text(), re.M)
        assert len(pictures) > 10
        assert not [name for name in pictures if not (folder / name).exists()]
