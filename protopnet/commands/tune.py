"""Search for better settings with Ray Tune: each trial is a run of jobs/train.py, poor ones are stopped early.

python jobs/tune.py --config configs/quickstart-tune.yaml
python jobs/train.py --config runs/tune/best.yaml

What is tried is the section `tune.space` of the settings; the other settings are those of jobs/train.py.
Trials are compared on validation images and never see a test image. Killed, the same command goes on.
"""

from protopnet import storage
from protopnet.cli import parse
from protopnet.config import RunSettings
from protopnet.errors import exit_with_a_sentence
from protopnet.experiments.space import TuneSettings
from protopnet.experiments.trials_table import as_markdown
from protopnet.experiments.tune import search


class TuneJobSettings(RunSettings):
    """Settings of `jobs/tune.py`."""

    tune: TuneSettings = TuneSettings()


@exit_with_a_sentence
def main() -> None:
    given = parse(TuneJobSettings, description=__doc__)
    figures = search(RunSettings.model_validate(given.model_dump(exclude={"tune"})), given.tune)
    output = storage.located(given.tune.output)
    print(as_markdown(figures))
    print(f"table  {storage.join(output, 'table.html')}\nbest   {storage.join(output, 'best.yaml')}", flush=True)
