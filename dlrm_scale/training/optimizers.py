"""The optimizers of a run behind one `zero_grad` / `step`, as TorchRec's pipelines call them.

Tables that are sharded step inside the backward pass (FBGEMM); tables that a plan replicates step here, by a plain twin of
the same rule, so that the result does not depend on the plan; the dense arch has an optimizer of its own.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torchrec.optim.optimizers import in_backward_optimizer_filter

from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS, DenseOptimizer, Schedule, SparseOptimizer, TrainConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.apply import ShardedModel

FP16_DIGITS, FP16_LEAST_EXPONENT = 11, -13  # significant bits; of a normal number's frexp
TABLES = "embeddings."  # RankingModel's parameters under this prefix are tables


class ReplicatedTableOptimizer(torch.optim.Optimizer):
    """FBGEMM's exact row-wise Adagrad, Adagrad and SGD in plain torch, for tables that every rank holds whole.

    With g the gradient of a row of D columns (plus weight_decay * row, on rows with a gradient):
    row-wise Adagrad: s += mean(g * g);  row -= lr * g / (sqrt(s) + eps), s one number a row;
    Adagrad: the same with s of D numbers, s += g * g;  SGD: row -= lr * g.
    fp16 rows are rounded to the nearest, or with `stochastic_rounding` by chance: the same on every rank.

    Raises:
        ConfigError: for another rule; a replicated table would silently learn by another one than a sharded table.
    """

    def __init__(self, tables: Iterable[nn.Parameter], config: SparseOptimizer) -> None:
        if config.name not in PLAIN_SPARSE_OPTIMIZERS:
            raise ConfigError(
                f"the plan replicates a table (data_parallel), which can train by {', '.join(PLAIN_SPARSE_OPTIMIZERS)}, but train.sparse.name is "
                f"{config.name}; leave data_parallel out of the tables' sharding types, or change the optimizer"
            )
        super().__init__(tables, {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay})
        self.rule, self.stochastic_rounding = config.name, config.stochastic_rounding
        self.num_steps = 0  # seeds the rounding: `TrainOptimizer` sets it
        for table in self.param_groups[0]["params"] if self.rule != "sgd" else ():
            shape = (len(table), 1) if self.rule == "rowwise_adagrad" else table.shape
            self.state[table]["sum"] = torch.zeros(shape, device=table.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for index, table in enumerate(group["params"]):
                if table.grad is None:
                    continue
                updated = self._updated(table, group["lr"], group["eps"], group["weight_decay"])
                if self.stochastic_rounding and table.dtype == torch.float16:
                    seed = self.num_steps * len(group["params"]) + index
                    updated = round_by_chance(updated, torch.Generator(table.device).manual_seed(seed))
                table.copy_(updated)

    def _updated(self, table: nn.Parameter, lr: float, eps: float, weight_decay: float) -> torch.Tensor:
        """In fp32."""
        weight, grad = table.float(), table.grad.float()  # fp16 would round small squares, and eps, to zero
        if weight_decay:
            touched_R1 = (grad != 0).any(dim=1, keepdim=True)
            grad = grad + weight_decay * weight * touched_R1
        if self.rule == "sgd":
            return weight - lr * grad
        squares = grad.square().mean(dim=1, keepdim=True) if self.rule == "rowwise_adagrad" else grad.square()
        total = self.state[table]["sum"].add_(squares)
        return weight - lr * grad / (total.sqrt() + eps)


def round_by_chance(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 values to one of their two fp16 neighbours, each so likely that the mean stays (fp16's range is the caller's)."""
    _, exponent = torch.frexp(values)
    ulp = torch.ldexp(torch.ones_like(values), exponent.clamp(min=FP16_LEAST_EXPONENT) - FP16_DIGITS)
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    scaled = values / ulp
    below = torch.floor(scaled)
    return ((below + (chance < scaled - below)) * ulp).half()


def learning_rate_factor(step: int, schedule: Schedule, total_steps: int) -> float:
    """The factor on every learning rate at optimizer step `step` (0-based) of `total_steps`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - 1 - schedule.warmup_steps))
    shape = 1 - progress if schedule.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.final_factor + (1 - schedule.final_factor) * shape


class TrainOptimizer:
    """All optimizers of a sharded model, their schedule, clipping and gradient accumulation.

    `zero_grad` and `step` are called once a micro-batch. Fused tables have then already stepped, at the learning rate set
    before; dense parameters and replicated tables step at each `accumulate_steps`-th call.
    """

    def __init__(self, model: ShardedModel, config: TrainConfig, total_steps: int) -> None:
        trained_here = list(in_backward_optimizer_filter(model.module.named_parameters()))
        self.replicated_tables = {n.split(".")[-2]: p for n, p in trained_here if n.startswith(TABLES)}
        self.dense_parameters = [p for name, p in trained_here if not name.startswith(TABLES)]
        self.dense = _dense_optimizer(self.dense_parameters, config.dense)
        replicated = list(self.replicated_tables.values())
        self.replicated = ReplicatedTableOptimizer(replicated, config.sparse) if replicated else None
        self.fused = model.fused_optimizer
        self.config = config
        self.total_steps = total_steps
        self.num_steps = 0
        self.micro_batch = 0
        self._set_learning_rates()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the step to come, by {"dense", "sparse"}."""
        factor = learning_rate_factor(self.num_steps, self.config.schedule, self.total_steps)
        return {"dense": self.config.dense.lr * factor, "sparse": self.config.sparse.lr * factor}

    def go_on_from(self, num_steps: int) -> None:
        """Sets the step, and with it the learning rates, as after `num_steps` whole optimizer steps."""
        self.num_steps, self.micro_batch = num_steps, 0
        self._set_learning_rates()

    def zero_grad(self) -> None:
        if self.micro_batch == 0:
            self.dense.zero_grad()
            if self.replicated:
                self.replicated.zero_grad()

    def step(self) -> None:
        self.micro_batch += 1
        if self.micro_batch < self.config.accumulate_steps:
            return
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.dense_parameters, self.config.clip_grad_norm)
        self.dense.step()
        if self.replicated:
            self.replicated.num_steps = self.num_steps
            self.replicated.step()
        self.micro_batch = 0
        self.num_steps += 1
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        rates = self.learning_rates
        for group in self.dense.param_groups:
            group["lr"] = rates["dense"]
        for optimizer in (self.replicated, self.fused):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = rates["sparse"]
        self.fused.step()  # hands the rate to the kernels; the tables themselves step in the backward pass


def _dense_optimizer(parameters: list[nn.Parameter], config: DenseOptimizer) -> torch.optim.Optimizer:
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}  # one pass over memory
    if config.name == "sgd":
        return torch.optim.SGD(parameters, **options)
    rules = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
    optimizer = rules[config.name](parameters, eps=config.eps, **options)
    if config.name != "adagrad":  # it makes its state now; the Adams would at the first step, too late to load it into
        for p in parameters:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
    return optimizer
