"""What MLflow runs when it loads a bundle as a model: images in, class, probability and evidence out.

MLflow keeps this file with the model and runs it by itself; nothing imports it.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

import protopnet


class ExplainingModel(PythonModel):  # type: ignore[misc]
    """Images: a list, or the first column of a table; each a path, bytes, a PIL image or an array."""

    def load_context(self, context: Any) -> None:
        self.model = protopnet.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input, params=None) -> pd.DataFrame:  # type: ignore[no-untyped-def]
        images = list(model_input.iloc[:, 0]) if isinstance(model_input, pd.DataFrame) else list(model_input)
        found: Any
        if self.model.predictor.bundles[0].prototypes is not None:
            found = self.model.explain(images)
            evidence = [why.to_pandas().to_dict("records") for why in found]
        else:
            found, evidence = self.model.predict(images), [[] for _ in images]
        return pd.DataFrame(
            {
                "class_name": [each.class_name for each in found],
                "probability": [each.probability for each in found],
                "evidence": evidence,
            }
        )


set_model(ExplainingModel())
