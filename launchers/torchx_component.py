"""The trainer as a TorchX component: local, Slurm and Kubernetes from one definition.

    torchx run -s local_cwd launchers/torchx_component.py:train --config configs/quickstart.yaml --nproc 2

Each replica is one machine and runs launchers/torchrun.sh, so that a job behaves the same however it is started. A job that
ends with exit code 75 has saved; started again on the same output.dir it goes on. TorchX shows it as FAILED and does not do it.
"""

import shlex

import torchx
from torchx import specs
from torchx.specs import macros

RENDEZVOUS_PORT = 29500


def train(
    *changes: str,
    config: str,
    overrides: str = "",
    nproc: int = 0,
    nnodes: int = 1,
    threads: int = 0,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Trains what a config file says.

    Args:
        changes: to the config, key=value, after all options: train.max_steps=100
        config: path of the config file, relative to the repository's root
        overrides: path of a file that tools.tune wrote for that config
        nproc: ranks on each machine; 0: as the overrides file says, or else one a GPU, without a GPU 2
        nnodes: machines
        threads: of each rank; 0: as the overrides file says, or else cores / ranks
        cpu: cores to ask for, on each machine
        gpu: GPUs to ask for, on each machine
        memMB: memory to ask for, on each machine
        max_restarts: times that a machine's launcher starts its ranks again after one was killed, crashed or hung
        image: container image with this repository as its working directory (container schedulers only)
    """
    # TorchX turns $$ into $. Each scheduler has its own name (rank0_env) for the variable with machine 0's address;
    # some leave it unset on machine 0 itself.
    endpoint = f'"$${{{macros.rank0_env}:-localhost}}:{RENDEZVOUS_PORT}"'
    multi_node = f"--node-rank {macros.replica_id} --rdzv-endpoint {endpoint}" if nnodes > 1 else ""
    given = {"nproc": nproc, "threads": threads, "overrides": shlex.quote(overrides) if overrides else ""}
    options = " ".join(f"--{name} {value}" for name, value in given.items() if value)
    command = (
        f"exec launchers/torchrun.sh {options} --nnodes {nnodes} {multi_node} --max-restarts {max_restarts} "
        f"--config {shlex.quote(config)} {shlex.join(changes)}"
    )
    return specs.AppDef(
        name="train",
        roles=[
            specs.Role(
                name="trainer",
                image=image,
                entrypoint="bash",
                args=["-c", command],
                num_replicas=nnodes,
                resource=specs.Resource(cpu=cpu, gpu=gpu, memMB=memMB),
                port_map={"c10d": RENDEZVOUS_PORT},
            )
        ],
    )
