"""gunpowder nodes that gunpowder lacks, or whose versions there are slower than the training step.

Batches are made in forked worker processes. Each node handles one batch element at a time, and keeps no state between
requests.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastremap
import gunpowder as gp
import numpy as np
import torch
import torch.multiprocessing
from numpy.typing import NDArray

from lsdseg.data_utils.gray import Window, to_unit
from lsdseg.data_utils.labels import grow_boundary, is_labeled
from lsdseg.engine.training.lsd import local_shape_descriptors
from lsdseg.errors import UserError


class SeedPatches(gp.BatchFilter):
    """Give every patch its own seed, drawn from the seed of the run and the number of the patch.

    Workers share one counter, so they never make the same patch twice, and a resumed run continues with new patches.
    One worker always makes the same patches in the same order.

    Args:
        seed: the seed of the run.
        first: the number of the first patch.
        stride: the difference between the numbers of two patches in a row. With several ranks, each counts in strides.
    """

    def __init__(self, seed: int, first: int, stride: int) -> None:
        self.seed, self.stride = seed, stride
        self.next_number = multiprocessing.Value("q", first)

    def provide(self, request: gp.BatchRequest) -> gp.Batch:
        with self.next_number.get_lock():
            number = self.next_number.value
            self.next_number.value += self.stride
        state = np.random.SeedSequence([self.seed, number]).generate_state(1)
        seeded = gp.BatchRequest(random_seed=int(state[0]))
        for key, spec in request.items():
            seeded[key] = spec.copy()
        return self.get_upstream_provider().request_batch(seeded)


class ToUnit(gp.BatchFilter):
    """Scale gray values to 0..1, see `to_unit`.

    Args:
        raw: the array.
        window: the gray values that become 0 and 1.
    """

    def __init__(self, raw: gp.ArrayKey, window: Window) -> None:
        self.raw, self.window = raw, window

    def setup(self) -> None:
        self.enable_autoskip()
        spec = self.spec[self.raw].copy()
        spec.dtype = np.float32
        self.updates(self.raw, spec)

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        needed = gp.BatchRequest()
        needed[self.raw] = request[self.raw].copy()
        needed[self.raw].dtype = None
        return needed

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> None:
        array = batch[self.raw]
        array.data = to_unit(array.data, self.window)
        array.spec.dtype = np.float32


class LabeledLocation(gp.RandomLocation):
    """Choose random locations at which at least half of the patch is labeled.

    The request is larger than the patch, because LSDs see what lies around it. That need not be labeled.

    gunpowder's own `min_masked` draws locations until one fits, forever if none can: a strong deformation needs more
    than a small labeled volume has. Here, every miss lowers the share that the next location must have.

    Args:
        mask: key of the labels mask.
        known: ROI of the labels mask without its margins.
        patch: size of the patch, which is in the middle of the request.
    """

    MIN_LABELED = 0.5
    MISS_FACTOR = 0.98

    def __init__(self, mask: gp.ArrayKey, known: gp.Roi, patch: gp.Coordinate) -> None:
        super().__init__()
        self.labels_mask, self.known, self.patch, self.required_share = mask, known, patch, self.MIN_LABELED

    def setup(self) -> None:
        super().setup()
        request = gp.BatchRequest({self.labels_mask: gp.ArraySpec(self.known)})
        # Counting voxels in a box takes milliseconds. Sums that would save that time need eight bytes per voxel.
        self.labeled = self.get_upstream_provider().request_batch(request)[self.labels_mask].data > 0

    def accepts(self, request: gp.BatchRequest) -> bool:
        voxel_size = self.spec[self.labels_mask].voxel_size
        begin = request[self.labels_mask].roi.center - self.patch / 2 - self.known.offset
        box = gp.Roi(begin / voxel_size, self.patch / voxel_size)
        inside = box.intersect(gp.Roi((0,) * box.dims, self.labeled.shape))
        share = np.count_nonzero(self.labeled[inside.to_slices()]) / box.size
        accepted = bool(share >= self.required_share)
        self.required_share = self.MIN_LABELED if accepted else self.required_share * self.MISS_FACTOR
        return accepted


class Relabel(gp.BatchFilter):
    """Replace labels by what `new_labels` returns for them.

    Args:
        labels: key of the labels.

    Attributes:
        dtype: the type of the new labels.
    """

    dtype: type[np.unsignedinteger[Any]]

    def __init__(self, labels: gp.ArrayKey) -> None:
        self.labels = labels

    def new_labels(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return what replaces labels (z, y, x)."""
        raise NotImplementedError

    def setup(self) -> None:
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.dtype = self.dtype
        self.updates(self.labels, spec)

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        deps = gp.BatchRequest()
        deps[self.labels] = request[self.labels].copy()
        deps[self.labels].dtype = None
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> None:
        array = batch[self.labels]
        array.data = self.new_labels(array.data).astype(self.dtype)
        array.spec.dtype = self.dtype


