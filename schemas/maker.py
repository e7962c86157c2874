"""The maker of a shard or of its scores: the code, libraries, settings and machine that decide its last bits."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from rats.schemas.errors import plain
from rats.schemas.record import Record

Facts = Annotated[dict[str, str], Field(max_length=100)]
"""What is known by name. A name that is not there is a setting that is not set, or a package that is not installed."""

UNSET = "unset"


class Difference(NamedTuple):
    """One fact in which two makers differ: its group and name, and both values. Its text is safe to print."""

    group: str
    name: str
    first: str
    second: str


class Software(Record):
    """What must be the same for all workers of a run, since it decides bytes and can be chosen.

    Attributes:
        code: sha256 of the sources that compute samples and scores: those of `rats`, and of the plug-ins in use.
        versions: By package: `rats`, the libraries that compute, the distributions of the plug-ins in use.
        kernels: What chooses kernels: torch's flags, and environment variables such as ATEN_CPU_CAPABILITY.
    """

    code: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    versions: Facts
    kernels: Facts

    def differences(self, other: Software) -> list[Difference]:
        """Where code, versions or kernels differ. A difference in the code comes last: versions say more."""
        found = [*_different("versions", self.versions, other.versions)]
        found += _different("kernels", self.kernels, other.kernels)
        return found + _different("code", {"sources": self.code[:12]}, {"sources": other.code[:12]})


class Maker(Software):
    """The same with the machine, of which a cluster may have several kinds.

    Attributes:
        machine: The device, the processor with its instruction sets, the build of torch.
    """

    machine: Facts

    def machine_differences(self, other: Maker) -> list[Difference]:
        """Where the machines differ."""
        return _different("machine", self.machine, other.machine)

    @property
    def text(self) -> str:
        """One line, safe to print: a published set may come from anybody."""
        facts = self.versions | self.machine | self.kernels
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        return plain(f"{told}, sources {self.code[:12]}", 2000)


def _different(group: str, first: Facts, second: Facts) -> list[Difference]:
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return [
        Difference(group, plain(name), plain(first.get(name, UNSET)), plain(second.get(name, UNSET))) for name in names
    ]
