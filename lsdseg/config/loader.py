"""Load a config: merge the defaults, a config file, `./experiment.yaml` and the command line, then check and resolve.

Later sources override earlier ones. Nothing is derived before all sources are merged, so `DATA.HOME /data` alone moves
every folder. The result is frozen.
"""

import difflib
import math
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from lsdseg.config.rules import RULES, canonical, parse_yaml
from lsdseg.errors import SECRET_OPTIONS, UserError, quoted
from lsdseg.files import write_whole

CHECKOUT = Path(__file__).resolve().parents[2]
EXPERIMENT = "experiment.yaml"
CONFIG_SUFFIXES = (".py", ".yaml", ".yml")
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in RULES))
MODEL_SECTIONS = ("MODEL_ISO", "MODEL_ANISO")
# Loading derives this section. Files may hold it, but it is ignored, and it is not written to them.
DERIVED_SECTION = "MODEL"
# Keys of MODEL_* for the folders of a run, and the folders of HOME that these lie in by default.
RUN_FOLDERS = {"LOG_DIR": "lsd_logs", "CKPT_FOLDER": "lsd_checkpoints", "OUTPUT_DIR": "lsd_snapshots"}
# Keys of folders that results go to. Those below DATA.HOME move with it if a later source changes DATA.HOME.
OUTPUT_FOLDERS = ("DATA.OUTFILE", *(f"{section}.{name}" for section in MODEL_SECTIONS for name in RUN_FOLDERS))
# Keys that the published scripts add to the config_0.yaml that they write. What they say follows from other keys here.
PUBLISHED_KEYS = (
    "DATA.CONTEXT",
    "DATA.SAMPLE",
    "DATA.SAMPLE_NAME",
    "DATA.SAMPLE_SLICE",
    "DATA.DB_COLLECTION_NAME",
    "INS_SEGMENT.AFFS_DS",
    "INS_SEGMENT.OUT_FRAGS_DS",
    "INS_SEGMENT.NUM_VOXELS_IN_BLOCK",
    "INS_SEGMENT.THRESHOLD",
)
# Keys of MODEL_* that describe the network, in the order of the arguments of `network_shapes`.
NETWORK = ("DOWNSAMPLE_FACTORS", "KERNEL_SIZE_DOWN", "KERNEL_SIZE_UP", "PAD_CONV")
# Config files in YAML have a few thousand bytes. Reading a larger one would take minutes.
MOST_BYTES = 10**6
# A network with more weights fits no GPU. The published one has 2e8.
MOST_WEIGHTS = 2 * 10**9
# Where settings come from, for messages, and (key, value) pairs.
Source = tuple[str, Iterable[tuple[str, Any]]]


def load_config(path: str | Path | None = None, overrides: Sequence[Any] = ()) -> CfgNode:
    """Return the checked, resolved and frozen config.

    Args:
        path: a `.py` file (it is executed, and must define `cfg`, `_C` or `get_cfg_defaults()`) or a `.yaml` file.
            A relative path is looked up in the current directory, then in the checkout; a bare name also in the
            checkout's `config/`. None: no file.
        overrides: KEY, VALUE, KEY, VALUE ...

    Returns:
        The sections of `lsdseg.config.defaults`, and a section `MODEL`: MODEL_ISO or MODEL_ANISO, as DATA.FIB says,
        with every kernel written out. `MODEL.RAW_SHAPE` is the size in voxels of the raw data that a training patch
        needs. `MODEL.CONTEXT` is the context in voxels that a tile needs on each side of its output in prediction. In
        2D, the keys of `MODEL` and `TRAIN.NEIGHBORHOOD` hold the values of the keys with the suffix `_2D`.

    Raises:
        UserError: there is no such file, it contains an error, a key is unknown, or a value is not allowed.
    """
    sources: list[Source] = [("config/config.py", _entries(get_cfg_defaults()))]
    files = [] if path is None else [find_config(path)]
    files += [Path(EXPERIMENT)] if Path(EXPERIMENT).is_file() else []
    sources += [(str(file), _without_published_keys(_entries(read_config_file(file)))) for file in files]
    sources += [("command line", _pairs(overrides))]
    return _merge(sources)


