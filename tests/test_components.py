"""Components by name: the one-line form, registries, and configurations made of them."""

import functools
import inspect
import json
import shlex
import sys
import types
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import optax
import pytest
from conftest import OwnDecoder, OwnEncoder, refused

from jaxvae import ModelConfig, TrainConfig
from jaxvae.components import (
    Config,
    Registry,
    build,
    field_docs,
    imported,
    is_dotted_path,
    option_names,
    parse_spec,
    spec,
    written,
)
from jaxvae.errors import InputError
from jaxvae.models.config import LIKELIHOODS, NETWORKS, POSTERIORS, PRIORS
from jaxvae.models.likelihoods import Bernoulli
from jaxvae.models.networks import MLP
from jaxvae.models.priors import Mixture, StandardNormal
from jaxvae.objectives import ELBO, OBJECTIVES, WARMUPS, Linear
from jaxvae.training.optimizer import OPTIMIZERS, SCHEDULES, Cosine
from jaxvae.validation import whole_number

ALL = {
    "network": NETWORKS,
    "likelihood": LIKELIHOODS,
    "prior": PRIORS,
    "posterior": POSTERIORS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "objective": OBJECTIVES,
    "warmup": WARMUPS,
}


@dataclass(frozen=True)
class Brush:
    """Paints.

    More about it.
    """

    width: int = 3
    colour: str = "red"
    wet: bool = False
    sheen: float | None = None
    made: int = field(default=0, init=False)

    def __post_init__(self):
        object.__setattr__(self, "width", whole_number("width", self.width))

    def paint(self):
        return self.colour


@dataclass(frozen=True)
class Roller:
    size: float

    def paint(self):
        return "grey"


class Bucket(NamedTuple):
    """A component that is its own class: what it holds is no option."""

    litres: float

    @classmethod
    def paint(cls):
        return "blue"


def by_finger(pressure=1):
    return pressure


TOOLS: Registry[Any] = Registry(
    "tool", {"brush": Brush, "roller": Roller, "bucket": Bucket, "finger": by_finger}
)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("brush", "brush", {}),
        ("brush:", "brush", {}),
        ("brush:width=4", "brush", {"width": 4}),
        ("a:b=1,c=2.5,d=1e-4", "a", {"b": 1, "c": 2.5, "d": 1e-4}),
        ("a:b=-1,c=+2,d=inf", "a", {"b": -1, "c": 2, "d": float("inf")}),
        ("a:b=true,c=False,d=none,e=NONE", "a", {"b": True, "c": False, "d": None, "e": None}),
        ("a:b=red,c=,d=x=y,e=1 2", "a", {"b": "red", "c": "", "d": "x=y", "e": "1 2"}),
        ("a:b=x:y,c=1", "a", {"b": "x:y", "c": 1}),
        ("a:b=1,", "a", {"b": 1}),
        ("my.package.Brush:width=4", "my.package.Brush", {"width": 4}),
        ("", "", {}),
    ],
)
def test_a_name_and_its_options_are_read(text, name, options):
    found = parse_spec("tool", text)
    assert found == (name, options)
    kinds = {key: type(value) for key, value in options.items()}
    assert {key: type(value) for key, value in found[1].items()} == kinds


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("brush:width", "'width'"),
        ("brush:width=4,wet", "'wet'"),
        ("brush:=4", "'=4'"),
        ("brush:wi dth=4", "'wi dth=4'"),
        ("brush:1=2", "'1=2'"),
        ("brush:a-b=2", "'a-b=2'"),
        ("brush: width=4", "' width=4'"),
        ("brush:width=4 wet=true,b\n=1", r"'b\n=1'"),
    ],
)
def test_what_is_no_option_is_quoted(text, part):
    with refused(f"tool is {text!r}: expected NAME:KEY=VALUE,KEY=VALUE, not {part} in it"):
        TOOLS.parse(text)


def test_an_option_is_given_once():
    with refused("tool is 'brush:width=4,width=5': expected the option 'width' once"):
        TOOLS.parse("brush:width=4,width=5")


