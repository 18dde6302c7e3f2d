"""Segment predicted affinities, in memory: python instance_segmenter.py -c CKPT_FOLDER/config_predict.yaml"""

from engine.cli import run_script
from engine.post.segment import segment

if __name__ == "__main__":
    run_script(
        segment,
        description="Segment the affinities that predicter.py wrote, once for every INS_SEGMENT.THRESHOLDS.",
        example="python instance_segmenter.py -c config/config_predict.py INS_SEGMENT.MERGE_FUNCTION mean",
        default_config="config/config_predict.py",
    )
