"""gunpowder nodes that gunpowder does not have, or has only slower than the training step.

Batches are made in forked worker processes. Each node is written for one batch element at a time, without state
from one request to the next.
"""

from __future__ import annotations

import multiprocessing

import fastremap
import gunpowder as gp
import numpy as np

from lsdseg.data_utils.labels import is_labeled
from lsdseg.engine.training.lsd import local_shape_descriptors


class SeedSamples(gp.BatchFilter):
    """Give every patch its own seed, drawn from the run's seed and the patch's number.

    Workers share one counter, so they never make the same patch twice, a resumed run goes on with new ones, and one
    worker gives the same patches in the same order every time. Processes that train together count in steps.

    Args:
        seed: the run's seed.
        first, step: number of the first patch, and from each to the next.
    """

    def __init__(self, seed: int, first: int, step: int):
        self.seed, self.step = seed, step
        self.next_number = multiprocessing.Value("q", first)

    def provide(self, request):
        with self.next_number.get_lock():
            number = self.next_number.value
            self.next_number.value += self.step
        state = np.random.SeedSequence([self.seed, number]).generate_state(1)
        seeded = gp.BatchRequest(random_seed=int(state[0]))
        for key, spec in request.items():
            seeded[key] = spec.copy()
        return self.get_upstream_provider().request_batch(seeded)


class LabelledLocation(gp.RandomLocation):
    """Random locations of which at least half is labelled.

    gunpowder's own `min_masked` draws locations until one fits, for ever if none can: a strong deformation asks for
    more than a small labelled volume has. Here every miss lowers what the next location has to have.
    """

    LEAST_LABELLED = 0.5
    PATIENCE = 0.98

    def __init__(self, mask: gp.ArrayKey, known: gp.Roi):
        """known: ROI of the labels mask without its margins."""
        super().__init__()
        self.labels_mask, self.known, self.least = mask, known, self.LEAST_LABELLED

    def setup(self):
        super().setup()
        request = gp.BatchRequest({self.labels_mask: gp.ArraySpec(self.known)})
        # Counting in a box takes milliseconds; sums that spare it would take eight bytes for each of these.
        self.labelled = self.get_upstream_provider().request_batch(request)[self.labels_mask].data > 0

    def accepts(self, request):
        box = (request[self.labels_mask].roi - self.known.offset) / self.spec[self.labels_mask].voxel_size
        inside = box.intersect(gp.Roi((0,) * box.dims, self.labelled.shape))
        share = np.count_nonzero(self.labelled[inside.to_slices()]) / box.size
        accepted = share >= self.least
        self.least = self.LEAST_LABELLED if accepted else self.least * self.PATIENCE
        return accepted


class Relabel(gp.BatchFilter):
    """Replace labels by `new_labels` of them, of type `dtype`."""

    dtype: type

    def __init__(self, labels: gp.ArrayKey):
        self.labels = labels

    def new_labels(self, labels: np.ndarray) -> np.ndarray:
        """What becomes of labels (z, y, x)."""
        raise NotImplementedError

    def setup(self):
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.dtype = self.dtype
        self.updates(self.labels, spec)

    def prepare(self, request):
        deps = gp.BatchRequest()
        deps[self.labels] = request[self.labels].copy()
        deps[self.labels].dtype = None
        return deps

    def process(self, batch, request):
        array = batch[self.labels]
        array.data = self.new_labels(array.data).astype(self.dtype)
        array.spec.dtype = self.dtype


class CompactLabels(Relabel):
    """Renumber labels to 1..n as uint32; background stays 0, and ids that mean "not labelled" become 0.

    Deforming goes through float64 and affinities through int32: ids of large volumes would collide in either.
    """

    dtype = np.uint32

    def new_labels(self, labels):
        return fastremap.renumber(np.where(is_labeled(labels), labels, 0), preserve_zero=True)[0]


class Binarize(Relabel):
    """Replace labels by 1, uint8, where they are not 0."""

    dtype = np.uint8

    def new_labels(self, labels):
        return labels != 0


class PadLabels(gp.BatchFilter):
    """Provide labels in all of a ROI (nm), 0 where there are none.

    gunpowder's node warns of requests that lie wholly outside of what is known, and then fails.
    """

    def __init__(self, labels: gp.ArrayKey, roi: gp.Roi):
        self.labels, self.roi = labels, roi

    def setup(self):
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.roi = self.roi
        self.updates(self.labels, spec)

    def prepare(self, request):
        known = self.get_upstream_provider().spec[self.labels].roi
        inside = request[self.labels].roi.intersect(known)
        request[self.labels].roi = gp.Roi(known.begin, known.shape * 0) if inside.empty else inside

    def process(self, batch, request):
        array, roi = batch[self.labels], request[self.labels].roi
        padded = np.zeros(roi.shape / array.spec.voxel_size, array.data.dtype)
        padded[((array.spec.roi - roi.begin) / array.spec.voxel_size).to_slices()] = array.data
        array.data, array.spec.roi = padded, roi


