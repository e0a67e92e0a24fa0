"""Corpora on an object store, divided into units that are read and committed independently.

Each format provides three functions, which `cluster.runs.planning` and `cluster.corpus.source`
choose by the format of a file:
`index_…(store, object, limits) → FileIndex` cuts one object into units from its metadata,
`map_…(store, indexes) → ColumnMapping` assigns roles to source columns, and
`read_…(store, unit, mapping) → Table` reads one unit in the schema of `cluster.schema`.
Only `cluster.corpus.source` imports Ray; planning runs without it.
"""
