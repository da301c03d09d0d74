"""The predictor's network: M members as one, every product a batched one, so that an ensemble costs what a larger network would.

Each member is the analytic model with prices it may change, and a residual network on top:
    log ms = log(sum_k exp(price_k) term_k + sum_e worth_e extra_e) + shift + MLP(inputs)
    logit of fitting = sharpness x (1 - sum_p exp(price_p) fill_p) + MLP(inputs)
Prices, worths, shift and the last layer begin at zero: untrained, each member is the analytic model, and the planner's count of
memory, exactly.
"""

# M members  N runs  K terms  E extras  F inputs  H hidden  P pairs
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FITS_SHARPNESS = 25.0  # of the logit, over the part of its memory that a rank has left
LEAST_PART = 0.05  # of the analytic time that extras with a negative price leave


@dataclass(frozen=True)
class Inputs:
    terms_NK: Tensor
    extras_NE: Tensor
    inputs_NF: Tensor  # standardised
    log_samples_N: Tensor
    fill_N3: Tensor


@dataclass(frozen=True)
class Targets:
    """A run that does not fit has log_ms 0, and no time. `group`: workload, within which runs are ranked."""

    log_ms_N: Tensor
    fits_N: Tensor
    group_N: Tensor


class Ensemble(nn.Module):
    def __init__(
        self, members: int, terms: int, extras: int, inputs: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * (2 / shape[1]) ** 0.5)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.fill_price_M3, self.sharpness_M = zeros(members, 3), zeros(members)
        self.price_MK, self.worth_ME, self.shift_M = zeros(members, terms), zeros(members, extras), zeros(members)
        self.w1_MFH, self.b1_M1H = drawn(members, inputs, hidden), zeros(members, 1, hidden)
        self.w2_MHH, self.b2_M1H = drawn(members, hidden, hidden), zeros(members, 1, hidden)
        self.out_MH2, self.out_M12 = zeros(members, hidden, 2), zeros(members, 1, 2)

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """(M, N) log ms, and (M, N) the logit of fitting."""
        hidden = functional.silu(x.inputs_NF @ self.w1_MFH + self.b1_M1H)
        hidden = functional.silu(torch.baddbmm(self.b2_M1H, hidden, self.w2_MHH))
        residual, fits = torch.baddbmm(self.out_M12, hidden, self.out_MH2).unbind(-1)
        analytic_N = x.terms_NK.sum(1)
        priced = self.price_MK.exp() @ x.terms_NK.T + functional.elu(self.worth_ME) @ x.extras_NE.T
        log_ms = torch.maximum(priced, LEAST_PART * analytic_N).log() + self.shift_M.unsqueeze(1) + residual
        left = 1 - self.fill_price_M3.exp() @ x.fill_N3.T
        return log_ms, FITS_SHARPNESS * self.sharpness_M.exp().unsqueeze(1) * left + fits


@dataclass(frozen=True)
class Training:
    steps: int = 200
    lr: float = 0.03
    fits_weight: float = 2.0
    rank_weight: float = 0.5
    pairs_per_run: int = 4
    price_decay: float = 3e-3
    network_decay: float = 3e-3
    worth_decay: float = 1e-3


def train(
    ensemble: Ensemble, x: Inputs, y: Targets, weight_MN: Tensor, how: Training, generator: torch.Generator
) -> None:
    """`weight_MN`: 0 where a member must not see a run."""
    timed_N = y.fits_N
    network = [ensemble.w1_MFH, ensemble.w2_MHH, ensemble.out_MH2]
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=how.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=how.steps, pct_start=0.1)
    first, second = _pairs(y.group_N, timed_N, how.pairs_per_run, generator)
    timed_MN = weight_MN * timed_N
    weights_M1 = timed_MN.sum(1, keepdim=True).clamp(min=1e-6)
    fit_weights_M1 = weight_MN.sum(1, keepdim=True).clamp(min=1e-6)
    for _ in range(how.steps):
        log_ms_MN, logit_MN = ensemble(x)
        loss = (functional.huber_loss(log_ms_MN, y.log_ms_N.expand_as(log_ms_MN), reduction="none", delta=0.3)
                * timed_MN / weights_M1).sum()  # fmt: skip
        if len(first):
            loss = loss + how.rank_weight * _ranking_loss(log_ms_MN, x, y, first, second, timed_MN)
        wrong = functional.binary_cross_entropy_with_logits(
            logit_MN, y.fits_N.float().expand_as(logit_MN), reduction="none"
        )
        loss = loss + how.fits_weight * (wrong * weight_MN / fit_weights_M1).sum()
        loss = loss + how.price_decay * ensemble.fill_price_M3.square().sum()
        centred = ensemble.price_MK - ensemble.price_MK.mean(1, keepdim=True)
        loss = loss + how.price_decay * centred.square().sum() + how.worth_decay * ensemble.worth_ME.square().sum()
        loss = loss + how.network_decay * sum(w.square().sum() / w.shape[1] for w in network)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _pairs(group_N: Tensor, timed_N: Tensor, per_run: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pairs of measured runs of one workload."""
    runs = timed_N.nonzero().squeeze(1)
    if not len(runs):
        return runs, runs
    first = runs.repeat(per_run)
    second = runs[torch.randint(len(runs), (len(first),), generator=generator)]
    for _ in range(8):  # most draws of another workload are drawn again
        strange = group_N[first] != group_N[second]
        second = torch.where(strange, runs[torch.randint(len(runs), (len(first),), generator=generator)], second)
    kept = (group_N[first] == group_N[second]) & (first != second)
    return first[kept], second[kept]


def _ranking_loss(log_ms_MN: Tensor, x: Inputs, y: Targets, first: Tensor, second: Tensor, timed_MN: Tensor) -> Tensor:
    """Logistic, of milliseconds a sample, weighted by how far apart the two were measured: near ties are noise."""
    true_P = (y.log_ms_N - x.log_samples_N)[first] - (y.log_ms_N - x.log_samples_N)[second]
    cost_MN = log_ms_MN - x.log_samples_N
    predicted_MP = cost_MN.index_select(1, first) - cost_MN.index_select(1, second)  # indexing is slow to differentiate
    weight_MP = timed_MN[:, first] * timed_MN[:, second] * true_P.abs()
    losses = functional.softplus(-torch.sign(true_P) * predicted_MP / 0.1) * 0.1
    return (losses * weight_MP).sum(1).div(weight_MP.sum(1).clamp(min=1e-6)).sum()
