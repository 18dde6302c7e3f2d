"""Merge the defaults, a file, `./experiment.yaml` and the command line; only then check and resolve.

Nothing is derived before all sources are merged, so that `DATA.HOME /data` alone moves every folder. Later
sources win: `config.py`, the file, `./experiment.yaml`, `KEY VALUE` pairs. The result is frozen.
"""

import difflib
import os
import re
import traceback
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.config.model_types import MODEL_TYPES, ModelType
from lsdseg.config.network_shapes import (
    default_kernels,
    input_shape_for,
    nearest_input_shapes,
    output_shape,
    tile_context,
    total_factor,
)
from lsdseg.config.rules import RULES, canonical
from lsdseg.errors import UserError
from lsdseg.files import write_whole

CHECKOUT = Path(__file__).resolve().parents[2]
EXPERIMENT = "experiment.yaml"
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in RULES))
# The section that loading derives; it is no setting, so files may hold it and it is not written to them.
DERIVED_SECTION = "MODEL"
PATH_KEYS = (
    "DATA.HOME",
    "DATA.OUTFILE",
    "TRAIN.CHECKPOINT",
    "TRAIN.CHECKPOINT_AC",
    "TRAIN.VALIDATION_VOLUME",
    "INS_SEGMENT.MASK_FILE",
) + tuple(
    f"{section}.{name}{suffix}"
    for section in ("MODEL_ISO", "MODEL_ANISO")
    for name in ("LOG_DIR", "CKPT_FOLDER", "OUTPUT_DIR", "DEFECT_AUGMENT")
    for suffix in ("", "_2D")
)
# Voxels by which tiles grow for prediction where the network can take it.
GROW_INPUT = 36


def load_config(path: str | Path | None = None, overrides=()) -> CfgNode:
    """The validated, resolved and frozen config.

    Args:
        path: a `.py` file (executed; its `cfg`, `_C` or `get_cfg_defaults()` counts) or a `.yaml` file. A
            relative path is looked for below the current directory, then below the checkout; a bare name also
            in the checkout's `config/`.
        overrides: KEY, VALUE, KEY, VALUE ...

    Returns:
        The sections of `config.config`, and `MODEL`: MODEL_ISO or MODEL_ANISO by DATA.FIB, with every kernel
        spelled out, RAW_SHAPE, the voxels of raw that a training patch needs, and CONTEXT, those that a tile of the
        prediction needs on every side of its output. In 2D the values of the `_2D` keys stand in `MODEL` and in
        `TRAIN.NEIGHBORHOOD` under the plain names, too.

    Raises:
        UserError: no such file, an error in it, an unknown key, or a value that is not allowed.
    """
    sources = [("config/config.py", _entries(get_cfg_defaults()))]
    files = [] if path is None else [find_config(path)]
    files += [Path(EXPERIMENT)] if Path(EXPERIMENT).is_file() else []
    sources += [(str(file), _entries(read_config_file(file))) for file in files]
    sources += [("command line", _pairs(overrides))]
    return _merged(sources)


def derived_config(cfg: CfgNode, settings: dict[str, Any]) -> CfgNode:
    """A loaded config with other settings (key -> value); what they decide is worked out anew.

    Raises:
        UserError: as `load_config`.
    """
    resolved = ((key, value) for key, value in _entries(cfg) if key not in settings)
    return _merged([("the config", resolved), ("derived", settings.items())])


def _merged(sources) -> CfgNode:
    """The config from (origin, key-value pairs) of which later ones win."""
    cfg = CfgNode({section: {} for section in SECTIONS})
    origins = {}
    for origin, entries in sources:
        for key, value in entries:
            if key not in RULES:
                raise UserError(f"unknown key {key} ({origin}): the nearest known one is {_nearest(key)}")
            section, _, name = key.partition(".")
            try:
                cfg[section][name] = canonical(key, value)
            except ValueError as error:
                raise UserError(f"{key} is {value!r} ({origin}): allowed is {error}") from None
            origins[key] = origin
    _resolve(cfg, origins)
    cfg.freeze()
    return cfg


