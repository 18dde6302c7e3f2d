"""Region adjacency graphs: fragments as nodes, scored contacts as edges, kept where all workers can reach them."""

import math
import os
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.data_utils.layout import rag_folder, sample_name
from lsdseg.rag.mongo import MongoStore
from lsdseg.rag.parquet import ParquetStore
from lsdseg.rag.store import RagStore

__all__ = ["MongoStore", "ParquetStore", "RagStore", "open_store", "sample_name"]

# Folders above SAMPLE.zarr that tell outputs of one sample apart: MODEL_TYPE, {2d,3d}, RUN, CHECKPOINT.
OUTPUT_PARTS = 5


def open_store(cfg: CfgNode, output: Path | str, mode: str = "r") -> RagStore:
    """The graph of the sample that is segmented in a zarr.

    Args:
        cfg: the loaded config. A URI in the environment variable LSD_DB_URI, or else DATA.DB_HOST, chooses MongoDB;
            without them the graph is Parquet files beside the zarr, in SAMPLE.rag.
        output: SAMPLE.zarr.
        mode: "r" to read, "r+" to read and write, "w" to drop what is there first: see `RagStore`.

    Raises:
        UserError: within 10 seconds, if the server or the graph cannot be used.
    """
    output = Path(output)
    voxels_in_block = math.prod(cfg.INS_SEGMENT.BLOCK_SIZE)
    uri = os.environ.get("LSD_DB_URI") or cfg.DATA.DB_HOST
    if not uri:
        return ParquetStore(rag_folder(output), voxels_in_block, mode)
    # Collections are named by the sample alone, so the output is recorded: two checkpoints must not mix their graphs.
    # Machines may mount a folder at different places, so only the last parts of its path count.
    origin = "/".join(output.absolute().parts[-OUTPUT_PARTS:])
    return MongoStore(uri, cfg.DATA.DB_NAME, sample_name(output), voxels_in_block, mode, origin)
