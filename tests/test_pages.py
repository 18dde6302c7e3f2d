"""Every report in a real browser: wide and light, narrow and dark, with few neurons, thousands and odd names."""

import numpy as np
import pytest
from PIL import Image
from test_view import chromium  # noqa: F401
from torch.utils.tensorboard import SummaryWriter

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import data_folder, neurons_path, output_path, scores_path
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.volumes import write_array
from lsdseg.engine.evaluate.evaluate import evaluate
from lsdseg.engine.training.report import report_training
from lsdseg.engine.training.volumes_report import report_volumes

ODD = "a_name_" * 20 + "<b>&'x"
MOST_BYTES = 2_000_000
WINDOWS = [(1600, "light"), (380, "dark")]

# What does not fit: elements whose content is wider than they are, and words that leave their drawing or meet in it.
MISFITS = """() => {
    const found = [], meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
    for (const e of document.querySelectorAll('html, body *:not(svg *)'))
        if (e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.matches('.scroll')) found.push(e.outerHTML);
    for (const svg of document.querySelectorAll('svg')) {
        const frame = svg.getBoundingClientRect();
        const words = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
        for (const [n, [text, box]] of words.entries()) {
            if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1) found.push(`${text} leaves ${svg.ariaLabel}`);
            for (const [other, there] of words.slice(n + 1))
                if (meet(box, there)) found.push(`${text} meets ${other} in ${svg.ariaLabel}`);
        }
    }
    return found.map(words => words.slice(0, 200));
}"""

# Texts whose contrast is below 4.5, as the Web Content Accessibility Guidelines 2.1 define it (criterion 1.4.3).
FAINT = """() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = color => parts(color).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
    const found = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let seen = 0;
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement, style = getComputedStyle(e);
        if (!walk.currentNode.data.trim()) continue;
        let back = e;
        while (parts(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
        const pair = [e.closest('svg') ? style.fill : style.color, getComputedStyle(back).backgroundColor];
        const [low, high] = pair.map(luminance).sort((a, b) => a - b);
        seen += 1;
        if ((high + 0.05) / (low + 0.05) < 4.5) found.add(`${walk.currentNode.data.slice(0, 40)}: ${pair}`);
    }
    return [seen, [...found]];
}"""


def make_sample(home, name, raw, truth, segmentations, voxel_size):
    """Write a volume and its segmentations, score them, and return the paths of volume and report."""
    overrides = {"DATA.HOME": home, "TRAIN.CHECKPOINT": home / "run" / "model_checkpoint_1"}
    overrides["MODEL_ISO.VOXEL_SIZE"] = voxel_size
    cfg = load_config(overrides=[str(part) for pair in overrides.items() for part in pair])
    volume = data_folder(cfg, "test") / f"{name}.zarr"
    output, place = output_path(cfg, volume), {"voxel_size": voxel_size, "offset": (12_340, 0, 500)}
    write_array(volume, "volumes/raw", raw, **place)
    write_array(volume, "volumes/labels/neuron_ids", truth, **place)
    for number, labels in enumerate(segmentations, 1):
        function = f"hist_quant_{30 + number % 3}_initmax"
        made = {"method": "waterz", "merge_function": function, "threshold": number / 20}
        dataset = f"volumes/final_segmentation_{function}_{5 * number:03}"
        write_array(output, dataset, labels, attributes=made, **place)
    evaluate(cfg)
    return volume, output


def spoiled(labels, number):
    """Merge some labels, the more the larger the number is, and cut the others, the fewer."""
    half = np.indices(labels.shape)[2] > labels.shape[2] // 2
    merged = np.where(labels % 12 < number, labels // 6 * 6 + 1, labels)
    return np.where(half & (labels % 9 > number), merged + np.uint64(10**6), merged)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports by name, and the output of the sample with thousands of neurons."""
    folder = tmp_path_factory.mktemp("pages")
    raw, labels, _ = make_phantom((24, 64, 64), seed=1)
    few = np.minimum(labels, np.uint64(3))
    z, y, x = np.indices((20, 100, 120)) // 4
    many = (1 + x + 30 * (y + 25 * z)).astype(np.uint64)
    noise = np.random.default_rng(0).integers(0, 256, many.shape, np.uint8)
    samples = [
        make_sample(folder / "few", "few", raw, few, [spoiled(few, n) for n in (1, 2, 3)], (10, 10, 10)),
        make_sample(folder / "many", "many", noise, many, [spoiled(many, n) for n in (1, 3, 5, 6)], (10, 10, 10)),
        make_sample(folder / "odd", ODD, raw[:1], labels[:1], [spoiled(labels[:1], 3)], (40, 4, 4)),
    ]
    report_volumes([str(volume) for volume, _ in samples], None, folder / "volumes.html")
    report_volumes([str(samples[2][0])], None, folder / "volume.html")
    with SummaryWriter(str(folder / "logs" / ODD)) as writer:
        for step in range(0, 4000, 100):
            for name in ("loss/lsds", "loss/total", "validation/voi_sum", f"dead_channels/{ODD}"):
                writer.add_scalar(name, 1e4 / (step + 1), step)
        writer.add_image("preview/lsds", np.zeros((3, 40, 900), np.uint8), 100)
    report_training([str(folder / "logs")], None, folder / "training.html")
    found = {name: folder / f"{name}.html" for name in ("volumes", "volume", "training")}
    found |= {name: scores_path(s[1], "html") for name, s in zip(("few", "many", "odd"), samples, strict=True)}
    return found, samples[1][1]


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
@pytest.mark.parametrize("name", ["few", "many", "odd", "volumes", "volume", "training"])
def test_page_fits_and_can_be_read(pages, chromium, name, width, scheme):  # noqa: F811
    path, errors = pages[0][name], []
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("request", lambda request: request.url[:5] in ("file:", "data:") or errors.append(request.url))
    tab.goto(path.as_uri())
    assert tab.evaluate(MISFITS) == []
    seen, faint = tab.evaluate(FAINT)
    assert seen > 50
    assert faint == []
    assert errors == []
    tab.close()
    assert path.stat().st_size < MOST_BYTES


def test_no_text_of_the_plot_is_cut(pages):
    with Image.open(scores_path(pages[1], "png")) as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels[:, [0, 1, -2, -1]] == 255).all()
    assert (pixels[[0, 1, -2, -1]] == 255).all()


def test_all_neurons_are_listed(pages):
    listed = np.genfromtxt(neurons_path(pages[1]), delimiter=",", names=True)
    assert sorted(listed["neuron"]) == list(range(1, 25 * 30 * 5 + 1))
    assert (np.diff(listed["share"]) <= 0).all()
    assert listed["share"].sum() == pytest.approx(1)
