"""What the commands share: flags, and the parameter file as they change it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from rats.schemas.errors import ConfigError
from rats.schemas.identity import LARGEST_SEED

if TYPE_CHECKING:
    from rats.pipeline.files.places import Place
    from rats.schemas.params import Params, Split
    from rats.stages.workers.target import Tls, WorkerTarget

# Plain help: rich would double the time to the first line.
HELP_STYLE: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show what would be done.")]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=LARGEST_SEED, metavar="N", help="The stage's seed; overrides the parameter file."
    ),
]

DEFAULT_PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class WorkerFlags:
    """Where the tasks of a stage run; each field is a flag of a command that is `grouped`."""

    workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Number of local processes or jobs; 0: in this process.")
    ] = None
    scheduler_address: Annotated[
        str | None, typer.Option(metavar="URL", help="A running Dask scheduler: tls://, or on this machine.")
    ] = None
    scheduler_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file of `dask scheduler --scheduler-file`.")
    ] = None
    tls_ca_file: Annotated[Path | None, typer.Option(metavar="PEM", help="Certificate of the cluster's CA.")] = None
    tls_cert: Annotated[Path | None, typer.Option(metavar="PEM", help="Certificate of this client.")] = None
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its private key, if it is in another file.")] = (
        None
    )
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="slurm|pbs|sge|lsf|htcondor|oar|cuda", help="Start workers on this system; cuda: one on each GPU."
        ),
    ] = None
    worker_resources: Annotated[
        list[str] | None, typer.Option(metavar="GPU=1", help="Resources that a task needs; repeatable.")
    ] = None
    wait_for_workers: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Fail after so long without a worker.")
    ] = None
    performance_report: Annotated[
        Path | None, typer.Option(metavar="HTML", help="Write Dask's performance report to this file.")
    ] = None

    def where(self, values: Params) -> WorkerTarget:
        """The place that the flags name; else `store.workers` local processes."""
        from rats.stages.workers.target import WorkerTarget, address_in, parse_resources

        self._refuse_contradictions()
        default = values.store.workers if self.cluster is None else 0
        return WorkerTarget(
            workers=default if self.workers is None else self.workers,
            scheduler_address=address_in(self.scheduler_file) if self.scheduler_file else self.scheduler_address,
            cluster=self.cluster,
            tls=self._tls(),
            resources=parse_resources(self.worker_resources or []),
            performance_report=self.performance_report,
            wait_seconds=self.wait_for_workers,
        )

    @property
    def _elsewhere(self) -> bool:
        return self.scheduler_address is not None or self.scheduler_file is not None

    def _refuse_contradictions(self) -> None:
        if self.scheduler_address is not None and self.scheduler_file is not None:
            raise ConfigError("--scheduler-address and --scheduler-file name the same thing: leave out one of them")
        if self._elsewhere and self.workers is not None:
            raise ConfigError(
                "--workers starts local processes, and a running scheduler has its own: leave out one of them"
            )

    def _tls(self) -> Tls | None:
        from rats.stages.workers.target import Tls

        if not any((self.tls_ca_file, self.tls_cert, self.tls_key)):
            return None
        if self.tls_ca_file is None or self.tls_cert is None:
            raise ConfigError(
                "TLS takes both --tls-ca-file and --tls-cert (and --tls-key, if the key is not in the same file)"
            )
        if self.cluster == "cuda" or not (self._elsewhere or self.cluster):
            raise ConfigError("TLS files are for a running scheduler or a batch system: workers here stay on loopback")
        return Tls(self.tls_ca_file, self.tls_cert, self.tls_key)


LOCAL_WORKERS = WorkerFlags()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take `WorkerFlags` as one parameter: typer sees its fields as flags, the command the object."""
    hints = get_type_hints(command, include_extras=True)
    group = next(name for name, kind in hints.items() if kind is WorkerFlags)
    flags = get_type_hints(WorkerFlags, include_extras=True)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        # typer calls by name; keywords may follow each other with and without defaults
        plain = [(parameter.name, hints[parameter.name], parameter.default)]
        shown = [(name, kind, getattr(WorkerFlags, name)) for name, kind in flags.items()]
        for name, kind, default in shown if parameter.name == group else plain:
            parameters.append(inspect.Parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=kind))

    @functools.wraps(command)
    def called(**values: Any) -> None:
        given = {name: values.pop(name) for name in flags}
        command(**values, **{group: WorkerFlags(**given)})

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called


def load(path: Path, sets: list[str] | None, **values: float | None) -> Params:
    """The parameters. A flag for one of them, such as `teacher__seed`, overrides file and `--set`."""
    from rats.schemas.params import load_params

    flags = [f"{name.replace('__', '.')}={value}" for name, value in values.items() if value is not None]
    return load_params(path, [*(sets or []), *flags])


def split_named(name: str) -> Split:
    """The split of that name. Raises ConfigError if there is none."""
    if name not in ("train", "validation", "test"):
        raise ConfigError(f"unknown split {name!r}: use train, validation or test")
    return cast("Split", name)


def place(text: str) -> Place:
    """The folder that `text` names, which must exist, or the remote place, which is not checked here."""
    from rats.pipeline.files.places import open_place

    found = open_place(text)
    if found.local:
        existing(found.local)
    return found


def creatable(path: Path | None) -> None:
    """Refuses a file that could not be written at the end, before there is anything to write."""
    from rats.pipeline.files.atomic import check_creatable

    if path is not None:
        check_creatable(path)


def existing(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"no folder {path}: run the stage that makes it first")
    return path
