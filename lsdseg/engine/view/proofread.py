"""Proofreading on a page: keys merge and split segments, and every edit is in the log before the page shows it.

The layer shows the fragments on disk through a look-up table in memory, so an edit changes a table, not voxels. The log
is read again whenever it has changed, so that two pages at the same output see each other's edits.
"""

import threading
from collections.abc import Callable
from typing import Any

import fastremap
import neuroglancer
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.layout import edits_path
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.records import identity
from lsdseg.data_utils.volumes import open_array, read
from lsdseg.engine.sample import Sample
from lsdseg.engine.view.layers import Layer
from lsdseg.engine.view.page import Voxels, add_layer, page_scale, say, show_lines
from lsdseg.errors import UserError
from lsdseg.rag import open_store
from lsdseg.rag.edits import Edit, EditLog, active, marked
from lsdseg.rag.proofread import apply_edits, components, merging_pair
from lsdseg.rag.store import Edges, Ids, Nodes

KEYS = {
    "keym": "merge-segments",
    "keyc": "cut-segment",
    "keyd": "mark-segment",
    "keyu": "undo-edit",
    "keyg": "show-edges",
}
HELP = (
    "m: merge the two selected segments (double-click selects); c at two places: cut a segment; d: a segment is done; "
    "u: undo; g: edges between the fragments of a segment"
)
EDGES = 2000  # that are shown at a time, those next to the mouse
POLL = 1.0  # seconds between two looks at the log


