"""What a stranger's files may not do: be executed, be unpickled, or end in anything but a line."""

import ast
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import fields

import jax
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxvae
from jaxvae import InputError, ModelConfig, TrainConfig
from jaxvae.runs.config import RunConfig

PACKAGE = pathlib.Path(jaxvae.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def nodes(kind):
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield path, node


def test_nothing_is_unpickled():
    """Of NumPy's own loaders none is called: they would unpickle what says that it is pickled."""
    for path, node in nodes(ast.Attribute | ast.Name):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        assert name not in ("load_module", "read_array", "read_pickle"), path
        if isinstance(node, ast.Attribute) and name == "load":
            assert not (isinstance(node.value, ast.Name) and node.value.id in ("np", "numpy")), path
    for path, node in nodes(ast.keyword):
        assert node.arg != "allow_pickle" or node.value.value is False, path
    for path, node in nodes(ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        assert not {name.split(".")[0] for name in names} & UNPICKLERS, path


def test_nothing_calls_what_executes_text():
    """But for the dotted paths that a user types, which one function imports."""
    calls = {"import_module": set(), "imported": set()}
    for path, node in nodes(ast.Call):
        if isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        assert name not in ("system", "popen", "extractall"), path
        if name in calls:
            calls[name].add(str(path.relative_to(PACKAGE)))
    assert calls == {
        "import_module": {"__init__.py", "components.py"},
        "imported": {"cli/commands.py", "runs/data.py"},
    }
    with_shell = [path for path, node in nodes(ast.keyword) if node.arg == "shell"]
    assert not with_shell


LOADS = """
import pickle
import sys
import jaxvae

first, second = sys.argv[1:]
jaxvae.load(first)  # imports and compiles what any run needs

watched = ("pickle.find_class", "marshal.load", "subprocess.Popen", "os.system", "os.exec",
           "os.posix_spawn", "os.spawn", "os.fork", "socket.connect", "socket.bind",
           "urllib.Request", "ctypes.dlopen", "shutil.rmtree", "os.remove", "os.rename")
seen = []

def hook(event, arguments):
    if event in watched:
        seen.append((event, str(arguments)))
    elif event == "exec" and not arguments[0].co_filename.startswith((sys.prefix, "<frozen",
            sys.base_prefix, "<attrs", "<string>", "<lambdifygenerated")):
        seen.append((event, arguments[0].co_filename))
    elif event == "compile" and str(arguments[1]).startswith(second):
        seen.append((event, str(arguments[1])))
    elif event == "open" and str(arguments[0]).startswith(second):
        mode, flags = arguments[1:]
        if (mode and set(mode) & set("wax+")) or (not mode and flags & 3):
            seen.append((event, str(arguments)))

sys.addaudithook(hook)
jaxvae.load(second)
print(seen)
pickle.loads(b"cos\\nsystem\\n.")  # which is seen
print(seen)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same model, made apart."""
    folder = tmp_path_factory.mktemp("runs")
    config = ModelConfig((4, 3, 1), 2, network="mlp:width=4")
    for name in ("first", "second"):
        key = jax.random.key(len(name))
        jaxvae.save(folder / name, jaxvae.create_train_state(key, config, TrainConfig()))
    return folder


def test_loading_a_run_executes_nothing_and_writes_nothing(runs):
    """In a process that has loaded another run before, so that nothing is left to import."""
    # What would be imported, were its folder looked into.
    (runs / "second" / "sitecustomize.py").write_text("raise SystemExit('executed')\n")
    (runs / "second" / "checkpoints" / "__init__.py").write_text("raise SystemExit('executed')\n")
    before = {path: path.stat().st_mtime_ns for path in (runs / "second").rglob("*")}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, runs / "first", runs / "second"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    while_loading, *control = done.stdout.splitlines() or [done.stderr]
    assert while_loading == "[]"
    assert control == ["[('pickle.find_class', \"('os', 'system')\")]"]
    assert {path: path.stat().st_mtime_ns for path in (runs / "second").rglob("*")} == before


numbers = st.integers() | st.floats() | st.sampled_from([2**31, -(10**400), 1e308, 5e-324])
junk = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def valid_values(kind):
    """What the fields of a configuration may be, so that more than the first check is reached."""
    registries = {**ModelConfig._registries, **TrainConfig._registries}
    names = [name for registry in registries.values() for name in registry]
    named = st.sampled_from([*names, "own", "notebook", "function", "os.system"])
    keys = ["num_samples", "steps", "width", "components", "eps", "scale", "name", "0", ""]
    values = st.integers(-1, 9) | st.floats() | st.text(max_size=3) | st.sampled_from(names)
    option = st.builds("{}={}".format, st.sampled_from(keys), values)
    options = st.lists(option, min_size=1, max_size=2).map(",".join)
    return (
        st.integers(0, 9) | st.floats(0, 9) | named | st.builds("{}:{}".format, named, options)
        | st.lists(st.integers(0, 9), min_size=3, max_size=3)
    )  # fmt: skip


# Of version 0.1, which are still read.
OLD = ("width", "prior_components", "flow_steps", "num_samples", "free_bits", "mmd_weight",
       "warmup_steps", "epsilon", "divide")  # fmt: skip


def objects(kind, **parts):
    names = (*(field.name for field in fields(kind)), *OLD)
    values = {name: valid_values(kind) | junk for name in names} | parts
    return st.fixed_dictionaries({}, optional={**values, "other": junk}) | junk


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (ModelConfig, objects(ModelConfig)),
        (TrainConfig, objects(TrainConfig)),
        (RunConfig, objects(RunConfig, model=objects(ModelConfig), train=objects(TrainConfig))),
    ],
)
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_configuration_of_anything_is_valid_or_refused_in_one_line(kind, content, data):
    try:
        config = kind.from_dict(data.draw(content))
    except InputError as error:
        lines = str(error).splitlines()
        assert len(lines) == 1
        assert len(lines[0]) < 30_000
        return
    hash(config)
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def bottomless():
    nest = []
    for _ in range(100_000):
        nest = [nest]
    return nest


@pytest.mark.parametrize("value", [bottomless(), 10**5000], ids=["a deep list", "a long number"])
def test_what_python_itself_cannot_print_is_refused_all_the_same(value):
    for kind in (ModelConfig, TrainConfig, RunConfig):
        with refused():
            kind.from_dict(value)
        for name in (field.name for field in fields(kind)):
            with refused(" is of type "):
                kind.from_dict({name: value})


def test_a_message_is_one_line_of_what_can_be_printed():
    message = str(InputError("a\nb\r\x1b[2J\u2028\x00 \\n é " + "x" * 10**6))
    assert message.startswith(r"a\nb\r\x1b[2J\u2028\x00 \n é xxx")
    assert message.isprintable()
    assert len(message) < 5000
