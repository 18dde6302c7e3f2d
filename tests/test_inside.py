import pytest
import torch

from lsdseg.models.inside import features_inside
from lsdseg.models.unet import UNet


def network(factors, down, up, **more):
    torch.manual_seed(0)
    return UNet(1, 3, 2, factors, down, up, padding="same", activation="leaky_relu", **more).eval()


TWICE = [(3, 3, 3), (3, 3, 3)]
NETWORKS = {
    "isotropic": ([(2, 2, 2)] * 3, [TWICE] * 4, [TWICE] * 3, (48, 56, 64)),
    "anisotropic": (
        [(1, 2, 2), (2, 3, 3)],
        [[(1, 3, 3)] * 2, TWICE, [(3, 5, 5)]],
        [[(1, 3, 3)], TWICE],
        (20, 48, 60),
    ),
    "even kernels": ([(2, 2, 2)], [[(2, 4, 3)], TWICE], [[(4, 2, 2), (3, 3, 3)]], (24, 24, 24)),
    "2D": ([(2, 2), (2, 2)], [[(3, 3)] * 2] * 3, [[(3, 3)] * 2] * 2, (64, 80)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_box_has_the_values_of_the_whole(name):
    *layers, shape = NETWORKS[name]
    unet = network(*layers)
    x = torch.rand(2, 1, *shape)
    boxes = [
        tuple((0, n) for n in shape),  # all of it
        tuple((n // 3, n // 2) for n in shape),
        tuple((n // 2 - 1, n // 2) for n in shape),  # one voxel
        ((0, 5), *((n - 7, n) for n in shape[1:])),  # where the input ends
    ]
    with torch.no_grad():
        whole = unet(x)
        for box in boxes:
            expected = whole[(..., *(slice(*ends) for ends in box))]
            torch.testing.assert_close(features_inside(unet, x, box), expected, rtol=1e-4, atol=1e-5)
