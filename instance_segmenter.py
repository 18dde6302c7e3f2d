"""Segment predicted affinities in memory: python instance_segmenter.py -c CKPT_FOLDER/config_predict.yaml"""

from lsdseg.cli import deferred, run_script

segment = deferred("lsdseg.engine.post.whole:segment")

if __name__ == "__main__":
    run_script(
        segment,
        description="Segment the affinities that predicter.py wrote, once for each of INS_SEGMENT.THRESHOLDS.",
        example="python instance_segmenter.py -c config/config_predict.py INS_SEGMENT.MERGE_FUNCTION mean",
        default_config="config/config_predict.py",
    )
