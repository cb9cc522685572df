"""What was learned as scikit-learn estimators (pip install 'metalr[sklearn]')."""

from metalr.integrations.sklearn import MetaClassifier, MetaRegressor

__all__ = ["MetaClassifier", "MetaRegressor"]
