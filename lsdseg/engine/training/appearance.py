"""Augmentation by what goes wrong in real volumes: contrast, blur, noise, faded membranes, holes and bad sections.

Each function changes the raw data of one patch, (z, y, x) float32 in 0..1, and returns it in the same type; it may
leave that range. `CHANGES` lists them in the order in which they happen on the way to a file: what the specimen does
comes before what the microscope does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gunpowder as gp
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from yacs.config import CfgNode

Raw = NDArray[np.float32]
Amount = tuple[float, float]

# Standard deviation in voxels of the local mean towards which contrast fades: wider than a membrane.
LOCAL_MEAN = 3.0
# A faded or cut-out box covers this share of the patch along each axis.
BOX = (0.1, 0.5)


def fade(raw: Raw, random: np.random.Generator, amount: Amount) -> Raw:
    """Lower the contrast in a box with soft edges to a share `amount` of what it was: membranes nearly vanish."""
    weight = np.ones((1, 1, 1), np.float32)
    for axis, (begin, end) in enumerate(_box(raw.shape, random)):
        inside = np.zeros(raw.shape[axis], np.float32)
        inside[begin:end] = 1
        weight = weight * np.expand_dims(gaussian_filter1d(inside, 2.0), tuple({0, 1, 2} - {axis}))
    lost = weight * np.float32(1 - random.uniform(*amount))
    return raw + lost * (_blurred(raw, LOCAL_MEAN) - raw)


def cut_out(raw: Raw, random: np.random.Generator, amount: Amount) -> Raw:
    """Replace a box by one gray value between `amount`."""
    box = tuple(slice(*ends) for ends in _box(raw.shape, random))
    raw[box] = random.uniform(*amount)
    return raw


def gamma(raw: Raw, random: np.random.Generator, amount: Amount) -> Raw:
    """Raise gray values to a power between `amount`."""
    low, high = np.log(amount)
    return raw.clip(0, 1) ** np.float32(np.exp(random.uniform(low, high)))


def blur(raw: Raw, random: np.random.Generator, amount: Amount) -> Raw:
    """Blur with a Gaussian whose standard deviation in voxels is between `amount`."""
    return _blurred(raw, random.uniform(*amount))


def add_noise(raw: Raw, random: np.random.Generator, amount: Amount) -> Raw:
    """Add Gaussian noise with a standard deviation between `amount`."""
    return raw + random.standard_normal(raw.shape, np.float32) * np.float32(random.uniform(*amount))


def spoil_section(raw: Raw, random: np.random.Generator, amount: Amount) -> Raw:
    """Give one section a share `amount` of its contrast, 0 if the section is missing, and another brightness."""
    section = raw[random.integers(len(raw))]
    section[:] = random.uniform(0, 1) + (section - section.mean()) * random.uniform(*amount)
    return raw


def _box(shape: tuple[int, ...], random: np.random.Generator) -> list[tuple[int, int]]:
    """Return begin and end of a random box along each axis; along an axis of one voxel, all of it."""
    box = []
    for size in shape:
        width = min(size, max(1, round(size * random.uniform(*BOX))))
        begin = int(random.integers(size - width + 1))
        box.append((begin, begin + width))
    return box


def _blurred(raw: Raw, sigma: float) -> Raw:
    # Sections of 2D networks are blurred in the plane.
    blurred: Raw = gaussian_filter(raw, [sigma if size > 1 else 0 for size in raw.shape], truncate=3)
    return blurred


class Change(NamedTuple):
    """One way to change a patch. MODEL.PROB_NAME says how often, MODEL.AMOUNT_NAME how much."""

    name: str
    function: Callable[[Raw, np.random.Generator, Amount], Raw]


CHANGES = (
    Change("FADE", fade),
    Change("CUTOUT", cut_out),
    Change("BLUR", blur),
    Change("GAMMA", gamma),
    Change("NOISE", add_noise),
    Change("SECTION", spoil_section),
)


class AppearanceAugment(gp.BatchFilter):
    """Apply each of `CHANGES` with its own probability. Gray values stay in 0..1.

    Args:
        raw: key of the raw data, float32 in 0..1, (z, y, x).
        model: the section MODEL, with the probabilities and amounts.
    """

    def __init__(self, raw: gp.ArrayKey, model: CfgNode) -> None:
        self.raw = raw
        self.changes = [
            (change.function, model[f"PROB_{change.name}"], model[f"AMOUNT_{change.name}"]) for change in CHANGES
        ]

    @property
    def is_on(self) -> bool:
        """Whether any change can happen."""
        return any(probability for _, probability, _ in self.changes)

    def setup(self) -> None:
        self.enable_autoskip()
        self.updates(self.raw, self.spec[self.raw])

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        deps = gp.BatchRequest()
        deps[self.raw] = request[self.raw].copy()
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> None:
        array = batch[self.raw]
        # The nodes before this one have drawn from numpy's generator, which the request has seeded.
        array.data = changed(array.data, np.random.default_rng(np.random.randint(2**31)), self.changes)


def changed(raw: Raw, random: np.random.Generator, changes: list[tuple[Any, float, Amount]]) -> Raw:
    """Return a patch after changes, each (function, probability, amount), in 0..1."""
    raw = raw.astype(np.float32)
    for function, probability, amount in changes:
        if random.random() < probability:
            raw = function(raw, random, amount)
    return raw.clip(0, 1)
