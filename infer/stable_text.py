"""A text of static choices that says the same in every process, for keys that are kept on disk.

`repr` will not do: it leaves fields out, shortens arrays and holds addresses.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


class UnstableError(Exception):
    """Names what has no text that would say the same in every process."""


class StableText:
    """`of(value)` is the text of a value; UnstableError for one that cannot be told.

    packages  whose classes and functions may be named, beside those of Python: a name says what is behind it only
              where the reader of the text knows the version too
    """

    def __init__(self, packages: Iterable[str]):
        self._packages = frozenset(packages) | sys.stdlib_module_names

    def of(self, value: Any) -> str:
        if type(value) in PLAIN:
            return repr(value)
        if isinstance(value, Enum):
            return f"{self._of_class(type(value))}.{value.name}"
        if isinstance(value, type):
            return self._of_class(value)
        if is_dataclass(value):
            return self._all(value, [(field.name, getattr(value, field.name)) for field in fields(value)])
        for told in (self._of_collection, self._of_numbers, self._of_placement, self._of_function):
            if (text := told(value)) is not None:
                return text
        raise UnstableError(f"a {type(value).__module__}.{type(value).__qualname__}")

    def of_tree(self, structure: Any) -> str:
        """Of a tree's structure, with the static fields of every node."""
        node = structure.node_data()
        if node is None:
            return "*"
        children = ",".join(self.of_tree(child) for child in structure.children())
        return f"{self._of_class(node[0])}<{self.of(node[1])}>({children})"

    def _of_collection(self, value: Any) -> str | None:
        if isinstance(value, tuple | list):
            return self._all(value, enumerate(value))
        if isinstance(value, Mapping):
            return self._all(value, value.items())
        if isinstance(value, Set):
            return f"{self._of_class(type(value))}{sorted(self.of(one) for one in value)}"
        return None

    def _of_numbers(self, value: Any) -> str | None:
        if isinstance(value, np.dtype):
            return f"dtype {value}"
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return f"{self._of_class(type(value))}({value.dtype}, {value.shape}, {content})"
        return None

    def _of_placement(self, value: Any) -> str | None:
        if isinstance(value, jax.Device):
            return f"device {value.platform} {value.id}"
        if isinstance(value, Mesh):
            ids = [] if value.empty else [device.id for device in value.devices.flat]
            return f"mesh({self.of(_axes(value))}, {ids})"
        if isinstance(value, AbstractMesh):
            return f"abstract mesh({self.of(_axes(value))}, {value.abstract_device})"
        if isinstance(value, NamedSharding):
            return f"named({self.of(value.mesh)}, {value.spec}, {value.memory_kind})"
        if isinstance(value, SingleDeviceSharding):
            return f"on({self.of(tuple(value.device_set))}, {value.memory_kind})"
        return f"spec {value}" if isinstance(value, PartitionSpec) else None

    def _of_function(self, value: Any) -> str | None:
        if isinstance(value, partial):
            return f"partial({self.of(value.func)}, {self.of(value.args)}, {self.of(value.keywords)})"
        if isinstance(value, types.MethodType):
            return f"method({self.of(value.__self__)}, {self.of(value.__func__)})"
        if isinstance(value, types.BuiltinFunctionType) and value.__self__ in (None, sys.modules.get(value.__module__)):
            return self._name(value)
        if isinstance(value, types.FunctionType):
            return self._of_written(value)
        if callable(value) and hasattr(value, "__wrapped__"):  # jax.jit and its like
            return f"{self._of_class(type(value))}({self.of(value.__wrapped__)})"
        return None

    def _of_written(self, function: types.FunctionType) -> str:
        if function.__name__ == "<lambda>":  # others of that name may stand in the same line
            raise UnstableError(f"a lambda of {function.__module__}")
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        return f"{self._name(function)}:{function.__code__.co_firstlineno}({self.of(held)})"

    def _of_class(self, value: type) -> str:
        if "<locals>" in value.__qualname__:  # its methods may hold what the function around it held
            raise UnstableError(f"{value.__module__}.{value.__qualname__}, a class made by a function")
        return self._name(value)

    def _all(self, value: Any, parts: Iterable[tuple[Any, Any]]) -> str:
        return f"{self._of_class(type(value))}({', '.join(f'{self.of(name)}={self.of(part)}' for name, part in parts)})"

    def _name(self, named: Any) -> str:
        module = named.__module__ or ""
        if module.partition(".")[0] not in self._packages:
            raise UnstableError(f"{module}.{named.__qualname__}, of a package whose version is not known")
        return f"{module}.{named.__qualname__}"


def _axes(mesh: Mesh | AbstractMesh) -> list[tuple[str, int, str]]:
    return [
        (str(name), size, str(kind)) for (name, size), kind in zip(mesh.shape.items(), mesh.axis_types, strict=True)
    ]
