"""Walk through the doubtful places of a segmentation with two keys."""

from pathlib import Path
from typing import Any

import neuroglancer
import numpy as np

from lsdseg.data_utils.layout import quality_path
from lsdseg.engine.view.page import page_scale, say
from lsdseg.errors import UserError
from lsdseg.files import read_json

KEYS = {"keyw": "next-place", "keyq": "previous-place"}
ZOOM = 0.5  # voxels per pixel, at most

# What `lsdseg.engine.evaluate.quality` lists, the most doubtful first.
Places = list[dict[str, Any]]
# Name of a list -> what it lists, the columns that are shown, and how.
LISTS = {
    "segments": (
        "doubtful segments",
        ("segment", "doubt", "worst_nm"),
        "segment {}, doubt {:.3f}, centers {:.0f} nm apart here",
    ),
    "splits": (
        "contacts that may be splits",
        ("segment", "other", "affinity", "faces"),
        "segments {} and {}, affinity {:.2f} across {} faces",
    ),
}


def read_places(output: Path, name: str = "segments") -> Places:
    """Read a list that quality.py made for an output.

    Args:
        output: the zarr.
        name: of the list, one of LISTS.

    Raises:
        UserError: it did not run, or the file is damaged.
    """
    path = quality_path(output)
    content = read_json(path, "run quality.py first, with the same config")
    places = content.get(name)
    keys = (*LISTS[name][1], "z", "y", "x")
    if not isinstance(places, list) or not places:
        raise UserError(f"{path} lists no {LISTS[name][0]}: run quality.py again")
    for place in places:
        if not isinstance(place, dict) or not all(isinstance(place.get(key), int | float) for key in keys):
            raise UserError(f"{path} is damaged: run quality.py again")
    return places


class Walk:
    """The keys of a page that go from one doubtful place to the next.

    Args:
        page: the page.
        places: see `read_places`.
        name: of their list.
    """

    def __init__(self, page: neuroglancer.Viewer, places: Places, name: str = "segments"):
        self.page, self.places, self.number = page, places, -1
        what, self.columns, self.described = LISTS[name]
        for action, step in (("next-place", 1), ("previous-place", -1)):
            page.actions.add(action, lambda _state, step=step: self.go(step))
        with page.config_state.txn() as config:
            for key, action in KEYS.items():
                config.input_event_bindings.viewer[key] = action
        say(page, "walk", f"{len(places)} {what}: w goes to the next one, q back")

    def go(self, step: int) -> None:
        """Show the place that comes so many steps after this one."""
        self.number = min(max(self.number + step, 0), len(self.places) - 1)
        place = self.places[self.number]
        with self.page.txn() as state:
            state.position = (np.array([place["z"], place["y"], place["x"]]) / page_scale(state))[::-1]
            state.cross_section_scale = min(state.cross_section_scale, ZOOM)
        described = self.described.format(*(place[column] for column in self.columns))
        say(self.page, "walk", f"{self.number + 1} of {len(self.places)}: {described}")
