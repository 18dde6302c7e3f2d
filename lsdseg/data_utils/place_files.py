"""Text files NAME.volume: where a volume is, and what of it is taken.

Such a file holds a location, or in YAML:

    location: https://example.org/em    # or a path, from the folder of this file
    dataset: em/s0                      # which one is raw, if the location holds several
    voxel_size: [8, 8, 8]               # z, y, x in nm, if the volume does not say or is wrong
    offset: [0, 0, 0]                   # in nm
    begin: [100, 0, 0]                  # a box of the volume, in voxels
    shape: [512, 512, 512]
    neuron_labels: labels.tif           # labels to train on, if they are elsewhere or have another name
    neuron_labels_mask:                 # with all of the keys above; without a location, they are where raw is
        dataset: em/mask

The keys of labels and masks are those of DATA, and stand for the default names of the datasets. Labels have the voxel
size and the offset in this file unless they say their own. If raw is a box, labels are cut to it, and masks to labels,
unless they are boxes of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.config.model_types import LABELS
from lsdseg.data_utils.formats import PLACE
from lsdseg.errors import UserError
from lsdseg.files import write_whole

if TYPE_CHECKING:  # it imports scipy, for which `--help` would wait
    from lsdseg.data_utils.placement import Placement

REMOTE = re.compile(r"(https?|gs|s3)://")
MAX_BYTES = 10_000  # of a file NAME.volume
RAW = get_cfg_defaults().DATA.RAW
# Keys of a file that are three numbers: z, y, x.
TRIPLES = {"voxel_size": (int, float), "offset": (int, float), "begin": (int,), "shape": (int,)}
KEYS = ("location", "dataset", *TRIPLES)


class Beside(NamedTuple):
    """What a volume may have beside raw.

    Attributes:
        key: its key in a file NAME.volume.
        within: the dataset that it lies within.
    """

    key: str
    within: str


BESIDE: dict[str, Beside] = {}
for _key, _labels in LABELS.items():
    BESIDE[_labels.dataset] = Beside(_key.lower(), RAW)
    BESIDE[_labels.mask] = Beside(f"{_key.lower()}_mask", _labels.dataset)


class Place(NamedTuple):
    """Where a volume is, and what of it is taken.

    Attributes:
        location: a URL, or a path.
        dataset: which one is raw. None: the only one.
        voxel_size: z, y, x in nm. None: what the volume says.
        offset: z, y, x in nm. None: what the volume says.
        begin: first voxel of a box, z, y, x. None: the first of all.
        shape: voxels of the box. None: up to the end.
        beside: dataset in BESIDE -> its own place.
        default_voxel_size: z, y, x in nm if neither the volume nor `voxel_size` says it.
        default_offset: the same for `offset`.
    """

    location: str
    dataset: str | None = None
    voxel_size: Sequence[float] | None = None
    offset: Sequence[float] | None = None
    begin: Sequence[int] | None = None
    shape: Sequence[int] | None = None
    beside: Mapping[str, Place] = {}
    default_voxel_size: Sequence[float] | None = None
    default_offset: Sequence[float] | None = None

    @property
    def is_box(self) -> bool:
        """Whether only a box is taken."""
        return self.begin is not None or self.shape is not None

    def of(self, dataset: str) -> Place:
        """Return the place of one dataset, without those beside it."""
        if dataset not in BESIDE:
            return self._replace(beside={})
        own = self.beside.get(dataset) or Place(self.location, dataset)
        return own._replace(default_voxel_size=self.voxel_size, default_offset=self.offset)

    def fallback(self, given: Placement | None) -> Placement | None:
        """Return voxel size and offset in nm of a volume that says neither: the defaults, or what is given for both."""
        if self.default_voxel_size is not None:
            return self.default_voxel_size, self.default_offset or (0, 0, 0)
        return given and (given[0], self.default_offset or given[1])

    def name_of(self, dataset: str, exists: Callable[[str], bool]) -> str | None:
        """Return the name that a dataset has at `of(dataset)`. None: it is the only one there."""
        named = self.of(dataset).dataset
        if dataset in BESIDE or (dataset == RAW and (named is None or exists(named))):
            return named
        return dataset if named is None or exists(dataset) else named

    def cut_to(self, dataset: str) -> str | None:
        """Return the dataset to whose extent another one is cut. None: it is not cut."""
        if dataset not in BESIDE or self.of(dataset).is_box:
            return None
        within = BESIDE[dataset].within
        return within if any(self.of(name).is_box for name in (within, RAW)) else None


def is_place(path: Path) -> bool:
    """Return whether a path is a file NAME.volume."""
    return path.suffix.lower() == PLACE and path.is_file()


def write_place(path: Path, place: Place) -> None:
    """Write a file NAME.volume for raw alone."""
    given = {key: value for key in KEYS if (value := getattr(place, key)) is not None}
    with write_whole(path) as partial:
        partial.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")


def place_of(path: Path, dataset: str) -> Place:
    """Return where a dataset is, for another file NAME.volume; volumes/raw also stands for the only one."""
    place = read_place(path).of(dataset)
    named = place.dataset or (None if dataset == RAW else dataset)
    return place._replace(location=_absolute(place.location), dataset=named)


def paths_in(path: Path) -> set[Path]:
    """Return the absolute paths of all that a file NAME.volume names on disk.

    Raises:
        UserError: as for `read_place`.
    """
    place = read_place(path)
    locations = {place.location, *(other.location for other in place.beside.values())}
    return {Path(_absolute(location)) for location in locations if not REMOTE.match(location)}


def read_place(path: Path) -> Place:
    """Return what a file NAME.volume holds; of any other path, the place of that volume.

    Raises:
        UserError: the file is damaged, or has a key or a value that it cannot have.
    """
    if path.suffix.lower() != PLACE:
        return Place(str(path))
    try:
        content = yaml.safe_load(path.read_bytes()[:MAX_BYTES])
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({str(error)[:150]}): write a location in it, or YAML") from error
    given = {"location": content} if isinstance(content, str) else content
    if not isinstance(given, dict) or not isinstance(given.get("location"), str) or not given["location"].strip():
        raise UserError(f"{path} names no volume: write its location in it, a path or a URL")
    datasets = {beside.key: dataset for dataset, beside in BESIDE.items()}
    own = {key: value for key, value in given.items() if key not in datasets}
    place = _checked(own, path, str(path), [*KEYS, *datasets])
    beside = {}
    for key in given.keys() & datasets.keys():
        content = {"location": given[key]} if isinstance(given[key], str) else given[key]
        if not isinstance(content, dict):
            raise UserError(f"{path} has {key} {str(content)[:80]}: give a location, or {', '.join(KEYS)}")
        if "location" not in content:
            content = {"location": given["location"], "dataset": datasets[key], **content}
        beside[datasets[key]] = _checked(content, path, f"{key} in {path}", KEYS)
    return place._replace(beside=beside)


def _checked(given: dict[Any, Any], path: Path, where: str, known: Sequence[str]) -> Place:
    """Return a place if all keys are known and have values that they can have."""
    if unknown := sorted(map(str, set(given) - set(KEYS))):
        raise UserError(f"{where} has the key {unknown[0]}: use {', '.join(known)}")
    for key in ("location", "dataset"):
        if not (isinstance(given.get(key, "-"), str) and given.get(key, "-").strip()):
            raise UserError(
                f"{where} has {key} {str(given[key])[:80]!r}: give a {'path or a URL' if key == 'location' else 'name'}"
            )
    for key, kinds in TRIPLES.items():
        values: Any = given.get(key, [0, 0, 0])
        if not isinstance(values, list) or len(values) != 3 or any(type(n) not in kinds for n in values):
            raise UserError(f"{where} has {key} {str(values)[:80]}: give three numbers, z, y, x")
    location = given["location"].strip().removeprefix("file://")
    if not REMOTE.match(location):
        location = str(path.parent / Path(location).expanduser())
    return Place(**given | {"location": location})


def _absolute(location: str) -> str:
    return location if REMOTE.match(location) else os.path.abspath(Path(location))
