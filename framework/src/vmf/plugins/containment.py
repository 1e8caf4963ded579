"""Containment: what a plugin's object raises or returns wrongly stays the plugin's, and is told under its name.

Theory of operation. The core never holds a plugin's object itself. `contain` puts a stand-in of the same seam (the
abstract class that it implements) before it: each public method calls the object, turns whatever it raises into an
error that names plugin, device and method, and checks what it returns. An error that vmf defines (`VmfError`) passes:
its text was written for people. Methods that free something (`RELEASING`) never raise; what they raise is logged.

Callables that a plugin hands to the core (timers, posted work) are `guarded` in the same way. Where a call per port
access would be too dear (`vmf.machine.bus`), the caller catches and asks the culprit for the error itself.

The culprit is who was asked, except when the error came out of another plugin's code that it called (an interrupt
line, say): the innermost frame that belongs to a known plugin decides.

`where` tells which plugin a thread is in right now, from its stack. It costs nothing until somebody asks.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar, cast

from attrs import evolve, frozen

from vmf.errors import PluginError, VmfError
from vmf.plugins.discovery import PluginEntry, describe

log = logging.getLogger("vmf.plugins")

T = TypeVar("T")
Check = Callable[[Any], Any]
"""Gives a result as the core uses it, or raises ValueError with what was expected."""

RELEASING = frozenset({"close", "shutdown", "stop", "unlock"})
"""Methods that free something: the caller has more to free, so they never raise."""


@frozen
class Culprit:
    """Who is to blame for a call into a plugin.

    Attributes:
        plugin: as people know it: "device plugin 'hello' (of vmf-hello 1.0)".
        authors: whose authors can mend it.
        part: which of its objects ("hello.port"), "" where it has only one.
        error: the class of the errors.
    """

    plugin: str
    authors: str = ""
    part: str = ""
    error: type[VmfError] = PluginError

    @classmethod
    def of(cls, entry: PluginEntry, error: type[VmfError] = PluginError) -> Culprit:
        return cls(str(entry), entry.distribution or entry.target, error=error)

    @property
    def remedy(self) -> str:
        return f"Report this to the authors of {self.authors or 'the plugin'}, or do without it."

    def call(self, method: str) -> str:
        """The call in words: "save of hello.port"."""
        return f"{method} of {self.part}" if self.part else method

    def fault(self, method: str, error: BaseException) -> VmfError:
        """The error for what the plugin raised; a VmfError comes back as it is, with the part's name in it."""
        if isinstance(error, VmfError):
            if self.part and self.part not in error.message and self.plugin not in error.message:
                error.message = f"{self.part}: {error.message}"
                error.args = (error.message, error.remedy)
            return error
        to_blame = self
        for name in _modules_of(error.__traceback__):
            other = _culprit_of(name)
            if other is not None:
                to_blame = self if other.plugin == self.plugin else evolve(other, error=self.error)
                break
        return to_blame.error(
            f"The {to_blame.plugin} failed in {self.call(method)}: {describe(error)}.", to_blame.remedy
        )

    def wrong(self, method: str, result: object, expected: str) -> VmfError:
        """The error for a result that the seam does not allow."""
        return self.error(
            f"The {self.plugin} returned {show(result)} from {self.call(method)}, where {expected} is specified.",
            self.remedy,
        )


def show(value: object) -> str:
    """What came instead of the right thing: its type, and the value where that is short and safe to print."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int | float):
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 128 else "a huge number"
        return text if value is None or isinstance(value, bool) else f"{text} ({kind})"
    if isinstance(value, str | bytes | bytearray) and len(value) > 40:
        return f"{len(value)} {'characters' if isinstance(value, str) else 'bytes'} ({kind})"
    return kind


def interrupted(error: BaseException) -> bool:
    """Whether this is the user's Ctrl-C, which no containment may swallow."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


# -- whose code is it ----------------------------------------------------------------------------------------

_known: dict[str, Culprit] = {}
"""By module, and by top-level package where one plugin alone has it."""
_known_lock = threading.Lock()


def remember(entry: PluginEntry, culprit: Culprit) -> None:
    """A plugin was loaded: errors that come out of its modules are its own."""
    module = entry.target.partition(":")[0].strip()
    package = module.partition(".")[0]
    with _known_lock:
        _known[module] = culprit
        if _known.setdefault(package, culprit).plugin != culprit.plugin:
            # A distribution with several plugins: only their own modules tell them apart.
            _known[package] = Culprit("", "")


def _culprit_of(module: str) -> Culprit | None:
    found = _known.get(module) or _known.get(module.partition(".")[0])
    return found if found is not None and found.plugin else None


