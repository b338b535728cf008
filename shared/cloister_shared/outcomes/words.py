"""Metrics in words: their names, what they mean, and how a reader tells a good figure from a bad one."""

from __future__ import annotations

from cloister_shared.schema import Binary, Survival, Target

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "macro_auroc": "AUROC, mean over classes",
    "macro_f1": "F1, mean over classes",
    "micro_f1": "F1",
    "top_3": "in the first three",
    "precision_at_5": "precision at 5",
    "rmse": "RMSE",
    "mae": "mean absolute error",
    "r_squared": "R²",
    "spearman": "Spearman's ρ",
    "c_index": "C-index",
    "integrated_brier": "integrated Brier score",
    "brier_at_end": "Brier score at the end",
    "dice": "Dice",
    "hausdorff_95": "Hausdorff distance",
    "sensitivity_at_5_percent_false": "sensitivity at 5% false",
}

_NARROW = {"brier": "Brier", "calibration_slope": "slope", "macro_auroc": "AUROC, mean", "macro_f1": "F1, mean"}

_MEANINGS = {
    "auroc": "The chance that a patient with the outcome is given a higher risk than one without: 0.5 is a coin,"
    " 1 is perfect.",
    "auprc": "Mean precision over all thresholds; a coin scores the share of positive patients.",
    "brier": "Mean squared distance between predicted risk and outcome: 0 is perfect, lower is better.",
    "calibration_slope": "1 is calibrated; below 1 the predicted risks are too extreme, above 1 too timid.",
    "accuracy": "The share of patients who are called right: 1 is perfect.",
    "sensitivity": "The share of patients with the outcome who are called so.",
    "specificity": "The share of patients without the outcome who are called so.",
    "macro_auroc": "AUROC of each class against the rest, and the mean of these: 0.5 is a coin, 1 is perfect.",
    "macro_f1": "Balance of precision and recall in each class by itself, and the mean of these: 1 is perfect.",
    "micro_f1": "Balance of precision and recall over all labels of all patients together: 1 is perfect.",
    "top_3": "The share of patients whose class is among the three that the model finds likeliest.",
    "log_loss": "How surprised the model is by what was true: 0 is perfect, lower is better.",
    "precision_at_5": "Of the five likeliest labels of a patient, the share that are right.",
    "rmse": "Root of the mean squared error, in the unit of what is predicted: 0 is perfect, lower is better.",
    "mae": "How far off a prediction is on average, in its unit: 0 is perfect, lower is better.",
    "r_squared": "The share of the variance that is explained: 1 is perfect, 0 is what the mean alone would do.",
    "spearman": "How well the order of the patients is met: 1 is perfect, 0 is chance.",
    "c_index": "The chance that of two patients the one with the earlier event was given the higher risk: 0.5 is a"
    " coin, 1 is perfect.",
    "integrated_brier": "Brier score of the chances to outlive each period, averaged over them: lower is better.",
    "brier_at_end": "Brier score of the chance to outlive the last period: lower is better.",
    "dice": "How far the drawn lesion and the true one overlap: 0 is not at all, 1 is perfect.",
    "hausdorff_95": "The distance in pixels within which 95% of both outlines lie: lower is better.",
    "lesion_sensitivity": "The share of lesions of which a part was drawn: 1 is perfect.",
    "false_lesions": "Lesions drawn where there is none, for each picture: lower is better.",
    "error": "Mean squared error between a record and what the model makes of it: 0 is perfect, lower is better.",
    "sensitivity_at_5_percent_false": "The share of due alarms that are raised where one in twenty others is false.",
    "alarm_rate": "The share of records that raise an alarm though none was known to be due.",
    "alarm_sensitivity": "The share of due alarms that are raised.",
    "policy_value": "The mean outcome if the model chose whom to treat.",
    "uplift": "What treating the likeliest to gain first gains over treating in any order: 0 is chance.",
    "mean_effect": "What the treatment changes on average.",
    "overlap": "The share of patients of whom treated and untreated alike are there to compare with: 1 is all.",
}


def title(metric: str) -> str:
    """A metric's name as people write it."""
    return TITLES.get(metric, metric.replace("_", " "))


def narrow(metric: str) -> str:
    """The same for the head of a narrow column."""
    return _NARROW.get(metric, title(metric))


def meaning(metric: str) -> str:
    """What it says, in a sentence; empty of one that has no words yet."""
    return _MEANINGS.get(metric, "")


def scale(metric: str, rises: bool) -> str:
    """How to read it, in a few words: what of its meaning follows the colon."""
    said = meaning(metric).rpartition(": ")[2].removesuffix(".") if ": " in meaning(metric) else ""
    return said or ("more is better" if rises else "less is better")


def counted_as(target: Target) -> str:
    """The head of a column that counts who has the outcome; empty of one that is not had or not had."""
    return "positive" if isinstance(target, Binary) else "event" if isinstance(target, Survival) else ""