@pytest.mark.parametrize(
    ("text", "component"),
    [
        ("brush", Brush()),
        ("brush:width=4,wet=true", Brush(4, wet=True)),
        ("brush:colour=dark blue,sheen=0.5", Brush(colour="dark blue", sheen=0.5)),
        ("brush:sheen=none", Brush()),
        ("roller:size=2", Roller(2)),
    ],
)
def test_a_registered_name_makes_its_component(text, component):
    assert TOOLS.parse(text) == component
    assert TOOLS.spec(component) == TOOLS.spec(TOOLS.parse(TOOLS.spec(component)))


def test_a_function_or_the_class_of_a_tuple_is_the_component_itself():
    assert TOOLS.parse("finger") is by_finger
    assert TOOLS.parse("finger:pressure=3") == 3
    assert TOOLS.parse("bucket") is Bucket
    assert TOOLS.spec(Bucket) == "bucket"
    assert TOOLS.spec(by_finger) == "finger"
    with refused("tool 'bucket' has no option 'litres': it has none"):
        TOOLS.parse("bucket:litres=3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pencil", "tool is 'pencil': expected 'brush', 'roller', 'bucket' or 'finger'"),
        ("Brush", "tool is 'Brush': expected 'brush'"),
        (" brush", "tool is ' brush': expected 'brush'"),
        ("", "tool is '': expected 'brush'"),
        ("brush width=4", "tool is 'brush width=4': expected 'brush'"),
        ("brush:size=3", "tool 'brush' has no option 'size': expected among 'width', 'colour', 'w"),
        ("brush:made=3", "tool 'brush' has no option 'made'"),
        ("brush:paint=3", "tool 'brush' has no option 'paint'"),
        ("brush:width=0", "tool 'brush': width is 0: expected at least 1"),
        ("brush:width=2.5", "tool 'brush': width is 2.5: expected a whole number"),
        ("brush:width=true", "tool 'brush': width is True: expected a whole number"),
        ("brush:width=wide", "tool 'brush': width is 'wide': expected a whole number"),
        ("brush:width=", "tool 'brush': width is '': expected a whole number"),
        ("roller", "tool 'roller' needs the option 'size': expected roller:size=VALUE"),
        ("finger:length=3", "tool 'finger' has no option 'length': expected among 'pressure'"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_what_was_expected(text, says):
    with refused(says):
        TOOLS.parse(text)


@pytest.mark.parametrize("error", [TypeError, ValueError, InputError])
def test_what_a_component_raises_ends_in_one_line(error):
    class Glass:
        def __init__(self, thickness=1):
            raise error("it is\nbroken")

    for options in ({}, {"thickness": 2}):
        with refused("tool 'glass': it is", "broken"):
            build("tool", "glass", Glass, options)


def test_an_object_is_taken_as_it_is_where_it_has_what_its_kind_needs():
    other = Brush(5)
    assert TOOLS.parse(other) is other
    assert TOOLS.parse(other, protocol=("paint",)) is other
    assert TOOLS.parse(Bucket, protocol=("paint",)) is Bucket
    for wrong in (None, 3, ("brush",), Brush, object(), b"brush"):
        with refused("tool is "):
            TOOLS.parse(wrong, protocol=("paint",))
    with refused("tool is 3: expected 'brush', 'roller', 'bucket' or 'finger', or a hand"):
        TOOLS.parse(3, ", or a hand", ("paint",))
    with refused("tool is the class Brush: expected an instance, Brush(...)"):
        TOOLS.parse(Brush, protocol=("paint",))


def test_an_object_that_can_change_is_refused():
    """A configuration is an argument of compiled functions, which look it up by its hash."""

    @dataclass
    class Sponge:
        size: int = 1

        def paint(self):
            return "wet"

    with refused("Sponge(size=1), which is not hashable: expected", "@dataclass(frozen=True)"):
        TOOLS.parse(Sponge(), protocol=("paint",))


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that could be imported; returns whether it was."""
    (tmp_path / "trap.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: "trap" in sys.modules
    sys.modules.pop("trap", None)


PATHS = ("trap.Thing", "trap.Thing:scale=2", "trap.f.<locals>.g:b=1")


@pytest.mark.parametrize("kind", ALL)
def test_a_dotted_path_in_a_string_is_never_imported(kind, trap):
    """A string may come from a file: what it names is not looked for."""
    config = ModelConfig if kind in ModelConfig._registries else TrainConfig
    for path in PATHS:
        for make in (
            ALL[kind].parse,
            lambda path: config(**{kind: path}),
            lambda path: config.from_dict({kind: path}),
        ):
            typed = f"--{kind} {shlex.quote(path)}"
            with refused(f"{kind} is {path!r}, which is not registered: pass it as an object "
                         f"({kind}=...), or on the command line with {typed}"):  # fmt: skip
                make(path)
    assert not trap()
    assert imported(kind, "trap.Thing").__class__.__name__ == "Thing"
    assert trap()


@pytest.fixture
def shelf(monkeypatch):
    """A module of a user's own."""
    module = types.ModuleType("shelf")
    module.Brush, module.make, module.number = Brush, by_finger, 3
    monkeypatch.setitem(sys.modules, "shelf", module)


@pytest.mark.usefixtures("shelf")
def test_what_a_user_types_is_imported_with_its_options():
    assert imported("tool", "shelf.Brush:width=4,colour=blue") == Brush(4, "blue")
    assert imported("tool", "shelf.Brush") == Brush()
    assert imported("tool", "shelf.make") is by_finger
    assert imported("tool", "shelf.make:pressure=2") == 2
    assert imported("tool", "shelf.number") == 3


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("shelf.Pencil", "tool is 'shelf.Pencil', which cannot be imported: "),
        ("nowhere.at.all.Brush", "which cannot be imported: No module named 'nowhere'"),
        ("shelf.Brush.Bristle", "which cannot be imported: "),
        ("shelf.Brush:size=2", "tool 'shelf.Brush' has no option 'size': expected among 'width'"),
        ("shelf.Brush:width=0", "tool 'shelf.Brush': width is 0: expected at least 1"),
        ("shelf.number:a=1", "tool 'shelf.number' has no option 'a': it has none"),
        ("shelf.Brush:width", "expected NAME:KEY=VALUE,KEY=VALUE, not 'width' in it"),
    ],
)
def test_what_cannot_be_imported_is_said(path, says):
    with refused(says):
        imported("tool", path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mine.Thing", True),
        ("mine.deep.Thing:scale=0.5", True),
        ("__main__.Thing", True),
        ("optax._src.base.GradientTransformationExtraArgs", True),
        ("mine.make.<locals>.schedule", True),
        ("__main__.<lambda>:x=1", True),
        ("mixture", False),
        ("mixture:weight=0.5", False),
        ("", False),
        (".", False),
        ("a..b", False),
        ("a.b-c", False),
        ("photos/a.png", False),
        ("./a.b", False),
        ("1.5", False),
        (None, False),
        (1.5, False),
        (["a.b"], False),
    ],
)
def test_what_reads_as_a_dotted_path(text, expected):
    assert is_dotted_path(text) is expected