class Proofreading:
    """The segments of a sample at a threshold, with the edits in its log.

    Args:
        fragments: (z, y, x), ids.
        ids: uint64 (n,), all fragments, ascending.
        edges: u, v and scores, uint64, uint64 and float32 (m,).
        threshold: scores up to which edges hold.
        log: the edits. They are made here.
        author: whoever edits.
        read_nodes: gives fragments between two ids, and their centers in nm, as a store of graphs does.

    Raises:
        UserError: the log is damaged, or names fragments that are no longer there.
    """

    def __init__(
        self,
        fragments: Array,
        ids: Ids,
        edges: Edges,
        threshold: float,
        log: EditLog,
        author: str,
        read_nodes: Callable[[int, int], Nodes],
    ):
        self._read_nodes = read_nodes
        self.fragments, self.edges, self.threshold, self.log, self.author = fragments, edges, threshold, log, author
        u, v, scores = edges
        hold = scores <= np.float32(threshold)
        self._unedited = np.stack([ids, components(ids, u[hold], v[hold])])
        self._edits: list[Edit] | None = None
        self._lock = threading.RLock()
        self.refresh()

    def refresh(self) -> bool:
        """Read the log, and make its edits if they are others than before. Return whether they are."""
        with self._lock:
            edits = active(self.log.read())
            if edits == self._edits:
                return False
            try:
                self.lut = apply_edits(self._unedited, [self.edges], edits, self.threshold)
            except ValueError as error:
                raise UserError(f"{self.log.path}: {error}: move the file away, or restore the fragments") from error
            self._edits = edits
            return True

    def segments_of(self, fragments: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Segments (uint64) of fragments, an array of any shape; 0 for those that are not in the graph."""
        found = fastremap.unique(fragments)
        rows = np.searchsorted(self.lut[0], found).clip(max=self.lut.shape[1] - 1)
        known = self.lut[0][rows] == found
        table = dict(zip(found.tolist(), np.where(known, self.lut[1][rows], 0).tolist(), strict=True))
        segments: NDArray[np.uint64] = fastremap.remap(fragments, table)
        return segments

    def fragment_at(self, place: NDArray[Any]) -> int:
        """Return the fragment at a place, z, y, x in nm.

        Raises:
            UserError: there is none.
        """
        voxel = np.floor((np.asarray(place) - offset_nm(self.fragments)) / voxel_size_nm(self.fragments))
        inside = (voxel >= 0).all() and (voxel < self.fragments.shape).all()
        fragment = int(read(self.fragments, tuple(voxel.astype(int)))) if inside else 0
        if fragment == 0 or self.segment_of(fragment) == 0:
            raise UserError("there is no segment at this place: point at one")
        return fragment

    def segment_of(self, fragment: int) -> int:
        """Return the segment of a fragment; 0, if it is not in the graph."""
        return int(self.segments_of(np.array([fragment], np.uint64))[0])

    def merge(self, first: int, second: int) -> int:
        """Merge two segments, and return the id of the new one.

        Raises:
            UserError: a segment is no longer there.
        """
        with self._lock:
            self.refresh()
            for segment in (first, second):
                if segment not in self.lut[1]:
                    raise UserError(f"segment {segment} is no longer there: select it anew")
            pair = merging_pair(self.lut, [self.edges], first, second)
            self.log.merge(*pair, author=self.author)
            self.refresh()
            return self.segment_of(pair[0])

    def split(self, a: int, b: int) -> tuple[int, int]:
        """Split the segment that holds two fragments, and return the ids of the two new ones.

        Raises:
            UserError: the two are the same, or in two segments.
        """
        with self._lock:
            self.refresh()
            if a == b:
                raise UserError("both places are in one fragment, which cannot be cut: choose places farther apart")
            if self.segment_of(a) != self.segment_of(b):
                raise UserError("the two places are in two segments already")
            self.log.split(a, b, author=self.author)
            self.refresh()
            return self.segment_of(a), self.segment_of(b)

    def edges_near(self, fragment: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return the edges within the segment of a fragment, the nearest `EDGES` of them.

        Returns:
            ends: float64 (n, 2, 3), the centers of the two fragments of each edge in nm, z, y, x.
            scores: float32 (n,), up to the threshold.
        """
        own = np.sort(self.lut[0][self.lut[1] == self.segment_of(fragment)])
        ids, centers = self._read_nodes(int(own[0]), int(own[-1]))
        order = np.argsort(ids)
        ids, centers = ids[order], centers[order]
        u, v, scores = self.edges
        inside = np.isin(u, own) & np.isin(v, own) & (scores <= np.float32(self.threshold))
        ends = np.stack([centers[np.searchsorted(ids, end[inside])] for end in (u, v)], axis=1).astype(np.float64)
        here = centers[np.searchsorted(ids, np.uint64(fragment))]
        nearest = np.argsort(np.linalg.norm(ends.mean(axis=1) - here, axis=1))[:EDGES]
        return ends[nearest], scores[inside][nearest]

    def mark(self, fragment: int) -> list[int]:
        """Mark the segment of a fragment as right, and return all that are marked."""
        with self._lock:
            self.refresh()
            self.log.mark(fragment, author=self.author)
            return self.marked()

    def marked(self) -> list[int]:
        """The segments that were marked as right, as they are after all edits."""
        fragments = np.array(marked(self.log.read()), np.uint64)
        return sorted({*self.segments_of(fragments).tolist()} - {0})

    def undo(self) -> Edit:
        """Take the last edit back, and return it.

        Raises:
            UserError: there is none.
        """
        with self._lock:
            undone = self.log.undo(self.author)
            self.refresh()
            return undone


class EditedVoxels(Voxels):
    """Fragments on disk as the segments that they are in now."""

    def __init__(self, proofreading: Proofreading):
        super().__init__(proofreading.fragments)
        self.dtype = np.dtype(np.uint64)
        self._proofreading = proofreading

    def __getitem__(self, slices: Any) -> NDArray[Any]:
        """Read a box of voxels."""
        return self._proofreading.segments_of(super().__getitem__(slices))


def open_proofreading(
    sample: Sample, threshold: float, merge_function: str | None = None, author: str = ""
) -> Proofreading:
    """Read the graph of a sample, to edit its segments at a threshold.

    Args:
        sample: what 02 and 03 ran on.
        threshold: scores up to which edges hold.
        merge_function: whose scores. None: the only ones, or those of INS_SEGMENT.MERGE_FUNCTION.
        author: whoever edits. Empty: the user of this process.

    Raises:
        UserError: there are no fragments, no graph or no such scores; as for `Proofreading`.
    """
    fragments = open_array(sample.output, sample.fragments_dataset)
    made = identity(fragments)
    store = open_store(sample.cfg, sample.output, "r", made)
    names = store.merge_functions()
    name = merge_function or (names[0] if len(names) == 1 else sample.cfg.INS_SEGMENT.MERGE_FUNCTION)
    if name not in names:
        raise UserError(
            f"there are no edges of {name} in {store}, but of {', '.join(names) or 'none'}: choose with -mf, or run "
            "03_agglomerate_blockwise.py"
        )
    ids = np.sort(np.concatenate([np.empty(0, np.uint64), *store.node_ids()]))
    batches = list(zip(*store.edges(name), strict=True)) or [[np.empty(0, np.uint64)]] * 2 + [[np.empty(0, "f4")]]
    u, v, scores = (np.concatenate(column) for column in batches)
    log = EditLog(edits_path(sample.output), made)
    return Proofreading(fragments, ids, (u, v, scores), threshold, log, author, store.read_nodes)


class Editor:
    """The keys of a page that edit segments.

    Args:
        page: the page; its layer of segments is added here.
        proofreading: the segments.
    """

    def __init__(self, page: neuroglancer.Viewer, proofreading: Proofreading):
        self.page, self.proofreading = page, proofreading
        self.name = f"proofread {proofreading.threshold:g}"
        self._first: int | None = None
        self._handlers = {
            "merge-segments": self._merge,
            "cut-segment": self._cut,
            "mark-segment": self._mark,
            "undo-edit": self._undo,
            "show-edges": self._show_edges,
        }
        layer = Layer(self.name, self.name, proofreading.fragments)
        self.volume = add_layer(page, layer, EditedVoxels(proofreading))
        for action, handler in self._handlers.items():
            page.actions.add(action, self._guarded(handler))
        with page.config_state.txn() as config:
            for key, action in KEYS.items():
                config.input_event_bindings.viewer[key] = action
        say(page, "proofreading", HELP)
        threading.Thread(target=self._watch, daemon=True).start()

    def _guarded(self, handler: Callable[[Any], str]) -> Callable[[Any], None]:
        """Show what a handler says, or the mistake that it found."""

        def handle(state: Any) -> None:
            try:
                say(self.page, "proofreading", handler(state))
            except UserError as error:
                say(self.page, "proofreading", f"error: {error}")

        return handle

    def _merge(self, state: Any) -> str:
        selected = [int(segment) for segment in state.viewer_state.layers[self.name].segments]
        if len(selected) != 2:
            raise UserError(f"select two segments to merge, not {len(selected)}: double-click them")
        self._show(self.proofreading.merge(*selected))
        return f"merged {selected[0]} and {selected[1]}; u takes it back"

    def _pointed_at(self, state: Any) -> int:
        """Return the fragment below the mouse."""
        if state.mouse_position is None:
            raise UserError("point at a segment")
        place = np.array(state.mouse_position[:3])[::-1] * page_scale(state.viewer_state)
        return self.proofreading.fragment_at(place)

    def _show_edges(self, state: Any) -> str:
        fragment = self._pointed_at(state)
        ends, scores = self.proofreading.edges_near(fragment)
        show_lines(self.page, "edges", ends, scores, self.proofreading.threshold)
        segment = self.proofreading.segment_of(fragment)
        return f"{len(scores)} edges of segment {segment}, from sure (blue) to unsure (orange)"

    def _cut(self, state: Any) -> str:
        fragment = self._pointed_at(state)
        if self._first is None:
            self._first = fragment
            return f"cut segment {self.proofreading.segment_of(fragment)}: press c at the other side, too"
        first, self._first = self._first, None
        parts = self.proofreading.split(first, fragment)
        self._show(*parts)
        return f"cut into {parts[0]} and {parts[1]}; u takes it back"

    def _mark(self, state: Any) -> str:
        fragment = self._pointed_at(state)
        marked = self.proofreading.mark(fragment)
        segment = self.proofreading.segment_of(fragment)
        return f"segment {segment} is done, one of {len(marked)}; u takes it back"

    def _undo(self, _state: Any) -> str:
        self._first = None
        undone = self.proofreading.undo()
        self._show()
        return f"took back edit {undone.number}, a {undone.action} by {undone.author}"

    def _show(self, *segments: int) -> None:
        """Draw the layer anew, with some segments selected if any were selected before."""
        self.volume.invalidate()
        with self.page.txn() as state:
            layer = state.layers[self.name]
            layer.segments = [*segments] if len(layer.segments) else []

    def _watch(self) -> None:
        """Draw the layer anew when others have edited."""
        while not threading.Event().wait(POLL):
            try:
                if self.proofreading.refresh():
                    self.volume.invalidate()
                    say(self.page, "proofreading", "others have edited")
            except UserError as error:
                say(self.page, "proofreading", f"error: {error}")
