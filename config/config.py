"""The defaults of all keys, for config files that start from them. lsdseg/config/defaults.py explains each key."""

from lsdseg.config.defaults import get_cfg_defaults

_C = get_cfg_defaults()

__all__ = ["_C", "get_cfg_defaults"]
