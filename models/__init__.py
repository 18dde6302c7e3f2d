"""The networks, under the name that scripts of the published LSD code import; the code is in `lsdseg.models`."""

from lsdseg.models import AutoContext, build_model

__all__ = ["AutoContext", "build_model"]
