"""Networks that look at a picture or a volume. All of them normalise each record by itself: GroupNorm (Wu and He 2018).

MONAI's models come with BatchNorm, whose means of a batch no clip bounds; here they get groups of eight channels
instead, and activations that leave their inputs alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cloister_shared.noise import Entropy, gaussians, uniforms

if TYPE_CHECKING:
    from cloister_shared.tasks.task import Augment

GROUP = 8
"""Channels that one group holds."""

GROUPED: tuple[str, dict[str, Any]] = ("group", {"num_groups": GROUP})
"""MONAI's name for a normalisation over eight groups; every width of its models here is a multiple of eight."""

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_POOLS: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEANS: dict[int, Any] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

_MOBILE = (
    "r1_k3_s11_e1_i32_o16_se0.25",
    "r2_k3_s22_e6_i16_o24_se0.25",
    "r2_k5_s22_e6_i24_o40_se0.25",
    "r3_k3_s22_e6_i40_o80_se0.25",
    "r3_k5_s11_e6_i80_o112_se0.25",
    "r4_k5_s22_e6_i112_o192_se0.25",
    "r1_k3_s11_e6_i192_o320_se0.25",
)
"""EfficientNet-B0's blocks (Tan and Le 2019, table 1), as MONAI writes them."""


def convolutional(shape: tuple[int, ...], widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Layers ``conv_i``, ``norm_i``, ``relu_i``, ``pool_i``, …, ``head`` for inputs [n, channels * pixels].

    ``shape`` is [channels, *size]. Each stage but the last halves the size; the head sees each channel's mean.
    """
    channels, dimensions = shape[0], len(shape) - 1
    layers: OrderedDict[str, nn.Module] = OrderedDict(shape=nn.Unflatten(1, shape))
    for i, width in enumerate(widths):
        layers[f"conv_{i}"] = _CONVOLUTIONS[dimensions](channels, width, 3, padding=1)
        layers[f"norm_{i}"] = nn.GroupNorm(width // GROUP, width)
        layers[f"relu_{i}"] = nn.ReLU()
        if i + 1 < len(widths):
            layers[f"pool_{i}"] = _POOLS[dimensions](2)
        channels = width
    layers["mean"] = _MEANS[dimensions](1)
    layers["flat"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, outputs)
    return nn.Sequential(layers)


def densenet121(shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """MONAI's DenseNet121 (Huang et al. 2017) as ``body``, and ``head``."""
    from monai.networks.nets.densenet import DenseNet121

    body: Any = DenseNet121(
        spatial_dims=len(shape) - 1,
        in_channels=shape[0],
        out_channels=outputs,
        act=("relu", {"inplace": False}),
        norm=GROUPED,
    )
    head, body.class_layers.out = body.class_layers.out, nn.Identity()
    return nn.Sequential(OrderedDict(shape=nn.Unflatten(1, shape), body=body, head=head))


def efficientnet_b0(shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """MONAI's EfficientNet-B0 (Tan and Le 2019) as ``body``, and ``head``.

    Without dropout of layers or of units: clipping and noise regularise enough, and a step is then a function of what
    was drawn for it alone.
    """
    from monai.networks.nets.efficientnet import EfficientNet

    body: Any = EfficientNet(
        list(_MOBILE),
        spatial_dims=len(shape) - 1,
        in_channels=shape[0],
        num_classes=outputs,
        image_size=max(shape[1:]),
        norm=GROUPED,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    body.set_swish(memory_efficient=False)  # the other one writes a backward pass of its own
    head, body._fc = body._fc, nn.Identity()
    return nn.Sequential(OrderedDict(shape=nn.Unflatten(1, shape), body=body, head=head))


def varied(pictures: Tensor, terms: Augment, entropy: Entropy) -> Tensor:
    """Each picture of [n, channels, *size] moved, mirrored and dimmed by draws of its own."""
    n, size = len(pictures), pictures.shape[2:]
    for axis, length in enumerate(size):
        at = torch.arange(length).expand(n, length)
        if terms.shift:
            draws = np.floor(uniforms(entropy, n) * (2 * terms.shift + 1)) - terms.shift
            # What moves in from beyond the border is the border.
            at = (at - torch.from_numpy(draws).long()[:, None]).clamp(0, length - 1)
        if terms.flip and axis == len(size) - 1:
            mirrored = torch.from_numpy(uniforms(entropy, n) < 0.5)[:, None]
            at = torch.where(mirrored, length - 1 - at, at)
        if terms.shift or terms.flip:
            line = at.view(n, 1, *[length if k == axis else 1 for k in range(len(size))])
            pictures = pictures.gather(2 + axis, line.expand(pictures.shape))
    if terms.jitter:
        drawn = (terms.jitter * gaussians(entropy, 2 * n)).astype(np.float32)
        contrast, brightness = torch.from_numpy(drawn).view(2, n, *[1] * (1 + len(size)))
        pictures = pictures * (1 + contrast) + brightness
    return pictures
