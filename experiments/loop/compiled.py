"""Compiled programs, kept between commands: a command that is started again does not compile again.

The cache is JAX's own, and its key knows the program, the versions and the compiler's flags, but not the processor. So
there is a folder for each kind of processor and number of cores, which is what XLA compiles a CPU's programs for. JAX's
own variables go first: with JAX_COMPILATION_CACHE_DIR set nothing is changed here, and JAX_ENABLE_COMPILATION_CACHE=0
keeps nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments.loop.user_cache import user_cache

HELP = (
    "Compiled programs are kept in ~/.cache/subquadratic-zoo/compiled; JAX_COMPILATION_CACHE_DIR=FOLDER keeps them "
    "elsewhere, JAX_ENABLE_COMPILATION_CACHE=0 nowhere."
)

# JAX's floor of a second would leave out most of what a small model compiles; below this, files cost what they save.
MIN_SECONDS = 0.1
# The programs of a small model take about a megabyte. What was not used for longest goes first.
MAX_BYTES = 2**30
# What /proc/cpuinfo says of the instructions there are, on x86 and on ARM; the rest of it changes from hour to hour.
LINES = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")


def keep_compiled() -> Path | None:
    """Has JAX keep compiled programs in the user's cache folder.

    Returns:
      The folder; None where JAX was told another one, or nothing can be written there.
    """
    said = jax.config.values
    if said["jax_compilation_cache_dir"] or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    if not said["jax_enable_compilation_cache"]:
        return None
    folder = user_cache() / "compiled" / processor_key()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    _unless_said("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    _unless_said("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _only_cpus():
        _silence_loader()
    return folder


@contextlib.contextmanager
def without_cache():
    """Programs are compiled, whether they lie in the cache or not, and not kept: to say what compiling them takes."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it looks at the switch once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def processor_key() -> str:
    """A name for the processor and the number of its cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0].splitlines()
        described = [line for line in first if line.startswith(LINES)]
    else:
        described = [platform.processor(), platform.node()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = "\n".join([platform.machine(), str(cores), *described])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _unless_said(option: str, value: float) -> None:
    if option.upper() not in os.environ:
        jax.config.update(option, value)


def _only_cpus() -> bool:
    """Whether JAX can find no accelerator here. Asking its devices would start them, which is for the command to do."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def _silence_loader() -> None:
    """Leaves XLA's C++ log to what ends the process.

    XLA's loader of CPU programs logs two errors, of some kilobytes each, for every program, also where it was compiled
    on the same machine: it takes two preferences of the compiler, +prefer-no-gather and +prefer-no-scatter, for
    instructions that the processor lacks (openxla/xla#44565). Here the folder is the processor's own. Other errors of
    XLA's are exceptions in Python. A user's TF_CPP_MIN_LOG_LEVEL stays.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "1":  # importing jax sets 1 where nobody has set it
        return
    try:
        from jaxlib.utils import absl_set_min_log_level  # the variable is read when jaxlib is imported, before this
    except ImportError:
        return
    absl_set_min_log_level(3)
