"""Exported models: every file, read by another program, computes what the model does."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OwnDecoder, OwnEncoder, at_once, moved, refused

import jaxvae
from jaxvae.interchange import onnx
from jaxvae.interchange.export import export, load_safetensors
from jaxvae.interchange.onnx import to_onnx
from jaxvae.models.codebooks import codebook_of
from jaxvae.models.vae import prior

pytestmark = pytest.mark.usefixtures("compile_quickly")

DOCS = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)

MODELS = {
    "notebook": jaxvae.ModelConfig(),
    "flow": jaxvae.ModelConfig(
        (8, 7, 3),
        5,
        network="mlp",
        likelihood="discretized_logistic",
        prior="mixture:components=4",
        posterior="iaf",
        num_classes=3,
    ),
    "classes": jaxvae.ModelConfig((8, 7, 1), 2, num_classes=3, compute_dtype="bfloat16"),
    "ladder": jaxvae.ModelConfig((4, 4, 1), network="ladder:groups=2x2z1,width=4"),
    "colour": jaxvae.ModelConfig((4, 4, 3), 3, network="mlp:width=8", prior="vamp"),
    "covariates": jaxvae.ModelConfig(
        (4, 4, 1), 3, "mlp:width=8", num_covariates=2, conditions="decoder"
    ),
}


def random_params(config):
    """Of biases that are not zero, so that every parameter counts."""
    return moved(jaxvae.init(jax.random.key(0), config), 0.05)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(params, the folder they are exported to)."""
    params, folder = random_params(MODELS[request.param]), tmp_path_factory.mktemp("export")
    paths = export(params, folder)
    assert all(path.parent == folder for path in paths)
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths}
    assert len(paths) == 6
    return params, folder


def inputs(params, batch):
    """Images, latents, keys and, where there are classes, labels."""
    rng, config = np.random.default_rng(batch), params.config
    given = {
        "images": rng.random((batch, *config.image_shape), np.float32),
        "latents": rng.normal(size=(batch, config.latent_dim)).astype("f"),
        "keys": rng.integers(2**32, size=(batch, 2), dtype=np.uint32),
    }
    if config.num_covariates:
        return given, {"labels": rng.normal(size=(batch, config.num_covariates)).astype("f")}
    labels = rng.integers(0, config.num_classes, batch) if config.num_classes else None
    return given, {} if labels is None else {"labels": labels.astype(np.int32)}


def expected(params, given, labels):
    """The outputs of encoder, decoder and sampler."""
    posterior = jaxvae.encode(params, given["images"], **labels)
    center = [posterior.center] if params.posterior else []
    keys = jax.random.wrap_key_data(given["keys"])
    z = jnp.concatenate([prior(params).sample(key, 1) for key in keys])
    return {
        "encoder": [posterior.mean, posterior.log_var, *center],
        "decoder": [jaxvae.decode(params, given["latents"], **labels).mean],
        "sampler": [jaxvae.decode(params, z, **labels).mean],
    }


def assert_close(ours, theirs, params):
    error = 2e-5 if params.config.compute_dtype == "float32" else 2e-2
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert b.dtype == np.float32
        assert np.std(a) > 1e-3  # more than constants
        np.testing.assert_allclose(a, b, rtol=error, atol=error)


# In a process that cannot import this library.
CALL = """
import sys
sys.modules["jaxvae"] = None
import jax.export
import numpy as np

folder, batches = sys.argv[1], map(int, sys.argv[2:])
for batch in batches:
    given = np.load(f"{folder}/in-{batch}.npz")
    labels = [given["labels"]] if "labels" in given else []
    found = {}
    for name, takes in {"encoder": "images", "decoder": "latents", "sampler": "keys"}.items():
        content = open(f"{folder}/{name}.stablehlo", "rb").read()
        exported = jax.export.deserialize(bytearray(content))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        own = labels[: len(exported.in_avals) - 1]
        for i, x in enumerate(jax.tree.leaves(exported.call(given[takes], *own))):
            found[f"{name}{i}"] = x
    np.savez(f"{folder}/out-{batch}.npz", **found)
"""


