"""Score any number of images with a bundle, or with several as an ensemble, to Parquet.

python jobs/score.py --bundle runs/quickstart/bundle --input my-images --output scores
python jobs/score.py --bundle s3://b/one --bundle s3://b/two --input s3://b/photos --output s3://b/scores --explain 5
python jobs/score.py --bundle … --input … --output … --plan      what it would use; starts nothing

The input may be a folder or a bucket's prefix, with images, tar files (WebDataset) and Parquet files that hold images; a
list of locations (a line each in .txt; the column `uri` of .csv, .tsv or .parquet), also ones on the web; or shards of
jobs/prepare.py. The same command goes on where it was stopped. Exit code 1: it is finished,
but more than max_bad of the images couldn't be scored.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from protopnet.cli import checked, parse
from protopnet.errors import exit_with_a_sentence
from protopnet.plan import PlanSettings, arguments, this_cluster
from protopnet.progress import make_reporter
from protopnet.scoring import job
from protopnet.scoring.forecast import plan_scoring
from protopnet.scoring.job import ScoreSettings
from protopnet.scoring.summary import closing_table, too_many_bad


class ScoreJobSettings(ScoreSettings):
    """Settings of `jobs/score.py`."""

    plan: PlanSettings = PlanSettings()


def score(settings: ScoreSettings | Mapping[str, Any]) -> dict[str, Any]:
    """Score what isn't scored yet; returns the content of `scores.json`, which counts the images that couldn't be.

    `UserError` for what is wrong with the settings, a bundle or the input.
    """
    started, reporter = time.time(), make_reporter()
    try:
        return job.score(checked(ScoreSettings, settings), reporter, started)[0]
    finally:
        reporter.close()


@exit_with_a_sentence
def main() -> None:
    given = parse(ScoreJobSettings, arguments(), description=__doc__)
    settings = ScoreSettings.model_validate(given.model_dump(exclude={"plan"}))
    if given.plan.wanted:
        print(plan_scoring(settings, this_cluster(settings.compute), given.plan.images_per_second))
        return
    summary = score(settings)
    closing_table(summary, settings.output)
    if summary["bad"] > settings.max_bad * summary["images"]:
        print(f"error: {too_many_bad(summary, settings.max_bad)}", file=sys.stderr)
        sys.exit(1)
