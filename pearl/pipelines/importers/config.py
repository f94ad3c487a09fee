"""What is to be imported: a generation whose sources are recorded trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pearl.pipelines.config import GenerateConfig
from pearl.pipelines.experts import Case, Expertise
from pearl.pipelines.importers import importer_class
from pearl.pipelines.importers.base import ImportOptions
from pearl.pipelines.replay import EXPERT, replay
from pearl.pipelines.sources import Source


@dataclass(frozen=True)
class ImportConfig(GenerateConfig):
    """As `GenerateConfig`, where `sources` are places of data (a file, a folder, a glob, a Hub dataset id) and `tools`
    those of the format.

    Attributes:
        kind: The format, see `importer_names`.
        license: Recorded with each trajectory.
        reexecute: Carry out again the recorded calls whose tool is known.
    """

    kind: str = ""
    license: str = "unknown"
    reexecute: bool = False

    expert: ClassVar[str] = EXPERT

    def _refuse_idle_options(self) -> None:
        """Nothing: a source is a place here, which may be called like a kind of source."""

    def open_sources(self) -> list[Source]:
        options = ImportOptions(self.source_options, self.license, self.reexecute)
        return [importer_class(self.kind)(place, options) for place in self.sources]

    def start_expert(self, case: Case) -> Expertise:
        return replay(case)
