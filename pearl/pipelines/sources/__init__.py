"""Where samples come from: `photos`, `scenes`, `coco:FILE`, `folder:DIR`, `parquet:PATH`, `hf:ORG/NAME`."""

from __future__ import annotations

from importlib import import_module

from pearl.pipelines.sources.base import (
    AnnotationOptions,
    BadRecord,
    Item,
    Source,
    SourceError,
    SourceOptions,
    Thresholds,
    annotators_of,
)

_KINDS = {
    "photos": "pearl.pipelines.sources.photos:Photos",
    "scenes": "pearl.pipelines.sources.scenes:Scenes",
    "coco": "pearl.pipelines.sources.coco:Coco",
    "folder": "pearl.pipelines.sources.folder:Folder",
    "parquet": "pearl.pipelines.sources.tables:ParquetRows",
    "hf": "pearl.pipelines.sources.tables:HubRows",
}


def open_source(spec: str, options: SourceOptions) -> Source:
    """The source that `kind` or `kind:argument` names.

    Raises:
        SourceError: no such kind, or the source cannot be used.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _KINDS:
        raise SourceError(f"--source {spec}: there is no {kind!r}; there are {', '.join(_KINDS)}")
    module, _, attribute = _KINDS[kind].partition(":")
    source = getattr(import_module(module), attribute)(argument, options)
    assert isinstance(source, Source)
    return source


__all__ = [
    "AnnotationOptions",
    "BadRecord",
    "Item",
    "Source",
    "SourceError",
    "SourceOptions",
    "Thresholds",
    "annotators_of",
    "open_source",
]
