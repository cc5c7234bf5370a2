"""Measure a model, and a baseline beside it, on the user's own data or on public benchmarks."""

from pymcip.data.class_names import ClassNames, ClassTexts, name_texts, read_class_names
from pymcip.evaluation.own_data import TEMPLATES, evaluate_model
from pymcip.evaluation.run import EvaluateResult, evaluate
from pymcip.evaluation.tables import comparison_table, in_words, metric_title

__all__ = [
    "TEMPLATES",
    "ClassNames",
    "ClassTexts",
    "EvaluateResult",
    "comparison_table",
    "evaluate",
    "evaluate_model",
    "in_words",
    "metric_title",
    "name_texts",
    "read_class_names",
]