class CompactLabels(Relabel):
    """Renumber labels to 1..n as uint32. Background stays 0, and ids that mean "unlabeled" become 0.

    Deformation converts labels to float64 and affinities convert them to int32. The ids of large volumes would collide
    in either.
    """

    dtype = np.uint32

    def new_labels(self, labels: NDArray[Any]) -> NDArray[Any]:
        renumbered: NDArray[Any] = fastremap.renumber(np.where(is_labeled(labels), labels, 0), preserve_zero=True)[0]
        return renumbered


class Binarize(Relabel):
    """Replace all labels other than 0 by 1, as uint8."""

    dtype = np.uint8

    def new_labels(self, labels: NDArray[Any]) -> NDArray[Any]:
        return labels != 0


class CopyLabels(gp.BatchFilter):
    """Provide labels under a second key, as they are here. Nodes that follow may change those under the first.

    Args:
        labels: key of the labels.
        copy: key of the copy to provide.
    """

    def __init__(self, labels: gp.ArrayKey, copy: gp.ArrayKey) -> None:
        self.labels, self.copy = labels, copy

    def setup(self) -> None:
        self.enable_autoskip()
        self.provides(self.copy, self.spec[self.labels].copy())

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        deps = gp.BatchRequest()
        deps[self.labels] = request[self.copy].copy()
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> gp.Batch:
        result = gp.Batch()
        result[self.copy] = gp.Array(batch[self.labels].data.copy(), batch[self.labels].spec.copy())
        return result


class PadLabels(gp.BatchFilter):
    """Provide labels in a whole ROI, 0 where there are none.

    gunpowder's own node warns about requests that lie entirely outside the labels, and then fails.

    Args:
        labels: key of the labels.
        roi: where to provide them.
    """

    def __init__(self, labels: gp.ArrayKey, roi: gp.Roi) -> None:
        self.labels, self.roi = labels, roi

    def setup(self) -> None:
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.roi = self.roi
        self.updates(self.labels, spec)

    def prepare(self, request: gp.BatchRequest) -> None:
        known = self.get_upstream_provider().spec[self.labels].roi
        inside = request[self.labels].roi.intersect(known)
        request[self.labels].roi = gp.Roi(known.begin, known.shape * 0) if inside.empty else inside

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> None:
        array, roi = batch[self.labels], request[self.labels].roi
        padded = np.zeros(roi.shape / array.spec.voxel_size, array.data.dtype)
        padded[((array.spec.roi - roi.begin) / array.spec.voxel_size).to_slices()] = array.data
        array.data, array.spec.roi = padded, roi


class GrowBoundary(gp.BatchFilter):
    """Erode every label where it meets another one or background.

    The result is the same as that of gunpowder's node of this name, which erodes one label after the other. Where the
    mask is 0, nothing is known, so nothing grows from there: the outermost labeled voxels are no boundary.

    Args:
        labels: key of the labels.
        mask: key of the labels mask.
        steps: voxels to erode.
        only_xy: erode in the plane (4-neighborhood), not in 3D (6-neighborhood).
    """

    def __init__(self, labels: gp.ArrayKey, mask: gp.ArrayKey, steps: int, only_xy: bool) -> None:
        self.labels, self.mask, self.steps, self.axes = labels, mask, steps, (1, 2) if only_xy else (0, 1, 2)

    def setup(self) -> None:
        self.enable_autoskip()
        self.updates(self.labels, self.spec[self.labels])

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        deps = gp.BatchRequest()
        deps[self.labels] = request[self.labels].copy()
        deps[self.mask] = gp.ArraySpec(roi=request[self.labels].roi)
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> None:
        labels, known = batch[self.labels].data, batch[self.mask].data > 0
        batch[self.labels].data = grow_boundary(labels, self.steps, self.axes, known)


