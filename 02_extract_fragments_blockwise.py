"""Extract fragments and graph nodes block by block: python 02_extract_fragments_blockwise.py -c FILE"""

from lsdseg.cli import deferred, run_script

extract_fragments_blockwise = deferred("lsdseg.engine.post.steps.fragments:extract_fragments_blockwise")

if __name__ == "__main__":
    run_script(
        extract_fragments_blockwise,
        description="Watershed the predicted affinities of every test volume into fragments, block by block.",
        example="python 02_extract_fragments_blockwise.py -c config/config_predict.py SYSTEM.NUM_WORKERS 8",
        default_config="config/config_predict.py",
    )
