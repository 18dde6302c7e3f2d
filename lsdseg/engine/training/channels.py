"""Channels of a U-Net that have died: no input makes them positive any more.

A ReLU turns them into 0 and passes no gradient back. They therefore never return, and without a word the network works
as a smaller one. Behind a leaky ReLU they are nearly as useless, but can return. It happens where a step moves all
weights of a convolution the same way: its inputs, which are outputs of ReLUs, are all positive, so its sum moves by the
step times the number of its inputs (TRAIN.LR_FAN_IN).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lsdseg.models.unet import ACTIVATIONS, UNet


@contextmanager
def channel_maxima(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Watch the U-Net in a model while it runs. Of two U-Nets in a row, the second is watched: it is in training.

    torch.compile must be off meanwhile.

    Args:
        model: a network, or several in a row.

    Yields:
        A dictionary that fills while the model runs. Name of a layer, such as `r_conv.0.2.conv_pass.1` -> the largest
        value of each of its channels so far, float32 (channels,), on the device of the model.
    """
    maxima: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found = output.detach().amax(dim=(0, *range(2, output.ndim))).float()
            maxima[name] = torch.maximum(maxima[name], found) if name in maxima else found

        return hook

    unet = [module for module in model.modules() if isinstance(module, UNet)][-1]
    kinds = tuple(ACTIVATIONS.values())
    handles = [
        layer.register_forward_hook(watch(name)) for name, layer in unet.named_modules() if isinstance(layer, kinds)
    ]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def dead_per_level(maxima: dict[str, Tensor]) -> dict[str, int]:
    """Count the channels that were positive nowhere.

    Args:
        maxima: what `channel_maxima` filled.

    Returns:
        Level, such as `r_conv.0.2` -> number of channels of all its convolutions that were positive nowhere.
    """
    dead: dict[str, int] = {}
    for name, values in maxima.items():
        level = name.partition(".conv_pass")[0]
        dead[level] = dead.get(level, 0) + int((values <= 0).sum())
    return dead


def dead_channels(model: nn.Module, batch: Tensor) -> dict[str, int]:
    """Run a model, and count the channels that are positive nowhere.

    Args:
        model: a network, or several in a row, on the device of the batch.
        batch: its input, float32 (batch, channels, *spatial). The more it shows, the surer is the answer.

    Returns:
        What `dead_per_level` returns.
    """
    with torch.no_grad(), channel_maxima(model) as maxima:
        model(batch)
    return dead_per_level(maxima)


class ChannelWatch:
    """Find dead channels while a network trains: those that were positive in none of the last `WINDOW` watched steps.

    One step shows one patch. A channel for something rare has nothing to say in most of them. A watched step is not
    compiled, so only few steps are watched.

    Attributes:
        steps: channel maxima of the last watched steps.
        warned: share of dead channels above which the next warning is due.
    """

    WINDOW = 10
    MIN_INTERVAL = 10  # iterations between watched steps
    WORTH_A_WARNING = 0.02

    def __init__(self) -> None:
        self.steps: deque[dict[str, Tensor]] = deque(maxlen=self.WINDOW)
        self.warned = self.WORTH_A_WARNING

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Watch the step of training in this context, which then counts among the last ones."""
        with torch.compiler.set_stance("force_eager"), channel_maxima(model) as maxima:
            yield
        self.steps.append(maxima)

    def dead(self) -> dict[str, int]:
        """Return the number of dead channels of every level; {} before `WINDOW` steps were watched."""
        if len(self.steps) < self.WINDOW:
            return {}
        return dead_per_level(self._maxima())

    def warning(self) -> str | None:
        """Return what to tell the user if too many channels are dead. It is said again when they have doubled."""
        dead = self.dead()
        count, channels = sum(dead.values()), sum(len(values) for values in self._maxima().values()) if dead else 1
        if count <= self.warned * channels:
            return None
        self.warned = 2 * count / channels
        levels = ", ".join(f"{number} in {level}" for level, number in dead.items() if number)
        return (
            f"warning: {count} of {channels} channels ({count / channels:.0%}) are dead on all of the last patches "
            f"({levels}): start anew with a lower TRAIN.INITIAL_LR or TRAIN.LR_FAN_IN, or with ACTIVATION leaky_relu"
        )

    def _maxima(self) -> dict[str, Tensor]:
        return {name: torch.stack([step[name] for step in self.steps]).amax(dim=0) for name in self.steps[-1]}
