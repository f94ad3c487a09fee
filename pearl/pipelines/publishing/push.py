"""A push: validate, describe, upload, and in the end one commit, so that the dataset appears whole or not at all.

What was uploaded before an interruption is in the Hub's storage under its hash; the next push does not send it again.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from pearl.paths import local_paths
from pearl.pipelines.publishing.card import TAG, Card, make_card
from pearl.pipelines.publishing.errors import PublishError, explained, is_transient
from pearl.pipelines.publishing.facts import gather
from pearl.pipelines.publishing.plan import Plan, Shard
from pearl.pipelines.validation import validate_data

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

Result = TypeVar("Result")

SHOWN_PROBLEMS = 10
BATCH_FILES, BATCH_BYTES = 16, 1_000_000_000
"""What is uploaded at once; of a file that is cut, the parts of one batch lie on the disk."""
WAITS = (1.0, 4.0, 16.0)
"""Seconds before each further attempt at what the library tries once."""
_OWN = re.compile(r"data/.*\.parquet|pictures/\d+\.jpg")
_HARMLESS = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True)
class Publication:
    """Validated data with its card: what a push sends.

    Attributes:
        local_paths: Absolute paths of this machine that stand in the files' metadata, which is sent as it is.
    """

    repo: str
    plan: Plan
    card: Card
    local_paths: tuple[str, ...]


@dataclass(frozen=True)
class Pushed:
    """What came of a push: where it is, and what of the data files had to be sent."""

    url: str
    revision: str
    files: int
    """Data files of the dataset."""
    unchanged: int
    """Of these, how many the repository had already."""
    removed: int
    """Files of an earlier push that are no longer part of the dataset."""


@dataclass(frozen=True)
class _Content:
    """What a file of the repository must be; a file in git is known by its git hash, one in large-file storage by its sha256."""

    size: int
    sha256: str
    git_sha1: str | None = None


def prepare(repo: str, plan: Plan, credits: str = "") -> Publication:
    """Validates every row and writes the card; nothing is sent.

    Raises:
        PublishError: the repository's name cannot be one, or the data fails validation; the first problems are named.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(repo, "README.md", repo_type="dataset")
    except HFValidationError as error:
        raise PublishError(f"{repo!r} is no name of a dataset: {error}") from error
    if repo.count("/") != 1:
        raise PublishError(f"{repo!r} is no name of a dataset: expected ORG/NAME")
    problems: list[str] = []
    for data in dict.fromkeys(split.data for split in plan.splits):
        problems += validate_data(data)[1]
    if problems:
        more = f"\n… and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        raise PublishError(
            f"nothing is uploaded, for pearl-gen validate finds {len(problems)} problems:\n{shown}{more}"
        )
    facts = gather(plan)
    return Publication(repo, plan, make_card(repo, plan, facts, credits), tuple(local_paths(facts.makings)))


