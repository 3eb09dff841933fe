"""The evaluation: published methods and baselines under their keys, scenes, metrics, attacks, report."""
