"""In what numbers ranks talk to each other: looked-up rows and their gradients, and the dense gradients."""

from typing import Literal

from pydantic import Field

from dlrm_scale.strict import Strict

# INT8 and FP8 are left out: TorchRec 1.8.0 has no reduce-scatter of them, so that row-wise tables would fail or fall back to fp16
CommunicationPrecision = Literal["fp32", "fp16", "bf16"]


class Communication(Strict):
    """Of the exchanges between a table's ranks and those that look it up (sums of row-wise shards too).

    fp16 has 3 decimal digits, but nothing above 65,504 (clamped) or below 6e-8 (zero): gradients of a mean over a large batch can
    be that small, so bf16 (2 digits, fp32's range) is the safer one backward.
    """

    forward: CommunicationPrecision = Field("fp32", description="of looked-up and pooled rows")
    backward: CommunicationPrecision = Field("fp32", description="of the gradients of those rows")


PLAIN = Communication()


class AllReduce(Strict):
    """Of the gradients of the dense arch, averaged over ranks while the backward pass goes on."""

    bucket_mb: int = Field(25, gt=0, description="gradients are sent as soon as so many MiB of them are there")
    precision: CommunicationPrecision = Field(
        "fp32", description="gradients are rounded to it, summed in it and kept in fp32 again"
    )
