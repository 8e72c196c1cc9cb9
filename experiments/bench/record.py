"""What a bench writes beside its figures: its options, the machine, the versions, the commit."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PEERS = ("jaxlib", "flax", "torch", "transformers", "timm", "mambapy", "mamba2-jax", "mamba3-jax")


def save_record(path: Path, config: Any, environment: dict, figures: list[dict]) -> None:
    """Writes a bench's figures with its options and what they depend on; where they were written is not among them."""
    options = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }
    options |= dict.fromkeys(options.keys() & {"json", "plot"})
    path.write_text(json.dumps({"config": options, **environment, "figures": figures}, indent=2) + "\n")


def read_environment() -> dict:
    """What the figures depend on: the machine, the versions, the commit."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = _processor() if device.platform == "cpu" else device.device_kind
    versions = {"jax": jax.__version__}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "hardware": f"{kind} ({platform.machine()}), {cores} CPU cores, {device.platform}",
        "versions": versions,
        "commit": commit,
    }


def machine_and_versions(environment: dict) -> str:
    """The line above a table that stands beside other packages."""
    return f"{environment['hardware']}; " + ", ".join(f"{name} {v}" for name, v in environment["versions"].items())


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