def _modules_of(trace: types.TracebackType | None) -> Iterator[str]:
    frames = [frame for frame, _line in traceback.walk_tb(trace)]
    for frame in reversed(frames):
        yield str(frame.f_globals.get("__name__", ""))


# -- stand-ins -----------------------------------------------------------------------------------------------


def contain(
    seam: type,
    target: T,
    culprit: Culprit,
    checks: Mapping[str, Check] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> T:
    """A stand-in for `target`, an object of a plugin that implements `seam`.

    Args:
        checks: by method, of what it returns.
        fixed: attributes that were read and checked before; the object is not asked for them again.
    """
    return cast("T", _stand_in(seam)(target, culprit, checks or {}, fixed or {}))


class _StandIn:
    """What all stand-ins share. It passes for the object's own class (`isinstance`), and gives its other attributes."""

    def __init__(self, target: Any, culprit: Culprit, checks: Mapping[str, Check], fixed: Mapping[str, Any]) -> None:
        own = self.__dict__
        own["_target"], own["_culprit"], own["_checks"], own["_fixed"] = target, culprit, checks, dict(fixed)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_target"])

    def __getattr__(self, name: str) -> Any:  # what the seam does not name
        own = self.__dict__
        return own["_fixed"][name] if name in own["_fixed"] else getattr(own["_target"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), types.FunctionType):
            self.__dict__[name] = value  # a method is replaced for those who call the stand-in
            return
        if name in self.__dict__["_fixed"]:
            self.__dict__["_fixed"][name] = value
        setattr(self.__dict__["_target"], name, value)

    def __repr__(self) -> str:
        return f"<contained {type(self.__dict__['_target']).__qualname__}>"


@cache
def _stand_in(seam: type) -> Any:
    members: dict[str, Any] = {"__abstractmethods__": frozenset()}
    names = {
        name for base in seam.__mro__ if base is not object for name in (*vars(base), *inspect.get_annotations(base))
    }
    for name in names:
        if name.startswith("_"):
            continue
        if isinstance(getattr(seam, name, None), types.FunctionType):
            members[name] = _method(name)
        else:
            members[name] = _attribute(name)
    return type(f"Contained{seam.__name__}", (_StandIn, seam), members)


def _method(name: str) -> Any:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        own = self.__dict__
        try:
            result = getattr(own["_target"], name)(*arguments, **named)
        except BaseException as error:
            if interrupted(error):
                raise
            fault = own["_culprit"].fault(name, error)
            if name not in RELEASING:
                if fault is error:
                    raise
                raise fault from error
            log.warning("%s", fault)
            return None
        check = own["_checks"].get(name)
        if check is None:
            return result
        try:
            return check(result)
        except ValueError as error:
            raise own["_culprit"].wrong(name, result, str(error)) from None

    method.__name__ = name
    return method


def _attribute(name: str) -> property:
    def get(self: Any) -> Any:
        own = self.__dict__
        if name in own["_fixed"]:
            return own["_fixed"][name]
        try:
            return getattr(own["_target"], name)
        except (AttributeError, VmfError):
            raise
        except BaseException as error:
            if interrupted(error):
                raise
            raise own["_culprit"].fault(name, error) from error

    return property(get)


def guarded(culprit: Culprit, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A callable of a plugin for the core to call."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException as error:
            if interrupted(error) or isinstance(error, VmfError):
                raise
            raise culprit.fault(what, error) from error

    return call


# -- where is that thread? -----------------------------------------------------------------------------------

Explanation = Callable[[Mapping[str, Any]], "tuple[Culprit, str] | threading.Thread | None"]
"""Culprit and method; or the thread that does the call while this one waits for it."""
_explanations: dict[types.CodeType, list[Explanation]] = {}


def explain(code: types.CodeType, explanation: Explanation) -> None:
    """A function of the core that calls plugins says, by its local variables, whom it is calling and what."""
    _explanations.setdefault(code, [])
    _explanations[code].append(explanation)


explain(_method("").__code__, lambda values: (vars(values["self"])["_culprit"], str(values["name"])))
explain(guarded(Culprit(""), "", lambda: None).__code__, lambda values: (values["culprit"], str(values["what"])))


def where(thread: threading.Thread) -> str:
    """The call of a plugin that this thread is in, innermost first: "device plugin 'x' (of y) in io_read of z (at
    FILE:LINE)"; "" when it is in none."""
    frame = sys._current_frames().get(thread.ident or -1)
    place = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    while frame is not None:
        for explanation in _explanations.get(frame.f_code, ()):
            found = explanation(frame.f_locals)
            if isinstance(found, threading.Thread):
                return where(found) if found is not thread else ""
            if found is not None:
                culprit, method = found
                return f"the {culprit.plugin} in {culprit.call(method)} (at {place})"
        frame = frame.f_back
    return ""
