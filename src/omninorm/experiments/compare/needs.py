"""Raises a readable error if packages that only the comparisons need are missing."""

from omninorm.errors import MissingExtraError

try:
    import pydantic  # noqa: F401
    import scipy  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    missing = {"yaml": "PyYAML"}.get(error.name or "", error.name)
    remedy = 'install it with pip install "omninorm[compare]"'
    raise MissingExtraError(f"omninorm compare needs the package {missing}", "", remedy) from error
