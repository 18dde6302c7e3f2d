"""Score segmentations: python 06_evaluate_volumes.py -c CKPT_FOLDER/config_predict.yaml"""

from lsdseg.cli import run_script
from lsdseg.engine.evaluate.evaluate import evaluate

if __name__ == "__main__":
    run_script(
        evaluate,
        description="Score the segmentations of all test volumes with ground truth: VOI and adapted Rand error.",
        example="python 06_evaluate_volumes.py -c config/config_predict.py",
        default_config="config/config_predict.py",
    )
