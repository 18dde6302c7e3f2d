"""The defaults of every key. They are explained in lsdseg/config/defaults.py, where the code reads them."""

from lsdseg.config.defaults import get_cfg_defaults

_C = get_cfg_defaults()

__all__ = ["_C", "get_cfg_defaults"]