@pytest.mark.parametrize(
    ("component", "text"),
    [
        (Brush(), "brush"),
        (Brush(4), "brush:width=4"),
        (Brush(wet=True), "brush:wet=true"),
        (Brush(3, "blue", False, 0.1), "brush:colour=blue,sheen=0.1"),
        (Roller(2.5), "roller:size=2.5"),
    ],
)
def test_the_one_line_form_has_the_options_that_are_not_the_defaults(component, text):
    assert TOOLS.spec(component) == text
    assert TOOLS.parse(text) == component


def test_the_one_line_form_of_an_unregistered_component_is_its_path():
    @dataclass(frozen=True)
    class Inside:
        size: int = 1

    class Named:
        spec = "own"

    class Busy:
        def spec(self):
            return "not this"

    def function():
        return None

    here = f"{__name__}.test_the_one_line_form_of_an_unregistered_component_is_its_path.<locals>"
    registry: Registry[Any] = Registry("tool", {"roller": Roller})
    assert registry.spec(Brush(4)) == f"{__name__}.Brush:width=4"
    assert registry.spec(by_finger) == f"{__name__}.by_finger"
    assert registry.spec(Bucket) == f"{__name__}.Bucket"
    assert registry.spec(Inside(2)) == f"{here}.Inside:size=2"
    assert registry.spec(function) == f"{here}.function"
    assert registry.spec(lambda: None) == f"{here}.<lambda>"
    assert registry.spec(Named()) == "own"
    assert registry.spec(Busy()) == f"{here}.Busy"
    assert registry.spec(functools.partial(function)) == "functools.partial"
    assert spec("name", object()) == "name"
    assert written("name", [("a", None), ("b", True), ("c", 1e-5)]) == "name:a=none,b=true,c=1e-05"


