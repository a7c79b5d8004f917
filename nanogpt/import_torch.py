"""Import torch in three quarters of the time; a script imports this before anything that imports torch.

`torch._meta_registrations`, a quarter of the whole, holds Python functions that compute the shapes of results: for the
compiler, torch.export and most operations on meta tensors, which a plain run does not use. It is left out until
anything imports a module of torch that `import torch` does not load, as all those parts of torch do (runs/start).
"""

import gc
import importlib
import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DEFERRED = "torch._meta_registrations"


class DeferredImport(Loader):
    """A finder and loader of modules that imports `DEFERRED` ahead of the next module of torch."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if not name.startswith("torch."):
            return None
        sys.meta_path.remove(self)
        importlib.import_module(DEFERRED)
        spec = sys.modules[name].__spec__ if name in sys.modules else None
        if spec:  # it was loaded on the way, and must not be loaded again
            spec.loader_state, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec
        spec.loader, spec.loader_state = spec.loader_state, None


def print_interrupt(kind: Any, error: Any, traceback: Any) -> None:
    """For sys.excepthook: Ctrl-C while the other modules are imported prints no traceback."""
    if kind is KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = print_interrupt

if "torch" not in sys.modules:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost process are twenty frames of C++
    sys.modules[DEFERRED] = ModuleType(DEFERRED)
    gc.disable()  # modules leave little garbage, and looking for it takes a tenth of the time
    try:
        import torch
        import torch.utils._device  # for `with torch.device(...)`; later it would end the deferral
    finally:
        del sys.modules[DEFERRED]
        gc.enable()
    gc.freeze()
    del torch._meta_registrations
    # Without this, torch 2.13 cannot make a Generator; what is deferred would do it.
    if hasattr(torch._C, "_set_generator_metaclass"):
        torch._C._set_generator_metaclass(torch._opaque_base.OpaqueBaseMeta)
    sys.meta_path.insert(0, DeferredImport())