def find_config(path: str | Path) -> Path:
    """The config file that the user means; see `load_config`."""
    path = Path(path).expanduser()
    places = [Path.cwd(), CHECKOUT] + ([CHECKOUT / "config"] if path.name == str(path) else [])
    for place in places:
        if (place / path).is_file():
            return place / path
    looked = "" if path.is_absolute() else f" in {', '.join(dict.fromkeys(map(str, places)))}"
    raise UserError(f"there is no config file {path}{looked}: check the path given with -c")


def dump_config(cfg: CfgNode, path: str | Path) -> None:
    """Write a loaded config as YAML that loads to an equal one, without user name and password in DATA.DB_HOST.

    Raises:
        UserError: the file cannot be written.
    """
    with write_whole(path) as partial:
        partial.write_text(config_text(cfg), encoding="utf-8")


def config_text(cfg: CfgNode) -> str:
    """The YAML that `dump_config` writes."""
    tree = {section: dict(keys) for section, keys in cfg.items() if section != DERIVED_SECTION}
    tree["DATA"]["DB_HOST"] = re.sub(r"^(\w+://)?.*@", r"\1", tree["DATA"]["DB_HOST"])
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def read_config_file(file: Path) -> dict:
    """The tree of sections that a config file holds."""
    if file.suffix == ".py":
        return _run_python(file)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a config file ends in .py, .yaml or .yml")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{file} holds {tree!r:.60}: it must hold sections such as TRAIN:")
    return tree or {}


def _run_python(file: Path) -> dict:
    namespace = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), namespace)
        candidates = [namespace.get("cfg"), namespace.get("_C")]
        if callable(namespace.get("get_cfg_defaults")):
            candidates.append(namespace["get_cfg_defaults"]())
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", 1)
        raise UserError(f"{file}, line {line}: {type(error).__name__}: {error}") from None
    for tree in candidates:
        if isinstance(tree, dict):
            return tree
    raise UserError(f"{file} gives no settings: it must define cfg, _C or get_cfg_defaults()")


def _entries(tree: dict):
    """The ("SECTION.NAME", value) pairs of a tree; what is no section comes out as it is, to be refused."""
    for section, keys in tree.items():
        if section == DERIVED_SECTION or (section in SECTIONS and keys in (None, {})):
            continue
        if isinstance(keys, dict) and keys:
            yield from ((f"{section}.{name}", value) for name, value in keys.items())
        else:
            yield str(section), keys


def _pairs(overrides) -> list[tuple[str, Any]]:
    """The (key, value) pairs of a flat list."""
    keys, values = overrides[::2], overrides[1::2]
    if len(keys) > len(values):
        # With a value forgotten in the middle, the next key sits in its place.
        lonely = next((k for k, v in zip(keys, values, strict=False) if v in RULES), keys[-1])
        raise UserError(f"{lonely} has no value: settings on the command line are KEY VALUE pairs")
    return list(zip(keys, values, strict=True))


def _nearest(key: str) -> str:
    """The known key that was probably meant: the same name in another section, else the most similar one."""
    name = key.upper().rpartition(".")[2]
    same_name = [known for known in RULES if known.endswith(f".{name}")]
    return difflib.get_close_matches(key.upper(), same_name or RULES, n=1, cutoff=0)[0]