def in_a_process(code, *arguments, cwd=None):
    places = [str(Path(jaxvae.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(places), "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def test_stablehlo_computes_the_same_where_there_is_only_jax(model):
    params, folder = model
    batches = (1, 5)
    for batch in batches:
        given, labels = inputs(params, batch)
        np.savez(folder / f"in-{batch}.npz", **given, **labels)
    in_a_process(CALL, folder, *batches)
    for batch in batches:
        with np.load(folder / f"out-{batch}.npz", allow_pickle=False) as found:
            for name, ours in expected(params, *inputs(params, batch)).items():
                assert_close(ours, [found[n] for n in found if n.startswith(name)], params)


def test_onnx_computes_the_same_in_onnxruntime(model):
    import onnxruntime

    params, folder = model
    for batch in (1, 5):
        given, labels = inputs(params, batch)
        ours = expected(params, given, labels)
        for name, takes in {"encoder": "images", "decoder": "latents"}.items():
            session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
            part = "encoder" if name == "encoder" else "decoder"
            own = labels if params.config.conditional(part) else {}
            assert [one.name for one in session.get_inputs()] == [takes, *own]
            names = [one.name for one in session.get_outputs()]
            assert names == ["mean", "log_var", "center"][: len(ours[name])]
            assert_close(ours[name], session.run(None, {takes: given[takes], **own}), params)


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({"likelihood": "poisson:size=0"}, ["mean", "log_var"]),
        ({"posterior": "vq:codes=4,dim=2", "prior": "uniform_codes"}, ["codes", "center"]),
    ],
)
def test_counts_and_codes_are_exported_to_onnx(tmp_path, fields, outputs):
    import onnxruntime

    config = jaxvae.ModelConfig((4, 4, 1), 4, network="mlp:width=8", **fields)
    params = random_params(config)
    encoder, _ = export(params, tmp_path, ["onnx"])
    images = np.random.default_rng(0).integers(0, 2, (5, 4, 4, 1)).astype(np.float32)
    session = onnxruntime.InferenceSession(encoder)
    assert [one.name for one in session.get_outputs()] == outputs
    found = dict(zip(outputs, session.run(None, {"images": images}), strict=True))
    posterior = jaxvae.encode(params, images)
    for name in outputs:
        if name == "codes":
            assert found[name].dtype == np.int32
            np.testing.assert_array_equal(found[name], codebook_of(params).codes(posterior.center))
        else:
            np.testing.assert_allclose(found[name], getattr(posterior, name), rtol=1e-5, atol=1e-5)


class Flat(nn.Module):
    latent_dim: int

    @nn.compact
    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)
        return nn.Dense(self.latent_dim)(x), nn.Dense(self.latent_dim)(x)


class Sorting(OwnDecoder):
    @nn.compact
    def __call__(self, z, labels=None):
        return jnp.sort(super().__call__(z, labels), axis=1)


def test_the_formats_that_can_be_written_are_and_the_others_told_in_a_line(tmp_path):
    network = (Flat(2), Sorting((4, 4, 1)))
    config = jaxvae.ModelConfig((4, 4, 1), 2, network=network)
    params, folder = jaxvae.init(jax.random.key(0), config), tmp_path / "x"
    with refused(
        "onnx cannot be written: the decoder has the operation 'sort'",
        f"written to {folder}: encoder.stablehlo, decoder.stablehlo, sampler.stablehlo, "
        "model.safetensors",
    ):
        export(params, folder)
    assert len(list(folder.iterdir())) == 4
    with refused("'sort'"):
        export(params, tmp_path / "y", ["onnx"])
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda content: b"weights", "ONNX Runtime does not compute this encoder as JAX does: "),
        (lambda content: content.replace(b"Tanh", b"Atan"), "its mean is off by 0."),
    ],
)
def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch, wrong, says):
    params = random_params(MODELS["colour"])
    monkeypatch.setattr(onnx, "to_onnx", lambda *given: wrong(to_onnx(*given)))
    with refused(says):
        export(params, tmp_path / "x", ["onnx"])
    assert not (tmp_path / "x").exists()


def test_safetensors_hold_every_array_by_its_place(model):
    from safetensors.numpy import load_file

    params, folder = model
    arrays = load_file(folder / "model.safetensors")
    parts = ("encoder", "decoder", "likelihood", "prior", "posterior")
    tree = {name: getattr(params, name) for name in parts}
    flat = {}

    def walk(prefix, node):
        for name, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    walk("", tree)
    assert set(arrays) == set(flat)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, flat[name])


def test_safetensors_come_back_as_the_model(model):
    params, folder = model
    back = load_safetensors(folder / "model.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_safetensors_of_version_0_1_are_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    config = jaxvae.ModelConfig(
        (4, 4, 1), 2, network="mlp:width=3", prior="mixture:components=4", posterior="iaf:steps=1"
    )
    params = jaxvae.init(jax.random.key(0), config)
    path = tmp_path / "model.safetensors"
    export(params, tmp_path, ["safetensors"])
    arrays = {re.sub(r"^posterior\.", "flow.", n): x for n, x in load_file(path).items()}
    assert "flow.step_1.dense.kernel" in arrays
    before = config.to_dict() | {"network": "mlp", "width": 3, "prior": "mixture"}
    before |= {"prior_components": 4, "posterior": "iaf", "flow_steps": 1}
    save_file(arrays, path, {"jaxvae.ModelConfig": json.dumps(before)})
    back = load_safetensors(path)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_modules_of_ones_own_are_exported(tmp_path):
    config = jaxvae.ModelConfig((8, 8, 1), 2, network=(OwnEncoder(2), OwnDecoder((8, 8, 1))))
    params = jaxvae.init(jax.random.key(0), config)
    export(params, tmp_path, ["safetensors"])
    back = load_safetensors(tmp_path / "model.safetensors", network=config.network)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))
    with refused(str(tmp_path), "pass network=(encoder, decoder)"):
        load_safetensors(tmp_path / "model.safetensors")
    with refused("the encoder calls len(x)", "expected x.shape[0] in modules of your own"):
        export(params, tmp_path / "x", ["stablehlo"])
    assert not (tmp_path / "x").exists()


