"""Score the edges between fragments block by block: python 03_agglomerate_blockwise.py -c FILE"""

from lsdseg.cli import deferred, run_script

agglomerate_blockwise = deferred("lsdseg.engine.post.steps.edges:agglomerate_blockwise")

if __name__ == "__main__":
    run_script(
        agglomerate_blockwise,
        description="Score the edges between the fragments of every test volume, block by block.",
        example="python 03_agglomerate_blockwise.py -c config/config_predict.py INS_SEGMENT.MERGE_FUNCTION mean",
        default_config="config/config_predict.py",
    )
