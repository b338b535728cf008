"""A U-Net that draws what it finds in a picture or a volume."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from cloister_shared.networks.images import GROUP, GROUPED


def unet(shape: tuple[int, ...], width: int) -> nn.Sequential:
    """MONAI's BasicUNet (Falk et al. 2019) from [n, channels * pixels] to a logit a pixel, [n, pixels].

    ``width`` channels at full size, and up to eight times as many at a sixteenth of it. GroupNorm in the place of
    InstanceNorm; what goes up again is interpolated, not convolved, so that every layer has a fast exact clip.
    """
    from monai.networks.nets.basic_unet import BasicUNet

    assert width % GROUP == 0
    body: Any = BasicUNet(
        spatial_dims=len(shape) - 1,
        in_channels=shape[0],
        out_channels=1,
        features=(width, width, 2 * width, 4 * width, 8 * width, width),
        act=("leakyrelu", {"negative_slope": 0.1, "inplace": False}),
        norm=GROUPED,
        upsample="nontrainable",
    )
    head, body.final_conv = body.final_conv, nn.Identity()
    parts = OrderedDict[str, nn.Module](shape=nn.Unflatten(1, shape), body=body, head=head, flat=nn.Flatten())
    return nn.Sequential(parts)