class GrowBoundary(gp.BatchFilter):
    """Erode every label by `steps` voxels (6-neighborhood, in-plane 4-neighborhood with `only_xy`).

    Same result as gunpowder's node of this name, for all labels at once instead of one after the other.
    """

    def __init__(self, labels: gp.ArrayKey, steps: int, only_xy: bool):
        self.labels, self.steps, self.axes = labels, steps, (1, 2) if only_xy else (0, 1, 2)

    def setup(self):
        self.enable_autoskip()
        self.updates(self.labels, self.spec[self.labels])

    def process(self, batch, request):
        labels = batch[self.labels].data.copy()
        for _ in range(self.steps):
            boundary = np.zeros(labels.shape, dtype=bool)
            for axis in self.axes:
                before = (slice(None),) * axis + (slice(None, -1),)
                after = (slice(None),) * axis + (slice(1, None),)
                differs = labels[before] != labels[after]
                boundary[before] |= differs
                boundary[after] |= differs
            labels[boundary] = 0
        batch[self.labels].data = labels


class AddLocalShapeDescriptors(gp.BatchFilter):
    """Add LSDs of the labels, and their weights: 1 where a voxel is labelled and inside the mask.

    Args:
        labels, mask: keys of the labels and of the labels mask.
        lsds, weights: keys to provide, both (10 or 6, z, y, x) float32.
        sigma: standard deviation in nm.
        downsample: every n-th voxel only.
        sections: compute the six LSDs of each section by itself.

    Asks for 3 sigma of labels around the LSDs, beyond which a voxel has no weight in them.
    """

    def __init__(self, labels, mask, lsds, weights, *, sigma: float, downsample: int, sections: bool = False):
        self.labels, self.mask, self.lsds, self.weights = labels, mask, lsds, weights
        self.sigma, self.downsample, self.sections = sigma, downsample, sections

    def setup(self):
        self.enable_autoskip()
        spec = self.spec[self.labels].copy()
        spec.dtype, spec.interpolatable = np.float32, True
        self.provides(self.lsds, spec)
        self.provides(self.weights, spec.copy())
        self.context = lsd_context(self.sigma, spec.voxel_size, self.downsample, self.sections)

    def prepare(self, request):
        roi = request[self.lsds].roi
        deps = gp.BatchRequest()
        deps[self.labels] = gp.ArraySpec(roi=roi.grow(self.context, self.context))
        deps[self.mask] = gp.ArraySpec(roi=roi)
        return deps

    def process(self, batch, request):
        roi, labels = request[self.lsds].roi, batch[self.labels]
        voxel_size = labels.spec.voxel_size
        if self.sections:
            of_section = [
                local_shape_descriptors(section, self.sigma, voxel_size[1:], downsample=self.downsample)
                for section in labels.data
            ]
            descriptors = np.stack(of_section, axis=1)
        else:
            descriptors = local_shape_descriptors(labels.data, self.sigma, voxel_size, downsample=self.downsample)
        crop = ((roi - labels.spec.roi.offset) / labels.spec.voxel_size).to_slices()
        weights = ((labels.data[crop] > 0) & (batch[self.mask].data > 0)).astype(np.float32)

        spec = self.spec[self.lsds].copy()
        spec.roi = roi
        result = gp.Batch()
        descriptors = np.ascontiguousarray(descriptors[:, *crop])
        result[self.lsds] = gp.Array(descriptors, spec)
        result[self.weights] = gp.Array(np.broadcast_to(weights, descriptors.shape).copy(), spec.copy())
        return result


class DefectAugment(gp.DefectAugment):
    """gunpowder's node, which at the end calls a method that its artifact source does not have."""

    def teardown(self):
        self.artifact_source.internal_teardown()


def lsd_context(sigma: float, voxel_size: gp.Coordinate, downsample: int, sections: bool = False) -> gp.Coordinate:
    """Labels needed around LSDs, in nm: 3 sigma, up to a multiple of the down-sampled voxel; in z none for sections."""
    step = voxel_size * downsample
    context = gp.Coordinate(int(np.ceil(3 * sigma / s)) * s for s in step)
    return gp.Coordinate(0, *context[1:]) if sections else context