def _resolve(cfg: CfgNode, origins: dict[str, str]) -> None:
    """Fill in what is None, make paths absolute, set cfg.MODEL, and check what depends on several keys."""
    data, train, preprocess = cfg.DATA, cfg.TRAIN, cfg.PREPROCESS
    dims = 2 if data.DIM_2D else 3

    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        if cfg[section].get(name):
            cfg[section][name] = _absolute(cfg[section][name])
    data.OUTFILE = data.OUTFILE or f"{data.HOME}/lsd_outputs"
    data.DB_NAME = data.DB_NAME or "lsd_parallel_fragments"

    if preprocess.EXPORT_2D_FROM_3D is None:
        preprocess.EXPORT_2D_FROM_3D = data.DIM_2D
    preprocess.SOURCE_DATA_OFFSET = preprocess.SOURCE_DATA_OFFSET or (0, 0, 0)
    preprocess.SOURCE_DATA_RESOLUTION = preprocess.SOURCE_DATA_RESOLUTION or (8, 8, 8)

    if MODEL_TYPES[train.MODEL_TYPE].first and not train.CHECKPOINT_AC:
        train.LSD_EPOCHS = train.LSD_EPOCHS or train.EPOCHS
    if train.NEIGHBORHOOD == "LR_NEIGHBORHOOD":
        train.NEIGHBORHOOD = [list(offset) for offset in train.LR_NEIGHBORHOOD]
    if train.NEIGHBORHOOD_2D == "LR_NEIGHBORHOOD":
        train.NEIGHBORHOOD_2D = [list(offset[-2:]) for offset in train.LR_NEIGHBORHOOD if offset[0] == 0]
    if data.DIM_2D:
        train.NEIGHBORHOOD = [list(offset) for offset in train.NEIGHBORHOOD_2D]
    if any(len(offset) != dims for offset in train.NEIGHBORHOOD):
        key = "TRAIN.NEIGHBORHOOD_2D" if data.DIM_2D else "TRAIN.NEIGHBORHOOD"
        raise _refusal(key, train.NEIGHBORHOOD, origins, f"in {dims}D every offset has {dims} numbers")

    used = "MODEL_ISO" if data.FIB else "MODEL_ANISO"
    for section in ("MODEL_ISO", "MODEL_ANISO"):
        model = cfg[section]
        # Logs and snapshots of a run lie in folders of its checkpoints' name.
        run = Path((data.DIM_2D and model.get("CKPT_FOLDER_2D")) or model.CKPT_FOLDER or "run").name
        model.VOXEL_SIZE_2D = model.VOXEL_SIZE_2D or model.VOXEL_SIZE[1:]
        model.LSDS = model.LSDS or (6 if data.DIM_2D else 10)
        for name, folder in [
            ("LOG_DIR", "lsd_logs"),
            ("CKPT_FOLDER", "lsd_checkpoints"),
            ("OUTPUT_DIR", "lsd_snapshots"),
        ]:
            model[name] = model[name] or f"{data.HOME}/{folder}/{train.MODEL_TYPE}_{dims}D/{data.BRAIN_VOL}/{run}"
        for suffix, axes in (("", 3), ("_2D", 2)):
            try:
                _fit_network(model, section, suffix, origins)
            except UserError:
                if section == used and axes == dims:
                    raise

    cfg.MODEL = _model_in_use(cfg[used], dims)
    _fit_inputs(cfg.MODEL, MODEL_TYPES[train.MODEL_TYPE])
    _check_model(cfg.MODEL, used, dims, origins)


