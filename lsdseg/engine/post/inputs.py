"""What fragments and segmentations are made from, by instance_segmenter.py in memory or by 02 in blocks."""

from lsdseg.data_utils.records import identity
from lsdseg.data_utils.volumes import require_whole
from lsdseg.engine.post.placement import PLACEMENT, open_placement
from lsdseg.engine.sample import AFFINITIES, Sample

IN_MEMORY, IN_BLOCKS = "instance_segmenter.py", "02_extract_fragments_blockwise.py"


def inputs_of(sample: Sample) -> dict[str, str]:
    """Return name -> id of what the method of INS_SEGMENT reads: affinities, and placement and mask if it takes them.

    Raises:
        UserError: there are no affinities, or one of the inputs cannot be used or has lost chunks.
    """
    for name in (AFFINITIES, PLACEMENT):
        require_whole(sample.output, name)
    inputs = {AFFINITIES: sample.affinities, PLACEMENT: open_placement(sample), "the mask": sample.mask}
    return {name: identity(array) for name, array in inputs.items() if array is not None}
