"""Says in words which packages are missing: this part needs some that the rest of omninorm does without."""

from omninorm.errors import MissingExtraError

try:
    import pydantic  # noqa: F401
    import scipy  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    remedy = 'install them with pip install "omninorm[compare]"'
    raise MissingExtraError(
        "comparisons need pydantic, PyYAML and scipy", f"an installation without {error.name}", remedy
    ) from error
