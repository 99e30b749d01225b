"""What the package declares is what it gets and gives: a check of every call, cheap enough for all.

jaxtyping's own decorator binds the arguments by hand and checks them twice. Here beartype checks
them once, inside of a context of sizes where an array is declared.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, config

JAXTYPED = jaxtyping.jaxtyped
SIZES = JAXTYPED("context")  # each entry forgets what names of sizes stood for, until it is left


def install(package: str) -> None:
    """Check every function of a package that is imported from now on."""
    jaxtyping.install_import_hook(package, "beartype.beartype")
    jaxtyping.jaxtyped = checked  # what the hook decorates with


def checked(thing: Any = None, *, typechecker: Callable[[Any], Any] = beartype) -> Any:
    """A function, or the constructor of a dataclass, that refuses what is not as declared."""
    if thing is None:
        return checked
    if inspect.isclass(thing):
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(checked(thing.__func__))
    if isinstance(thing, property):
        return property(*(part and checked(part) for part in (thing.fget, thing.fset, thing.fdel)))
    return _checked(thing)


def _checked(function: FunctionType) -> Callable[..., Any]:
    function.__annotations__ = {
        name: _resolved(hint, function) for name, hint in function.__annotations__.items()
    }
    arrays = [array for hint in function.__annotations__.values() for array in _arrays(hint)]
    if inspect.isgeneratorfunction(function) or any("{" in array.dim_str for array in arrays):
        return JAXTYPED(function, typechecker=beartype)  # it checks before the first `next`
    careful = beartype(function)
    if careful is function:  # nothing is declared
        return function

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return (function if config.jaxtyping_disable else careful)(*args, **kwargs)

    @functools.wraps(function)
    def sized(*args: Any, **kwargs: Any) -> Any:
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with SIZES:
            return careful(*args, **kwargs)

    return sized if arrays else plain


def _resolved(hint: Any, function: FunctionType) -> Any:
    """What a hint in quotes names; anything, where that is imported for type checkers alone."""
    holder = type("Holder", (), {"__annotations__": {"value": hint}})
    try:
        return get_type_hints(holder, function.__globals__, include_extras=True)["value"]
    except NameError:
        return Any


def _arrays(hint: Any) -> Iterator[type[AbstractArray]]:
    """Every array that is declared in a hint, however deep."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        yield hint
    for part in get_args(hint):
        yield from _arrays(part)
