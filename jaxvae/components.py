"""Components by name: registries, and the one-line form `NAME:KEY=VALUE,KEY=VALUE`.

A component is a frozen dataclass whose fields are its options, or a class or function without
options. A registry lists the components of one kind by name; the command line, its completion
and the documentation read names and options from it. `Registry.parse` knows registered names only
and never imports anything; `imported` imports what a user has typed.
"""

import dataclasses
import difflib
import importlib
import inspect
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from jaxvae.errors import ComponentNeeded, InputError, either, shown

C = TypeVar("C")
_UNNAMED = ("<locals>", "<lambda>")


@dataclass(frozen=True)
class Registry(Generic[C]):
    """The components of one kind, by name.

    Attributes:
      kind: name of the kind in messages, such as "prior".
      entries: a class, or a function or class without options, for each name.
    """

    kind: str
    entries: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def parse(self, value: Any, expected: str = "", protocol: tuple[str, ...] = ()) -> C:
        """Return the component of a name or specification.

        Args:
          value: a name, a name with options, or a component, which is returned unchanged.
          expected: further values that the field accepts, for the message.
          protocol: attributes that a component of this kind must have.

        Returns:
          The component.

        Raises:
          InputError: an unknown name or option, a wrong value, or an object of another kind.
        """
        if not isinstance(value, str):
            if value is None or not all(hasattr(value, name) for name in protocol):
                raise self._refusal(value, expected)
            if inspect.isclass(value) and any(_needs_object(value, name) for name in protocol):
                raise InputError(
                    f"{self.kind} is the class {value.__name__}: expected an instance, "
                    f"{value.__name__}(...)"
                )
            try:
                hash(value)
            except TypeError:
                raise InputError(
                    f"{self.kind} is {' '.join(shown(value).split())}, which is not hashable: "
                    "expected an instance of a frozen dataclass, @dataclass(frozen=True)"
                ) from None
            return value
        name, options = parse_spec(self.kind, value)
        if name not in self.entries:
            if "." in name:
                raise ComponentNeeded(
                    f"{self.kind} is {value!r}, which is not registered: pass it as an object "
                    f"({self.kind}=...), or on the command line with --{self.kind} "
                    f"{shlex.quote(value)}"
                )
            raise self._refusal(value, expected)
        return build(self.kind, name, self.entries[name], options)

    def spec(self, component: Any) -> str:
        """Return the specification of a component, as `config.json` records it.

        A component of a class that is not registered is named by the dotted path of the class.
        """
        named = getattr(component, "spec", None)
        if isinstance(named, str):
            return named
        for name, entry in self.entries.items():
            if component is entry or type(component) is entry:
                return spec(name, component)
        kind = component if inspect.isclass(component) or inspect.isroutine(component) else None
        kind = kind or type(component)
        return spec(f"{kind.__module__}.{kind.__qualname__}", component)

    def _refusal(self, value: Any, expected: str) -> InputError:
        given = " ".join(shown(value).split())
        return InputError(
            f"{self.kind} is {given}: expected {either(tuple(self.entries))}{expected}"
        )