def test_names_and_options_are_listed():
    assert list(TOOLS) == ["brush", "roller", "bucket", "finger"]
    assert option_names(Brush) == ("width", "colour", "wet", "sheen")
    assert option_names(by_finger) == ("pressure",)
    assert option_names(3) == ()


# Of every registered component: the names with other options than the defaults.
OTHERS = {
    "network": ["mlp:width=16", "residual:width=8,blocks=2", "spatial:blocks=3"],
    "prior": ["mixture:components=5", "vamp:components=7"],
    "posterior": ["iaf:steps=1", "iaf:hidden=32", "iaf:steps=3,hidden=8"],
    "likelihood": [
        "gaussian:scale=feature",
        "negative_binomial:size=0,dispersion=entry",
        "columns:of=gaussianx3+categorical4x2+poisson",
    ],
    "optimizer": [
        "adam:eps=0.1",
        "adamw:b1=0.8,weight_decay=0.0001",
        "rmsprop:decay=0.95,eps=1e-08,centered=true",
        "sgd:momentum=0.9,nesterov=true",
        "adam:mu_dtype=bfloat16",
    ],
    "schedule": [
        "warmup_cosine_decay_schedule:warmup_steps=10",
        "linear_schedule:end_value=0.0001,transition_steps=50",
    ],
    "objective": ["elbo:num_samples=3,free_bits=0.1", "stl:num_samples=2", "iwae:num_samples=50",
                  "dreg:num_samples=4", "mmd:weight=50.0"],
    "warmup": ["linear:steps=4", "cyclical:steps=100"],
}  # fmt: skip
NEEDY = {
    "columns": "of",
    "linear": "steps",
    "cyclical": "steps",
    "exponential_decay": "decay_rate",
    "warmup_constant_schedule": "warmup_steps",
    "warmup_cosine_decay_schedule": "warmup_steps",
    "warmup_exponential_decay_schedule": "warmup_steps",
}
# What goes only with codes, and a number of latents that codes of 4, 8 and 10 latents make up.
PARTNERS = {
    **{
        name: {"posterior": "fsq", "latent_dim": 40} for name in ("uniform_codes", "autoregressive")
    },
    **{name: {"prior": "uniform_codes", "latent_dim": 40} for name in ("categorical", "fsq", "vq")},
}
SPECS = [
    (kind, text)
    for kind, registry in ALL.items()
    for text in [*(name for name in registry if name not in NEEDY), *OTHERS[kind]]
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # optax's, of some of its optimizers
@pytest.mark.parametrize(("kind", "text"), SPECS)
def test_the_one_line_form_of_every_component_survives_a_configuration_and_json(kind, text):
    config = ModelConfig if kind in ModelConfig._registries else TrainConfig
    others = {} if kind == "likelihood" else PARTNERS.get(text.partition(":")[0], {})
    made = config(**{kind: text}, **others)
    assert made.specs()[kind] == made.to_dict()[kind] == text
    assert config(**{kind: getattr(made, kind)}, **others) == made
    back = config.from_dict(json.loads(json.dumps(made.to_dict())))
    assert back == made
    assert hash(back) == hash(made)


@pytest.mark.parametrize(
    ("kind", "text", "component"),
    [
        ("prior", "mixture:components=5", Mixture(5)),
        ("prior", "mixture:components=500", Mixture()),
        ("prior", "standard_normal", StandardNormal()),
        ("network", "mlp:width=16", MLP(16)),
        ("likelihood", "bernoulli", Bernoulli),
        ("objective", "elbo:free_bits=1", ELBO(free_bits=1.0)),
        ("warmup", "linear:steps=4", Linear(4)),
        ("schedule", "cosine", Cosine()),
    ],
)
def test_a_name_an_object_and_the_parsed_field_are_the_same(kind, text, component):
    config = ModelConfig if kind in ModelConfig._registries else TrainConfig
    made = config(**{kind: text})
    assert getattr(made, kind) == component
    assert made == config(**{kind: component})
    assert hash(made) == hash(config(**{kind: component}))


@pytest.mark.parametrize("kind", ALL)
def test_every_name_is_taken_and_no_other(kind):
    config = ModelConfig if kind in ModelConfig._registries else TrainConfig
    name = next(iter(ALL[kind]))
    for other in (name.upper(), f" {name}", ""):
        with refused(f"{kind} is {other!r}: expected ", repr(name)):
            config(**{kind: other})
    for other in (None, 1, (name,), {"a": 1}):
        with refused(f"{kind} is {other!r}: expected "):
            config(**{kind: other})
    with refused(f"{kind} {name!r} has no option 'nothing': "):
        config(**{kind: f"{name}:nothing=1"})


@pytest.mark.parametrize("name", NEEDY)
def test_a_name_that_needs_options_says_which(name):
    if name in WARMUPS.entries:
        with refused(f"warmup {name!r} needs the option 'steps': expected {name}:steps=VALUE"):
            TrainConfig(warmup=name)
    elif name in LIKELIHOODS.entries:
        with refused("likelihood 'columns' needs the option 'of': expected columns:of=VALUE"):
            ModelConfig(likelihood=name)
    else:
        with refused(f"schedule is {name!r}, which optax refuses: ", repr(NEEDY[name])):
            TrainConfig(schedule=name)


@pytest.mark.parametrize(
    ("config", "kind", "component"),
    [
        (ModelConfig, "prior", Mixture),
        (ModelConfig, "network", MLP),
        (TrainConfig, "objective", ELBO),
        (TrainConfig, "warmup", Linear),
        (TrainConfig, "schedule", Cosine),
    ],
)
def test_a_class_in_the_place_of_its_object_is_refused(config, kind, component):
    name = component.__name__
    with refused(f"{kind} is the class {name}: expected an instance, {name}(...)"):
        config(**{kind: component})


@dataclass(frozen=True)
class Laplace:
    """A prior of the user's own."""

    scale: float = 1.0

    def init(self, key, config):
        return {}

    def bind(self, learned, params):
        raise NotImplementedError


def test_a_component_of_ones_own_is_recorded_by_its_path_and_handed_over_again():
    config = ModelConfig(prior=Laplace(2.0))
    recorded = json.loads(json.dumps(config.to_dict()))
    assert recorded["prior"] == f"{__name__}.Laplace:scale=2.0"
    assert is_dotted_path(recorded["prior"])
    with refused(f"prior is '{__name__}.Laplace:scale=2.0', which is not registered: pass it"):
        ModelConfig.from_dict(recorded)
    assert ModelConfig.from_dict(recorded, prior=Laplace(2.0)) == config
    with refused(f"prior is {__name__}.Laplace:scale=3.0, but the recorded one is "
                 f"{__name__}.Laplace:scale=2.0: pass that one"):  # fmt: skip
        ModelConfig.from_dict(recorded, prior=Laplace(3.0))
    with refused("prior is standard_normal, but the recorded one is"):
        ModelConfig.from_dict(recorded, prior="standard_normal")
    assert ModelConfig.from_dict({}, prior=Laplace(3.0)).prior == Laplace(3.0)


OWN = (OwnEncoder(2), OwnDecoder((28, 28, 1)))


@pytest.mark.parametrize(
    ("config", "kind", "component"),
    [
        (ModelConfig, "network", OWN),
        (TrainConfig, "optimizer", optax.adam(1e-3)),
        (TrainConfig, "optimizer", optax.chain(optax.clip(1.0), optax.sgd(0.1))),
        (TrainConfig, "optimizer", lambda rate: optax.adam(rate, b1=0.5)),
        (TrainConfig, "optimizer", functools.partial(optax.adam, b1=0.5)),
        (TrainConfig, "schedule", optax.cosine_decay_schedule(1e-3, 100)),
        (TrainConfig, "schedule", lambda step: 1e-3),
        (TrainConfig, "objective", lambda params, keys, images: None),
        (TrainConfig, "objective", Roller.paint),
        (TrainConfig, "warmup", lambda beta, step: beta),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_every_object_of_ones_own_can_be_told_from_a_name(config, kind, component):
    """As it is then asked for again, or left out where it is not needed."""
    made = config(**{kind: component})
    assert hash(made) == hash(config(**{kind: component}))
    recorded = json.loads(json.dumps(made.to_dict()))
    assert is_dotted_path(recorded[kind]) or recorded[kind] == "own"
    with refused(f"{kind} is ", "pass ", f"{kind}="):
        config.from_dict(recorded)
    assert config.from_dict(recorded, **{kind: component}) == made


@dataclass(frozen=True)
class Room(Config):
    """A configuration.

    Attributes:
      area: in square metres; a second
        line.
      tool: what it is painted with.
      rooms: next to it.

    More.
    """

    area: float = 1.0
    tool: Any = "brush"
    rooms: tuple[Any, ...] = ()
    _registries: ClassVar[dict[str, Registry[Any]]] = {"tool": TOOLS}

    def __post_init__(self):
        object.__setattr__(self, "tool", TOOLS.parse(self.tool))


def test_a_configuration_is_a_json_object():
    room = Room(2.0, "brush:width=5", (Room(3.0), "hall"))
    assert room.to_dict() == {
        "area": 2.0,
        "tool": "brush:width=5",
        "rooms": [{"area": 3.0, "tool": "brush", "rooms": []}, "hall"],
    }
    assert Room.from_dict({"area": 3.0}) == Room(3.0)
    assert Room.from_dict({}) == Room()


@pytest.mark.parametrize(
    "fields", [[1, 2], None, "area", 3, {1: 2}, {"are": 1}, {"_registries": 1}]
)
def test_what_is_no_object_of_the_fields_is_refused(fields):
    with pytest.raises(InputError, match=r"Room (is .*: expected an object of named fields|has no "
                                         r"field .*: expected area, rooms, tool)"):  # fmt: skip
        Room.from_dict(fields)


def test_help_comes_from_the_docstring():
    assert field_docs(Room) == {
        "area": "in square metres; a second line",
        "tool": "what it is painted with",
        "rooms": "next to it",
    }
    assert field_docs(Brush) == {}
    for config in (ModelConfig, TrainConfig):
        documented = field_docs(config)
        assert list(documented) == list(config().to_dict())
        assert all(documented.values())


@pytest.mark.parametrize("registry", ALL.values(), ids=ALL)
def test_every_registered_component_says_in_a_line_what_it_is(registry):
    assert all(inspect.getdoc(entry) for entry in registry.entries.values())


def test_the_configurations_are_static_arguments_of_compiled_functions():
    @functools.partial(jax.jit, static_argnums=(0, 1))
    def twice(model, train, x):
        calls.append(1)
        return model.latent_dim * train.batch_size * x

    calls: list[int] = []
    for prior in ("mixture:components=5", Mixture(5), "mixture:components=5"):
        model, train = ModelConfig(prior=prior), TrainConfig(optimizer="adam:eps=0.1")
        assert twice(model, train, 1.0) == 256
    assert calls == [1]
