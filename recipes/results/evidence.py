"""What the latents of the table's models are worth: `python -m recipes.results.evidence`, after `work.py`.

Asks `pearl-eval latents` of the first seed of `lvr`, `mirage` and `pearl`, on held-out trajectories of the split `val`,
and puts tables and curves into docs/results.md.
"""

from __future__ import annotations

import argparse
import shutil
from itertools import islice
from pathlib import Path

import torch

from recipes.results.jobs import table
from recipes.results.table import put
from recipes.results.work import chosen_rates, model_of

ASKED = ("lvr", "mirage", "pearl")
TRAJECTORIES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    from pearl.evaluation.evidence import markdown, write_evidence
    from pearl.evaluation.latents import latent_evidence
    from pearl.evaluation.subject import Subject
    from pearl.parquet import read_trajectories

    jobs = [job for job in table(chosen_rates()) if job.variant.name in ASKED and job.seed == 0]
    trajectories = list(islice(read_trajectories(options.work / "data" / "val.parquet"), TRAJECTORIES))
    found = [latent_evidence(Subject.load(str(model_of(job, options.work))), trajectories) for job in jobs]
    write_evidence(found, options.work / "evidence")
    shutil.copy(options.work / "evidence" / "latents.png", options.page.parent / "images" / "latents.png")
    picture = "![Retrieval, replaced latents, number of latents](images/latents.png)"
    put(options.page, "evidence", f"{picture}\n\n{markdown(found).strip()}")


if __name__ == "__main__":
    main()
