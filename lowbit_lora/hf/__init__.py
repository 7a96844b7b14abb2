"""lowbit in the libraries around transformers: each library's facts in one module.

``import lowbit_lora`` is enough for transformers to know ``LowbitConfig`` and folders that were saved with it. It does
not import transformers, which takes seconds: :func:`register_with_transformers` waits until somebody else does.
"""

import importlib
import importlib.abc
import importlib.util
import sys

_QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer with transformers: now if its list of quantizers is loaded, else as soon as it is."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _OnceLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnceLoaded())


class _OnceLoaded(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, but registers once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module):
            load(module)
            _register()

        spec.loader.exec_module = load_and_register
        return spec


def _register() -> None:
    importlib.import_module(".quantizer", __name__)  # registers itself
