"""Corpora on an object store, cut into units of work that can be read and committed on their own.

Nothing here imports Ray but `cluster.corpus.source`, so that a plan can be made without it.
"""
