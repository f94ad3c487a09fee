"""From datasets to datasets: split, merge, sample, filter, near-duplicates, overlap with benchmarks.

Rows are chosen from light columns and from hashes of images, then copied as they are, row group by row group.
"""

from pearl.pipelines.curation.decontamination import decontaminate
from pearl.pipelines.curation.duplicates import dedup_data
from pearl.pipelines.curation.filtering import filter_data
from pearl.pipelines.curation.merging import merge_data
from pearl.pipelines.curation.rows import CurationError
from pearl.pipelines.curation.sampling import sample_data
from pearl.pipelines.curation.splitting import split_data

__all__ = [
    "CurationError",
    "decontaminate",
    "dedup_data",
    "filter_data",
    "merge_data",
    "sample_data",
    "split_data",
]
