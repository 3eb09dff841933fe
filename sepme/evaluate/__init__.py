"""The evaluation: rivals and baselines under their keys, scenes, metrics, attacks, report."""