class Config:
    """Base class of the configurations: conversion to and from a JSON object."""

    _registries: ClassVar[Mapping[str, Registry[Any]]] = {}

    def __repr__(self) -> str:
        """Return a call that makes this configuration, with the specifications of components."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        } | self.specs()
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON object, with the specifications of components."""
        return {
            field.name: self._recorded(field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    def specs(self) -> dict[str, str]:
        """Return the specifications of the components, by field."""
        return {name: r.spec(getattr(self, name)) for name, r in self._registries.items()}

    def _recorded(self, name: str) -> Any:
        value = getattr(self, name)
        if name in self._registries:
            return self._registries[name].spec(value)
        if isinstance(value, tuple):
            return [x.to_dict() if isinstance(x, Config) else x for x in value]
        return value.to_dict() if isinstance(value, Config) else value

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **own: Any) -> Self:
        """Build from a JSON object.

        Args:
          fields: the result of `to_dict`, or some of its fields.
          **own: components of a user's classes, by field, which cannot be built from `fields`.

        Returns:
          The configuration.

        Raises:
          InputError: an unknown or wrong field, or another component in `own` than the recorded
            one.
        """
        if not isinstance(fields, Mapping):
            raise InputError(
                f"{cls.__name__} is {shown(fields)}: expected an object of named fields"
            )
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        fields = cls._updated(dict(fields))
        expect_known(f"{cls.__name__} has no field", fields, known)
        made = cls(**{**fields, **own})
        for name in own:
            if (now := made.to_dict()[name]) != (was := fields.get(name, now)):
                raise ComponentNeeded(
                    f"{name} is {now}, but the recorded one is {was}: pass that one"
                )
        return made

    @classmethod
    def _updated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Convert the fields of an older version to those of this one."""
        return fields


def expect_known(subject: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """Check that names are known ones.

    Args:
      subject: start of the message, such as "TrainConfig has no field".
      names: the names.
      known: the known names.

    Raises:
      InputError: one of them is not. The message has the nearest known name, if there is one.
    """
    known = sorted(known)
    for name in sorted(set(names) - set(known), key=str):
        initials = [one for one in known if "".join(part[:1] for part in one.split("_")) == name]
        near = initials or difflib.get_close_matches(str(name), known, 1)
        hint = f" (do you mean {near[0]!r}?)" if near else ""
        raise InputError(f"{subject} {shown(name)}{hint}: expected {', '.join(known)}")


def parse_spec(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """Split `NAME:KEY=VALUE,KEY=VALUE` into the name and its options.

    Args:
      kind: kind of the component, for the message.
      text: the specification.

    Returns:
      The name, and the options with values as bool, int, float, str or None.

    Raises:
      InputError: a part is not of the form KEY=VALUE, or a key occurs twice.
    """
    name, _, rest = text.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(
                f"{kind} is {text!r}: expected NAME:KEY=VALUE,KEY=VALUE, not {part!r} in it"
            )
        if key in options:
            raise InputError(f"{kind} is {text!r}: expected the option {key!r} once")
        options[key] = _literal(value)
    return name, options


def spec(name: str, component: Any) -> str:
    """Write a component as NAME:KEY=VALUE,KEY=VALUE, with the options that differ from defaults."""
    options = []
    if dataclasses.is_dataclass(component) and not isinstance(component, type):
        for field in dataclasses.fields(component):
            value = getattr(component, field.name)
            if value != field.default and field.init:
                options.append((field.name, value))
    return written(name, options)


def written(name: str, options: Iterable[tuple[str, Any]]) -> str:
    """Write NAME:KEY=VALUE,KEY=VALUE, or NAME if there are no options."""
    return ":".join(filter(None, (name, ",".join(f"{k}={_text(v)}" for k, v in options))))


def build(kind: str, name: str, entry: Any, options: Mapping[str, Any]) -> Any:
    """Build a component from an entry of a registry, or from an imported object.

    Args:
      kind: kind of the component, for the message.
      name: name of the component, for the message.
      entry: a class or function, which is called with the options; without options, anything else
        than a class is the component.
      options: the options.

    Returns:
      The component.

    Raises:
      InputError: an unknown option, or a required option is missing.
    """
    # A NamedTuple class is itself the component; its fields are not options.
    itself = inspect.isclass(entry) and issubclass(entry, tuple)
    if not options and (itself or not inspect.isclass(entry)):
        return entry
    known = option_names(entry) if callable(entry) and not itself else ()
    if unknown := sorted(set(options) - set(known)):
        has = f"expected {either(known, 'among ')}" if known else "it has none"
        raise InputError(f"{kind} {name!r} has no option {unknown[0]!r}: {has}")
    if missing := [option for option in _required(entry) if option not in options]:
        raise InputError(
            f"{kind} {name!r} needs the option {missing[0]!r}: expected {name}:{missing[0]}=VALUE"
        )
    try:
        return entry(**options)
    except (TypeError, ValueError) as error:  # an InputError among them
        reason = " ".join(str(error).split())
        raise InputError(f"{kind} {name!r}: {reason}") from None


def option_names(entry: Any) -> tuple[str, ...]:
    """Return the names of the options of a class or function."""
    return tuple(p.name for p in _parameters(entry))


def _required(entry: Any) -> tuple[str, ...]:
    return tuple(p.name for p in _parameters(entry) if p.default is p.empty)


def _parameters(entry: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(entry).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in parameters if p.kind in kinds]


def _needs_object(kind: type, name: str) -> bool:
    """Whether an attribute of a class is a method, which only its objects can call."""
    return inspect.isroutine(found := inspect.getattr_static(kind, name)) and not isinstance(
        found, classmethod | staticmethod
    )


def imported(kind: str, text: str) -> Any:
    """Import a component by dotted path, with options: `package.module.Class:scale=2`.

    Only for paths that a user has typed: names in files are never imported.

    Args:
      kind: kind of the component, for the message.
      text: the path, with options.

    Returns:
      The component.

    Raises:
      InputError: there is no such module or attribute, or the options are wrong.
    """
    path, options = parse_spec(kind, text)
    module_name, _, attribute = path.rpartition(".")
    if not is_dotted_path(path):
        raise InputError(f"{kind} is {text!r}: expected a dotted path, such as package.module.Name")
    with _current_directory_on_path():
        try:
            entry = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"{kind} is {text!r}, which cannot be imported: {error}") from None
        return build(kind, path, entry, options)


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """Allow imports from the current directory, as `python -m` does but console scripts do not."""
    if sys.flags.safe_path:
        yield
        return
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with suppress(ValueError):  # the imported module may have changed sys.path
            sys.path.remove("")


def is_dotted_path(text: Any) -> bool:
    """Whether a value has the form of a dotted path, such as that of a user's component.

    Paths of local functions are included, such as those of the schedules that optax returns.
    """
    name = text.partition(":")[0] if isinstance(text, str) else ""
    parts = name.split(".")
    return len(parts) > 1 and all(p.isidentifier() or p in _UNNAMED for p in parts)


def field_docs(config: type) -> dict[str, str]:
    """Return the descriptions of fields in the "Attributes:" section of a class's docstring."""
    section = (inspect.getdoc(config) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    docs: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            name, _, text = line.strip().partition(": ")
            docs[name] = text
        elif name:
            docs[name] += " " + line.strip()
    return {name: text.rstrip(".") for name, text in docs.items()}


def _literal(text: str) -> Any:
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
