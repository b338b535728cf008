"""Attacks on the secure sum: a hostile coordinator, or a hostile hospital, among real ones that must refuse it.

``suite`` lists and runs them. An attack says what it gained, or meets a refusal. Only the refusal that it should
meet counts as one; whatever else goes wrong is raised.
"""
