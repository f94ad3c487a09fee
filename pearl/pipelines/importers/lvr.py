"""`lvr`: the data of Latent Visual Reasoning (arXiv 2509.24251), stage 1.

A data file is a list of rows, a meta file a list of data files with their image folders:

    [{"ds_name": "viscot", "data_path": "viscot_lvr.json", "image_folder": "images"}, …]

    {"dataset": "flickr30k", "split": "train", "question_id": 7, "image": ["flickr30k/7.jpg"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat …?\\nProvide a short and direct response."},
                       {"from": "gpt", "value": "<lvr>\\n<answer> … </answer>"}],
     "bboxes": [[0.382, 0.456, 0.718, 0.656]]}

Boxes are fractions of the image's own width and height; the i-th `<lvr>` stands for the i-th box, and becomes a crop
that is carried out. What is said before a `<lvr>` is the thought that leads to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pearl.pipelines.errors import Rejected
from pearl.pipelines.importers.base import (
    LOOK_CLOSER,
    Dialogue,
    Importer,
    conversation,
    final_answer,
    fractions,
    looked_at,
    only_image,
    without_placeholders,
)
from pearl.pipelines.importers.images import Images
from pearl.pipelines.importers.rows import DataFile, Row, listed
from pearl.pipelines.replay import RecordedStep
from pearl.pipelines.sources.base import BadRecord, SourceError, inside

MARK = "<lvr>"


class Lvr(Importer):
    name = "lvr"
    columns = ("dataset", "image", "conversations", "bboxes")

    @cached_property
    def files(self) -> list[DataFile]:
        """The data files: those that meta files name, with the folders they name, then those given besides."""
        given = super().files
        metas = [file for file in given if _is_meta(file)]
        found = {data.path.resolve(): data for meta in metas for data in self._named(meta)}
        for file in given:
            if file not in metas:
                found.setdefault(file.path.resolve(), file)
        return list(found.values())

    def _named(self, file: DataFile) -> Iterator[DataFile]:
        for listing in listed(file):
            row = listing.record.get("row", {})
            where = f"{file.path}, entry {listing.number}"
            data = _beside(file, row.get("data_path"), where)
            given = file.images if self.options.source.images else None
            yield DataFile(data, str(row["data_path"]), given or _beside(file, row.get("image_folder"), where))

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        turns = conversation(row.get("conversations"))
        if [who for who, _ in turns] != ["user", "assistant"]:
            raise Rejected("not one question and one answer", str(len(turns)))
        question, reply = turns[0][1], turns[1][1]
        boxes, (*thoughts, rest) = row.get("bboxes") or [], reply.split(MARK)
        if len(boxes) != len(thoughts):
            raise Rejected(f"boxes and {MARK} differ in number", f"{len(boxes)} boxes, {len(thoughts)} {MARK}")
        if not boxes:
            raise Rejected("no box")
        conclusion, answer = final_answer(rest)
        steps = [
            RecordedStep(thought.strip() or LOOK_CLOSER, looked_at(0, fractions(box)))
            for thought, box in zip(thoughts, boxes, strict=True)
        ]
        return Dialogue(
            image=images.read(only_image(row.get("image"))),
            question=without_placeholders(question),
            steps=steps,
            conclusion=conclusion,
            answer=answer,
            skill="grounding",
            origin=str(row.get("dataset") or ""),
        )


def _is_meta(file: DataFile) -> bool:
    first = None if file.path.suffix == ".parquet" else next(listed(file), None)
    return first is not None and "data_path" in first.record.get("row", {})


def _beside(meta: DataFile, path: object, where: str) -> Path:
    """A path of a meta file, which starts from the meta file's folder.

    Raises:
        SourceError: it is no path, leaves that folder, or leads nowhere.
    """
    try:
        found = inside(meta.path.parent, str(path)) if isinstance(path, str) and path else None
    except BadRecord as error:
        raise SourceError(f"{where}: {error}; import the data file itself, and give --images") from error
    if found is None or not found.exists():
        raise SourceError(f"{where}: {path!r} is not there")
    return found
