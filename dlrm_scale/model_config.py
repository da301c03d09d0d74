"""The dense archs that there are: the section `model` of a `RunConfig`, one class each."""

from typing import Literal

from pydantic import Field, model_validator

from dlrm_scale.strict import Strict


class InterFormerConfig(Strict):
    """arXiv 2411.09852; the defaults are docs/interformer.md's readings of what the paper leaves open."""

    arch: Literal["interformer"] = "interformer"
    dim: int = Field(64, gt=0, description="d, of every token; tables of another width are projected to it")
    num_feature_tokens: int | None = Field(
        None,
        gt=1,
        description="mix the features' tokens to this many first (LCE), where there are hundreds; None: keep all",
    )
    num_layers: int = Field(3, gt=0)
    num_heads: int = Field(4, gt=0)
    num_cls: int = Field(4, gt=0, description="n_CLS = n_sum: summary tokens of the non-sequence features")
    num_pma: int = Field(2, ge=0, description="pooling-by-attention tokens; 0 leaves them out")
    num_recent: int = Field(2, ge=0, description="most recent events in the summary; 0 leaves them out")
    mode: Literal["int", "s2n", "n2s", "sep", "sole"] = Field(
        "int",
        description="exchange: both ways, sequence to non-sequence only, the reverse only, none, or no sequence arch (pooled early)",
    )
    early_pooling: Literal["mean", "mlp", "mha"] = Field("mean", description="of the sequence, in mode sole")
    gating: Literal["mask", "sigmoid", "tanh", "identity", "sigmoid_times_x", "none"] = Field(
        "mask", description="x * sigmoid(MLP(x)) | f(x * MLP(x)) | sigmoid(x * MLP(x)) * x | no gate"
    )
    pffn: Literal["rank", "matrix", "two_layer", "gdpa", "none"] = "two_layer"
    pffn_hidden: int | None = Field(None, gt=0, description="K of two_layer and gdpa; None: dim")
    pffn_kernel: Literal["torch", "triton", "auto"] = Field(
        "torch",
        description="of two_layer on CUDA: PyTorch's operations, one fused kernel, or that wherever it can run; on a CPU bf16 has one of its own",
    )
    attention: bool = Field(True, description="False leaves the sequence arch's MHA out")
    paper_literal: bool = Field(False, description="Eq. 9 as printed: no residual, no pre-norm")
    mask_ratio: float = Field(1.0, gt=0, description="hidden width of MaskNet's mask MLP over its input width")
    mask_activation: Literal["none", "sigmoid"] = "none"
    pma_sees_cls: bool = True
    rope_base: float = Field(10_000.0, gt=1)
    interactions: tuple[Literal["dot", "dcn"], ...] = Field(("dot", "dcn"), min_length=1, description="DHEN's modules")
    ensemble: Literal["sum", "concat"] = "sum"
    dcn_layers: int = Field(2, gt=0)
    dcn_rank: int = Field(32, gt=0)
    head_hidden: tuple[int, ...] = (1024, 512, 256, 128)
    dropout: float = Field(0.0, ge=0, lt=1, description="of the head's hidden layers and the outputs of PFFN and MHA")

    @model_validator(mode="after")
    def _check(self) -> "InterFormerConfig":
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"model.dim ({self.dim}) over model.num_heads ({self.num_heads}) must be an even whole number (rotary pairs); "
                f"set model.num_heads to {self._nearest_heads()} or change model.dim"
            )
        if self.mode != "sole" and not (self.attention or self.num_pma or self.num_recent):
            raise ValueError(
                "model.attention is false and model.num_pma and model.num_recent are 0, so that nothing would read the events; "
                "keep one of them, or set model.mode=sole"
            )
        return self

    def _nearest_heads(self) -> int:
        fits = [h for h in range(1, self.dim + 1) if self.dim % h == 0 and (self.dim // h) % 2 == 0] or [1]
        return min(fits, key=lambda h: abs(h - self.num_heads))


class DLRMConfig(Strict):
    """DLRM (arXiv 1906.00091): pairwise dot products. A sequence counts as a bag: the mean of its events."""

    arch: Literal["dlrm"] = "dlrm"
    bottom_hidden: tuple[int, ...] = Field(
        (512, 256), description="before the last layer, whose width is the tables' dim"
    )
    top_hidden: tuple[int, ...] = (512, 512, 256)


class DCNv2Config(Strict):
    """DLRM-DCNv2 as in MLPerf: low-rank cross layers. A sequence counts as a bag: the mean of its events."""

    arch: Literal["dlrm_dcnv2"] = "dlrm_dcnv2"
    bottom_hidden: tuple[int, ...] = Field(
        (512, 256), description="before the last layer, whose width is the tables' dim"
    )
    cross_layers: int = Field(3, gt=0)
    cross_rank: int = Field(512, gt=0)
    top_hidden: tuple[int, ...] = (1024, 1024, 512, 256)


class LogisticConfig(Strict):
    """Logistic regression on the same features: the floor that every other model must beat."""

    arch: Literal["logistic"] = "logistic"