def _fit_network(model: CfgNode, section: str, suffix: str, origins: dict[str, str]) -> None:
    """Fill in OUTPUT_SHAPE and GROW_INPUT, or check those given, by what the network does to INPUT_SHAPE."""

    def value(name):
        return model.get(name + suffix, model[name])

    network = [value(n) for n in ("DOWNSAMPLE_FACTORS", "KERNEL_SIZE_DOWN", "KERNEL_SIZE_UP", "PAD_CONV")]
    shape = value("INPUT_SHAPE")
    try:
        output = output_shape(shape, *network)
    except ValueError as error:
        argument, _, reason = str(error).partition(": ")
        key = argument.upper()
        if key == "INPUT_SHAPE":
            possible = " or ".join(f"{i} -> {o}" for i, o in nearest_input_shapes(shape, *network))
            reason += f"; nearest possible, with the output each gives: {possible}"
        elif key.startswith("KERNEL"):
            reason += "; None is two kernels of width 3 on every level"
        raise _refusal(f"{section}.{key}{suffix}", value(key), origins, reason) from None

    if any((i - o) % 2 for i, o in zip(shape, output, strict=True)):
        reason = f"INPUT_SHAPE {shape} loses an odd number of voxels, to {output}, so that the two have no common "
        reason += "middle; change factors or kernel sizes"
        raise _refusal(f"{section}.DOWNSAMPLE_FACTORS{suffix}", network[0], origins, reason)
    given = value("OUTPUT_SHAPE")
    if given not in (None, output):
        reason = f"from INPUT_SHAPE {shape} the network gives {output}; set that, or None"
        raise _refusal(f"{section}.OUTPUT_SHAPE{suffix}", given, origins, reason)
    model["OUTPUT_SHAPE" + suffix] = output

    steps = total_factor(network[0])
    grow = value("GROW_INPUT")
    if grow is None:
        model["GROW_INPUT" + suffix] = tuple(GROW_INPUT // step * step for step in steps)
    elif any(g % step for g, step in zip(grow, steps, strict=True)):
        reason = f"the network can only grow by multiples of {steps}"
        raise _refusal(f"{section}.GROW_INPUT{suffix}", grow, origins, reason)


def _model_in_use(section: CfgNode, dims: int) -> CfgNode:
    """The section as the network is built from it: 2D values under plain names, every kernel spelled out."""
    model = section.clone()
    if dims == 2:
        model.update({name.removesuffix("_2D"): model[name] for name in section if name.endswith("_2D")})
    levels = len(model.DOWNSAMPLE_FACTORS)
    model.KERNEL_SIZE_DOWN = model.KERNEL_SIZE_DOWN or default_kernels(levels + 1, dims)
    model.KERNEL_SIZE_UP = model.KERNEL_SIZE_UP or default_kernels(levels, dims)
    return model


def _fit_inputs(model: CfgNode, model_type: ModelType) -> None:
    """Work out RAW_SHAPE and CONTEXT, by what one network needs, or two in a row."""
    network = [model[n] for n in ("DOWNSAMPLE_FACTORS", "KERNEL_SIZE_DOWN", "KERNEL_SIZE_UP", "PAD_CONV")]
    model.RAW_SHAPE, model.CONTEXT = model.INPUT_SHAPE, tile_context(*network)
    if model_type.first and model.PAD_CONV == "same":
        model.CONTEXT = tuple(2 * voxels for voxels in model.CONTEXT)
    elif model_type.first:
        model.RAW_SHAPE = input_shape_for(model.INPUT_SHAPE, *network)
        sizes = zip(model.RAW_SHAPE, model.OUTPUT_SHAPE, strict=True)
        model.CONTEXT = tuple((raw - output) // 2 for raw, output in sizes)


def _check_model(model: CfgNode, section: str, dims: int, origins: dict[str, str]) -> None:
    lsds = 6 if dims == 2 else 10
    if lsds != model.LSDS:
        raise _refusal(f"{section}.LSDS", model.LSDS, origins, f"in {dims}D there are {lsds}")
    for name in ("INTENSITYAUG_SCALE", "INTENSITYAUG_SHIFT"):
        low, high = model[f"{name}_MIN"], model[f"{name}_MAX"]
        if low > high:
            raise _refusal(f"{section}.{name}_MIN", low, origins, f"{name}_MAX is {high} and may not be smaller")


def _refusal(key: str, value: Any, origins: dict[str, str], reason: str) -> UserError:
    return UserError(f"{key} is {value} ({origins.get(key, 'derived')}): {reason}")


def _absolute(path: str) -> str:
    """The path as it is if it is absolute, else counted from the current directory; ~ is the user's home."""
    path = os.path.expanduser(path)
    return path if os.path.isabs(path) else os.path.abspath(path)