class TargetFromLabels(gp.BatchFilter):
    """Provide the target that a function on arrays makes from labels. The labels themselves stay as they are.

    Args:
        labels: key of the labels, (z, y, x).
        target: key of the target to provide, (channels, z, y, x), or (z, y, x) if there is one channel.
        function: from labels, uint32 (z, y, x), to the target on the same voxels.
        context: voxels along z, y, x around the target of which the function needs the labels, too.
        dtype: type of the target.
    """

    def __init__(
        self,
        labels: gp.ArrayKey,
        target: gp.ArrayKey,
        function: Callable[[NDArray[Any]], NDArray[Any]],
        *,
        context: Sequence[int] = (0, 0, 0),
        dtype: type = np.float32,
    ) -> None:
        self.labels, self.target, self.function = labels, target, function
        self.context_voxels, self.dtype = context, dtype

    def setup(self) -> None:
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.dtype = self.dtype
        self.provides(self.target, spec)
        self.context = gp.Coordinate(self.context_voxels) * spec.voxel_size

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        deps = gp.BatchRequest()
        deps[self.labels] = gp.ArraySpec(roi=request[self.target].roi.grow(self.context, self.context))
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> gp.Batch:
        roi, labels = request[self.target].roi, batch[self.labels]
        crop = ((roi - labels.spec.roi.offset) / labels.spec.voxel_size).to_slices()
        target = self.function(labels.data)[..., *crop]
        spec = self.spec[self.target].copy()
        spec.roi = roi
        result = gp.Batch()
        result[self.target] = gp.Array(np.ascontiguousarray(target, dtype=self.dtype), spec)
        return result


class AddAffinities(gp.BatchFilter):
    """Add the affinities of labels: 1 where a voxel and the one at an offset from it have the same label, not 0.

    Args:
        offsets: (z, y, x) in voxels, one per channel.
        labels: key of the labels.
        mask: key of the labels mask.
        affinities: key of the affinities to provide, uint8 (channels, z, y, x).
        known: key of what is known about them, of the same type and shape: 1 where both voxels are inside the mask.
    """

    def __init__(
        self,
        offsets: Sequence[Sequence[int]],
        labels: gp.ArrayKey,
        mask: gp.ArrayKey,
        affinities: gp.ArrayKey,
        known: gp.ArrayKey,
    ) -> None:
        self.offsets, self.labels, self.mask = offsets, labels, mask
        self.affinities, self.known = affinities, known

    def setup(self) -> None:
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.dtype, spec.interpolatable = np.uint8, False
        self.provides(self.affinities, spec)
        self.provides(self.known, spec.copy())
        steps = list(zip(*self.offsets, strict=True))
        self.before = gp.Coordinate(max(0, -min(axis)) for axis in steps) * spec.voxel_size
        self.after = gp.Coordinate(max(0, *axis) for axis in steps) * spec.voxel_size

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        around = request[self.affinities].roi.grow(self.before, self.after)
        deps = gp.BatchRequest()
        deps[self.labels] = gp.ArraySpec(roi=around)
        deps[self.mask] = gp.ArraySpec(roi=around)
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> gp.Batch:
        roi, labels = request[self.affinities].roi, batch[self.labels]
        voxel_size = labels.spec.voxel_size
        known = self._at_offsets(batch[self.mask], roi, voxel_size, lambda here, there: (here > 0) & (there > 0))
        same = self._at_offsets(labels, roi, voxel_size, lambda here, there: (here == there) & (here > 0))
        result = gp.Batch()
        for key, data in ((self.affinities, same), (self.known, known)):
            spec = self.spec[key].copy()
            spec.roi = roi
            result[key] = gp.Array(data, spec)
        return result

    def _at_offsets(
        self,
        array: gp.Array,
        roi: gp.Roi,
        voxel_size: gp.Coordinate,
        compare: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]],
    ) -> NDArray[np.uint8]:
        """Compare the voxels of a ROI with those at the offsets. Returns uint8 (channels, z, y, x)."""
        box = (roi - array.spec.roi.offset) / voxel_size
        results = np.empty((len(self.offsets), *box.shape), np.uint8)
        for result, offset in zip(results, self.offsets, strict=True):
            result[:] = compare(array.data[box.to_slices()], array.data[(box + gp.Coordinate(offset)).to_slices()])
        return results


