"""Picks settings offline: a space of knobs, records of measured runs, a predictor of step time, searchers on it.

Plans what it prices with dlrm_scale.sharding and never imports training: the launcher starts that as a user does.
"""
