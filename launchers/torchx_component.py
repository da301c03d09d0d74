"""The trainer as a TorchX component: local, Slurm and Kubernetes from one definition.

    torchx run -s local_cwd launchers/torchx_component.py:train --config configs/quickstart.yaml --nproc 2

Each replica is one machine and runs launchers/torchrun.sh, so that a job behaves the same however it is started. A job that
ends with exit code 75 has saved and may be started again by the same command; TorchX shows it as FAILED and does not do it.
"""

import shlex

import torchx
from torchx import specs
from torchx.specs import macros

RENDEZVOUS_PORT = 29500


def train(
    *overrides: str,
    config: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Trains what a config file says.

    Args:
        overrides: changes to the config, key=value, after all options: train.max_steps=100
        config: path of the config file, relative to the repository's root
        nproc: ranks on each machine; on GPUs one a GPU
        nnodes: machines
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
    command = (
        f"exec launchers/torchrun.sh --nproc {nproc} --nnodes {nnodes} {multi_node} --max-restarts {max_restarts} "
        f"--config {shlex.quote(config)} {shlex.join(overrides)}"
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