@pytest.fixture
def small():
    return jaxvae.init(jax.random.key(0), jaxvae.ModelConfig((4, 4, 1), 2, network="mlp:width=3"))


def damaged(path, small, how):
    from safetensors.numpy import load_file, save_file

    export(small, path.parent, ["safetensors"])
    written = path.read_bytes()
    arrays, config = load_file(path), small.config.to_dict()
    if how == "cut":
        path.write_bytes(written[:-1])
    elif how == "text":
        path.write_text("weights")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no config":
        save_file(arrays, path)
    elif how == "config of words":
        save_file(arrays, path, {"jaxvae.ModelConfig": "default"})
    elif how == "config of numbers":
        save_file(arrays, path, {"jaxvae.ModelConfig": "3"})
    elif how == "deep config":
        save_file(arrays, path, {"jaxvae.ModelConfig": "[" * 100_000})
    elif how == "wrong config":
        save_file(arrays, path, {"jaxvae.ModelConfig": json.dumps(config | {"latent_dim": 0})})
    elif how == "another config":
        save_file(arrays, path, {"jaxvae.ModelConfig": json.dumps(config | {"latent_dim": 3})})
    elif how == "one too few":
        del arrays["encoder.mean.bias"]
        save_file(arrays, path, {"jaxvae.ModelConfig": json.dumps(config)})
    elif how == "one too many":
        arrays["a\nb"] = np.zeros(3)
        save_file(arrays, path, {"jaxvae.ModelConfig": json.dumps(config)})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "is damaged: "),
        ("text", "is damaged: "),
        ("empty", "is damaged: "),
        ("no config", "has no jaxvae.ModelConfig in its metadata: expected a file written by"),
        ("config of words", "is damaged: Expecting value"),
        ("config of numbers", "is damaged: "),
        ("deep config", "is damaged: "),
        ("wrong config", "is damaged: latent_dim is 0: expected at least 1"),
        ("another config", "'decoder.dense_1.kernel' of shape (2, 3) and type float32: expected "),
        ("one too few", "no 'encoder.mean.bias': expected 'encoder.mean.bias' of shape (2,)"),
        ("one too many", r"'a\nb' of shape (3,) and type float64: expected no 'a\nb'"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, small, how, says):
    damaged(tmp_path / "model.safetensors", small, how)
    with refused(says):
        load_safetensors(tmp_path / "model.safetensors")


def test_safetensors_that_are_not_there_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "pipe.safetensors"):
        with at_once(), refused(str(path)):
            load_safetensors(path)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("stablehlo", "flatbuffers"),
        ("onnx", "onnx"),
        ("onnx", "onnxruntime"),
        ("safetensors", "safetensors"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    tmp_path, small, name, package, monkeypatch
):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else find_spec(name)
    )
    with refused(f"{name} cannot be written: {package} is not installed: pip install {package}"):
        export(small, tmp_path / "x", [name])
    assert not (tmp_path / "x").exists()


def test_where_nothing_can_be_written_is_told(tmp_path, small):
    (tmp_path / "file").touch()
    with refused("file/x cannot be written: Not a directory"):
        export(small, tmp_path / "file" / "x", ["safetensors"])
    with refused("the format is 'h5': expected stablehlo, onnx, safetensors"):
        export(small, tmp_path / "x", ["safetensors", "h5"])
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """Where the documentation's snippets find what they read."""
    folder = tmp_path_factory.mktemp("documented")
    export(random_params(jaxvae.ModelConfig()), folder / "runs" / "mine" / "export")
    return folder


@pytest.mark.parametrize(
    ("index", "holds"),
    list(
        enumerate(
            [
                "reconstructions.shape == (5, 28, 28, 1)",
                "images.shape == (16, 28, 28, 1)",
                "reconstructions.shape == (5, 28, 28, 1) and samples.shape == (16, 28, 28, 1)",
                "config['latent_dim'] == 2 and kernel.shape == (3, 3, 1, 32)",
                "images.shape == (16, 28, 28, 1)",
            ]
        )
    ),
)
def test_the_documentations_snippets_run(index, holds, documented):
    assert len(SNIPPETS) == 5
    snippet = SNIPPETS[index]
    alone = "" if "import jaxvae" in snippet else "import sys; sys.modules['jaxvae'] = None\n"
    in_a_process(f"{alone}{snippet}\nassert {holds}", cwd=documented)
