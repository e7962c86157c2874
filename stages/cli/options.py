"""What the commands share: flags, and the parameter file as they change it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rats.schemas.errors import ConfigError

if TYPE_CHECKING:
    from rats.pipeline.files.places import Place
    from rats.schemas.params import Params, Split
    from rats.stages.workers.target import Tls, Where

# Plain help: rich would double the time to the first line.
STYLE: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, do nothing.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The stage's seed, in place of the file's.")]

Workers = Annotated[int | None, typer.Option(min=0, metavar="N", help="Local processes, or jobs; 0: in this process.")]
Address = Annotated[
    str | None, typer.Option(metavar="URL", help="A running Dask scheduler, tls:// or on this machine.")
]
SchedulerFile = Annotated[Path | None, typer.Option(metavar="FILE", help="What `dask scheduler` wrote about itself.")]
TlsCa = Annotated[Path | None, typer.Option("--tls-ca-file", metavar="PEM", help="Who signs for the cluster.")]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", metavar="PEM", help="Our certificate.")]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", metavar="PEM", help="Its key, if not in the same file.")]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="slurm|pbs|sge|lsf|htcondor|oar|cuda", help="Start workers there; cuda: on each GPU."),
]
Needs = Annotated[
    list[str] | None, typer.Option("--worker-resources", metavar="GPU=1", help="What one task needs; repeatable.")
]
Wait = Annotated[
    float | None,
    typer.Option("--wait-for-workers", min=0, metavar="SECONDS", help="Give up when none is there so long."),
]
PerformanceReport = Annotated[Path | None, typer.Option(metavar="HTML", help="Dask's page about the workers.")]

DEFAULT_PARAMS = Path("params.yaml")


def load(path: Path, sets: list[str] | None, **values: float | None) -> Params:
    """The parameters; a flag for one of them, such as `teacher__seed`, comes last and wins."""
    from rats.schemas.params import load_params

    flags = [f"{name.replace('__', '.')}={value}" for name, value in values.items() if value is not None]
    return load_params(path, [*(sets or []), *flags])


def split_named(name: str) -> Split:
    """The split, if there is such a one."""
    if name not in ("train", "validation", "test"):
        raise ConfigError(f"unknown split {name!r}: use train, validation or test")
    return cast("Split", name)


def place(text: str) -> Place:
    """The folder that `text` names, which must be there, or the remote place, which is looked at when it is read."""
    from rats.pipeline.files.places import open_place

    found = open_place(text)
    return existing(found) if isinstance(found, Path) else found


def existing(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"no folder {path}: run the stage that makes it first")
    return path


def where_from(
    values: Params,
    workers: int | None,
    address: str | None,
    file: Path | None,
    tls_files: tuple[Path | None, Path | None, Path | None],
    cluster: str | None,
    needs: list[str] | None,
    wait: float | None,
    report: Path | None,
) -> Where:
    """Where the tasks run, by the flags above and else `store.workers` local processes."""
    from rats.stages.workers.target import Where, address_in, parse_resources

    elsewhere = address is not None or file is not None
    if address is not None and file is not None:
        raise ConfigError("--scheduler-address and --scheduler-file name the same thing: leave out one of them")
    if elsewhere and workers is not None:
        raise ConfigError(
            "--workers starts local processes, and a running scheduler has its own: leave out one of them"
        )
    if workers is None:
        workers = values.store.workers if cluster is None else 0
    address = address_in(file) if file is not None else address
    tls = _tls(*tls_files) if any(tls_files) else None
    if tls is not None and (cluster == "cuda" or not (elsewhere or cluster)):
        raise ConfigError("TLS files are for a running scheduler or a batch system: workers here stay on loopback")
    return Where(workers, address, cluster, tls, parse_resources(needs or []), report, wait)


def _tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls:
    from rats.stages.workers.target import Tls

    if ca is None or cert is None:
        raise ConfigError(
            "TLS takes both --tls-ca-file and --tls-cert (and --tls-key, if the key is not in the same file)"
        )
    return Tls(ca, cert, key)