def push(publication: Publication, public: bool = False, say: Callable[[str], None] = lambda line: None) -> Pushed:
    """Sends everything to the Hub's dataset `publication.repo`, which is made, private, where it is not there.

    Args:
        public: Everyone may read it. An existing repository must be as visible as is asked for.
        say: Is told of every file.

    Raises:
        PublishError: there is no token, or the Hub refuses, fails or is not reached; a second push goes on.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise PublishError("there is no token for the Hub: `hf auth login`, or set HF_TOKEN")
    with explained(publication.repo, token):
        return _Push(HfApi(token=token), publication, say).run(public)


class _Push:
    def __init__(self, api: HfApi, publication: Publication, say: Callable[[str], None]) -> None:
        self.api, self.say = api, say
        self.repo, self.plan, self.card = publication.repo, publication.plan, publication.card

    def run(self, public: bool) -> Pushed:
        from huggingface_hub import CommitOperationAdd

        head = self._open(public)
        there = self._files(head)
        texts = {"README.md": self.card.text.encode(), **self.card.pictures}
        additions = [CommitOperationAdd(path, content) for path, content in texts.items()]
        self._preupload(additions[1:])
        expected = {path: _content(content) for path, content in texts.items()}
        unchanged = 0
        for shard, addition in self._uploaded(there):
            expected[shard.path] = _content_of(addition)
            additions.append(addition)
            unchanged += _is(there.get(shard.path), expected[shard.path])
        stale = [path for path in there if _OWN.fullmatch(path) and path not in expected]
        revision = self._commit(additions, stale, head, expected)
        url = f"{self.api.endpoint}/datasets/{self.repo}"
        return Pushed(url, revision, len(self.plan.shards), unchanged, len(stale))

    def _open(self, public: bool) -> str:
        """Makes the repository or finds it; its head's commit.

        Raises:
            PublishError: it is of the other visibility, or holds something else.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        self._patiently(lambda: self.api.create_repo(self.repo, repo_type="dataset", private=not public, exist_ok=True))
        try:
            info = self._patiently(lambda: self.api.dataset_info(self.repo))
        except RepositoryNotFoundError as error:
            raise PublishError(
                f"{self.repo} is on the Hub as something else than a dataset; choose another --repo"
            ) from error
        if bool(info.private) is public:
            now, asked = (
                ("private", "leave --public out") if info.private else ("public", "say --public if you mean it")
            )
            raise PublishError(f"{self.repo} is {now} already: {asked}, or change its settings on the Hub")
        names = [one.rfilename for one in info.siblings or () if one.rfilename not in _HARMLESS]
        tags = (info.card_data.get("tags") if info.card_data else None) or ()
        if names and TAG not in tags:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise PublishError(f"{self.repo} holds something else already ({shown}); choose another --repo")
        return str(info.sha)

    def _patiently(self, act: Callable[[], Result]) -> Result:
        """What `act` gives, after further attempts where the connection or the Hub fails."""
        for wait in WAITS:
            try:
                return act()
            except Exception as error:
                if not is_transient(error):
                    raise
                self._wait(error, wait)
        return act()

    def _wait(self, error: Exception, seconds: float) -> None:
        self.say(f"the Hub did not answer as it should; again in {seconds:.0f} s ({type(error).__name__})")
        time.sleep(seconds)

    def _files(self, revision: str) -> dict[str, _Content]:
        """What the repository holds at a commit."""
        from huggingface_hub.hf_api import RepoFile

        entries = self._patiently(
            lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision, repo_type="dataset"))
        )
        return {
            one.path: _Content(one.size, one.lfs.sha256 if one.lfs else "", one.blob_id)
            for one in entries
            if isinstance(one, RepoFile)
        }

    def _preupload(self, additions: Sequence[CommitOperationAdd]) -> None:
        self.api.preupload_lfs_files(self.repo, additions, repo_type="dataset", free_memory=True)

    def _uploaded(self, there: Mapping[str, _Content]) -> Iterator[tuple[Shard, CommitOperationAdd]]:
        """Every data file, in the Hub's storage when it is yielded."""
        from huggingface_hub import CommitOperationAdd

        done, total = 0, len(self.plan.shards)
        for batch in _batches(self.plan.shards):
            with TemporaryDirectory(prefix="pearl-push-") as folder, ExitStack() as stack:
                additions = [
                    CommitOperationAdd(shard.path, stack.enter_context(shard.on_disk(Path(folder)))) for shard in batch
                ]
                known = [
                    _is(there.get(shard.path), _content_of(one)) for shard, one in zip(batch, additions, strict=True)
                ]
                self._preupload(additions)
                for shard, addition in zip(batch, additions, strict=True):
                    if addition.path_or_fileobj != b"":
                        raise PublishError(
                            f"{self.repo} does not keep {shard.path} in large-file storage; mend its .gitattributes"
                        )
            for shard, addition, was_there in zip(batch, additions, known, strict=True):
                done += 1
                state = "unchanged" if was_there else "in storage"
                self.say(f"{done}/{total} {shard.path} ({addition.upload_info.size / 1e6:.1f} MB): {state}")
                yield shard, addition

    def _commit(
        self, additions: Sequence[CommitOperationAdd], stale: Sequence[str], head: str, expected: Mapping[str, _Content]
    ) -> str:
        """Commits everything at once and checks that it arrived; the commit's hash."""
        from huggingface_hub import CommitOperationDelete

        operations: list[Any] = [*(CommitOperationDelete(path, is_folder=False) for path in stale), *additions]
        for wait in (*WAITS, None):
            try:
                made = self.api.create_commit(
                    self.repo, operations, repo_type="dataset", parent_commit=head,
                    commit_message=f"{self.plan.rows} trajectories, pushed with pearl-vlm",
                )  # fmt: skip
            except Exception as error:
                arrived = is_transient(error) and self._arrived(expected)
                if arrived:
                    return arrived
                if wait is None or not is_transient(error):
                    raise
                self._wait(error, wait)
            else:
                self._check(str(made.oid), expected)
                return str(made.oid)
        raise AssertionError("the last attempt returns or raises")

    def _arrived(self, expected: Mapping[str, _Content]) -> str | None:
        """The head's commit when everything stands in it: a commit may have been made though its answer was lost."""
        head = str(self._patiently(lambda: self.api.dataset_info(self.repo)).sha)
        there = self._files(head)
        return head if all(_is(there.get(path), content) for path, content in expected.items()) else None

    def _check(self, revision: str, expected: Mapping[str, _Content]) -> None:
        there = self._files(revision)
        if wrong := [path for path, content in expected.items() if not _is(there.get(path), content)]:
            raise PublishError(f"{self.repo} does not hold what was sent as {', '.join(wrong[:3])}; push again")


def _batches(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    batch: list[Shard] = []
    for shard in shards:
        if batch and (len(batch) == BATCH_FILES or sum(one.size for one in batch) + shard.size > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(shard)
    yield batch


def _content(data: bytes) -> _Content:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return _Content(len(data), hashlib.sha256(data).hexdigest(), git)


def _content_of(addition: CommitOperationAdd) -> _Content:
    return _Content(addition.upload_info.size, addition.upload_info.sha256.hex())


def _is(found: _Content | None, expected: _Content) -> bool:
    """Whether a file of the repository is the expected one."""
    if found is None or found.size != expected.size:
        return False
    return found.sha256 == expected.sha256 if found.sha256 else found.git_sha1 == expected.git_sha1
