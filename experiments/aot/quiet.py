"""What the environment says to libtpu where there is no TPU. Importing JAX goes by it, so this comes first."""

import os

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",  # or importing JAX waits seconds for a cloud's metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes compile at once
    "TPU_LOG_DIR": "disabled",  # or files pile up in the system's temporary folder
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}


def quiet() -> None:
    """Lets the compilers be loaded by several processes, without words or files of their own. What was said stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
