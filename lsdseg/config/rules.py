"""What each key may hold. Type errors, range errors and unknown keys all follow from one table, RULES.

Values come from Python files, YAML and the command line, so types are lenient where the meaning is clear: a whole float
passes for an int and an int for a float, 0 and 1 for False and True, a list for a tuple and a tuple for a list, a numpy
scalar for a Python number, and a string that spells such a value ("(8, 8, 8)", "1e5", "None") for the value. What comes
out has the same type whatever went in.
"""

import ast
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from lsdseg.config.implementations import MERGE_FUNCTIONS, METHODS, SCHEDULERS
from lsdseg.config.model_types import LABELS, MODEL_TYPES, TASKS


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        allowed: what the key may hold, in words that follow "must be".
        parse: takes a value and returns it in its canonical type, or raises ValueError if it is not allowed.
    """

    allowed: str
    parse: Callable[[Any], Any]


# Longer texts and lists are mistakes, and take long to check and to print.
MOST_CHARACTERS = 4000
MOST_IN_PATH = 1000
MOST_ITEMS = 1000
# Larger numbers are mistakes, and take for ever.
LARGEST = 10**9


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def number(low: float = -LARGEST, high: float = LARGEST, *, above: bool = False, below: bool = False) -> Rule:
    """Return a rule for a float from `low` to `high`; `above` excludes `low`, `below` excludes `high`."""

    def parse(value: Any) -> float:
        value = _scalar(value)
        _require(isinstance(value, int | float) and not isinstance(value, bool))
        _require((low < value if above else low <= value) and (value < high if below else value <= high))
        return float(value)

    lower, upper = f" above {low}" if above else f" from {low}", f" to below {high}" if below else f" to {high}"
    return Rule(f"a number{lower}{upper}", parse)


def integer(low: int = -LARGEST, high: int = LARGEST) -> Rule:
    """Return a rule for an int from `low` to `high`."""

    def parse(value: Any) -> int:
        value = _scalar(value)
        _require(isinstance(value, int | float) and not isinstance(value, bool))
        _require(low <= value <= high and value == int(value))
        return int(value)

    return Rule(f"a whole number from {low} to {high}", parse)


def choice(*options: Any) -> Rule:
    """Return a rule for one of the options."""

    def parse(value: Any) -> Any:
        value = _scalar(value)
        _require(isinstance(value, str | int | float))
        # YAML reads a bare no as False. Only MIXED_PRECISION has "no" among its options.
        value = "no" if value is False and "no" in options else value
        _require(value in options)
        return options[options.index(value)]

    return Rule("one of " + ", ".join(map(str, options)), parse)


def pattern(expression: str, allowed: str) -> Rule:
    """Return a rule for a string that matches the whole regular expression. Control characters are never allowed."""

    def parse(value: Any) -> str:
        _require(isinstance(value, str) and len(value) <= MOST_CHARACTERS and value.isprintable())
        _require(re.fullmatch(expression, value) is not None)
        return str(value)

    return Rule(allowed, parse)


def on_disk(string: Rule) -> Rule:
    """Return a rule for a path or a part of one: what `string` takes, if file systems take it too."""

    def parse(value: Any) -> str:
        given: str = string.parse(value)
        _require(len(given) <= MOST_IN_PATH and all(len(os.fsencode(part)) <= 255 for part in given.split("/")))
        return given

    return Rule(f"{string.allowed}, at most {MOST_IN_PATH}, and 255 between two /", parse)


def path(string: Rule) -> Rule:
    """Return a rule for a path: what `string` takes, made absolute, with ~ expanded. An empty string stays empty."""

    def parse(value: Any) -> str:
        given: str = os.path.expanduser(on_disk(string).parse(value))
        _require(not given.startswith("~"))
        return given if not given or os.path.isabs(given) else os.path.abspath(given)

    return Rule(f"{on_disk(string).allowed}; ~NAME only if there is a user NAME", parse)


def sequence(item: Rule, *lengths: int, most: int = MOST_ITEMS, kind: Callable[[Iterable[Any]], Any] = list) -> Rule:
    """Return a rule for a list, tuple or array of items, of one of the lengths; without lengths, 1 to `most`."""

    def parse(value: Any) -> Any:
        _require(isinstance(value, list | tuple) or bool(getattr(value, "shape", ())))
        _require(len(value) in lengths if lengths else 0 < len(value) <= most)
        return kind(item.parse(v) for v in value)

    size = " or ".join(map(str, lengths)) + " values" if lengths else f"a list of 1 to {most} values"
    return Rule(f"{size}, each {item.allowed}", parse)


def either(first: Rule, second: Rule, allowed: str) -> Rule:
    """Return a rule for what the first rule takes, or else what the second takes."""

    def parse(value: Any) -> Any:
        try:
            return first.parse(value)
        except ValueError:
            return second.parse(value)

    return Rule(allowed, parse)


def optional(rule: Rule) -> Rule:
    """Return a rule for None or what `rule` takes."""

    def parse(value: Any) -> Any:
        return None if value is None or value == "None" else rule.parse(value)

    return Rule(f"{rule.allowed}, or None", parse)


def per_pass(rule: Rule) -> Rule:
    """Return a rule for one value, or a list of two for the two passes of elastic augmentation."""
    return either(rule, sequence(rule, 2), f"{rule.allowed}; or a list of two such values, one for each pass")


flag = Rule("True or False", choice(True, False).parse)
text = pattern(".*", "a string of printable characters")
words = pattern(".+", "a string of 1 or more printable characters")
nonempty = on_disk(words)
share = number(0, 1)
positive = number(0, above=True)
threshold = number(0, 1, above=True)
decay = number(0, 1, below=True)
workers = 10_000
voxels = 100_000
offsets = sequence(sequence(integer(-voxels, voxels), 2, 3))
levels = 11
kernels = optional(sequence(sequence(sequence(integer(1, 100), 2, 3, kind=tuple), most=levels), most=levels))


def _model_rules(dims: int) -> dict[str, Rule]:
    """Return the rules of the keys of MODEL_ISO and MODEL_ANISO for data with `dims` axes."""
    shape = sequence(integer(1, voxels), dims, kind=tuple)
    return {
        "NUM_FMAPS": integer(1),
        "NUM_FMAPS_OUT": integer(1),
        "FMAP_INC_FACTOR": integer(1),
        # The numbers of axes and levels are checked with the shapes, and only for the network in use.
        "DOWNSAMPLE_FACTORS": sequence(sequence(integer(1, 100), 2, 3), most=levels),
        "KERNEL_SIZE_DOWN": kernels,
        "KERNEL_SIZE_UP": kernels,
        "PAD_CONV": choice("valid", "same"),
        "ACTIVATION": choice("relu", "leaky_relu"),
        "INPUT_SHAPE": shape,
        "OUTPUT_SHAPE": optional(shape),
        "GROW_INPUT": optional(sequence(integer(0, voxels), dims, kind=tuple)),
        "VOXEL_SIZE": shape,
        "LSD_SIGMA": positive,
        "LSD_DOWNSAMPLE": integer(1, voxels),
        "GROWBOUNDARY_STEPS": integer(0, 1000),
        "PROB_ELASTIC": per_pass(share),
        "CONTROL_POINT_SPACING": per_pass(shape),
        "JITTER_SIGMA": per_pass(sequence(number(0, 1000), dims, kind=tuple)),
        "ROTATION_INTERVAL": sequence(number(), 2),
        "PROB_SLIP": per_pass(share),
        "PROB_SHIFT": per_pass(share),
        "MAX_MISALIGN": per_pass(integer(0, 1000)),
        "SUBSAMPLE": integer(1, 1000),
        "TRANSPOSE": sequence(choice(*range(dims)), *range(dims + 1)),
        "INTENSITYAUG_SCALE_MIN": number(),
        "INTENSITYAUG_SCALE_MAX": number(),
        "INTENSITYAUG_SHIFT_MIN": number(),
        "INTENSITYAUG_SHIFT_MAX": number(),
        **{f"PROB_{name}": share for name in ("FADE", "CUTOUT", "BLUR", "GAMMA", "NOISE", "SECTION")},
        **{f"AMOUNT_{name}": sequence(share, 2, kind=tuple) for name in ("FADE", "CUTOUT", "NOISE", "SECTION")},
        "AMOUNT_BLUR": sequence(number(0), 2, kind=tuple),
        "AMOUNT_GAMMA": sequence(positive, 2, kind=tuple),
        "INTENSITYSCALESHIFT_SCALE": sequence(number(), 2),
        "INTENSITYSCALESHIFT_SHIFT": sequence(number(), 2),
        "DEFECT_AUGMENT": optional(path(text)),
        "LOG_DIR": optional(path(text)),
        "CKPT_FOLDER": optional(path(text)),
        "OUTPUT_DIR": optional(path(text)),
        # Without effect.
        "IN_CHANNELS": Rule("1, because raw has one channel", choice(1).parse),
        "LSDS": optional(integer(1)),
    }


RULES: dict[str, Rule] = {
    "SYSTEM.NUM_GPUS": integer(0),
    "SYSTEM.NUM_WORKERS": integer(0, workers),
    "SYSTEM.CACHE_SIZE": integer(1, workers),
    "SYSTEM.VERBOSE": flag,
    "DATA.HOME": path(words),
    "DATA.DATA_DIR_PATH": nonempty,
    "DATA.BRAIN_VOL": nonempty,
    "DATA.TRAIN_TEST_SPLIT": threshold,
    "DATA.FIB": choice(0, 1),
    "DATA.DIM_2D": flag,
    "DATA.RAW": nonempty,
    **{f"DATA.{key}{suffix}": nonempty for key in LABELS for suffix in ("", "_MASK")},
    "DATA.OUTFILE": optional(path(text)),
    "DATA.AFFS_DTYPE": choice("uint8", "float32"),
    "DATA.INVERT_PRED_AFFS": flag,
    "DATA.DB_HOST": text,
    "DATA.DB_NAME": pattern(
        r'(?:(?![/\\. "$*<>:|?])[!-~]){0,63}',
        'a name that MongoDB takes: at most 63 characters, without spaces and / \\ . " $ * < > : | ?',
    ),
    "DATA.DROP_DS_MONGOTABLE": flag,
    "PREPROCESS.EXPORT_2D_FROM_3D": optional(flag),
    "PREPROCESS.SOURCE_DATA_OFFSET": optional(sequence(integer(), 2, 3, kind=tuple)),
    "PREPROCESS.SOURCE_DATA_RESOLUTION": optional(sequence(integer(1), 2, 3, kind=tuple)),
    "PREPROCESS.HISTOGRAM_MATCH": optional(sequence(nonempty, 2)),
    "PREPROCESS.USE_WANDB": flag,
    "PREPROCESS.DATASETS_TO_COPY": optional(sequence(nonempty)),
    "TRAIN.MODEL_TYPE": choice(*MODEL_TYPES),
    "TRAIN.EPOCHS": integer(1),
    "TRAIN.SAVE_EVERY": integer(1),
    "TRAIN.KEEP_CHECKPOINTS": integer(0),
    "TRAIN.LOG_EVERY": integer(1),
    "TRAIN.DEVICE": pattern(
        r"auto|cpu|cuda(:[0-9]{1,2})?|multi_gpu", "one of auto, cpu, cuda, multi_gpu, or one GPU such as cuda:0"
    ),
    "TRAIN.BATCH_SIZE": integer(1, 10_000),
    "TRAIN.INITIAL_LR": positive,
    "TRAIN.LR_BETAS": sequence(decay, 2, kind=tuple),
    "TRAIN.LR_FAN_IN": integer(0),
    "TRAIN.LR_SCHEDULE": choice("constant", "cosine"),
    "TRAIN.WARMUP": integer(0),
    "TRAIN.AFF_LOSS": choice("mse", "bce"),
    "TRAIN.PLACEMENT": flag,
    **{f"TRAIN.{task.loss_weight}": number(0) for task in TASKS.values()},
    "TRAIN.ACCUMULATE": integer(1, 10_000),
    "TRAIN.EMA": decay,
    "TRAIN.VALIDATE_EVERY": integer(0),
    "TRAIN.VALIDATION_VOLUME": optional(path(text)),
    "TRAIN.VALIDATION_SHAPE": sequence(integer(1, voxels), 3, kind=tuple),
    "TRAIN.MIXED_PRECISION": choice("no", "bf16", "fp16", "auto"),
    "TRAIN.COMPILE": flag,
    "TRAIN.THREADS": integer(0, workers),
    "TRAIN.SEED": integer(0, 2**32 - 1),
    "TRAIN.AUGMENT": flag,
    "TRAIN.NEIGHBORHOOD": either(offsets, choice("LR_NEIGHBORHOOD"), f"{offsets.allowed}; or LR_NEIGHBORHOOD"),
    "TRAIN.NEIGHBORHOOD_2D": either(offsets, choice("LR_NEIGHBORHOOD"), f"{offsets.allowed}; or LR_NEIGHBORHOOD"),
    "TRAIN.LR_NEIGHBORHOOD": offsets,
    "TRAIN.LSD_EPOCHS": optional(integer(1)),
    "TRAIN.CHECKPOINT": optional(path(text)),
    "TRAIN.CHECKPOINT_AC": optional(path(text)),
    **{
        f"{section}.{name}{suffix}": optional(rule) if name + suffix == "VOXEL_SIZE_2D" else rule
        for section in ("MODEL_ISO", "MODEL_ANISO")
        for suffix, dims in (("", 3), ("_2D", 2))
        for name, rule in _model_rules(dims).items()
    },
    "INS_SEGMENT.METHOD": choice(*METHODS),
    "INS_SEGMENT.MUTEX_BIAS": optional(sequence(number(-1, 1))),
    "INS_SEGMENT.LINK_SECTIONS": optional(share),
    "INS_SEGMENT.THRESHOLDS": either(
        sequence(threshold), Rule("", lambda value: [threshold.parse(value)]), sequence(threshold).allowed
    ),
    "INS_SEGMENT.MERGE_FUNCTION": optional(choice(*MERGE_FUNCTIONS)),
    "INS_SEGMENT.FRAGMENTS_IN_XY": flag,
    "INS_SEGMENT.BACKGROUND_MASK": flag,
    "INS_SEGMENT.PLACEMENT": flag,
    "INS_SEGMENT.EPSILON_AGGLOMERATE": share,
    "INS_SEGMENT.MASK_FILE": optional(path(text)),
    "INS_SEGMENT.MASK_DATASET": optional(on_disk(text)),
    "INS_SEGMENT.FILTER_FRAGMENTS": share,
    "INS_SEGMENT.BLOCK_SIZE": sequence(integer(1, voxels), 3, kind=tuple),
    "INS_SEGMENT.CONTEXT": sequence(integer(0, voxels), 3, kind=tuple),
    "CLUSTER.TYPE": choice(*SCHEDULERS),
    "CLUSTER.PARTITION": text,
    "CLUSTER.ACCOUNT": text,
    "CLUSTER.TIME": text,
    "CLUSTER.MEMORY": text,
    "CLUSTER.GPUS_PER_WORKER": integer(0),
    "CLUSTER.CPUS_PER_WORKER": integer(1),
    "CLUSTER.EXTRA": either(sequence(text), sequence(text, 0), "a list of strings"),
    "CLUSTER.HOST": text,
    # Without effect.
    "DATA.WITH_MITO": choice(0, 1, 2),
}


def canonical(key: str, value: Any) -> Any:
    """Return the value of a known key in its canonical type.

    Raises:
        ValueError: the value is not allowed; the text says what is.
    """
    rule = RULES[key]
    for candidate in (value, _parse_literal(value)):
        try:
            return rule.parse(candidate)
        except (ValueError, OverflowError):
            continue
    raise ValueError(rule.allowed)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ValueError: it is no YAML, or contains a value that YAML describes but that does not exist, such as February 30.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _parse_literal(value: Any) -> Any:
    """Return what a string spells as a Python literal, or else in YAML. Anything else is returned unchanged."""
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        pass
    try:
        return parse_yaml(value)
    except ValueError:
        return value


def _scalar(value: Any) -> Any:
    """Turn a numpy number into Python's. `tolist` identifies it, so numpy need not be imported."""
    return value.tolist() if getattr(value, "shape", None) == () and hasattr(value, "tolist") else value
