"""How the modules import each other, and what importing jaxvae costs and does not do."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import jaxvae

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "jaxvae").rglob("*.py")
}
# Each imports only from its own row and from those above.
ORDER = (
    {"errors"},
    {"components", "storage", "validation"},
    {"data", "devices"},
    {"models"},
    {"objectives"},
    {"evaluation", "training"},
    {"compression", "explorer", "figures", "interchange"},
    {"runs"},
    {"cli"},
    {"__main__"},
)


def in_a_fresh_process(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(result.stdout)


def test_importing_loads_nothing_that_few_need_and_changes_no_setting():
    loaded, changed = in_a_fresh_process(
        "import json, sys, jax; before = dict(jax.config.values); import jaxvae; "
        "heavy = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'mlxtend', 'orbax', 'PIL', "
        "'sklearn', 'torch'}; "
        "print(json.dumps([sorted(heavy & set(sys.modules)), before != dict(jax.config.values)]))"
    )
    assert loaded == []
    assert not changed


def test_the_contracts_names_are_public():
    contract = (
        "ModelConfig TrainConfig Params init encode reparameterize decode sample reconstruct elbo "
        "log_likelihood create_train_state train_step train_epoch save restore load load_data"
    )
    for name in contract.split():
        assert name in jaxvae.__all__
        assert getattr(jaxvae, name).__doc__


def imported(node, when_called=False):
    """The modules of jaxvae that code imports, except for type checkers, and inside functions."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.FunctionDef) and not when_called:
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & MODULES.keys()
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        return (names | {node.module}) & MODULES.keys()
    children = ast.iter_child_nodes(node)
    return set().union(*(imported(child, when_called) for child in children))


def test_imports_point_one_way():
    rows = {package: row for row, packages in enumerate(ORDER) for package in packages}
    for name, path in MODULES.items():
        for other in imported(ast.parse(path.read_text()), when_called=True) - {"jaxvae"}:
            package, below = name.split(".")[1], other.split(".")[1]
            assert rows[below] <= rows[package], f"{name} imports {other}"


def test_the_longest_chain_of_imports_is_of_ten_modules():
    imports = {name: imported(ast.parse(path.read_text())) for name, path in MODULES.items()}

    @cache
    def chain(name):
        return (*max(map(chain, imports[name]), key=len, default=()), name)

    longest = max(map(chain, MODULES), key=len)
    assert len(longest) <= 10, " <- ".join(longest)


def test_type_checkers_see_the_public_names():
    names = {
        (alias.name, node.module)
        for node in ast.walk(ast.parse(MODULES["jaxvae"].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxvae.")
        for alias in node.names
    }
    assert names == {(name, f"jaxvae.{module}") for name, module in jaxvae._MODULES.items()}


def test_a_name_is_imported_with_its_first_use():
    before, after, public = in_a_fresh_process(
        "import json, sys, jaxvae; before = 'jax' in sys.modules; jaxvae.init; "
        "print(json.dumps([before, 'jax' in sys.modules, dir(jaxvae)]))"
    )
    assert not before
    assert after
    assert {*jaxvae.__all__, "models", "__version__"} <= set(public)
    with pytest.raises(AttributeError, match="module 'jaxvae' has no attribute 'encodes'"):
        jaxvae.encodes  # noqa: B018


def test_no_file_may_load_a_pickle():
    sources = list((ROOT / "jaxvae").rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        text = source.read_text()
        assert "import pickle" not in text
        assert text.count("np.load(") == text.count("allow_pickle=False")


PROGRAM = """
from typing import assert_type

import jax
import numpy as np

import jaxvae

key = jax.random.key(0)
params = jaxvae.init(key, jaxvae.ModelConfig())
images = jaxvae.sample(params, key, 4)
state = jaxvae.create_train_state(key, jaxvae.ModelConfig(), jaxvae.TrainConfig())
state, metrics = jaxvae.train_step(state, images, beta=0.5)
train_images, test_images = jaxvae.load_data("mnist-5k")

assert_type(params, jaxvae.Params)
assert_type(images, jax.Array)
assert_type(state, jaxvae.TrainState)
assert_type(metrics, dict[str, jax.Array])
assert_type(jaxvae.elbo(params, key, images), jaxvae.Elbo)
assert_type(jaxvae.reconstruct(params, test_images), jax.Array)
assert_type(jaxvae.log_likelihood(params, key, images, 10), jax.Array)
"""


def test_a_users_program_is_type_checked_strictly(tmp_path):
    """Of three programs: a correct one, and two with a mistake in the line that is added."""
    programs = {
        "correct": ("", ""),
        "wrong_type": ('jaxvae.sample(params, key, "4")', '"str"; expected "int"'),
        "too_few": ("jaxvae.elbo(params, images)", "call-arg"),
    }
    for name, (line, _) in programs.items():
        (tmp_path / f"{name}.py").write_text(PROGRAM + line)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", tmp_path],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 1, checked.stdout + checked.stderr
    for name, (_, error) in programs.items():
        found = [line for line in checked.stdout.splitlines() if f"{name}.py:" in line]
        assert len(found) == bool(error), checked.stdout
        assert all(error in line for line in found)
    assert "in 2 files (checked 3 source files)" in checked.stdout
