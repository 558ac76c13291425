"""A class for one object: how a method that Python looks up on the type is changed for a single instance."""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable
from typing import Any


def give_class(subject: Any, members: dict[str, Any]) -> Callable[[], None]:
    """Give `subject` a subclass of its own class with these members; returns the undo.

    Name, module and qualified name stay, so isinstance, save_pretrained and error messages see the class they know.
    All that was added lives on that class: a deep copy or a pickle of `subject` is an object of the stock class.
    """
    stock: Any = type(subject)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = stock.__reduce_ex__(self, protocol)
        # Pickle refuses its own constructor for another class than the object's.
        function = _blank if function is copyreg.__newobj__ else function  # pyright: ignore[reportAttributeAccessIssue]
        return (function, tuple(stock if value is one_off else value for value in arguments), *rest)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    members = {**names, "vivace_one_off": True, "__reduce_ex__": __reduce_ex__, **members}
    one_off: Any = type(stock)(stock.__name__, (stock,), members)
    subject.__class__ = one_off
    # Weak: an undo that waits for its turn must not keep its subject alive.
    reference = weakref.ref(subject)

    def undo() -> None:
        if type(alive := reference()) is one_off:
            alive.__class__ = stock  # pyright: ignore[reportAttributeAccessIssue]

    return undo


def stock_class(kind: type) -> type:
    """The class below all those that `give_class` made."""
    return next(one for one in kind.__mro__ if "vivace_one_off" not in vars(one))


def behind(part: Any) -> Any:
    """What a stand-in stands for, such as the server's for a module; anything else is itself."""
    return getattr(part, "vivace_behind", part)


def _blank(stock: type, *arguments: Any) -> Any:
    return stock.__new__(stock, *arguments)
