"""Pretraining methods: one file each, its class a subclass of `Method`; the file is the
registration.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
