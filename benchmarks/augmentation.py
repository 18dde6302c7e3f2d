"""Draw twelve augmented patches of a phantom, two of each kind: the picture docs/augmentation.png.

python benchmarks/augmentation.py --to docs/augmentation.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.engine.training.appearance import CHANGES, changed

SIZE = 96


def draw(target: Path) -> None:
    """Write the picture."""
    raw = make_phantom((SIZE // 3, SIZE, SIZE), seed=1)[0].astype(np.float32) / 255
    model = get_cfg_defaults().MODEL_ISO
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(2, len(CHANGES))
    for column, change in enumerate(CHANGES):
        for row in range(2):
            patch = changed(
                raw, np.random.default_rng([row, column]), [(change.function, 1.0, model[f"AMOUNT_{change.name}"])]
            )
            # Show the section that changed most.
            section = int(np.abs(patch - raw).mean((1, 2)).argmax())
            axes = panels[row, column]
            axes.imshow(patch[section], cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            axes.set_title(change.name if not row else "")
    figure.savefig(target, dpi=80)
    print(target)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="the picture, a PNG file")
    draw(parser.parse_args().to)


if __name__ == "__main__":
    main()
