"""Say on a page how large a segment is when it is selected."""

from collections.abc import Sequence
from pathlib import Path

import neuroglancer

from lsdseg.data_utils.segment_tables import find_segment, find_tables
from lsdseg.engine.view.layers import Layer
from lsdseg.engine.view.page import say
from lsdseg.errors import UserError


class Sizes:
    """The line of a page that says how large the segment is that was selected last.

    Args:
        page: the page.
        layers: what it shows; those without tables of their segments are left out, see `find_tables`.
        output: the zarr with the segmentations.
    """

    def __init__(self, page: neuroglancer.Viewer, layers: Sequence[Layer], output: Path):
        self.page = page
        found = {layer.name: find_tables(output, layer.dataset) for layer in layers if layer.kind == "segmentation"}
        self.tables = {name: folder for name, folder in found.items() if folder is not None}
        self.selected: dict[str, set[int]] = {name: set() for name in self.tables}
        if self.tables:
            page.shared_state.add_changed_callback(self.refresh)

    def refresh(self) -> None:
        """Look at what is selected."""
        for layer in self.page.state.layers:
            if layer.name in self.tables:
                selected = {int(segment) for segment in layer.layer.segments}
                new, self.selected[layer.name] = selected - self.selected[layer.name], selected
                if new:
                    say(self.page, "size", self._describe(layer.name, max(new)))

    def _describe(self, name: str, segment: int) -> str:
        try:
            row = find_segment(self.tables[name], segment)
        except UserError as error:  # the tables were replaced meanwhile
            return f"error: {error}"
        if row is None:
            return f"{name} has no segment {segment} in its tables"
        fragments = f", {row['fragments']:.0f} fragments" if row["fragments"] > 0 else ""
        return f"segment {segment}: {row['voxels']} voxels{fragments}{'' if row['touches_face'] else ', orphan'}"