def derived_config(cfg: CfgNode, settings: Mapping[str, Any]) -> CfgNode:
    """Return a loaded config with other settings (key -> value). What depends on them is derived again.

    Raises:
        UserError: as for `load_config`.
    """
    resolved = ((key, value) for key, value in _entries(cfg) if key not in settings)
    return _merge([("the config", resolved), ("derived", settings.items())])


def _merge(sources: Sequence[Source]) -> CfgNode:
    """Merge sources, the later ones over the earlier ones, and resolve the result."""
    cfg = CfgNode({section: {} for section in SECTIONS})
    origins: dict[str, str] = {}
    for origin, entries in sources:
        for key, value in _with_moved_folders(cfg, list(entries)):
            if key not in RULES:
                hint = f"did you mean {_nearest(str(key))}?"
                if isinstance(value, str) and value in RULES:
                    hint = f"write {value} before its value"
                raise UserError(f"unknown key {key!s:.80} ({origin}): {hint}")
            section, _, name = key.partition(".")
            try:
                cfg[section][name] = canonical(key, value)
            except ValueError as error:
                raise UserError(f"{key} is {quoted(value)} ({origin}), but must be {error}") from None
            origins[key] = origin
    _resolve(cfg, origins)
    cfg.freeze()
    return cfg


def _with_moved_folders(cfg: CfgNode, entries: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield a source's (key, value) pairs. If they change DATA.HOME, folders of earlier sources below it come first."""
    old, new = cfg.DATA.get("HOME"), dict(entries).get("DATA.HOME")
    for key in OUTPUT_FOLDERS if old and isinstance(new, str) else ():
        section, _, name = key.partition(".")
        folder = cfg[section].get(name)
        if folder and Path(folder).is_relative_to(old):
            yield key, str(Path(str(new)) / Path(folder).relative_to(old))
    yield from entries


def _without_published_keys(entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Drop the keys that published scripts add to a config.

    They also set DATA.OUTFILE to the zarr of the sample, OUTFILE/TYPE/3d/RUN/CHECKPOINT/SAMPLE.zarr.
    """
    for key, value in entries:
        if (
            key == "DATA.OUTFILE"
            and isinstance(value, str)
            and value.endswith(".zarr")
            and len(Path(value).parents) > 4
        ):
            yield key, str(Path(value).parents[4])
        elif key not in PUBLISHED_KEYS:
            yield key, value


def find_config(path: str | Path) -> Path:
    """Return the config file that the user means; see `load_config`.

    Raises:
        UserError: there is no such file.
    """
    path = Path(os.path.expanduser(path))
    places = [Path.cwd(), CHECKOUT] + ([CHECKOUT / "config"] if path.name == str(path) else [])
    for place in places:
        if os.path.isfile(place / path):  # unlike Path.is_file, it takes any name
            return place / path
    searched = "" if path.is_absolute() else f" in {', '.join(dict.fromkeys(map(str, places)))}"
    raise UserError(f"there is no config file {path}{searched}: check the path after -c")


def dump_config(cfg: CfgNode, path: str | Path) -> None:
    """Write a loaded config as YAML that loads to an equal config, without the credentials in DATA.DB_HOST.

    Raises:
        UserError: the file cannot be written.
    """
    with write_whole(path) as partial:
        partial.write_text(config_text(cfg), encoding="utf-8")


def config_text(cfg: CfgNode) -> str:
    """Return the YAML that `dump_config` writes."""
    tree = {section: dict(keys) for section, keys in cfg.items() if section != DERIVED_SECTION}
    host = re.sub(r"^([\w+.-]+://)?.*@", r"\1", tree["DATA"]["DB_HOST"])
    tree["DATA"]["DB_HOST"] = SECRET_OPTIONS.sub("", host)
    return str(yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110))


def read_config_file(file: Path) -> dict[str, Any]:
    """Return what a config file holds: section -> name -> value, unchecked.

    Raises:
        UserError: the file cannot be read or contains an error.
    """
    if file.suffix == ".py":
        return _run_python(file)
    if file.suffix not in CONFIG_SUFFIXES:
        raise UserError(f"{file}: the name of a config file must end in .py, .yaml or .yml")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        tree = parse_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{file} contains {quoted(tree)}, but must contain sections such as TRAIN:")
    return tree or {}


def _run_python(file: Path) -> dict[str, Any]:
    """Execute a config file and return its settings."""
    namespace: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), namespace)
        candidates = [namespace.get("cfg"), namespace.get("_C")]
        if callable(namespace.get("get_cfg_defaults")):
            candidates.append(namespace["get_cfg_defaults"]())
    except (Exception, SystemExit) as error:  # whatever the file does, it is a mistake in it
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", 1)
        raise UserError(f"{file}, line {line}: {type(error).__name__}: {error}") from None
    for tree in candidates:
        if isinstance(tree, dict):
            return tree
    raise UserError(f"{file} contains no settings: define cfg, _C or get_cfg_defaults() in it")


def _entries(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the ("SECTION.NAME", value) pairs of a tree. What is no section comes out unchanged, to be refused."""
    for section, keys in tree.items():
        if section == DERIVED_SECTION or (section in SECTIONS and keys in (None, {})):
            continue
        if isinstance(keys, dict) and keys:
            yield from ((f"{section}.{name}", value) for name, value in keys.items())
        else:
            yield str(section), keys


def _pairs(overrides: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return the (key, value) pairs of a flat list."""
    keys, values = overrides[::2], overrides[1::2]
    if len(keys) > len(values):
        # If a value is missing in the middle, the next key is in its place.
        without_value = next((k for k, v in zip(keys, values, strict=False) if v in RULES), keys[-1])
        raise UserError(f"{without_value} has no value: settings on the command line are KEY VALUE pairs")
    return list(zip(keys, values, strict=True))


def _nearest(key: str) -> str:
    """Return the known key that was probably meant: the same name in another section, else the most similar one."""
    key = key[-80:].upper()  # comparing takes long for long texts
    name = key.rpartition(".")[2]
    same_name = [known for known in RULES if known.endswith(f".{name}")]
    return difflib.get_close_matches(key, same_name or RULES, n=1, cutoff=0)[0]


def _resolve(cfg: CfgNode, origins: Mapping[str, str]) -> None:
    """Fill in what is None, set cfg.MODEL, and check what depends on several keys."""
    data, train, preprocess = cfg.DATA, cfg.TRAIN, cfg.PREPROCESS
    data.OUTFILE = data.OUTFILE or f"{data.HOME}/lsd_outputs"
    data.DB_NAME = data.DB_NAME or "lsd_parallel_fragments"
    if preprocess.EXPORT_2D_FROM_3D is None:
        preprocess.EXPORT_2D_FROM_3D = data.DIM_2D
    preprocess.SOURCE_DATA_OFFSET = preprocess.SOURCE_DATA_OFFSET or (0, 0, 0)
    preprocess.SOURCE_DATA_RESOLUTION = preprocess.SOURCE_DATA_RESOLUTION or (8, 8, 8)
    if MODEL_TYPES[train.MODEL_TYPE].first and not train.CHECKPOINT_AC:
        train.LSD_EPOCHS = train.LSD_EPOCHS or train.EPOCHS

    dims = 2 if data.DIM_2D else 3
    _resolve_neighborhood(cfg, dims, origins)
    used = "MODEL_ISO" if data.FIB else "MODEL_ANISO"
    for section in MODEL_SECTIONS:
        _resolve_model(cfg, section, dims, used, origins)
    cfg.MODEL = _model_in_use(cfg[used], dims)
    _derive_inputs(cfg.MODEL, MODEL_TYPES[train.MODEL_TYPE])
    _check_model(cfg.MODEL, used, dims, origins)
    for offset in train.NEIGHBORHOOD if "affs" in MODEL_TYPES[train.MODEL_TYPE].tasks else ():
        if any(abs(step) >= size for step, size in zip(offset, cfg.MODEL.INPUT_SHAPE, strict=True)):
            reason = f"the offset {offset} leads out of every patch, INPUT_SHAPE {cfg.MODEL.INPUT_SHAPE}"
            raise _bad_value(f"TRAIN.NEIGHBORHOOD{'_2D' * data.DIM_2D}", train.NEIGHBORHOOD, origins, reason)


def _resolve_neighborhood(cfg: CfgNode, dims: int, origins: Mapping[str, str]) -> None:
    """Write out LR_NEIGHBORHOOD, and in 2D let TRAIN.NEIGHBORHOOD hold the offsets of a section."""
    train = cfg.TRAIN
    if train.NEIGHBORHOOD == "LR_NEIGHBORHOOD":
        train.NEIGHBORHOOD = [list(offset) for offset in train.LR_NEIGHBORHOOD]
    if train.NEIGHBORHOOD_2D == "LR_NEIGHBORHOOD":
        train.NEIGHBORHOOD_2D = [list(offset[-2:]) for offset in train.LR_NEIGHBORHOOD if offset[0] == 0]
    if dims == 2:
        train.NEIGHBORHOOD = [list(offset) for offset in train.NEIGHBORHOOD_2D]
    key = "TRAIN.NEIGHBORHOOD_2D" if dims == 2 else "TRAIN.NEIGHBORHOOD"
    if any(len(offset) != dims for offset in train.NEIGHBORHOOD):
        raise _bad_value(key, train.NEIGHBORHOOD, origins, f"in {dims}D every offset needs {dims} numbers")
    if not all(any(offset) for offset in train.NEIGHBORHOOD):
        raise _bad_value(key, train.NEIGHBORHOOD, origins, "no offset may be 0 along all axes")


def _resolve_model(cfg: CfgNode, section: str, dims: int, used: str, origins: Mapping[str, str]) -> None:
    """Fill in what is None in MODEL_ISO or MODEL_ANISO. Shapes must fit only the network in use."""
    model, data = cfg[section], cfg.DATA
    # The folders for logs and snapshots of a run have the name of its folder for checkpoints.
    run = Path((data.DIM_2D and model.get("CKPT_FOLDER_2D")) or model.CKPT_FOLDER or "run").name
    for name, folder in RUN_FOLDERS.items():
        model[name] = model[name] or f"{data.HOME}/{folder}/{cfg.TRAIN.MODEL_TYPE}_{dims}D/{data.BRAIN_VOL}/{run}"
    model.VOXEL_SIZE_2D = model.VOXEL_SIZE_2D or model.VOXEL_SIZE[1:]
    model.LSDS = model.LSDS or (6 if data.DIM_2D else 10)
    for suffix, axes in (("", 3), ("_2D", 2)):
        try:
            _derive_shapes(model, section, suffix, origins)
        except UserError:
            if section == used and axes == dims:
                raise


def _derive_shapes(model: CfgNode, section: str, suffix: str, origins: Mapping[str, str]) -> None:
    """Compute OUTPUT_SHAPE from the network and INPUT_SHAPE, or check that and GROW_INPUT if they are given."""

    def value(name: str) -> Any:
        return model.get(name + suffix, model[name])

    network = [value(name) for name in NETWORK]
    shape = value("INPUT_SHAPE")
    try:
        output = output_shape(shape, *network)
    except ValueError as error:
        argument, _, reason = str(error).partition(": ")
        key = argument.upper()
        if key == "INPUT_SHAPE":
            possible = " or ".join(f"{i} -> {o}" for i, o in nearest_input_shapes(shape, *network))
            reason += f"; the nearest possible sizes, each with its output, are {possible}"
        elif key.startswith("KERNEL"):
            reason += "; set it to None for two kernels of width 3 on every level"
        raise _bad_value(f"{section}.{key}{suffix}", value(key), origins, reason) from None

    if any((i - o) % 2 for i, o in zip(shape, output, strict=True)):
        reason = f"INPUT_SHAPE {shape} loses an odd number of voxels and gives {output}, so input and output have no "
        reason += "common center; change factors or kernel sizes"
        raise _bad_value(f"{section}.DOWNSAMPLE_FACTORS{suffix}", network[0], origins, reason)
    given = value("OUTPUT_SHAPE")
    if given not in (None, output):
        reason = f"with INPUT_SHAPE {shape} the network gives {output}; set it to that, or to None"
        raise _bad_value(f"{section}.OUTPUT_SHAPE{suffix}", given, origins, reason)
    model["OUTPUT_SHAPE" + suffix] = output

    steps = total_factor(network[0])
    grow = value("GROW_INPUT")
    if grow is not None and any(g % step for g, step in zip(grow, steps, strict=True)):
        reason = f"the network can grow only by multiples of {steps}"
        raise _bad_value(f"{section}.GROW_INPUT{suffix}", grow, origins, reason)


def _model_in_use(section: CfgNode, dims: int) -> CfgNode:
    """Return the section that the network is built from: `_2D` values override in 2D, every kernel is written out."""
    model = section.clone()
    if dims == 2:
        model.update({name.removesuffix("_2D"): model[name] for name in section if name.endswith("_2D")})
    levels = len(model.DOWNSAMPLE_FACTORS)
    model.KERNEL_SIZE_DOWN = model.KERNEL_SIZE_DOWN or default_kernels(levels + 1, dims)
    model.KERNEL_SIZE_UP = model.KERNEL_SIZE_UP or default_kernels(levels, dims)
    return model


def _derive_inputs(model: CfgNode, model_type: ModelType) -> None:
    """Compute RAW_SHAPE and CONTEXT: what one network needs, or two in a row."""
    network = [model[name] for name in NETWORK]
    model.RAW_SHAPE, model.CONTEXT = model.INPUT_SHAPE, tile_context(*network)
    if model_type.first and model.PAD_CONV == "same":
        model.CONTEXT = tuple(2 * voxels for voxels in model.CONTEXT)
    elif model_type.first:
        model.RAW_SHAPE = input_shape_for(model.INPUT_SHAPE, *network)
        sizes = zip(model.RAW_SHAPE, model.OUTPUT_SHAPE, strict=True)
        model.CONTEXT = tuple((raw - output) // 2 for raw, output in sizes)


def _check_model(model: CfgNode, section: str, dims: int, origins: Mapping[str, str]) -> None:
    """Refuse contradictions in the section of the network in use."""
    lsds = 6 if dims == 2 else 10
    if model.LSDS != lsds:
        raise _bad_value(f"{section}.LSDS", model.LSDS, origins, f"in {dims}D there are {lsds}")
    weights = _weights(model)
    if weights > MOST_WEIGHTS:
        reason = f"the network would have {weights:.0e} weights, more than {MOST_WEIGHTS:.0e}; lower it, "
        raise _bad_value(f"{section}.NUM_FMAPS", model.NUM_FMAPS, origins, f"{reason}FMAP_INC_FACTOR or KERNEL_SIZE")
    for name in ("INTENSITYAUG_SCALE", "INTENSITYAUG_SHIFT"):
        low, high = model[f"{name}_MIN"], model[f"{name}_MAX"]
        if low > high:
            raise _bad_value(f"{section}.{name}_MIN", low, origins, f"it must not be above {name}_MAX, which is {high}")


def _weights(model: CfgNode) -> int:
    """Return about how many weights a network has: those of the convolutions on the way down."""
    widths = [1, *(model.NUM_FMAPS * model.FMAP_INC_FACTOR**level for level in range(len(model.KERNEL_SIZE_DOWN)))]
    return sum(
        math.prod(kernel) * width * (width if number else before)
        for before, width, kernels in zip(widths, widths[1:], model.KERNEL_SIZE_DOWN, strict=False)
        for number, kernel in enumerate(kernels)
    )


def _bad_value(key: str, value: Any, origins: Mapping[str, str], reason: str) -> UserError:
    return UserError(f"{key} is {value} ({origins.get(key, 'derived')}): {reason}")
