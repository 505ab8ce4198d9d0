"""What every test may use."""

import functools
import gc
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from matplotlib.figure import Figure

# Check the annotations of these packages at run time. Must come before they are imported.
jaxtyping.install_import_hook(
    ("jaxvae.models", "jaxvae.objectives", "jaxvae.training", "jaxvae.evaluation"),
    "typechecker.checked",
)

import jaxvae  # noqa: E402

# The tests are of the CPU; with libtpu, which is there to compile with, JAX would look for a TPU
# and tell at length of finding none.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
# The older of XLA's two code generators for the CPU compiles in half the time; JAX 0.12 has one.
# A program is compiled in one part, not in parts for several threads, which the workers keep busy.
# The processes that tests start inherit it.
if jax.__version_info__[:2] == (0, 10):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    # All programs of a module are lowered in one context of MLIR: to make one takes longer than to
    # lower a single operation.
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
# Tracing makes millions of objects that last, which Python would look through again and again.
gc.set_threshold(100_000, 50, 50)
# Eight devices of one CPU, for what is shared between devices. Must come before JAX's first use.
jax.config.update("jax_num_cpu_devices", 8)
# What one module or worker has compiled, the others find, down to single operations: most modules
# use the same. Commands that tests start have the command line's own cache in a folder of it, as
# some are killed while they write. The next run of the tests finds all of it, unless this one is
# killed. At most 1 GiB is kept.
PROGRAMS = Path(__file__).parents[1] / "build" / "test-programs"
if "JAXVAE_TESTS_PROGRAMS" not in os.environ:
    PROGRAMS.parent.mkdir(exist_ok=True)
    os.environ["JAXVAE_TESTS_PROGRAMS"] = tempfile.mkdtemp("", "test-programs-", PROGRAMS.parent)
    with suppress(OSError):  # there are none yet, or another run has them
        PROGRAMS.rename(os.environ["JAXVAE_TESTS_PROGRAMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAXVAE_TESTS_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# These have the directory in their options, and so in the key under which a program is found.
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
# For the environment of commands, which may be killed, and of processes that no test kills.
KEPT_BY_COMMANDS = {
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    "XDG_CACHE_HOME": os.environ["JAXVAE_TESTS_PROGRAMS"],
}
KEPT_PROGRAMS = {
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    "JAX_COMPILATION_CACHE_DIR": os.environ["JAXVAE_TESTS_PROGRAMS"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# Files with few tests that take long start first: at the end the other workers would wait for them.
LONG = ("test_processes.py", "test_tpu.py", "test_tutorial.py", "test_extending.py")


def pytest_collection_modifyitems(items):
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the last of all to end
        programs = Path(os.environ["JAXVAE_TESTS_PROGRAMS"])
        shutil.rmtree(PROGRAMS, ignore_errors=True)
        if sum(program.stat().st_size for program in programs.rglob("*")) < 2**30:
            programs.rename(PROGRAMS)
        else:
            shutil.rmtree(programs)


@pytest.fixture(scope="module")
def compile_quickly():
    """For modules that compile much and compute little: half the time, the same semantics."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for the processes they start
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def draw_coarsely(request):
    """Draw the dozen figures of a run once and in few pixels where no test is of them."""
    if "figures" in request.path.parts:
        yield
        return
    savefig, coarse = Figure.savefig, {"dpi": 20, "bbox_inches": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *to, **how: savefig(*to, **how | coarse))
        yield


@pytest.fixture(scope="module", autouse=True)
def let_go_of_programs(request):
    """Compiled programs take mappings of memory, of which Linux lets a process have 65,530.

    Below a third of that the next module finds them, unless this one is compiled otherwise or
    replaces what may have been traced.
    """
    quickly = "compile_quickly" in request.fixturenames
    if not quickly:
        _clear()
    yield
    mappings = Path("/proc/self/maps").read_bytes().count(b"\n")
    if not quickly or "setattr(" in request.path.read_text() or mappings > 20_000:
        _clear()


def _clear():
    jax.clear_caches()
    if jax.__version_info__[:2] == (0, 10):
        mlir.make_ir_context.cache_clear()
    gc.collect()


@pytest.fixture
def images():
    """64 random images of 8 by 8, uint8: a batch that compiles and runs fast."""
    return np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)


@pytest.fixture
def model_config():
    return jaxvae.ModelConfig(image_shape=(8, 8, 1), latent_dim=2)


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """A small data set with labels, as a file: 512 training and 100 test images of 8 by 8."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    labels = rng.integers(0, 3, 612)
    # Bright where the label says, so that there is something to learn.
    images = rng.integers(0, 60, (612, 8, 8), np.uint8)
    images[np.arange(612), 2 * labels] += 180
    np.savez(
        path,
        x_train=images[:512],
        y_train=labels[:512],
        x_test=images[512:],
        y_test=labels[512:],
    )
    return path


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Keras itself, on JAX."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "jax")
        environment.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras

        assert keras.backend.backend() == "jax"
        yield keras


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window. It has an event loop running, which checkpoints cannot bear."""
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("there is no Chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def moved(params, scale, seed=0):
    """Parameters with noise added, as the initial ones, many of which are 0, may be special."""
    rng = np.random.default_rng(seed)  # NumPy's: jax.random would compile for each shape
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + scale * rng.normal(size=x.shape), x.dtype), params
    )


OF_IMAGES = (
    "bernoulli", "continuous_bernoulli", "gaussian", "discretized_logistic", "logistic_mixture"
)  # fmt: skip


def examples_of(support, shape, seed=0):
    """Examples in the support of a likelihood: uint8 images, counts, categories or columns."""
    rng = np.random.default_rng(seed)
    if support == "count":
        return rng.poisson(3, shape).astype(np.float32)
    if support == "one_hot":
        return np.eye(shape[-1], dtype=np.float32)[rng.integers(0, shape[-1], shape[:-1])]
    if isinstance(support, str):
        return rng.integers(0, 256, shape, np.uint8)
    blocks = []
    for kind, columns in support:
        block = (*shape[:-1], columns)
        numbers = rng.normal(size=block).astype(np.float32)
        blocks.append(numbers if kind == "real" else examples_of(kind, block))
    return np.concatenate(blocks, axis=-1)


@contextmanager
def unchecked():
    """Without the run-time check of annotations, for input that they do not allow."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def refused(*texts):
    """An InputError whose message is one line that has these texts in it."""
    with pytest.raises(jaxvae.InputError) as error, unchecked():
        yield
    message = str(error.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


@contextmanager
def at_once():
    """Fails what takes more than 20 seconds, such as reading from a pipe that nobody writes to."""

    def fail(number, frame):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class SignalAt(jaxvae.Callback):
    """Sends this process a signal at its n-th dispatch."""

    def __init__(self, n, number=signal.SIGTERM, times=1):
        self.left, self.number, self.times = n, number, times

    def dispatch(self, images, metrics):
        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.01)  # until it is heard


class OnDisk:
    """Images that are no array, as those that stay on disk; `read` is how many were read."""

    def __init__(self, images):
        self.images, self.shape, self.dtype, self.read = images, images.shape, images.dtype, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        found = self.images[rows]
        self.read += len(found)
        return found


class OwnEncoder(nn.Module):
    """Modules as a user writes them; these two take classes where the model has some."""

    latent_dim: int

    @nn.compact
    def __call__(self, images, labels=None):
        x = images.reshape(len(images), -1)
        x = nn.relu(nn.Dense(16)(x if labels is None else jnp.concatenate([x, labels], 1)))
        return nn.Dense(self.latent_dim)(x), nn.Dense(self.latent_dim)(x)


class OwnDecoder(nn.Module):
    image_shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, z, labels=None):
        x = nn.relu(nn.Dense(16)(z if labels is None else jnp.concatenate([z, labels], 1)))
        height, width, outputs = self.image_shape
        return nn.Dense(height * width * outputs)(x).reshape(-1, height, width, outputs)
