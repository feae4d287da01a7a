"""Score any number of images with a bundle, or with several as an ensemble, to Parquet.

python jobs/score.py --bundle runs/quickstart/bundle --input my-images --output scores
python jobs/score.py --bundle s3://b/one --bundle s3://b/two --input s3://b/photos --output s3://b/scores --explain 5
python jobs/score.py --bundle … --input … --output … --plan      what it would use; starts nothing

The input may be a folder or a bucket's prefix, a list of locations (a line each in .txt; the column `uri` of .csv, .tsv
or .parquet), or shards of jobs/prepare.py. The same command goes on where it was stopped. Exit code 1: it is finished,
but more than max_bad of the images couldn't be scored.
"""

import sys
import time

from protopnet.cli import parse
from protopnet.errors import exit_with_a_sentence
from protopnet.plan import PlanSettings, arguments, this_cluster
from protopnet.progress import make_reporter
from protopnet.scoring.forecast import plan_scoring
from protopnet.scoring.job import ScoreSettings, score
from protopnet.scoring.summary import closing_table, too_many_bad


class ScoreJobSettings(ScoreSettings):
    """Settings of `jobs/score.py`."""

    plan: PlanSettings = PlanSettings()


@exit_with_a_sentence
def main() -> None:
    started = time.time()
    given = parse(ScoreJobSettings, arguments(), description=__doc__)
    settings = ScoreSettings.model_validate(given.model_dump(exclude={"plan"}))
    if given.plan.wanted:
        print(plan_scoring(settings, this_cluster(settings.compute), given.plan.images_per_second))
        return
    reporter = make_reporter()
    try:
        summary, tally = score(settings, reporter, started)
    finally:
        reporter.close()
    closing_table(summary, settings.output)
    if tally.bad_share > settings.max_bad:
        print(f"error: {too_many_bad(summary, settings.max_bad)}", file=sys.stderr)
        sys.exit(1)
