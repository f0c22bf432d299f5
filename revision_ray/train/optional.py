"""Packages that a setting asks for and that the installation need not have."""

import importlib
from types import ModuleType

from revision_ray.errors import ConfigError


def optional(package: str, setting: str) -> ModuleType:
    """The package that `setting` asks for.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{setting} is set, but the package {package} cannot be imported ({error}); install it in the "
            "environment of the workers, or leave the setting out"
        ) from error
