"""ClusterSpec: the machines a plan is made for, each number with the place it comes from."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dlrm_scale.config_io import parse_tree, read_tree
from dlrm_scale.errors import ConfigError
from dlrm_scale.host import host_bytes
from dlrm_scale.strict import Strict

CLUSTERS = Path("configs/clusters")  # relative to the working directory, as configurations are
SOURCES = "datasheet: ..., measured: ..., reported ... or guess: ..."


class Figure(Strict):
    """A number and its source: a datasheet, a measurement (with its command), what the system reports, or a guess."""

    value: float = Field(gt=0)
    source: str = Field(min_length=3)

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError(f"a number comes with its source, as in {{value: {given}, source: '{SOURCES}'}}")
        if "source" not in given:
            raise ValueError(f"the source of the number {given.get('value')} is missing; write source: '{SOURCES}'")
        return given


class CostCoefficients(Strict):
    """Weights of the terms of TorchRec's estimates; the defaults are its own (`PerfCoefficient`, `bwd_compute_multiplier`; all
    collectives alike)."""

    input_read: float = Field(1.0, ge=0)
    lookup: float = Field(1.0, ge=0)
    output_write: float = Field(1.0, ge=0)
    hash_size: float = Field(0.0, ge=0)
    backward: float = Field(2.0, ge=0, description="backward compute as a multiple of forward compute")
    all_to_all: float = Field(1.0, gt=0, description="its time as a multiple of bytes over bandwidth; also below")
    reduce_scatter: float = Field(1.0, gt=0)
    all_gather: float = Field(1.0, gt=0)
    all_reduce: float = Field(1.0, gt=0)


class ClusterSpec(Strict):
    """`num_ranks` equal ranks, `ranks_per_host` to a host. GB are 1e9 bytes. No number has a default.

    Raises (as pydantic's ValidationError):
        ranks that do not fill hosts; a cuda cluster without HBM or its link; a cpu cluster with them.
    """

    device: Literal["cpu", "cuda"]
    num_ranks: int = Field(gt=0)
    ranks_per_host: int = Field(gt=0)
    hbm_gb: Figure | None = Field(None, description="of one rank; cuda only")
    host_memory_gb: Figure = Field(description="of one host; its ranks share it")
    ssd_gb: Figure | None = Field(None, description="of one host; told only: no kernel here spills to it")
    hbm_gb_per_s: Figure | None = Field(None, description="memory bandwidth of one rank's device; cuda only")
    host_memory_gb_per_s: Figure = Field(description="one rank's share of its host's memory bandwidth")
    host_link_gb_per_s: Figure | None = Field(None, description="HBM to host memory (PCIe, C2C), one rank; cuda only")
    intra_host_gb_per_s: Figure = Field(description="one rank to the others of its host, one way")
    inter_host_gb_per_s: Figure = Field(description="one rank to ranks of other hosts, one way")
    cost_coefficients: CostCoefficients = CostCoefficients()

    @model_validator(mode="after")
    def _check(self) -> "ClusterSpec":
        if self.num_ranks > self.ranks_per_host and self.num_ranks % self.ranks_per_host:
            raise ValueError(
                f"num_ranks ({self.num_ranks}) must be a multiple of ranks_per_host ({self.ranks_per_host}): hosts are equal"
            )
        if self.num_ranks < self.ranks_per_host:
            raise ValueError(
                f"ranks_per_host ({self.ranks_per_host}) is more than num_ranks ({self.num_ranks}); set it to {self.num_ranks}"
            )
        of_device = {name: getattr(self, name) for name in ("hbm_gb", "hbm_gb_per_s", "host_link_gb_per_s")}
        wrong = [name for name, figure in of_device.items() if (figure is None) == (self.device == "cuda")]
        if wrong:
            names = ", ".join(wrong)
            if self.device == "cuda":
                raise ValueError(f"a cuda cluster needs {names}; give each a value and a source, or set device to cpu")
            raise ValueError(f"a cpu cluster must not have {names}; leave them out, or set device to cuda")
        return self

    @property
    def num_hosts(self) -> int:
        return self.num_ranks // self.ranks_per_host

    def group(self, num_groups: int) -> "ClusterSpec":
        """The ranks that share one of `num_groups` copies of the tables, as TorchRec's `DMPCollection` chooses them.

        The copies of a shard lie on `num_groups` neighbouring ranks of one host, so that a group has its part of every host:
        of a host's ranks and of its memory. Rank r of group g is rank r x num_groups + g of all.

        Raises:
            ConfigError: that many groups do not share each host evenly.
        """
        if num_groups == 1:
            return self
        if self.ranks_per_host % num_groups:
            fits = [n for n in range(1, self.ranks_per_host + 1) if self.ranks_per_host % n == 0]
            raise ConfigError(
                f"sharding.replica_groups is {num_groups}, but each host's {self.ranks_per_host} ranks must share them evenly, since copies lie "
                f"on neighbouring ranks; take one of {', '.join(map(str, fits))}"
            )
        memory = self.host_memory_gb
        return self.model_copy(
            update={
                "num_ranks": self.num_ranks // num_groups,
                "ranks_per_host": self.ranks_per_host // num_groups,
                "host_memory_gb": memory.model_copy(update={"value": memory.value / num_groups}),
            }
        )

    @property
    def hbm_bytes_per_rank(self) -> float:
        """0 on cpu."""
        return 0.0 if self.hbm_gb is None else self.hbm_gb.value * 1e9

    @property
    def host_bytes_per_rank(self) -> float:
        return self.host_memory_gb.value * 1e9 / self.ranks_per_host

    @property
    def table_bytes_per_rank(self) -> float:
        """The memory that a rank's tables live in: HBM, or its share of the host's memory."""
        return self.hbm_bytes_per_rank or self.host_bytes_per_rank


def bytes_per_ms(figure: Figure) -> float:
    """Of a figure in GB/s."""
    return figure.value * 1e6


def load_cluster(name_or_path: str) -> ClusterSpec:
    """A YAML file's cluster, or the one of that bare name in configs/clusters/.

    Raises:
        ConfigError: every problem found, each with file and dotted key; an unknown name, with the known ones.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CLUSTERS / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
            raise ConfigError(
                f"there is no cluster {name_or_path} in {CLUSTERS}, which has {known or 'none: is this the repository?'}; "
                "name one of them, or a file that ends in .yaml"
            )
    return parse_tree(read_tree(path, ClusterSpec, "cluster"), ClusterSpec, "cluster", str(path))


def check_ranks(cluster: ClusterSpec, named: str, num_ranks: int, ranks_per_host: int, device: str) -> None:
    """Raises ConfigError: `cluster`, which `sharding.cluster` names, is not of these ranks."""
    here = {"device": device, "num_ranks": num_ranks, "ranks_per_host": ranks_per_host}
    wrong = [f"{name} is {getattr(cluster, name)} there, {value} here" for name, value in here.items()
             if getattr(cluster, name) != value]  # fmt: skip
    if wrong:
        raise ConfigError(
            f"sharding.cluster is {named}, which is not of these ranks: {'; '.join(wrong)}; name the cluster that the job runs on, "
            "or leave sharding.cluster out (bandwidths are guessed then)"
        )


def this_cluster(num_ranks: int, ranks_per_host: int, device: Literal["cpu", "cuda"]) -> ClusterSpec:
    """The cluster of equal hosts that this host is one of: memory as the system reports it, bandwidths guessed."""
    guesses = {"host_memory": 20, "intra_host": 2, "inter_host": 1}
    reported = {"host_memory_gb": Figure(value=host_bytes() / 1e9, source="reported by the system")}
    if device == "cuda":
        import torch

        hbm_bytes = torch.cuda.get_device_properties(0).total_memory
        reported["hbm_gb"] = Figure(value=hbm_bytes / 1e9, source="reported by the CUDA driver")
        guesses = {"hbm": 2000, "host_memory": 20, "host_link": 20, "intra_host": 300, "inter_host": 25}
    bandwidths = {f"{name}_gb_per_s": Figure(value=value, source="guess") for name, value in guesses.items()}
    return ClusterSpec(
        device=device, num_ranks=num_ranks, ranks_per_host=min(ranks_per_host, num_ranks), **reported, **bandwidths
    )
