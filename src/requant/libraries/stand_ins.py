"""Import a library without a package that its layouts never use: stand-ins take its place.

mlx-lm imports transformers for its tokenizers, and transformers imports torch where that is
installed, which takes many times as long as the layout. While a library's convert runs, modules of
such packages are *stand-ins*: their names can be imported, derived from and registered, and nothing
else. The library's own modules are then kept apart from ``sys.modules``, so that whoever imports
it, or the package, afterwards gets the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from requant.libraries.surroundings import lock


class StandInUsedError(BaseException):
    """More than the name of something was used; no handler of a library catches it."""


class StandIns:
    """A library's modules as they are with stand-ins for some packages.

    Args:
        package: The library's ("mlx_lm").
        absent: The packages ("transformers").
    """

    def __init__(self, package: str, absent: Sequence[str]) -> None:
        self.package, self.absent = package, tuple(absent)
        self.suffice = True  # False once one was used
        self._modules: dict[str, ModuleType] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let imports find the library with stand-ins, unless it or they are imported already.

        Raises:
            StandInUsedError: The library needs one of the packages; it gets them from now on.
        """
        packages = (self.package, *self.absent)
        if not self.suffice or any(name in sys.modules for name in packages):
            yield
            return
        finder = _Finder(self.absent)
        with lock:
            sys.modules.update(self._modules)
            sys.meta_path.insert(0, finder)
            try:
                yield
            except StandInUsedError:
                self.suffice = False
                raise
            finally:
                sys.meta_path.remove(finder)
                for name in [x for x in sys.modules if _is_of(x, packages)]:
                    self._modules[name] = sys.modules.pop(name)


def _is_of(name: str, packages: Sequence[str]) -> bool:
    return name.partition(".")[0] in packages


class _Finder:
    """Finds a stand-in for every module of some packages; a finder and loader of ``importlib``."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if not _is_of(name, self.packages):
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Module(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Kind(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Kind(type):
    """A class that can be derived from, and whose ``register`` does nothing."""

    def register(cls, *_: object, **__: object) -> None:
        """What a registry of classes does at import."""

    def __call__(cls, *_: object, **__: object) -> Any:
        raise StandInUsedError(f"{cls.__module__}.{cls.__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StandInUsedError(f"{cls.__module__}.{cls.__name__}.{name}")
