"""Imports the stack for real, in a process of its own: a wrong pair of builds can kill the interpreter.

`python -m tools.doctor.probe` tries one step after the other and prints a JSON line when it begins and when it has
ended, so that the reader knows at which step a dead probe died. Steps after a failed `torch` are left out.
"""

import datetime
import json
import os
import tempfile

TIMEOUT = datetime.timedelta(seconds=20)


def probe_torch() -> dict:
    import torch

    return {"cuda_available": torch.cuda.is_available(), "cuda_build": torch.version.cuda}


def probe_gloo() -> dict:
    """Two processes meet and add 1 and 2. Forked here: only `torch` is imported so far, and no thread runs."""
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        rank = int(child == 0)
        try:
            store = dist.FileStore(os.path.join(folder, "store"), 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
            total = torch.tensor([rank + 1])
            dist.all_reduce(total)
            dist.destroy_process_group()
        finally:
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
    if total.item() != 3:
        raise RuntimeError(f"1 + 2 over two gloo processes gave {total.item()}")
    return {}


def probe_nccl() -> dict:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return {}
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    dist.all_reduce(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    dist.destroy_process_group()
    return {"version": ".".join(map(str, torch.cuda.nccl.version()))}


def probe_fbgemm_gpu() -> dict:
    import fbgemm_gpu  # noqa: F401  (registers the operators)
    import torch

    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3]))
    if offsets.tolist() != [0, 2, 5]:
        raise RuntimeError(f"fbgemm's cumsum of [2, 3] gave {offsets.tolist()}")
    return {}


def probe_torchrec() -> dict:
    import torchrec.distributed  # noqa: F401

    return {}


STEPS = {
    "torch": probe_torch,
    "gloo": probe_gloo,
    "nccl": probe_nccl,
    "fbgemm_gpu": probe_fbgemm_gpu,
    "torchrec": probe_torchrec,
}


def main() -> None:
    for name, step in STEPS.items():
        print(json.dumps({"step": name, "begins": True}), flush=True)
        try:
            result = {"step": name, "error": None, **step()}
        except Exception as error:
            result = {"step": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(result), flush=True)
        if name == "torch" and result["error"]:
            return


if __name__ == "__main__":
    main()
