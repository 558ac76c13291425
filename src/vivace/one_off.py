"""A class for one object: how a method that Python looks up on the type is changed for a single instance."""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import Any

from diffusers import ModelMixin


def give_class(subject: Any, members: dict[str, Any]) -> Callable[[], None]:
    """Give `subject` a subclass of its own class with these members; returns the undo.

    Name, module and qualified name stay, so isinstance, save_pretrained and error messages see the class they know.
    All that was added lives on that class: a deep copy or a pickle of `subject` is an object of the stock class, also
    where it was given several. Those are undone in any order.
    """
    stock: Any = type(subject)
    known: Any = stock_class(stock)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = known.__reduce_ex__(self, protocol)
        # Pickle refuses its own constructor for another class than the object's.
        function = _blank if function is copyreg.__newobj__ else function  # pyright: ignore[reportAttributeAccessIssue]
        return (function, tuple(known if value is type(self) else value for value in arguments), *rest)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    own = {"vivace_stock": known, "__reduce_ex__": __reduce_ex__}
    kind = _alike(type(known)) if isinstance(subject, ModelMixin) else type(stock)
    one_off: Any = kind(stock.__name__, (stock,), {**names, **own, **members})
    subject.__class__ = one_off
    # Weak: an undo that waits for its turn must not keep its subject alive.
    reference = weakref.ref(subject)

    def undo() -> None:
        one_off.vivace_undone = True
        alive: Any = reference()
        kind: Any = type(alive)
        # One that lies below another's stays until that one goes.
        while "vivace_undone" in vars(kind):
            kind = kind.__base__
        if alive is not None and kind is not type(alive):
            alive.__class__ = kind

    return undo


def stock_class(kind: type) -> type:
    """The class below all those that `give_class` made."""
    return getattr(kind, "vivace_stock", kind)


def behind(part: Any) -> Any:
    """What a stand-in stands for, such as the server's for a module; anything else is itself."""
    return getattr(part, "vivace_behind", part)


def _blank(stock: type, *arguments: Any) -> Any:
    return stock.__new__(stock, *arguments)


@functools.cache
def _alike(kind: type) -> Any:
    """The kind of class that equals the one it stands for: `from_pipe` takes over models whose type it knows."""

    def __eq__(cls: Any, other: Any) -> bool:
        return isinstance(other, type) and getattr(other, "vivace_stock", other) is cls.vivace_stock

    return type(kind.__name__, (kind,), {"__eq__": __eq__, "__hash__": lambda cls: hash(cls.vivace_stock)})
