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
from dataclasses import dataclass, replace
from typing import Any

import yaml
from yacs.config import CfgNode

from lsdseg.config.implementations import MERGE_FUNCTIONS, METHODS, SCHEDULERS
from lsdseg.config.model_types import LABELS, MODEL_TYPES, TASKS

# What a key can affect: the shape of the network, its training, and the steps from raw to a segmentation.
NETWORK, TRAINING, PREDICTION = "network", "training", "prediction"
FRAGMENTS, EDGES, SEGMENTATION = "fragments", "edges", "segmentation"


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        allowed: what the key may hold, in words that follow "must be".
        parse: takes a value and returns it in its canonical type, or raises ValueError if it is not allowed.
        affects: the results that depend on the key: NETWORK, TRAINING, PREDICTION, FRAGMENTS, EDGES,
            SEGMENTATION. Every entry of RULES says it, by `on`.
    """

    allowed: str
    parse: Callable[[Any], Any]
    affects: tuple[str, ...] | None = None

    def on(self, *results: str) -> "Rule":
        """Return the same rule for a key that affects these results, and no others."""
        return replace(self, affects=results)


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


def nanometers(low: float = -LARGEST, high: float = LARGEST) -> Rule:
    """Return a rule for a number from `low` to `high`, an int if it is whole, as lengths in nm mostly are."""
    rule = number(low, high)

    def parse(value: Any) -> float:
        parsed: float = rule.parse(value)
        return int(parsed) if parsed.is_integer() else parsed

    return Rule(rule.allowed, parse)


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


def interval() -> Rule:
    """Return a rule for two numbers, of which the second is larger."""

    def parse(value: Any) -> tuple[float, float]:
        low, high = sequence(number(), 2).parse(value)
        _require(low < high)
        return low, high

    return Rule("two numbers, the second larger than the first", parse)


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
        return None if value is None or (isinstance(value, str) and value == "None") else rule.parse(value)

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
length = nanometers(0.001, 1e9)
offsets = sequence(sequence(integer(-voxels, voxels), 2, 3))
levels = 11
kernels = optional(sequence(sequence(sequence(integer(1, 100), 2, 3, kind=tuple), most=levels), most=levels))


def _model_rules(dims: int) -> dict[str, Rule]:
    """Return the rules of the keys of MODEL_ISO and MODEL_ANISO for data with `dims` axes."""
    shape = sequence(integer(1, voxels), dims, kind=tuple)
    return {
        "NUM_FMAPS": integer(1).on(NETWORK),
        "NUM_FMAPS_OUT": integer(1).on(NETWORK),
        "FMAP_INC_FACTOR": integer(1).on(NETWORK),
        # The numbers of axes and levels are checked with the shapes, and only for the network in use.
        "DOWNSAMPLE_FACTORS": sequence(sequence(integer(1, 100), 2, 3), most=levels).on(NETWORK),
        "KERNEL_SIZE_DOWN": kernels.on(NETWORK),
        "KERNEL_SIZE_UP": kernels.on(NETWORK),
        "PAD_CONV": choice("valid", "same").on(NETWORK),
        "ACTIVATION": choice("relu", "leaky_relu").on(NETWORK),
        "INPUT_SHAPE": shape.on(TRAINING),
        "OUTPUT_SHAPE": optional(shape).on(TRAINING),
        "GROW_INPUT": optional(sequence(integer(0, voxels), dims, kind=tuple)).on(),
        "VOXEL_SIZE": sequence(length, dims, kind=tuple).on(TRAINING),
        "LSD_SIGMA": positive.on(TRAINING),
        "LSD_DOWNSAMPLE": integer(1, voxels).on(TRAINING),
        "GROWBOUNDARY_STEPS": integer(0, 1000).on(TRAINING),
        "PROB_ELASTIC": per_pass(share).on(TRAINING),
        "CONTROL_POINT_SPACING": per_pass(shape).on(TRAINING),
        "JITTER_SIGMA": per_pass(sequence(number(0, 1000), dims, kind=tuple)).on(TRAINING),
        "ROTATION_INTERVAL": sequence(number(), 2).on(TRAINING),
        "PROB_SLIP": per_pass(share).on(TRAINING),
        "PROB_SHIFT": per_pass(share).on(TRAINING),
        "MAX_MISALIGN": per_pass(integer(0, 1000)).on(TRAINING),
        "SUBSAMPLE": integer(1, 1000).on(TRAINING),
        "TRANSPOSE": sequence(choice(*range(dims)), *range(dims + 1)).on(TRAINING),
        "INTENSITYAUG_SCALE_MIN": number().on(TRAINING),
        "INTENSITYAUG_SCALE_MAX": number().on(TRAINING),
        "INTENSITYAUG_SHIFT_MIN": number().on(TRAINING),
        "INTENSITYAUG_SHIFT_MAX": number().on(TRAINING),
        **{f"PROB_{name}": share.on(TRAINING) for name in ("FADE", "CUTOUT", "BLUR", "GAMMA", "NOISE", "SECTION")},
        **{
            f"AMOUNT_{name}": sequence(share, 2, kind=tuple).on(TRAINING)
            for name in ("FADE", "CUTOUT", "NOISE", "SECTION")
        },
        "AMOUNT_BLUR": sequence(number(0), 2, kind=tuple).on(TRAINING),
        "AMOUNT_GAMMA": sequence(positive, 2, kind=tuple).on(TRAINING),
        "INTENSITYSCALESHIFT_SCALE": sequence(number(), 2).on(TRAINING, PREDICTION),
        "INTENSITYSCALESHIFT_SHIFT": sequence(number(), 2).on(TRAINING, PREDICTION),
        "DEFECT_AUGMENT": optional(path(text)).on(TRAINING),
        "LOG_DIR": optional(path(text)).on(),
        "CKPT_FOLDER": optional(path(text)).on(),
        "OUTPUT_DIR": optional(path(text)).on(),
        # Without effect.
        "IN_CHANNELS": Rule("1, because raw has one channel", choice(1).parse).on(NETWORK),
        "LSDS": optional(integer(1)).on(),
    }


# Each rule says by `on` what results the key affects: a step compares these settings before it goes on with a result.
# What only says where files are, how fast a step is, or which of several results to make, affects none. Nor does what
# names an input or switches it off: inputs are compared by what is in them.
RULES: dict[str, Rule] = {
    "SYSTEM.NUM_GPUS": integer(0).on(),
    "SYSTEM.NUM_WORKERS": integer(0, workers).on(),
    "SYSTEM.CACHE_SIZE": integer(1, workers).on(),
    "SYSTEM.VERBOSE": flag.on(),
    "DATA.HOME": path(words).on(),
    "DATA.DATA_DIR_PATH": nonempty.on(),
    "DATA.BRAIN_VOL": nonempty.on(),
    "DATA.TRAIN_TEST_SPLIT": threshold.on(TRAINING),
    "DATA.FIB": choice(0, 1).on(TRAINING),
    "DATA.DIM_2D": flag.on(TRAINING, PREDICTION),
    "DATA.RAW": nonempty.on(),
    "DATA.RAW_WINDOW": optional(interval()).on(TRAINING, PREDICTION),
    **{f"DATA.{key}{suffix}": nonempty.on() for key in LABELS for suffix in ("", "_MASK")},
    "DATA.OUTFILE": optional(path(text)).on(),
    "DATA.AFFS_DTYPE": choice("uint8", "float32").on(PREDICTION),
    "DATA.INVERT_PRED_AFFS": flag.on(PREDICTION),
    "DATA.VIEWS": choice(1, 4, 8, 16).on(PREDICTION),
    "DATA.COMBINE_VIEWS": choice("mean", "median", "min").on(PREDICTION),
    "DATA.DISAGREEMENT": flag.on(PREDICTION),
    "DATA.DB_HOST": text.on(),
    "DATA.DB_NAME": pattern(
        r'(?:(?![/\\. "$*<>:|?])[!-~]){0,63}',
        'a name that MongoDB takes: at most 63 characters, without spaces and / \\ . " $ * < > : | ?',
    ).on(),
    "DATA.DROP_DS_MONGOTABLE": flag.on(),
    "PREPROCESS.EXPORT_2D_FROM_3D": optional(flag).on(),
    "PREPROCESS.SOURCE_DATA_OFFSET": optional(sequence(nanometers(), 2, 3, kind=tuple)).on(),
    "PREPROCESS.SOURCE_DATA_RESOLUTION": optional(sequence(length, 2, 3, kind=tuple)).on(),
    "PREPROCESS.HISTOGRAM_MATCH": optional(sequence(nonempty, 2)).on(),
    "PREPROCESS.USE_WANDB": flag.on(),
    "PREPROCESS.DATASETS_TO_COPY": optional(sequence(nonempty)).on(),
    "TRAIN.MODEL_TYPE": choice(*MODEL_TYPES).on(NETWORK, PREDICTION),
    "TRAIN.EPOCHS": integer(1).on(TRAINING),
    "TRAIN.SAVE_EVERY": integer(1).on(),
    "TRAIN.KEEP_CHECKPOINTS": integer(0).on(),
    "TRAIN.LOG_EVERY": integer(1).on(),
    "TRAIN.DEVICE": pattern(
        r"auto|cpu|cuda(:[0-9]{1,2})?|multi_gpu", "one of auto, cpu, cuda, multi_gpu, or one GPU such as cuda:0"
    ).on(),
    "TRAIN.BATCH_SIZE": integer(1, 10_000).on(TRAINING),
    "TRAIN.INITIAL_LR": positive.on(TRAINING),
    "TRAIN.LR_BETAS": sequence(decay, 2, kind=tuple).on(TRAINING),
    "TRAIN.LR_FAN_IN": integer(0).on(TRAINING),
    "TRAIN.LR_SCHEDULE": choice("constant", "cosine").on(TRAINING),
    "TRAIN.WARMUP": integer(0).on(TRAINING),
    "TRAIN.AFF_LOSS": choice("mse", "bce").on(TRAINING),
    "TRAIN.PLACEMENT": flag.on(NETWORK, PREDICTION),
    **{f"TRAIN.{task.loss_weight}": number(0).on(TRAINING) for task in TASKS.values()},
    "TRAIN.ACCUMULATE": integer(1, 10_000).on(TRAINING),
    "TRAIN.EMA": decay.on(TRAINING),
    "TRAIN.VALIDATE_EVERY": integer(0).on(),
    "TRAIN.VALIDATION_VOLUME": optional(path(text)).on(),
    "TRAIN.VALIDATION_SHAPE": sequence(integer(1, voxels), 3, kind=tuple).on(),
    "TRAIN.MIXED_PRECISION": choice("no", "bf16", "fp16", "auto").on(TRAINING),
    "TRAIN.COMPILE": flag.on(),
    "TRAIN.THREADS": integer(0, workers).on(),
    "TRAIN.SEED": integer(0, 2**32 - 1).on(TRAINING),
    "TRAIN.AUGMENT": flag.on(TRAINING),
    "TRAIN.NEIGHBORHOOD": either(offsets, choice("LR_NEIGHBORHOOD"), f"{offsets.allowed}; or LR_NEIGHBORHOOD").on(
        NETWORK, PREDICTION
    ),
    "TRAIN.NEIGHBORHOOD_2D": either(offsets, choice("LR_NEIGHBORHOOD"), f"{offsets.allowed}; or LR_NEIGHBORHOOD").on(),
    "TRAIN.LR_NEIGHBORHOOD": offsets.on(TRAINING),
    "TRAIN.LSD_EPOCHS": optional(integer(1)).on(TRAINING),
    "TRAIN.INITIAL_WEIGHTS": optional(path(text)).on(TRAINING),
    "TRAIN.CHECKPOINT": optional(path(text)).on(),
    "TRAIN.CHECKPOINT_AC": optional(path(text)).on(),
    **{
        f"{section}.{name}{suffix}": optional(rule).on(TRAINING) if name + suffix == "VOXEL_SIZE_2D" else rule
        for section in ("MODEL_ISO", "MODEL_ANISO")
        for suffix, dims in (("", 3), ("_2D", 2))
        for name, rule in _model_rules(dims).items()
    },
    "INS_SEGMENT.METHOD": choice(*METHODS).on(FRAGMENTS, SEGMENTATION),
    "INS_SEGMENT.MUTEX_BIAS": optional(sequence(number(-1, 1))).on(FRAGMENTS, SEGMENTATION),
    "INS_SEGMENT.LINK_SECTIONS": optional(share).on(SEGMENTATION),
    "INS_SEGMENT.THRESHOLDS": either(
        sequence(threshold), Rule("", lambda value: [threshold.parse(value)]), sequence(threshold).allowed
    ).on(),
    "INS_SEGMENT.MERGE_FUNCTION": optional(choice(*MERGE_FUNCTIONS)).on(),
    "INS_SEGMENT.LARGE_SEGMENT": integer(0).on(EDGES, SEGMENTATION),
    "INS_SEGMENT.LARGE_MERGE_THRESHOLD": share.on(EDGES, SEGMENTATION),
    "INS_SEGMENT.FRAGMENTS_IN_XY": flag.on(FRAGMENTS, SEGMENTATION),
    "INS_SEGMENT.BACKGROUND_MASK": flag.on(FRAGMENTS, SEGMENTATION),
    "INS_SEGMENT.PLACEMENT": flag.on(),
    "INS_SEGMENT.EPSILON_AGGLOMERATE": share.on(FRAGMENTS, SEGMENTATION),
    "INS_SEGMENT.MASK_FILE": optional(path(text)).on(),
    "INS_SEGMENT.MASK_DATASET": optional(on_disk(text)).on(),
    "INS_SEGMENT.FILTER_FRAGMENTS": share.on(FRAGMENTS, SEGMENTATION),
    "INS_SEGMENT.BLOCK_SIZE": optional(sequence(integer(1, voxels), 3, kind=tuple)).on(FRAGMENTS),
    "INS_SEGMENT.CONTEXT": sequence(integer(0, voxels), 3, kind=tuple).on(FRAGMENTS),
    "INS_SEGMENT.CONTACTS_IN_MEMORY": integer(1).on(),
    "INS_SEGMENT.FRAGMENTS_IN_MEMORY": integer(1).on(),
    "CLUSTER.TYPE": choice(*SCHEDULERS).on(),
    "CLUSTER.PARTITION": text.on(),
    "CLUSTER.ACCOUNT": text.on(),
    "CLUSTER.TIME": text.on(),
    "CLUSTER.MEMORY": text.on(),
    "CLUSTER.GPUS_PER_WORKER": integer(0).on(),
    "CLUSTER.CPUS_PER_WORKER": integer(1).on(),
    "CLUSTER.SAME_ERRORS": integer(1).on(),
    "CLUSTER.SKIP_FAILED": flag.on(),
    "CLUSTER.EXTRA": either(sequence(text), sequence(text, 0), "a list of strings").on(),
    "CLUSTER.HOST": text.on(),
    # Without effect.
    "DATA.WITH_MITO": choice(0, 1, 2).on(),
}


def settings_of(cfg: CfgNode, result: str) -> dict[str, Any]:
    """Collect the values of all keys that affect a result.

    Args:
        cfg: a loaded config.
        result: NETWORK, TRAINING, PREDICTION, FRAGMENTS, EDGES or SEGMENTATION.

    Returns:
        Key -> number, bool, text or nested lists of numbers. Of the networks, only the one in use counts, with the
        values that `MODEL` holds.
    """
    section = "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO"
    settings = {}
    for key, rule in RULES.items():
        head, _, name = key.partition(".")
        in_network = head.startswith("MODEL_")
        if result in (rule.affects or ()) and not (in_network and (head != section or name.endswith("_2D"))):
            settings[key] = _to_lists(cfg.MODEL[name] if in_network else cfg[head][name])
    return settings


def _to_lists(value: Any) -> Any:
    return [_to_lists(v) for v in value] if isinstance(value, list | tuple) else value


def canonical(key: str, value: Any) -> Any:
    """Return the value of a known key in its canonical type.

    Raises:
        ValueError: the value is not allowed; the text says what is.
    """
    return read_value(RULES[key], value)


def read_value(rule: Rule, value: Any) -> Any:
    """Return what a rule takes, in its canonical type.

    Raises:
        ValueError: the value is not allowed; the text says what is.
    """
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