class AddLocalShapeDescriptors(gp.BatchFilter):
    """Add the LSDs of labels, and where they are known: 1 where a voxel is labeled and inside the mask.

    The node requests labels up to 3 sigma around the LSDs. Voxels farther away have no weight in them.

    Args:
        labels: key of the labels.
        mask: key of the labels mask.
        lsds: key of the LSDs to provide, float32 (10 or 6, z, y, x).
        known: key of where they are known, uint8 (z, y, x).
        sigma: standard deviation in nm.
        voxel_size: z, y, x in nm.
        downsample: use only every n-th voxel.
        sections: compute six LSDs for each section separately.
    """

    def __init__(
        self,
        labels: gp.ArrayKey,
        mask: gp.ArrayKey,
        lsds: gp.ArrayKey,
        known: gp.ArrayKey,
        *,
        sigma: float,
        voxel_size: Sequence[float],
        downsample: int,
        sections: bool = False,
    ) -> None:
        self.labels, self.mask, self.lsds, self.known = labels, mask, lsds, known
        self.sigma, self.voxel_size, self.downsample, self.sections = sigma, voxel_size, downsample, sections

    def setup(self) -> None:
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.dtype, spec.interpolatable = np.float32, True
        self.provides(self.lsds, spec)
        known = spec.copy()
        known.dtype, known.interpolatable = np.uint8, False
        self.provides(self.known, known)
        context = lsd_context(self.sigma, self.voxel_size, self.downsample, self.sections)
        self.context = context * spec.voxel_size

    def prepare(self, request: gp.BatchRequest) -> gp.BatchRequest:
        roi = request[self.lsds].roi
        deps = gp.BatchRequest()
        deps[self.labels] = gp.ArraySpec(roi=roi.grow(self.context, self.context))
        deps[self.mask] = gp.ArraySpec(roi=roi)
        return deps

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> gp.Batch:
        roi, labels = request[self.lsds].roi, batch[self.labels]
        if self.sections:
            of_section = [
                local_shape_descriptors(section, self.sigma, self.voxel_size[1:], downsample=self.downsample)
                for section in labels.data
            ]
            descriptors = np.stack(of_section, axis=1)
        else:
            descriptors = local_shape_descriptors(labels.data, self.sigma, self.voxel_size, downsample=self.downsample)
        crop = ((roi - labels.spec.roi.offset) / labels.spec.voxel_size).to_slices()
        known = ((labels.data[crop] > 0) & (batch[self.mask].data > 0)).astype(np.uint8)
        result = gp.Batch()
        for key, data in ((self.lsds, np.ascontiguousarray(descriptors[:, *crop])), (self.known, known)):
            spec = self.spec[key].copy()
            spec.roi = roi
            result[key] = gp.Array(data, spec)
        return result


class ShareMemory(gp.BatchFilter):
    """Let batches go from one process to another through shared memory, not through a pipe that copies them twice.

    Shared memory that is full ends a process without a message, and some containers have little of it. Batches for
    which there might not be enough room take the pipe.

    Args:
        workers: how many processes may take memory at the same time.
    """

    FOLDER = Path("/dev/shm")

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def process(self, batch: gp.Batch, request: gp.BatchRequest) -> None:
        needed = self.workers * sum(array.data.nbytes for array in batch.arrays.values())
        if self.FOLDER.is_dir() and needed < shutil.disk_usage(self.FOLDER).free:
            for array in batch.arrays.values():
                # PyTorch sends tensors through shared memory.
                array.data = torch.from_numpy(np.ascontiguousarray(array.data))


class PreCache(gp.PreCache):
    """gunpowder's node, with workers that can say why they failed.

    The errors of gunpowder itself hold the whole pipeline and none of its causes on the way to the main process, which
    would wait forever for what cannot be sent.
    """

    def _run_worker(self) -> gp.Batch:
        try:
            return super()._run_worker()
        except Exception as error:
            raise mistake_behind(error) or RuntimeError("".join(traceback.format_exception(error))) from None


def mistake_behind(error: BaseException | None) -> UserError | None:
    """Return the mistake of the user that an error came from, None if there is none."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


class DefectAugment(gp.DefectAugment):
    """gunpowder's node, with a teardown that works: the original calls a method that its artifact source lacks."""

    def teardown(self) -> None:
        self.artifact_source.internal_teardown()


def lsd_context(sigma: float, voxel_size: Sequence[float], downsample: int, sections: bool = False) -> gp.Coordinate:
    """Return how many voxels of labels LSDs need on each side.

    Args:
        sigma: standard deviation in nm.
        voxel_size: z, y, x in nm.
        downsample: LSDs use every n-th voxel.
        sections: LSDs are computed for each section separately.

    Returns:
        3 sigma along z, y, x, rounded up to whole down-sampled voxels. With `sections`, 0 along z.
    """
    context = gp.Coordinate(math.ceil(3 * sigma / (size * downsample)) * downsample for size in voxel_size)
    return gp.Coordinate(0, *context[1:]) if sections else context
