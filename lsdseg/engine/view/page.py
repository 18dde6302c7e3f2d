"""A page of Neuroglancer that shows layers, and the server behind it.

The server sends a voxel only when the page asks for it, and makes coarser levels of what the page shows from afar. So a
volume of any size opens at once. Whoever knows the token in the link sees the page; by default only this machine can
reach it.
"""

import errno
import getpass
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

import neuroglancer
import numpy as np
from funlib.geometry import Roi
from funlib.persistence import Array
from numpy.typing import NDArray

from lsdseg.data_utils.placement import in_picometers, voxel_size_nm
from lsdseg.data_utils.volumes import read
from lsdseg.engine.signals import signal_handlers
from lsdseg.engine.view.layers import Layer
from lsdseg.engine.view.shaders import line_shader
from lsdseg.errors import UserError

AXES = ["z", "y", "x"]
# Meshes need a whole volume in memory. Larger ones are shown in sections only.
MESH_VOXELS = 2**26
PIXELS = 350  # size that a volume has in a panel of a new page
WHOLE = 3  # a new page shows a volume as a whole if that takes at most so many voxels per pixel, or else a part of it
# Coarser levels are made from all their voxels, those above and below the section too. Coarser than twice takes longer
# to read than it saves.
MAX_DOWNSAMPLING = 2**3
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Types of voxels that the page cannot show, and those that hold the same values.
SHOWN_AS = {"bool": np.uint8, "int64": np.uint64, "float16": np.float32, "float64": np.float32}


class Voxels:
    """An array on disk as Neuroglancer reads it: part by part, from several threads."""

    def __init__(self, array: Array):
        self._array = array
        self.shape = tuple(map(int, array.shape))
        self.dtype = np.dtype(SHOWN_AS.get(array.dtype.name, array.dtype.newbyteorder("=")))

    def __getitem__(self, slices: Any) -> NDArray[Any]:
        """Read a box of voxels. One that is damaged is reported and stays black on the page."""
        try:
            return read(self._array, slices).astype(self.dtype, copy=False)
        except UserError as error:
            print("error:", error, file=sys.stderr, flush=True)
            raise ValueError(str(error)) from error  # Neuroglancer answers that the request was bad

    def transpose(self) -> NDArray[Any]:
        """Return all voxels in reversed order of axes, as meshes are made of them."""
        return self[...].T


def make_page(layers: Sequence[Layer], title: str, compare: Sequence[Layer] = ()) -> neuroglancer.Viewer:
    """Make a page, and start the server if it does not run yet.

    Args:
        layers: what it shows, the first one below.
        title: title of the window.
        compare: two segmentations to show side by side at the same place, on the other layers that are visible.

    Returns:
        The page, as long as it is referenced.
    """
    # With a token, Neuroglancer gives the page no credentials of the user.
    page = neuroglancer.Viewer(token=neuroglancer.random_token.make_random_token(), allow_credentials=False)
    with page.txn() as state:
        state.title = title
        state.cross_section_background_color = "#202020"
        state.dimensions = _space(layers[0].array, AXES[::-1])
        for layer in layers:
            visible = layer in compare or (layer.visible and not (compare and layer.kind == "segmentation"))
            state.layers.append(
                neuroglancer.ManagedLayer(name=layer.name, layer=_neuroglancer_layer(layer), visible=visible)
            )
        _look_at(state, [layer.array for layer in layers if layer.visible])
        state.layout = "4panel"
        if compare:
            below = [layer.name for layer in layers if layer.kind == "image"]
            sides = [neuroglancer.LayerGroupViewer(layers=[*below, side.name], layout="xy") for side in compare]
            state.layout = neuroglancer.row_layout(sides)
            state.cross_section_scale *= 0.7  # these panels are larger
    return page


def add_layer(page: neuroglancer.Viewer, layer: Layer, voxels: Voxels) -> neuroglancer.LocalVolume:
    """Add a layer of ids that are not on disk as they are shown, in place of the other visible ones.

    Returns:
        What to invalidate when the ids change.
    """
    shown = _neuroglancer_layer(layer, voxels)
    volume = shown.source[0].url
    with page.txn() as state:
        for other in state.layers:
            other.visible = other.visible and other.type != "segmentation"
        state.layers.append(neuroglancer.ManagedLayer(name=layer.name, layer=shown))
        state.selected_layer.layer = layer.name
    return volume


def show_lines(
    page: neuroglancer.Viewer, name: str, ends: NDArray[np.float64], values: NDArray[np.float32], highest: float
) -> None:
    """Show lines in a layer of their own, in place of those that it had.

    Args:
        page: the page.
        name: of the layer.
        ends: float64 (n, 2, 3), the two ends of each line in nm, z, y, x.
        values: float32 (n,), color them from blue at 0 to orange red at `highest`.
        highest: see `values`.
    """
    with page.txn() as state:
        places = (ends / page_scale(state))[..., ::-1]
        lines = [
            neuroglancer.LineAnnotation(id=str(n), point_a=a, point_b=b, props=[float(value)])
            for n, ((a, b), value) in enumerate(zip(places, values, strict=True))
        ]
        state.layers[name] = neuroglancer.LocalAnnotationLayer(
            dimensions=state.dimensions,
            annotation_properties=[neuroglancer.AnnotationPropertySpec(id="score", type="float32", default=0)],
            annotations=lines,
            shader=line_shader(highest),
        )


def say(page: neuroglancer.Viewer, key: str, text: str) -> None:
    """Show a line at the bottom of a page, in place of the one with the same key."""
    with page.config_state.txn() as config:
        config.status_messages[key] = text


def page_scale(state: neuroglancer.ViewerState) -> NDArray[np.float64]:
    """Return the voxel size (z, y, x) in nm that positions on a page are given in."""
    return np.array([state.dimensions[axis].scale for axis in AXES]) * 1e9


def listen(host: str, port: int) -> None:
    """Start the server.

    Args:
        host: address to listen at.
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken or may not be used, or this machine does not have the address.
    """
    neuroglancer.set_server_bind_address(host, port)
    try:
        neuroglancer.server.start()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "is taken" if error.errno == errno.EADDRINUSE else "is only for administrators"
            raise UserError(f"port {port} of {host} {reason}: choose another with --port, or leave it out") from error
        raise UserError(
            f"cannot listen at {host} ({error.strerror or error}): choose an address of this machine with --host"
        ) from error


def links(pages: Sequence[tuple[str, neuroglancer.Viewer]], host: str) -> str:
    """Return what to print: a link for each page, and how to reach it from another machine."""
    lines = [f"{title}: {page}" for title, page in pages]
    port = neuroglancer.server.global_server.port
    if host in LOOPBACK:
        lines.append("from another machine, run this there first, then open the link there:")
        lines.append(f"  ssh -L {port}:{host}:{port} {getpass.getuser()}@{socket.gethostname()}")
    else:
        lines.append(f"everybody who reaches {host} and has the link sees the volume: leave out --host to prevent that")
    return "\n".join([*lines, "Ctrl-C ends it"])


def serve(text: str) -> None:
    """Print a text, and serve until Ctrl-C or SIGTERM, also in the background of a shell, which ignores Ctrl-C."""
    ended = threading.Event()
    with signal_handlers(lambda *_: ended.set(), signal.SIGINT, signal.SIGTERM):
        print(text, flush=True)
        ended.wait()
        neuroglancer.server.stop()


def _neuroglancer_layer(layer: Layer, voxels: Voxels | None = None) -> neuroglancer.Layer:
    """Make an image of an array with channels or gray values, and a segmentation of ids."""
    array = layer.array
    channels = ["c^"] * (len(array.shape) - 3)
    volume = neuroglancer.LocalVolume(
        voxels or Voxels(array),
        dimensions=_space(array, [*channels, *AXES]),
        volume_type=layer.kind,
        max_downsampling=MAX_DOWNSAMPLING,
    )
    source = neuroglancer.LayerDataSource(url=volume, transform=_transform(array, [*channels, *AXES]))
    if layer.kind == "image":
        return neuroglancer.ImageLayer(source=source, shader=layer.shader, opacity=1.0)
    if np.prod(array.shape) > MESH_VOXELS:
        source.subsources["meshes"] = False
    return neuroglancer.SegmentationLayer(source=source, selected_alpha=0.4, not_selected_alpha=0.15)


def _space(array: Array, names: Sequence[str]) -> neuroglancer.CoordinateSpace:
    """Names, voxel sizes and units of axes; channels have none."""
    sizes = dict(zip(AXES, voxel_size_nm(array), strict=True))
    units = ["nm" if name in sizes else "" for name in names]
    return neuroglancer.CoordinateSpace(names=names, units=units, scales=[sizes.get(name, 1) for name in names])


def _transform(array: Array, names: Sequence[str]) -> neuroglancer.CoordinateSpaceTransform:
    """Move an array to its offset, which need not be a multiple of its voxel size."""
    shift = dict(zip(AXES, np.array(array.offset) / np.array(array.voxel_size), strict=True))
    matrix = np.eye(len(names), len(names) + 1)
    matrix[:, -1] = [shift.get(name, 0) for name in names]
    return neuroglancer.CoordinateSpaceTransform(output_dimensions=_space(array, names), matrix=matrix)


def _look_at(state: neuroglancer.ViewerState, arrays: Sequence[Array]) -> None:
    """Let the page show the middle of arrays; as a whole, if they are small enough to be read for that."""
    arrays = [in_picometers(array) for array in arrays]
    roi: Roi = arrays[0].roi
    for array in arrays[1:]:
        roi = roi.intersect(array.roi)
    voxel_size = np.array(arrays[0].voxel_size)
    state.position = (np.array(roi.center) / voxel_size)[::-1]
    scale = max(roi.shape) / voxel_size.min() / PIXELS
    state.cross_section_scale = scale if scale <= WHOLE else 1
    state.show_slices = bool(scale <= WHOLE)  # whether the view in 3D shows the sections, which it does as a whole
    state.projection_scale = 2 * max(roi.shape) / voxel_size.min()
